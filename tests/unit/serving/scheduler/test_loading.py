"""Versions come and go beside those that answer; also when ranks fail at it."""

import asyncio
import threading

import pytest

from hvdext.serving.scheduler.model_names import Named
from hvdext.serving.service import InvalidRequest, State
from tests.unit.serving.serving_ranks import Cluster, Gate, Model, serve

DEADLY = "rank {}: its loading ended the rank's process"


def test_loading_waits_for_the_unloading_and_adds_it_anew(tmp_path):
    gate = Gate()

    async def program(cluster):
        cluster.file("repository/m.keras")
        running = asyncio.ensure_future(cluster.ask(1))
        await asyncio.to_thread(gate.came.acquire)
        unloading = [asyncio.ensure_future(cluster.core.unload("m")) for _ in range(2)]
        await asyncio.sleep(0)
        loading = [asyncio.ensure_future(cluster.core.load("m")) for _ in range(2)]
        await asyncio.wait(loading, timeout=0.1)
        assert not any(task.done() for task in loading)
        gate.open.set()
        await asyncio.gather(running, *unloading, *loading)
        assert cluster.core.find("m").state is State.READY
        assert await cluster.ask(2) == [20]
        await cluster.until(lambda: len(cluster.workers[0]._models) == 1)

    serve(tmp_path, program, load=lambda path, stage, stages: Model(before=gate), size=1)


def test_loading_what_has_lost_its_ranks_waits_for_them(tmp_path):
    async def program(cluster):
        cluster.file("repository/m.keras")
        cluster.workers[0].close()
        await cluster.until(lambda: cluster.core.find("m").state is State.UNAVAILABLE)
        loading = asyncio.ensure_future(cluster.core.load("m"))
        await asyncio.wait([loading], timeout=0.1)
        assert not loading.done()
        await asyncio.to_thread(cluster.start_rank, 0)
        await loading
        assert cluster.core.find("m").state is State.READY

    serve(tmp_path, program, size=1)


def test_what_is_loaded_too_late_is_dropped(tmp_path):
    ready = threading.Event()

    def load(path, stage, stages):
        if "late" in path.name:
            ready.wait(20)
        return Model()

    async def program(cluster):
        cluster.file("repository/late.keras")
        with pytest.raises(InvalidRequest, match="not been loaded within 1 s"):
            await cluster.core.load("late")
        ready.set()
        await cluster.until(lambda: len(cluster.models) == 2 and len(cluster.workers[0]._models) == 1)

    serve(tmp_path, program, load=load, size=1, load_timeout=1.0)


def test_a_stage_that_fails_to_load_leaves_nothing_at_the_others(tmp_path):
    def load(path, stage, stages):
        if "bad" in path.name and stage == 2:
            raise ValueError("it is broken")
        return Model()

    async def program(cluster):
        cluster.file("repository/bad.keras")
        for _ in range(2):
            with pytest.raises(InvalidRequest, match=r"bad:1 could not be loaded: rank 2: it is broken"):
                await cluster.core.load("bad")
        await cluster.until(lambda: len(cluster.models) == 3 + 2 * 2)
        await cluster.until(lambda: all(len(worker._models) == 1 for worker in cluster.workers.values()))
        await cluster.core.unload("m")
        await cluster.until(lambda: not any(worker._models for worker in cluster.workers.values()))

    serve(tmp_path, program, load=load, mode="pipeline", size=3)


def second(rank, path):
    """Version 2 of the repository."""
    return path.parent.name == "2"


