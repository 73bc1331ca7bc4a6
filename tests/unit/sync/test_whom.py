"""Who meets whom in turn k."""

from collections import Counter

import numpy as np
import pytest

from hvdext.comm.communicator import SoloComm
from hvdext.comm.process_sets import ProcessSet, global_process_set
from hvdext.sync.whom import Everyone, Exponential, Group, Hierarchical, Pairs, Ring, Turn
from hvdext.testing import Room, ThreadComm, run_ranks

TURNS = 8


def comms(size):
    room = Room()
    return [ThreadComm(rank, range(size), room) for rank in range(size)]


def turns(whom, size, number):
    """Every rank's view of one turn."""
    everyone = comms(size)
    for comm in everyone:
        whom.check(comm)
    return [whom.turn(comm, number) for comm in everyone]


def mixing_matrix(whom, size, number):
    """Row i: the weights with which rank i mixes everybody's values."""
    matrix = np.zeros((size, size))
    for rank, turn in enumerate(turns(whom, size, number)):
        if turn.receive_from is None:
            assert turn.send_to is None
            members = list(turn.comm.ranks)
        else:
            members = [rank, *(turn.comm.ranks[place] for place in turn.receive_from)]
        matrix[rank, members] = 1 / len(members)
    return matrix


def halves(size):
    return [list(range(size // 2)), list(range(size // 2, size))] if size > 1 else [[0]]


CASES = [
    *((Everyone(), size) for size in range(1, 9)),
    *((Group(ProcessSet(range(size))), size) for size in range(1, 9)),
    *((Pairs(seed=3), size) for size in (2, 4, 6, 8)),
    *((Ring(), size) for size in range(1, 9)),
    *((Exponential(), size) for size in range(1, 9)),
    *((Hierarchical(halves(size), every=3), size) for size in range(1, 9)),
]


@pytest.mark.parametrize(("whom", "size"), CASES, ids=repr)
def test_the_mean_stays_where_it_is(whom, size):
    for number in range(TURNS):
        matrix = mixing_matrix(whom, size, number)
        np.testing.assert_allclose(matrix.sum(0), 1)
        np.testing.assert_allclose(matrix.sum(1), 1)
        assert (np.diag(matrix) > 0).all()


@pytest.mark.parametrize(("whom", "size"), [(w, n) for w, n in CASES if n > 1], ids=repr)
def test_in_time_everybody_hears_of_everybody(whom, size):
    product = np.eye(size)
    for number in range(TURNS):
        product = mixing_matrix(whom, size, number) @ product
    assert (product > 0).all()


@pytest.mark.parametrize(("whom", "size"), CASES, ids=repr)
def test_sent_is_what_is_received(whom, size):
    for number in range(TURNS):
        views = turns(whom, size, number)
        sent = {(i, to) for i, turn in enumerate(views) for to in turn.send_to or ()}
        received = {(source, i) for i, turn in enumerate(views) for source in turn.receive_from or ()}
        assert sent == received
        assert all(a != b for a, b in sent)


@pytest.mark.parametrize(("whom", "size"), CASES, ids=repr)
def test_the_number_of_peers_is_known_before(whom, size):
    for number in range(TURNS):
        for turn in turns(whom, size, number):
            places = turn.receive_from
            assert (None if places is None else len(places)) == whom.peers(size)
            assert places is None or len(set(places)) == len(places)


def test_those_who_always_meet_share_what_they_have_agreed_on():
    shares = [Everyone(), Group(ProcessSet([0, 1]))]
    others = [Pairs(), Ring(), Exponential(), Hierarchical([[0], [1]], every=2)]
    assert all(whom.shares_reference for whom in shares)
    assert not any(whom.shares_reference for whom in others)


# -- each one -----------------------------------------------------------------------------------------


def test_everyone():
    np.testing.assert_array_equal(mixing_matrix(Everyone(), 3, 5), np.full((3, 3), 1 / 3))
    comm = comms(3)[1]
    assert Everyone().turn(comm, 0) == Turn(comm, None, None)


def test_groups_go_their_own_ways():
    evens, odds = Group(ProcessSet([0, 2])), Group(ProcessSet([1, 3]))
    for comm in comms(4):
        group = odds if comm.rank % 2 else evens
        group.check(comm)
        met = group.turn(comm, 4).comm
        assert met.ranks == ((1, 3) if comm.rank % 2 else (0, 2))
        assert met.rank == comm.rank // 2


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_pairs_are_a_perfect_matching(size):
    for number in range(20):
        views = turns(Pairs(seed=11), size, number)
        partners = [turn.receive_from[0] for turn in views]
        assert all(turn.send_to == turn.receive_from for turn in views)
        assert all(partners[partners[rank]] == rank != partners[rank] for rank in range(size))


def partners_over(seed, size, numbers):
    return [tuple(turn.send_to[0] for turn in turns(Pairs(seed), size, n)) for n in numbers]


def test_pairs_come_from_the_seed_and_the_turn():
    assert partners_over(5, 6, range(30)) == partners_over(5, 6, range(30))
    assert partners_over(5, 6, range(30)) != partners_over(6, 6, range(30))
    assert len(set(partners_over(5, 6, range(30)))) > 8  # of 15 possible


def test_all_pairs_are_about_as_frequent():
    # In 2,000 turns each of the 3 matchings of 4 ranks is expected 667 times, with a deviation of 21.
    times = Counter(partners_over(0, 4, range(2000)))
    assert len(times) == 3
    assert all(abs(count - 2000 / 3) < 100 for count in times.values())


@pytest.mark.parametrize(("size", "received"), [(1, "1 rank"), (3, "3 ranks"), (5, "5 ranks")])
def test_a_rank_without_a_partner(size, received):
    for comm in comms(size):
        with pytest.raises(ValueError, match=rf"`whom=Pairs\(seed=2\)` needs an even .* {received}\.$"):
            Pairs(seed=2).check(comm)


def test_ring():
    assert [turn.send_to for turn in turns(Ring(), 4, 7)] == [(1, 3), (0, 2), (1, 3), (0, 2)]
    assert [turn.receive_from for turn in turns(Ring(), 5, 0)] == [(1, 4), (0, 2), (1, 3), (2, 4), (0, 3)]
    assert [turn.receive_from for turn in turns(Ring(), 2, 0)] == [(1,), (0,)]
    third = 1 / 3
    expected = np.array([[third, third, 0, third], [third, third, third, 0]])
    np.testing.assert_allclose(mixing_matrix(Ring(), 4, 0)[:2], expected)


def test_exponential_distances():
    def sends(size):
        return [turns(Exponential(), size, number)[0].send_to[0] for number in range(7)]

    assert sends(2) == [1] * 7
    assert sends(4) == [1, 2, 1, 2, 1, 2, 1]
    assert sends(5) == [1, 2, 4, 1, 2, 4, 1]
    assert sends(8) == [1, 2, 4, 1, 2, 4, 1]
    assert [turn.receive_from for turn in turns(Exponential(), 5, 1)] == [(3,), (4,), (0,), (1,), (2,)]


@pytest.mark.parametrize(("size", "rounds"), [(2, 1), (4, 2), (8, 3), (16, 4)])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_exponential_is_exact_after_log2_turns(size, rounds, first):
    product = np.eye(size)
    for number in range(first, first + rounds - 1):
        product = mixing_matrix(Exponential(), size, number) @ product
    assert (product == 0).any()
    product = mixing_matrix(Exponential(), size, first + rounds - 1) @ product
    np.testing.assert_array_equal(product, np.full((size, size), 1 / size))


def test_hierarchical():
    whom = Hierarchical([ProcessSet([3, 0]), [1, 2]], every=3)
    for comm in comms(4):
        mine = (0, 3) if comm.rank in (0, 3) else (1, 2)
        whom.check(comm)
        met = [whom.turn(comm, number).comm.ranks for number in range(7)]
        assert met == [mine, mine, comm.ranks, mine, mine, comm.ranks, mine]
    always = Hierarchical([[0], [1]], every=1)
    assert [always.turn(comms(2)[0], number).comm.size for number in range(3)] == [2, 2, 2]


# -- one rank -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whom",
    [
        *(Everyone(), Ring(), Exponential(), Hierarchical([[0]], every=2), Group(global_process_set)),
        # A script for more ranks, tried out in one process.
        *(Hierarchical([[0, 1], [2, 3]], every=2), Group(ProcessSet([2, 3]))),
    ],
    ids=repr,
)
def test_one_rank_has_nothing_to_do(whom):
    def program(comm):
        for communicator in (comm, SoloComm()):
            whom.check(communicator)
            for number in range(3):
                turn = whom.turn(communicator, number)
                assert turn.comm is communicator
                assert turn.send_to == turn.receive_from
                assert not turn.send_to
        return True

    assert run_ranks(1, program) == [True]


# -- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, 1.0, True, None, "1"])
def test_wrong_numbers(wrong):
    with pytest.raises(
        ValueError, match=f"`seed` must be an integer of at least 0. Received: seed={wrong!r}"
    ):
        Pairs(seed=wrong)
    with pytest.raises(ValueError, match=f"`every` must be an integer of at least 1. .*every={wrong!r}"):
        Hierarchical([[0], [1]], every=wrong)


def test_every_zero():
    with pytest.raises(ValueError, match=r"`every` must be an integer of at least 1. Received: every=0"):
        Hierarchical([[0], [1]], every=0)


@pytest.mark.parametrize(
    "wrong",
    [[], [[]], [[0, 1], []], [[0, 1], [1, 2]], [[0, 0], [1]], [[-1]], [["a"]], [0, 1], 3, None, [None]],
)
def test_what_are_no_groups(wrong):
    with pytest.raises(
        ValueError, match=r"`groups` must be process sets or lists of ranks, .* Received: groups="
    ):
        Hierarchical(wrong, every=2)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1], [2]], [[0, 1], [2, 3, 4]]])
