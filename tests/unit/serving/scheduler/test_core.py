"""Requests through queues, batches and ranks, and back to who asked; also when ranks fail."""

import asyncio
import collections
import contextlib
import re
import threading
import time
import weakref

import numpy as np
import pytest

from hvdext.serving.service import (
    ComputationFailed,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    OwnDeadlineExceeded,
    QueueFull,
    State,
    UnknownModel,
)
from tests.unit.serving.serving_ranks import Cluster, Gate, Model, serve


def models(**options):
    return lambda path, stage, stages: Model(**options)


def test_answers_go_to_who_asked(tmp_path):
    async def program(cluster):
        async def client(number):
            for i in range(30):
                values = [1000 * number + i + k for k in range(1 + (number + i) % 3)]
                assert await cluster.ask(*values) == [10 * value for value in values]

        await asyncio.gather(*map(client, range(20)))
        status = cluster.core.status()
        assert [rank["state"] for rank in status["ranks"]] == ["ready", "ready"]
        assert all(rank["batches"] > 0 for rank in status["ranks"])
        (model,) = status["models"]
        rows = sum(1 + (n + i) % 3 for n in range(20) for i in range(30))
        assert model["rows"] == rows == sum(int(k) * n for k, n in model["batch_sizes"].items())
        assert model["batches"] < 300  # 600 requests
        assert sum(rank["rows"] for rank in status["ranks"]) == rows
        assert status["queue"] == model["queue"] == model["in_flight"] == 0

    serve(tmp_path, program)


def test_large_requests_are_cut_and_small_ones_filled_up(tmp_path):
    async def program(cluster):
        values = list(range(21))
        assert await cluster.ask(*values) == [10 * value for value in values]
        assert await cluster.ask(5, 6, 7) == [50, 60, 70]
        sizes = [rows for model in cluster.models for rows in model.calls[3:]]  # after the warm-up
        assert sorted(sizes) == [4, 8, 8, 8]
        (model,) = cluster.core.status()["models"]
        assert (model["rows"], model["padded_rows"]) == (24, 4)
        warm = [model.calls[:3] for model in cluster.models]
        assert warm == [[1, 4, 8]] * 2

    serve(tmp_path, program, batch_sizes=(1, 4, 8), max_batch_size=8)


def fail_on_seven(rows):
    if 7 in rows:
        raise ValueError("seven")


