"""Which rows are computed together, and who gets which rows back."""

import numpy as np
import pytest

from hvdext.serving.scheduler.batching import Waiting, cut_outputs, joined_inputs, make_request, padded_rows
from hvdext.serving.scheduler.load_balancing import Load, Throughput, choose


def request(rows, now=0.0, width=1, start=0, max_rows=4):
    """A request whose rows are numbered from `start` on; and where its answer goes."""
    answers = []
    numbers = np.repeat(np.arange(start, start + rows, dtype=np.float32)[:, None], width, axis=1)
    made = make_request({"x": numbers}, max_rows, now, answers.append)
    return made, answers


def waiting(*requests, max_rows=4, max_delay=1.0):
    queue = Waiting(max_rows, max_delay)
    for one in requests:
        for part in one.parts:
            queue.put(part)
    return queue


def rows_of(parts):
    return [int(row[0]) for part in parts for row in part.inputs["x"]]


def test_a_batch_leaves_when_it_is_full_or_its_oldest_has_waited():
    queue = waiting(request(1, now=5.0)[0], request(2, now=5.5, start=1)[0])
    assert not queue.full
    assert queue.due_at() == 6.0  # the first came at 5 and may wait for 1
    for part in request(1, now=5.7, start=3)[0].parts:
        queue.put(part)
    assert queue.full
    assert queue.due_at() == 5.0
    assert rows_of(queue.take()) == [0, 1, 2, 3]
    assert queue.due_at() is None
    assert queue.take() == []
    assert queue.rows == len(queue) == 0


def test_whole_requests_go_while_they_fit():
    queue = waiting(request(3)[0], request(2, start=3)[0], request(1, start=5)[0])
    assert rows_of(queue.take()) == [0, 1, 2]
    assert rows_of(queue.take()) == [3, 4, 5]


def test_a_large_request_is_cut_and_put_together_again():
    large, answers = request(10)
    assert [(part.start, part.rows) for part in large.parts] == [(0, 4), (4, 4), (8, 2)]
    queue = waiting(large)
    batches = [queue.take() for _ in range(3)]
    for parts in reversed(batches):  # whatever order the ranks answer in
        batch = joined_inputs(parts, sum(part.rows for part in parts))
        outputs = {"y": batch["x"] * 10}
        assert not answers
        for part, piece in zip(parts, cut_outputs(outputs, parts), strict=True):
            part.request.part_done(part, piece)
    np.testing.assert_array_equal(answers[0]["y"], np.arange(10)[:, None] * 10)
    large.finish(ValueError())  # too late
    assert len(answers) == 1


def test_rows_of_equal_shapes_go_together():
    queue = waiting(request(1)[0], request(1, width=2, start=1)[0], request(1, start=2)[0])
    assert rows_of(queue.take()) == [0, 2]
    assert rows_of(queue.take()) == [1]


def test_a_rare_shape_does_not_wait_for_ever():
    queue = waiting(request(1, now=0.0, width=2)[0], *(request(4, now=0.5, start=10)[0] for _ in range(2)))
    assert rows_of(queue.take()) == [10, 11, 12, 13]  # full, and the rare one is not late yet
    for part in request(4, now=1.5, start=20)[0].parts:
        queue.put(part)
    queue.take()
    assert rows_of(queue.take()) == [0]  # came more than the delay before the full one


def test_what_failed_in_company_runs_alone_and_first():
    queue = waiting(request(2)[0])
    (part,) = request(1, start=7)[0].parts
    part.alone = True
    queue.put(part)
    assert queue.full
    assert rows_of(queue.take()) == [7]
    assert rows_of(queue.take()) == [0, 1]


def test_a_dropped_request_takes_no_place():
    first, second = request(2)[0], request(1, start=2)[0]
    queue = waiting(first, second)
    assert queue.drop(first.parts[0])
    assert not queue.drop(first.parts[0])
    assert queue.rows == 1
    assert rows_of(queue.take()) == [2]
    alone = request(1)[0].parts[0]
    alone.alone = True
    queue.put(alone)
    assert queue.drop(alone)
    assert not queue.drop(alone)
    assert queue.rows == len(queue) == 0


def test_batches_are_filled_up_with_the_last_row():
    parts = [*request(2)[0].parts, *request(1, start=2)[0].parts]
    assert padded_rows(3, (1, 2, 4, 8)) == 4
    assert padded_rows(3, ()) == 3
    batch = joined_inputs(parts, 4)
    assert batch["x"][:, 0].tolist() == [0, 1, 2, 2]
    first, second = cut_outputs({"y": batch["x"]}, parts)
    assert first["y"][:, 0].tolist() == [0, 1]
    assert second["y"][:, 0].tolist() == [2]


def test_who_is_done_first_gets_the_next_batch():
    slow, fast = Load(), Load()
    for load, seconds in ((slow, 4.0), (fast, 1.0)):
        load.start(1, "model", 10)
        load.end(1, seconds)
    loads = {0: slow, 1: fast}
    assert choose(loads, full=False) == 0  # both idle, both served once: the first
    slow.start(2, "model", 10)
    assert choose(loads, full=False) == 1
    fast.start(2, "model", 30)
    assert slow.expected() == pytest.approx((4.0, 10))
    assert fast.expected() == pytest.approx((3.0, 30))
    assert choose(loads, full=False) is None  # both compute: what is not full may grow
    assert choose(loads, full=True) == 1
    fast.start(3, "model", 1)
    assert choose(loads, full=True) == 0
    slow.start(3, "model", 1)
    assert choose(loads, full=True) is None  # two batches each
    assert choose({}, full=True) is None


def test_idle_ranks_take_turns():
    loads = {rank: Load() for rank in range(3)}
    chosen = []
    for number in range(6):
        rank = choose(loads, full=False)
        chosen.append(rank)
        loads[rank].start(number, "model", 1)
        loads[rank].end(number)
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_a_pipeline_has_a_batch_for_each_stage():
    load = Load(stages=3)
    for number in range(3):
        assert load.takes(full=False)
        load.start(number, "model", 1)
    assert not load.takes(full=False)
    assert load.takes(full=True)


@pytest.mark.parametrize("seconds", [1, 60])
def test_throughput_tells_how_long_a_queue_will_take(seconds):
    throughput = Throughput()
    assert throughput.seconds_for(100, 0.0) == 1  # nothing known
    for step in range(1, seconds * 10 + 1):
        throughput.add(5, step / 10)  # 50 rows per second
    now = float(seconds)
    assert throughput.seconds_for(1, now) == 1
    assert 10 <= throughput.seconds_for(550, now) <= 13
    assert throughput.seconds_for(10**6, now) == 60