def test_a_version_that_kills_its_rank_is_tried_on_one_only(tmp_path):
    deadly = [True]

    async def program(cluster):
        cluster.file("repository/m/2/model.keras")
        ended = asyncio.Event()

        async def client():
            while not ended.is_set():
                assert await cluster.ask(1) == [10]

        clients = asyncio.gather(*(client() for _ in range(4)))
        with pytest.raises(InvalidRequest, match="m:2 could not be loaded: " + DEADLY.format(0)):
            await cluster.core.load("m")
        await cluster.until(lambda: cluster.core.find("m", 1).ranks == (0, 1))
        assert cluster.core.find("m", 2).state is State.UNAVAILABLE
        assert any(DEADLY.format(0)[8:] in note for note in cluster.notes)
        assert cluster.deaths == [0]  # whoever starts again does not load it
        deadly.clear()
        await cluster.core.load("m")  # asked for anew
        assert cluster.core.find("m").version == 2
        assert cluster.core.find("m").ranks == (0, 1)
        ended.set()
        await clients

    fatal = lambda rank, path: deadly and second(rank, path)  # noqa: E731
    serve(tmp_path, program, fatal=fatal, supervised=True)


@pytest.mark.parametrize(("mode", "size", "rank"), [("replicas", 1, 0), ("pipeline", 2, 1)])
def test_what_answered_comes_back_without_what_killed_its_only_lane(tmp_path, mode, size, rank):
    async def program(cluster):
        cluster.file("repository/m/2/model.keras")
        with pytest.raises(InvalidRequest, match=DEADLY.format(rank)):
            await cluster.core.load("m")
        await cluster.until(lambda: cluster.core.ready)
        assert await cluster.ask(1) == [10**size]
        assert cluster.deaths == [rank]
        await cluster.until(lambda: all(len(worker._models) == 1 for worker in cluster.workers.values()))

    class Stage(Model):
        def run(self, inputs):
            (value,) = inputs.values()
            return super().run({"x": value})

    load = lambda path, stage, stages: Stage()  # noqa: E731
    fatal = lambda number, path: number == rank and second(number, path)  # noqa: E731
    serve(tmp_path, program, load=load, fatal=fatal, supervised=True, mode=mode, size=size)


def test_a_rank_that_dies_of_what_others_have_loaded_goes_without_it(tmp_path):
    async def program(cluster):
        cluster.file("repository/m/2/model.keras")
        await cluster.core.load("m")
        await cluster.until(lambda: cluster.core.find("m", 1).ranks == (0, 1) and len(cluster.deaths) == 2)
        assert cluster.deaths == [1, 1]  # once may have been an accident
        assert cluster.core.find("m").version == 2
        assert cluster.core.find("m").ranks == (0,)

    fatal = lambda rank, path: rank == 1 and second(rank, path)  # noqa: E731
    serve(tmp_path, program, fatal=fatal, supervised=True)


def test_a_rank_lost_where_others_live_gets_another_chance(tmp_path):
    under_way, lost = threading.Event(), threading.Event()

    def fatal(rank, path):
        """The first time that rank 0 loads n; rank 1 is at it, too, and is through later."""
        if path.name != "n.keras" or lost.is_set():
            return False
        if rank == 0:
            return under_way.wait(20)
        under_way.set()
        return not lost.wait(20)

    async def main():
        async with Cluster(tmp_path, fatal=fatal, supervised=True) as cluster:
            named = [Named(name, 1, cluster.file(f"{name}.keras")) for name in ("m", "n")]
            _, version = await cluster.core.add(named)
            await cluster.until(lambda: version.failures)
            assert cluster.core.find("m").state is State.READY
            lost.set()
            await cluster.until(lambda: cluster.core.find("n").ranks == (0, 1))
            assert cluster.deaths == [0]

    asyncio.run(asyncio.wait_for(main(), 30))


def test_other_new_versions_are_tried_elsewhere(tmp_path):
    async def program(cluster):
        for number in (2, 3):
            cluster.file(f"repository/m/{number}/model.keras")
        with pytest.raises(InvalidRequest, match="m:2 could not be loaded: " + DEADLY.format(0)):
            await cluster.core.load("m")
        await cluster.until(lambda: cluster.core.find("m").ranks == (0, 1))
        assert cluster.core.find("m").version == 3
        assert cluster.deaths == [0]

    serve(tmp_path, program, fatal=second, supervised=True)