def test_one_bad_request_does_not_fail_its_neighbours(tmp_path):
    async def program(cluster):
        asked = [cluster.ask(value) for value in range(10)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        bad = answers.pop(7)
        assert isinstance(bad, ComputationFailed)
        assert "m:1 failed on this request: seven" in str(bad)
        assert answers == [[10 * value] for value in range(10) if value != 7]
        assert cluster.core.ready

    serve(tmp_path, program, load=models(before=fail_on_seven), size=1, max_delay=0.05)


def test_outputs_of_a_wrong_length_are_no_answer(tmp_path):
    class Short(Model):
        def run(self, inputs):
            return {"y": super().run(inputs)["y"][:-1]}

    async def program(cluster):
        with pytest.raises(ComputationFailed, match="must have 2 rows"):
            await cluster.ask(1, 2)

    serve(tmp_path, program, load=lambda path, stage, stages: Short())


class Wide(Model):
    """As wide as the largest value of the batch."""

    def run(self, inputs):
        rows = inputs["x"]
        if 9 in rows:
            return {"other": rows}  # not even the same outputs
        return {"y": np.repeat(rows, max(1, int(rows.max())), axis=1)}


@pytest.mark.parametrize(
    ("last", "expected", "message"),
    [
        (2, InvalidRequest, r"'y' has rows of shape \(1,\) .* \(2,\) .*: send at most 4 rows. Received: 6"),
        (9, ComputationFailed, "m:1 gave outputs that make no answer: KeyError"),
    ],
)
def test_parts_that_cannot_be_joined_fail_alone(tmp_path, last, expected, message):
    async def program(cluster):
        def ask(*values):
            return cluster.core.infer("m", 1, {"x": np.array(values, np.float32)[:, None]}, timeout=5)

        cut, neighbour = await asyncio.gather(ask(1, 1, 1, 1, 1, last), ask(1), return_exceptions=True)
        assert isinstance(cut, expected)
        assert re.search(message, str(cut))
        assert len(next(iter(neighbour[1].values()))) == 1
        assert cluster.core.status()["models"][0]["batch_sizes"] == {"4": 1, "3": 1}

    load = lambda path, stage, stages: Wide()  # noqa: E731
    serve(tmp_path, program, load=load, size=1, max_batch_size=4, max_delay=0.05)


def test_deadlines_and_cancelled_requests_leave_the_queue(tmp_path):
    gate = Gate()

    async def program(cluster):
        first = asyncio.ensure_future(cluster.ask(1, timeout=0.2))
        await asyncio.to_thread(gate.came.acquire)
        second = asyncio.ensure_future(cluster.ask(2, timeout=0.1))
        third = asyncio.ensure_future(cluster.ask(3))
        fourth = asyncio.ensure_future(cluster.ask(4))
        await asyncio.sleep(0)
        assert cluster.core.status()["queue"] == 3
        third.cancel()
        for late in (first, second):
            with pytest.raises(OwnDeadlineExceeded, match=r"within 0\.[12] s"):
                await late
        assert cluster.core.status()["queue"] == 1
        gate.open.set()
        assert await fourth == [40]
        assert [rows for model in cluster.models for rows in model.calls[2:]] == [1, 1]
        assert not cluster.core._open

    serve(tmp_path, program, load=models(before=gate), size=1)


def test_the_servers_limit_holds_for_requests_that_want_more(tmp_path):
    gate = Gate()

    async def program(cluster):
        with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s") as late:
            await cluster.ask(1, timeout=5)
        assert late.value.status == 504
        gate.open.set()

    serve(tmp_path, program, load=models(before=gate), size=1, timeout=0.1)


def test_a_full_queue_says_when_to_come_back(tmp_path):
    gate = Gate()

    async def program(cluster):
        first = asyncio.ensure_future(cluster.ask(1))
        await asyncio.to_thread(gate.came.acquire)
        waiting = [asyncio.ensure_future(cluster.ask(value)) for value in (2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 requests with 8 bytes wait") as caught:
            await cluster.ask(4)
        assert 1 <= caught.value.retry_after <= 60
        gate.open.set()
        assert await asyncio.gather(first, *waiting) == [[10], [20], [30]]
        assert await cluster.ask(4) == [40]

    serve(tmp_path, program, load=models(before=gate), size=1, max_queue=2)


def test_queued_bytes_are_limited(tmp_path):
    gate = Gate()

    async def program(cluster):
        with pytest.raises(InvalidRequest, match=r"may have 40 bytes. Received: 44"):
            await cluster.ask(*range(11))
        first = asyncio.ensure_future(cluster.ask(1))
        await asyncio.to_thread(gate.came.acquire)
        waiting = asyncio.ensure_future(cluster.ask(*range(8)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await cluster.ask(1, 2, 3)
        gate.open.set()
        await asyncio.gather(first, waiting)

    serve(tmp_path, program, load=models(before=gate), size=1, max_queue_bytes=40)


def test_overload_gets_answers_or_queue_full(tmp_path):
    async def program(cluster):
        results = collections.Counter()

        async def client(number):
            for i in range(20):
                try:
                    assert await cluster.ask(100 * number + i) == [10 * (100 * number + i)]
                    results["answered"] += 1
                except QueueFull:
                    results["full"] += 1
                    await asyncio.sleep(0.001)

        await asyncio.gather(*map(client, range(40)))
        assert results["answered"] + results["full"] == 800
        assert min(results["answered"], results["full"]) > 20
        assert not cluster.core._open
        assert cluster.core._dispatcher._waiting_bytes == 0

    slow = models(before=lambda rows: time.sleep(0.002))
    serve(tmp_path, program, load=slow, max_queue=8, max_batch_size=4)


def test_models_have_turns(tmp_path):
    """A model with many requests does not keep another waiting for more than a batch or two."""
    order = []

    def load(path, stage, stages):
        def before(rows):
            time.sleep(0.005)
            order.append(path.name)

        return Model(before=before)

    async def program(cluster):
        await cluster.add("n")
        order.clear()
        many = [asyncio.ensure_future(cluster.ask(value)) for value in range(30)]
        await asyncio.sleep(0.01)
        assert await cluster.ask(1, name="n") == [10]
        assert order.index("n1.keras") <= 6
        await asyncio.gather(*many)

    serve(tmp_path, program, load=load, size=1, max_batch_size=1)


def test_a_lost_rank_costs_no_answer(tmp_path):
    """What it had is computed once more by another; the service goes on, and the rank comes back."""

    async def program(cluster):
        async def client(number):
            for i in range(60):
                assert await cluster.ask(100 * number + i) == [10 * (100 * number + i)]
                await asyncio.sleep(0.001)

        clients = asyncio.gather(*map(client, range(8)))
        await asyncio.sleep(0.05)
        cluster.workers[1].close()
        await clients
        await cluster.until(lambda: cluster.core.find("m").ranks == (0, 1))
        assert any("rank 1 was lost" in note for note in cluster.notes)
        status = cluster.core.status()["ranks"]
        assert [rank["restarts"] for rank in status] == [0, 1]
        before = status[1]["batches"]
        await asyncio.gather(*(cluster.ask(value) for value in range(40)))
        assert cluster.core.status()["ranks"][1]["batches"] > before

    serve(tmp_path, program, load=models(before=lambda rows: time.sleep(0.002)), supervised=True)


def test_a_request_that_kills_ranks_is_given_up(tmp_path):
    clusters = []

    class Deadly(Model):
        def run(self, inputs):
            if 7 in inputs["x"]:  # as a crash in the model would
                clusters[0].workers[self.rank].close()
            return super().run(inputs)

    async def program(cluster):
        clusters.append(cluster)
        values = [7, *range(6)]
        answers = await asyncio.gather(*map(cluster.ask, values), return_exceptions=True)
        assert isinstance(answers[0], ComputationFailed)
        assert "did not answer" in str(answers[0])
        assert answers[1:] == [[10 * value] for value in range(6)]

    deadly = lambda path, stage, stages: Deadly()  # noqa: E731
    serve(tmp_path, program, load=deadly, supervised=True, size=3, max_delay=0.05)


def test_without_ranks_requests_are_told_so_at_once(tmp_path):
    gate = Gate()

    async def program(cluster):
        running = asyncio.ensure_future(cluster.ask(1))
        await asyncio.to_thread(gate.came.acquire)
        waiting = asyncio.ensure_future(cluster.ask(2))
        await asyncio.sleep(0.02)
        cluster.workers[0].close()
        with pytest.raises(ComputationFailed, match="rank 0 was lost"):
            await running
        with pytest.raises(NotReady, match="m:1 is not ready: rank 0 was lost"):
            await waiting
        with pytest.raises(NotReady, match="rank 0 is not there"):
            await cluster.ask(3)
        assert not cluster.core.ready
        assert cluster.core.status()["ranks"][0]["state"] == "lost"
        gate.open.set()
        await asyncio.to_thread(cluster.start_rank, 0)
        await cluster.until(lambda: cluster.core.ready)
        assert await cluster.ask(3) == [30]

    serve(tmp_path, program, load=models(before=gate), size=1)


def test_a_rank_that_hangs_is_killed(tmp_path):
    hang = threading.Event()

    def before(rows):
        if 7 in rows and not hang.is_set():
            hang.set()
            time.sleep(3)

    async def program(cluster):
        start = time.monotonic()
        answers = await asyncio.gather(*(cluster.ask(value) for value in range(5, 9)))
        assert answers == [[50], [60], [70], [80]]  # on the other rank
        assert 0.2 < time.monotonic() - start < 2
        assert any("no batch was done within 0.3 s" in note for note in cluster.notes)
        await cluster.until(lambda: cluster.core.find("m").ranks == (0, 1))

    serve(tmp_path, program, load=models(before=before), supervised=True, batch_timeout=0.3)


def test_a_new_version_takes_over_without_a_failed_request(tmp_path):
    def load(path, stage, stages):
        time.sleep(0.1)
        return Model(factor=20.0 if "2" in path.parent.name else 10.0)

    async def program(cluster):
        cluster.file("repository/m/2/model.keras")
        factors = []
        ended = asyncio.Event()

        async def client():
            while not ended.is_set():
                (answer,) = await cluster.ask(1)
                factors.append(answer)

        clients = [asyncio.ensure_future(client()) for _ in range(4)]
        await asyncio.sleep(0.03)
        await cluster.core.load("m")
        assert cluster.core.find("m").version == 2
        assert cluster.core.find("m").ranks == (0, 1)
        assert await cluster.ask(1, version=1) == [10]
        await asyncio.sleep(0.03)
        await cluster.core.unload("m", 1)
        with pytest.raises(UnknownModel, match=r"version of 'm' must be one of: 2. Received: 1"):
            await cluster.ask(1, version=1)
        ended.set()
        await asyncio.gather(*clients)
        assert factors[0] == 10
        assert factors[-1] == 20
        assert factors == sorted(factors)

    serve(tmp_path, program, load=load)


def test_what_cannot_be_loaded_leaves_the_rest_alone(tmp_path):
    def load(path, stage, stages):
        if "bad" in path.name:
            raise ValueError("it is broken")
        return Model()

    async def program(cluster):
        cluster.file("repository/bad.keras")
        assert cluster.core.repository() == [("bad", 1)]
        with pytest.raises(InvalidRequest, match="bad:1 could not be loaded: rank 0: it is broken"):
            await cluster.core.load("bad")
        with pytest.raises(UnknownModel, match="Received: 'none'"):
            await cluster.core.load("none")
        with pytest.raises(UnknownModel, match=r"Received: '../m1'"):
            await cluster.core.load("../m1")
        with pytest.raises(NotReady, match="it is broken"):
            await cluster.ask(1, name="bad")
        assert cluster.core.find("bad").state is State.UNAVAILABLE
        assert await cluster.ask(1) == [10]
        await cluster.core.unload("bad")
        assert [version.name for version in cluster.core.versions()] == ["m"]
        with pytest.raises(UnknownModel):
            await cluster.core.unload("bad")

    serve(tmp_path, program, load=load)


def test_unloading_answers_first(tmp_path):
    gate = Gate()

    async def program(cluster):
        running = asyncio.ensure_future(cluster.ask(1))
        await asyncio.to_thread(gate.came.acquire)
        waiting = asyncio.ensure_future(cluster.ask(2))
        await asyncio.sleep(0)
        unloading = asyncio.ensure_future(cluster.core.unload("m"))
        await asyncio.sleep(0.01)
        assert cluster.core.find("m").state is State.UNLOADING
        with pytest.raises(NotReady, match="being unloaded"):
            await cluster.ask(3)
        gate.open.set()
        assert await running == [10]
        assert await waiting == [20]
        await unloading
        assert cluster.core.versions() == []
        await cluster.until(lambda: not cluster.workers[0]._models)

    serve(tmp_path, program, load=models(before=gate), size=1)


def test_draining_answers_what_is_there(tmp_path):
    gate = Gate()

    async def program(cluster):
        asked = [asyncio.ensure_future(cluster.ask(value)) for value in (1, 2, 3)]
        await asyncio.to_thread(gate.came.acquire)
        drained = asyncio.ensure_future(cluster.core.drain(5))
        await asyncio.sleep(0)
        assert not cluster.core.live
        assert not cluster.core.ready
        with pytest.raises(NotReady, match="shutting down"):
            await cluster.ask(4)
        assert not drained.done()
        gate.open.set()
        assert await asyncio.gather(*asked) == [[10], [20], [30]]
        await drained

    serve(tmp_path, program, load=models(before=gate))


def test_draining_does_not_wait_for_ever(tmp_path):
    gate = Gate()

    async def program(cluster):
        asked = asyncio.ensure_future(cluster.ask(1))
        await asyncio.to_thread(gate.came.acquire)
        await cluster.core.drain(0.05)
        with pytest.raises(NotReady, match="could not wait"):
            await asked
        gate.open.set()

    serve(tmp_path, program, load=models(before=gate))


def stages(path, stage, stages):
    """Stage s multiplies by 10 and adds s; they stay in order only if each runs on its rank."""

    class Stage(Model):
        def __init__(self):
            super().__init__()
            self.takes = self.takes if stage == 0 else ()

        def run(self, inputs):
            (value,) = inputs.values()
            self.calls.append(len(value))
            return {"y" if stage == stages - 1 else "between": value * 10 + stage}

    return Stage()


def test_a_pipeline_computes_stage_after_stage(tmp_path):
    async def program(cluster):
        asked = [cluster.ask(value, value + 1) for value in range(50)]
        expected = [[1000 * v + 12, 1000 * (v + 1) + 12] for v in range(50)]
        assert await asyncio.gather(*asked) == expected
        ranks = cluster.core.status()["ranks"]
        assert len({rank["batches"] for rank in ranks}) == 1
        assert cluster.core.find("m").ranks == (0, 1, 2)

    serve(tmp_path, program, load=stages, mode="pipeline", size=3, max_batch_size=8)


def test_a_lost_stage_stops_the_pipeline_until_it_is_back(tmp_path):
    async def program(cluster):
        results = collections.Counter()
        ended = asyncio.Event()

        async def client(value):
            while not ended.is_set():
                try:
                    assert await cluster.ask(value) == [1000 * value + 12]
                    results["answered"] += 1
                except (NotReady, ComputationFailed) as error:
                    results[type(error)] += 1
                    await asyncio.sleep(0.005)

        clients = [asyncio.ensure_future(client(value)) for value in range(6)]
        await cluster.until(lambda: results["answered"] > 20)
        cluster.workers[1].close()
        await cluster.until(lambda: results[NotReady] > 0)
        await cluster.until(lambda: cluster.core.ready)
        before = results["answered"]
        await cluster.until(lambda: results["answered"] > before + 20)
        ended.set()
        await asyncio.gather(*clients)
        assert results[ComputationFailed] <= 6

    serve(tmp_path, program, load=stages, mode="pipeline", size=3, supervised=True)


def test_a_broken_link_is_made_anew(tmp_path):
    async def program(cluster):
        assert await cluster.ask(1) == [1012]
        cluster.workers[0]._next.close()
        with pytest.raises(ComputationFailed, match=r"rank 0"):
            await cluster.ask(2)
        await cluster.until(lambda: cluster.core.ready)
        assert await cluster.ask(3) == [3012]

    serve(tmp_path, program, load=stages, mode="pipeline", size=3, supervised=True)


def test_a_host_without_the_file_fetches_it_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HVDEXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("hvdext.serving.worker.worker.identity_of", lambda path: [])
    paths = []

    def load(path, stage, stages):
        paths.append(path)
        return Model()

    async def program(cluster):
        assert await cluster.ask(1) == [10]
        assert paths[0] == paths[1] != cluster.folder / "m1.keras"
        assert paths[0].is_relative_to(tmp_path / "cache")
        assert paths[0].read_text() == "model"

    serve(tmp_path, program, load=load)


def test_a_file_that_has_changed_is_not_mixed_up(tmp_path, monkeypatch):
    """A rank that starts after the file was overwritten refuses it: both ranks must have the same model."""
    monkeypatch.setenv("HVDEXT_CACHE", str(tmp_path / "cache"))

    async def program(cluster):
        cluster.file("m1.keras", "other")
        cluster.workers[1].close()
        await cluster.until(lambda: any("cannot be loaded on rank 1" in note for note in cluster.notes))
        assert any("damaged" in note for note in cluster.notes)
        assert await cluster.ask(1) == [10]
        assert cluster.core.find("m").ranks == (0,)

    serve(tmp_path, program, supervised=True)


def test_text_travels(tmp_path):
    class Upper(Model):
        def run(self, inputs):
            upper = [text.upper() for text in inputs["x"].ravel()]
            return {"y": np.array(upper, object).reshape(inputs["x"].shape)}

    async def program(cluster):
        words = np.array([[b"a\xff"], [b""], [b"bc"]], object)
        _, outputs = await cluster.core.infer("m", 1, {"x": words})
        assert outputs["y"].tolist() == [[b"A\xff"], [b""], [b"BC"]]

    serve(tmp_path, program, load=lambda path, stage, stages: Upper())


def test_a_job_of_another_size_is_refused(tmp_path):
    async def program(cluster):
        from hvdext.serving.transport.connection import connect
        from hvdext.serving.transport.handshake import Refused

        facts = {"role": "worker", "rank": 0, "size": 3}
        with pytest.raises(Refused, match=r"as many ranks: 2. Received: 3"):
            await asyncio.to_thread(connect, [("127.0.0.1", cluster.port)], "a token for tests", facts)
        assert await cluster.ask(1) == [10]

    serve(tmp_path, program)


def test_noise_at_the_port_disturbs_nobody(tmp_path):
    async def program(cluster):
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"hvx1" + b"\xff" * 12, b"hvx1\0\0\0\2\0\0\0\0\0\0\0\0{}"):
            reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
            writer.write(noise)
            with contextlib.suppress(ConnectionResetError):
                while await reader.read(1000):  # the challenge, and then the end
                    pass
            writer.close()
        assert await cluster.ask(1) == [10]

    serve(tmp_path, program)


def test_cluster_starts_without_models(tmp_path):
    async def main():
        async with Cluster(tmp_path, size=1) as cluster:
            assert cluster.core.ready
            assert cluster.core.versions() == []
            with pytest.raises(UnknownModel):
                await cluster.ask(1)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_an_unloaded_model_leaves_no_memory_behind(tmp_path):
    alive = []

    class Knot(Model):
        def __init__(self):
            super().__init__()
            self.itself = self
            alive.append(weakref.ref(self))

    async def program(cluster):
        cluster.models.clear()
        assert alive[0]() is not None
        await cluster.core.unload("m")
        await cluster.until(lambda: alive[0]() is None)

    serve(tmp_path, program, load=lambda path, stage, stages: Knot(), size=1)
