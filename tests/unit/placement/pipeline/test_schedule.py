"""Orders of passes and messages: complete, right, without deadlock, as fast as their papers say."""

from __future__ import annotations

import itertools

import pytest

from hvdext.placement.pipeline.schedule import (
    Compute,
    Transfer,
    clock,
    computes,
    ideal_efficiency,
    kept,
    problem_of,
    programs,
)

SETTINGS = [
    ("gpipe", 1, 1, 3),
    ("1f1b", 1, 3, 2),
    ("gpipe", 2, 2, 4),
    ("gpipe", 4, 4, 8),
    ("1f1b", 2, 2, 1),
    ("1f1b", 4, 4, 2),
    ("1f1b", 4, 4, 9),
    ("eager-1f1b", 2, 2, 1),
    ("eager-1f1b", 2, 2, 8),
    ("eager-1f1b", 4, 4, 9),
    ("interleaved", 2, 4, 2),
    ("interleaved", 2, 6, 8),
    ("interleaved", 4, 8, 4),
    ("interleaved", 4, 12, 8),
    ("interleaved", 3, 3, 6),
]


def run(actions):
    """Runs the ranks' programs where each rank does one thing at a time and both ends of a message wait for
    it.

    This is the strictest way to run them: no rank prefetches, and nothing is buffered. Returns what was done,
    in order.
    """
    chunks = 1 + max(a.chunk for program in actions for a in program if isinstance(a, Compute))
    heads = [0] * len(actions)
    log, held = [], [set() for _ in actions]  # held: what each rank has at hand

    def head(rank):
        return actions[rank][heads[rank]] if heads[rank] < len(actions[rank]) else None

    def needed(rank, one):
        before = ("activations", one.chunk - 1, one.microbatch)
        after = ("gradients", one.chunk, one.microbatch)
        if one.kind == "forward":
            return one.chunk == 0 or before in held[rank]
        kept_here = ("kept", one.chunk, one.microbatch) in held[rank]
        return kept_here and (one.chunk == chunks - 1 or after in held[rank])

    progress = True
    while progress:
        progress = False
        for rank in range(len(actions)):
            one = head(rank)
            if isinstance(one, Compute):
                assert needed(rank, one), f"rank {rank}: {one} without what it needs"
                if one.kind == "forward":
                    held[rank] |= {
                        ("kept", one.chunk, one.microbatch),
                        ("activations", one.chunk, one.microbatch),
                    }
                else:
                    held[rank].add(("gradients", one.chunk - 1, one.microbatch))
            elif isinstance(one, Transfer):
                other = one.target if rank == one.source else one.source
                if head(other) != one:
                    continue
                what = (one.kind, one.boundary, one.microbatch)
                assert what in held[one.source]
                held[one.target].add(what)
                heads[other] += 1
            else:
                continue
            heads[rank] += 1
            log.append(one)
            progress = True
    assert all(head(rank) is None for rank in range(len(actions))), "the ranks wait for each other"
    return log


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_pass_and_message_once_and_nobody_waits_for_ever(settings):
    _schedule, ranks, chunks, microbatches = settings
    assert problem_of(*settings) is None
    log = run(programs(*settings))
    for kind in ("forward", "backward"):
        wanted = {Compute(kind, c, k) for c in range(chunks) for k in range(microbatches)}
        assert sorted(a for a in log if isinstance(a, Compute) and a.kind == kind) == sorted(wanted)
    messages = [a for a in log if isinstance(a, Transfer)]
    crossing = chunks - 1 if ranks > 1 else 0
    assert len(messages) == len(set(messages)) == 2 * crossing * microbatches
    for message in messages:
        low, high = message.boundary % ranks, (message.boundary + 1) % ranks
        assert (message.source, message.target) == (
            (low, high) if message.kind == "activations" else (high, low)
        )


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forward_only(settings):
    _schedule, _ranks, chunks, microbatches = settings
    log = run(programs(*settings, training=False))
    assert all(a.kind in ("forward", "activations") for a in log)
    assert sum(isinstance(a, Compute) for a in log) == chunks * microbatches


def test_forward_passes_of_a_chunk_keep_the_order_of_micro_batches():
    # Dropout masks and batch statistics then are those of one process that runs them in turn.
    for settings in SETTINGS:
        for program in programs(*settings):
            passes = [a for a in program if isinstance(a, Compute)]
            for kind, chunk in itertools.product(("forward", "backward"), range(settings[2])):
                order = [a.microbatch for a in passes if (a.kind, a.chunk) == (kind, chunk)]
                assert order == sorted(order)


