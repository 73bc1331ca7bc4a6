"""Ranks that name groups which do not fit together are refused; groups that do go their own ways."""

import keras
import pytest

import hvdext as hvd
from hvdext.sync import Everyone, Group
from hvdext.testing import run_ranks


def begin(whom):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, kernel_initializer="ones")])
    sync = hvd.sync.LocalSGD(1, whom=whom)
    sync.begin(model)
    return sync


def group(*ranks):
    return Group(hvd.ProcessSet(ranks))


REFUSED = {
    "not all name a group": (
        [Everyone(), group(1)],
        r"`whom` must be a Group on all ranks .*whom: rank 0: Everyone\(\); rank 1: Group\(process_set=",
    ),
    "groups overlap": (
        [group(0, 1), group(0, 1), group(1, 2)],
        r"no rank in common.*\n.*ranks 0, 1: Group\(.*\[0, 1\]\)\); rank 2: Group\(.*\[1, 2\]\)\)",
    ),
    "another rank's group": (
        [group(1), group(1)],
        r"must contain the rank that uses it. Received: ProcessSet\(\[1\]\) on rank 0",
    ),
    "a rank that is none": (
        [group(0, 5), group(1)],
        r"`process_set` must hold some of the ranks \[0, 1\] only. Received: process_set=\[0, 5\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_groups_that_do_not_fit_together_are_refused_on_all_ranks(case):
    answers, message = REFUSED[case]

    def rank(comm):
        with pytest.raises(ValueError, match=f"(?s){message}") as error:
            begin(answers[comm.rank])
        begin(group(comm.rank))  # nothing is left behind
        return str(error.value)

    assert len(set(run_ranks(len(answers), rank))) == 1


def test_groups_that_fit_go_their_own_ways():
    """One begins more syncs than the other, and trains more steps."""

    def rank(comm):
        steps = 0
        for _ in range(1 + comm.rank):
            sync = begin(group(comm.rank))
            sync.step(3)
            sync.end()
            steps += sync.steps
        return steps

    assert run_ranks(2, rank) == [3, 6]
