"""Supervisors with real worker processes: killed, hanging, asked to end, and left alone by the front."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from hvdext.serving.scheduler.core import ServingCore
from hvdext.serving.settings import Settings
from hvdext.serving.supervisor import Front, FrontMissing, Supervisor
from hvdext.serving.transport import peer
from hvdext.serving.worker.worker import Post
from tests.unit.serving.serving_ranks import TOKEN, Cluster

COMMAND = (sys.executable, "-m", "tests.unit.serving.worker.numpy_worker")
WORKER = {"threads": 1, "local_rank": 0, "modules": []}


class Processes(Cluster):
    """A cluster whose ranks are supervisors in threads, and workers in processes."""

    ended = ()

    def start_rank(self, rank, restarts=0):
        post = Post(rank, self.settings.size, (), "")
        supervisor = Supervisor(post, self.look, WORKER, patience=5, end_seconds=5, command=COMMAND)
        self.ended = (*self.ended, threading.Event())
        threading.Thread(target=self._run, args=[supervisor, self.ended[-1]], daemon=True).start()

    def _run(self, supervisor, ended):
        with contextlib.suppress(FrontMissing):
            supervisor.run()
        ended.set()

    def look(self):
        return Front((("127.0.0.1", self.port),), TOKEN)

    def ranks(self):
        return self.core.status()["ranks"]


def serve(folder, program, **options):
    async def main():
        async with Processes(folder, **options) as cluster:
            await cluster.add()
            await cluster.until(lambda: all(rank["state"] == "ready" for rank in cluster.ranks()))
            return await program(cluster)

    return asyncio.run(asyncio.wait_for(main(), 60))


async def ask_on(cluster, seconds):
    """Clients that ask until the time is over; every answer must be right."""
    end = time.monotonic() + seconds

    async def client(number):
        value = 1000 * number
        while time.monotonic() < end:
            value += 1
            assert await cluster.ask(value) == [10 * value]

    await asyncio.gather(*map(client, range(1, 7)))


@pytest.mark.slow
def test_a_killed_worker_is_started_again(tmp_path):
    async def program(cluster):
        asking = asyncio.ensure_future(ask_on(cluster, 1.5))
        await asyncio.sleep(0.1)
        old = cluster.ranks()[1]["pid"]
        os.kill(old, signal.SIGKILL)
        await cluster.until(lambda: cluster.ranks()[1]["state"] == "lost")
        await asking
        await cluster.until(lambda: cluster.ranks()[1]["state"] == "ready")
        rank = cluster.ranks()[1]
        assert rank["restarts"] == 1
        assert psutil.pid_exists(rank["pid"])
        assert not psutil.pid_exists(old)  # its supervisor has seen to the rest

    serve(tmp_path, program)


@pytest.mark.slow
def test_a_frozen_worker_is_killed_and_started_again(tmp_path):
    async def program(cluster):
        asking = asyncio.ensure_future(ask_on(cluster, 1.5))
        await asyncio.sleep(0.1)
        os.kill(cluster.ranks()[0]["pid"], signal.SIGSTOP)
        await asking
        await cluster.until(lambda: cluster.ranks()[0]["restarts"] == 1)
        await cluster.until(lambda: cluster.ranks()[0]["state"] == "ready")

    serve(tmp_path, program, batch_timeout=0.3)


@pytest.mark.slow
def test_an_idle_worker_that_is_silent_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(peer, "PING_SECONDS", 0.1)
    monkeypatch.setattr(peer, "SILENCE_SECONDS", 0.5)

    async def program(cluster):
        await asyncio.sleep(1)
        assert [rank["restarts"] for rank in cluster.ranks()] == [0, 0]  # pings are answered
        os.kill(cluster.ranks()[0]["pid"], signal.SIGSTOP)
        await cluster.until(lambda: cluster.ranks()[0]["restarts"] == 1)
        assert any("rank 0 was lost: it has been silent for" in note for note in cluster.notes)

    serve(tmp_path, program)


def test_workers_end_with_their_supervisors_not_before(tmp_path):
    async def program(cluster):
        pids = [rank["pid"] for rank in cluster.ranks()]
        for pid in pids:  # as horovodrun does
            os.kill(pid, signal.SIGTERM)
        await cluster.until(lambda: len(asked) == 2)
        assert sorted(asked) == ["rank 0 got SIGTERM", "rank 1 got SIGTERM"]
        assert await cluster.ask(1) == [10]  # they go on until the front says that it is over
        await cluster.core.drain(5)
        await cluster.core.close()
        await cluster.until(lambda: all(event.is_set() for event in cluster.ended))
        await cluster.until(lambda: not any(map(_lives, pids)))

    asked = []
    serve(tmp_path, program, on_end=asked.append)


def _lives(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
def test_a_front_that_starts_again_gets_its_ranks_back(tmp_path):
    async def program(cluster):
        old = [rank["pid"] for rank in cluster.ranks()]
        for rank in cluster.core._ranks:  # as if its process had died
            rank.supervisor.end("gone")
            rank.worker.end("gone")
        cluster.core._ranks._server.close()
        cluster.core = ServingCore(cluster.settings, TOKEN)
        cluster.port = await cluster.core.start("127.0.0.1")
        await cluster.add()
        await cluster.until(lambda: all(rank["state"] == "ready" for rank in cluster.ranks()))
        assert await cluster.ask(1) == [10]
        assert not set(old) & {rank["pid"] for rank in cluster.ranks()}

    serve(tmp_path, program)


@pytest.mark.slow
def test_a_supervisor_does_not_wait_for_ever():
    post = Post(1, 2, (), "")

    def supervise(look, patience=0.2):
        Supervisor(post, look, WORKER, patience, 5).run()

    with pytest.raises(FrontMissing, match=r"rank 1 has not reached rank 0 within 0.2 s: it has not told"):
        supervise(lambda: None)
    with pytest.raises(FrontMissing, match=r"within 0.2 s: 127.0.0.1:9: .*refused"):
        supervise(lambda: Front((("127.0.0.1", 9),), TOKEN))

    def given_up():
        raise FrontMissing("no such model")

    with pytest.raises(FrontMissing, match="no such model"):
        supervise(given_up, 60)
    supervisor = Supervisor(post, lambda: None, WORKER, 60, 5)
    threading.Timer(0.1, supervisor.ask_to_end, ["SIGTERM"]).start()
    supervisor.run()  # asked to end before there was a front


def test_a_supervisor_of_another_job_is_refused(tmp_path):
    async def main():
        core = ServingCore(Settings(size=3), TOKEN)
        port = await core.start("127.0.0.1")
        front = Front((("127.0.0.1", port),), TOKEN)
        supervisor = Supervisor(Post(1, 2, (), ""), lambda: front, WORKER, 5, 5)
        with pytest.raises(FrontMissing, match=r"rank 0 refuses rank 1: .* as many ranks: 3. Received: 2"):
            await asyncio.to_thread(supervisor.run)
        await core.close(seconds=0.1)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_supervisors_need_no_tensorflow():
    program = (
        "import sys, hvdext.serving.front, hvdext.serving.worker.process\n"
        "print([name for name in ('tensorflow', 'keras', 'horovod') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.stdout.strip() == "[]", answer
