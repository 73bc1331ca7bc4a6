"""Versions come and go beside those that answer; also when ranks fail at it."""

import asyncio
import threading

import pytest
from serving_ranks import Gate, Model, serve

from hvdext.inference.serving.service import InvalidRequest, State


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
            with pytest.raises(InvalidRequest, match=r"bad:1 could not be loaded: rank 2: .* it is broken"):
                await cluster.core.load("bad")
        await cluster.until(lambda: len(cluster.models) == 3 + 2 * 2)
        await cluster.until(lambda: all(len(worker._models) == 1 for worker in cluster.workers.values()))
        await cluster.core.unload("m")
        await cluster.until(lambda: not any(worker._models for worker in cluster.workers.values()))

    serve(tmp_path, program, load=load, mode="pipeline", size=3)