def test_groups_that_are_not_all_ranks(groups):
    for comm in comms(4):
        with pytest.raises(
            ValueError, match=r"`groups` must hold all of the ranks \[0, 1, 2, 3\] and no others"
        ):
            Hierarchical(groups, every=2).check(comm)


def test_a_group_that_does_not_fit():
    with pytest.raises(
        TypeError, match=r"`process_set` must be a hvd.ProcessSet. Received: process_set=\[0, 1\]"
    ):
        Group([0, 1])
    with pytest.raises(ValueError, match=r"`process_set` must hold some of .* \[0, 1\] only.*\[0, 5\]"):
        Group(ProcessSet([0, 5])).check(comms(2)[0])
    with pytest.raises(ValueError, match=r"must contain the rank that uses it. Received: .* on rank 2"):
        Group(ProcessSet([0, 1])).check(comms(3)[2])


def test_a_wrong_keyword():
    with pytest.raises(TypeError, match=r"has no argument `sed`. Did you mean `seed`"):
        Pairs(sed=3)


def test_equal_settings_are_equal():
    assert Group(ProcessSet([1, 0])) == Group(ProcessSet([0, 1])) != Group(ProcessSet([0, 2]))
    assert Hierarchical([[1, 0], (2, 3)], 2) == Hierarchical(
        [ProcessSet([0, 1]), ProcessSet([2, 3])], every=2
    )
    assert (
        len({Pairs(), Pairs(0), Pairs(1), Ring(), Ring(), Group(ProcessSet([0])), Group(ProcessSet([0]))})
        == 4
    )
    assert repr(Hierarchical([[0, 1]], 2)) == "Hierarchical(groups=((0, 1),), every=2)"