def test_orders_of_a_small_pipeline_by_hand():
    def short(order):
        return " ".join(f"{a.kind[0].upper()}{a.microbatch}" for a in order)

    assert [short(computes("gpipe", r, 2, 2, 3)) for r in (0, 1)] == ["F0 F1 F2 B0 B1 B2"] * 2
    assert short(computes("1f1b", 0, 2, 2, 3)) == "F0 F1 B0 F2 B1 B2"
    assert short(computes("1f1b", 1, 2, 2, 3)) == "F0 B0 F1 B1 F2 B2"
    assert short(computes("eager-1f1b", 0, 2, 2, 4)) == "F0 F1 F2 B0 F3 B1 B2 B3"
    assert short(computes("eager-1f1b", 1, 2, 2, 3)) == "F0 B0 F1 B1 F2 B2"
    two = [f"{a.kind[0].upper()}{a.chunk}.{a.microbatch}" for a in computes("interleaved", 1, 2, 4, 2)]
    # Rank 1 holds chunks 1 and 3; its first backward pass is as early as it can be.
    assert two == ["F1.0", "F1.1", "F3.0", "B3.0", "F3.1", "B3.1", "B1.0", "B1.1"]


def test_messages_of_one_micro_batch_by_hand():
    first, second = programs("1f1b", 2, 2, 1)
    there, back = Transfer("activations", 0, 0, 0, 1), Transfer("gradients", 0, 0, 1, 0)
    assert first == [Compute("forward", 0, 0), there, back, Compute("backward", 0, 0)]
    assert second == [there, Compute("forward", 1, 0), Compute("backward", 1, 0), back]
    without = programs("1f1b", 2, 2, 1, gradients=[False])
    assert back not in without[0] + without[1]


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s[1] > 1], ids=str)
def test_time_is_that_of_the_formula(settings):
    """3 units per chunk and micro-batch; with v chunks per rank m v times, and p - 1 at the ends."""
    schedule, ranks, chunks, microbatches = settings
    orders = [computes(schedule, rank, ranks, chunks, microbatches) for rank in range(ranks)]
    starts = clock(orders, chunks)
    end = max(start + (1 if one.kind == "forward" else 2) for one, start in starts.items())
    per_rank = chunks // ranks
    busy = 3 * microbatches * per_rank
    assert busy / end == pytest.approx(ideal_efficiency(ranks, microbatches, per_rank))


def seconds_with_latency(schedule, ranks, microbatches, latency):
    """When the last pass ends if messages take `latency`, F takes 1 and B 2; one chunk per rank."""
    orders = [computes(schedule, rank, ranks, ranks, microbatches) for rank in range(ranks)]
    ends, free, done = {}, [0.0] * ranks, [0] * ranks
    while any(done[r] < len(orders[r]) for r in range(ranks)):
        for rank, order in enumerate(orders):
            if done[rank] == len(order):
                continue
            one = order[done[rank]]
            neighbour = one.chunk - 1 if one.kind == "forward" else one.chunk + 1
            arrived = 0.0
            if 0 <= neighbour < ranks:
                arrived = ends.get(Compute(one.kind, neighbour, one.microbatch))
                if arrived is None:
                    continue
                arrived += latency
            free[rank] = ends[one] = max(free[rank], arrived) + (1 if one.kind == "forward" else 2)
            done[rank] += 1
    return max(free)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 16)])
def test_an_eager_schedule_computes_while_messages_travel(ranks, microbatches):
    ideal = 3 * (microbatches + ranks - 1)
    assert seconds_with_latency("1f1b", ranks, microbatches, 0) == ideal
    assert seconds_with_latency("eager-1f1b", ranks, microbatches, 0) == ideal
    # Of the eager one only the way of the first micro-batch there and of the last one back counts.
    assert seconds_with_latency("eager-1f1b", ranks, microbatches, 0.25) == ideal + 2 * (ranks - 1) * 0.25
    assert seconds_with_latency("1f1b", ranks, microbatches, 0.25) >= ideal + microbatches * 0.25


def test_what_is_kept():
    for program in programs("gpipe", 4, 4, 8):
        assert kept(program) == 8
    for rank, program in enumerate(programs("1f1b", 4, 4, 8)):
        assert kept(program) == 4 - rank
    for rank, program in enumerate(programs("eager-1f1b", 4, 4, 8)):
        assert kept(program) == 2 * (4 - rank) - 1


def test_a_circle_is_found():
    forward, backward = Compute("forward", 0, 0), Compute("backward", 0, 0)
    with pytest.raises(RuntimeError, match="wait for each other"):
        clock([[backward, forward]], 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("pipedream", 2, 2, 2),
            "`schedule` must be one of 'gpipe', '1f1b', 'eager-1f1b', 'interleaved'. Received",
        ),
        (("gpipe", 2, 2, 0), "`microbatches` must be an integer of at least 1. Received: microbatches=0"),
        (("gpipe", 2, 2, True), "Received: microbatches=True"),
        (("1f1b", 2, 3, 4), "as many places as the pipeline has ranks.*Received: 3 places on 2 ranks"),
        (("interleaved", 2, 3, 4), "a multiple of the pipeline's ranks as places.*3 places on 2 ranks"),
        (("interleaved", 2, 4, 3), "`microbatches` must be a multiple.*microbatches=3 on 2 ranks"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    assert message.split(".*")[0] in problem_of(*settings)
    assert message.split(".*")[-1] in problem_of(*settings)