def test_at_the_start_a_rank_may_be_lost_once(tmp_path):
    async def main(times):
        fatal = lambda rank, path: len(cluster.deaths) < times  # noqa: E731
        async with Cluster(tmp_path, size=1, fatal=fatal, supervised=True) as cluster:
            versions = await cluster.core.add([Named("m", 1, cluster.file("m.keras"))])
            await cluster.core.loaded(versions)
            assert await cluster.ask(1) == [10]

    asyncio.run(asyncio.wait_for(main(1), 20))
    with pytest.raises(InvalidRequest, match=DEADLY.format(0)):
        asyncio.run(asyncio.wait_for(main(9), 20))


def _broken(path, stage, stages):
    if "bad" in path.name:
        raise ValueError("could not be read: " + "x" * 5000 + "; the layer is not there")
    return Model()


def test_a_failed_load_leaves_the_server_ready(tmp_path):
    async def program(cluster):
        assert cluster.core.ready
        cluster.file("repository/bad.keras")
        with pytest.raises(InvalidRequest, match="bad:1 could not be loaded"):
            await cluster.core.load("bad")
        assert cluster.core.find("bad").state is State.UNAVAILABLE
        assert cluster.core.ready
        assert await cluster.ask(1) == [10]
        for rank in range(2):
            cluster.workers[rank].close()
        await cluster.until(lambda: not cluster.core.ready)  # what has answered is missed

    serve(tmp_path, program, load=_broken)


def test_the_server_stays_ready_while_another_model_is_loaded(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def load(path, stage, stages):
        if "new" in path.name:
            begun.set()
            go_on.wait(20)
        return Model()

    async def program(cluster):
        cluster.file("repository/new.keras")
        loading = asyncio.ensure_future(cluster.core.load("new"))
        await asyncio.to_thread(begun.wait, 20)
        assert cluster.core.find("new").state is State.LOADING
        assert cluster.core.ready
        go_on.set()
        await loading
        assert cluster.core.ready
        cluster.workers[0].close()
        await cluster.until(lambda: not cluster.core.ready)

    serve(tmp_path, program, load=load, size=1)


def test_the_server_stays_ready_while_another_model_is_unloaded(tmp_path):
    gate = Gate()

    async def program(cluster):
        await cluster.add("other")
        running = asyncio.ensure_future(cluster.ask(1, name="other"))
        await asyncio.to_thread(gate.came.acquire)
        unloading = asyncio.ensure_future(cluster.core.unload("other"))
        await cluster.until(lambda: cluster.core.find("other").state is State.UNLOADING)
        assert cluster.core.ready
        gate.open.set()
        await asyncio.gather(running, unloading)
        assert cluster.core.ready

    serve(tmp_path, program, load=lambda path, stage, stages: Model(before=gate), size=1)


@pytest.mark.parametrize(("names", "ready"), [(["bad", "good"], True), (["bad"], False)])
def test_at_the_start_a_model_is_waited_for_until_it_has_failed(tmp_path, names, ready):
    go_on = threading.Event()

    def load(path, stage, stages):
        if "good" in path.name:
            go_on.wait(20)
        return _broken(path, stage, stages)

    async def main():
        async with Cluster(tmp_path, load=load, size=1) as cluster:
            versions = await cluster.core.add([Named(n, 1, cluster.file(f"{n}.keras")) for n in names])
            await cluster.until(lambda: versions[0].failures)
            assert not cluster.core.ready
            go_on.set()
            with pytest.raises(InvalidRequest):
                await cluster.core.loaded(versions)
            assert cluster.core.ready is ready

    asyncio.run(asyncio.wait_for(main(), 30))


def test_the_end_of_a_long_reason_is_not_cut_off(tmp_path, caplog):
    async def program(cluster):
        cluster.file("repository/bad.keras")
        with pytest.raises(InvalidRequest) as raised:
            await cluster.core.load("bad")
        text = str(raised.value)
        assert "could not be read" in text
        assert "; the layer is not there" in text
        whole = len("could not be read: " + "x" * 5000 + "; the layer is not there")
        assert f"[... {whole - 2000} characters, which this rank's log has ...]" in text
        assert len(text) < 2200

    with caplog.at_level("ERROR"):
        serve(tmp_path, program, load=_broken, size=1)
    assert "x" * 5000 in caplog.text
