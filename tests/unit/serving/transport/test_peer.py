"""When the front takes a worker for lost, and when it does not."""

import asyncio
import contextlib
import threading
import time

import pytest
import uvloop

from hvdext.serving.transport import peer
from hvdext.serving.transport.connection import connect

TOKEN = "a token for tests"


def meet(monkeypatch, ping, silence, answers, program):
    """Runs `program(lost)` beside a peer, as the front does; its caller answers pings, or reads nothing."""
    monkeypatch.setattr(peer, "PING_SECONDS", ping)
    monkeypatch.setattr(peer, "SILENCE_SECONDS", silence)
    connections = []

    def call(port):
        connections.append(connect([("127.0.0.1", port)], TOKEN, {})[0])
        with contextlib.suppress(OSError):
            while answers and connections[0].receive() is not None:
                pass

    async def main():
        lost, arrived = [], asyncio.Event()

        def meet_one(one):
            one.on_lost = lost.append
            arrived.set()

        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: peer.Peer(TOKEN, lambda one: None, meet_one), "127.0.0.1", 0
        )
        port = server.sockets[0].getsockname()[1]
        thread = threading.Thread(target=call, args=[port], daemon=True)
        thread.start()
        await arrived.wait()
        try:
            return list(await program(lost))
        finally:
            server.close()
            connections[0].close()
            thread.join(10)

    return uvloop.run(asyncio.wait_for(main(), 30))


@pytest.mark.slow
def test_a_worker_is_not_lost_because_the_front_stood_still(monkeypatch):
    async def program(lost):
        for _ in range(2):
            await asyncio.sleep(0.1)
            time.sleep(0.7)  # the loop of the front itself
        await asyncio.sleep(0.1)
        return lost

    assert meet(monkeypatch, 0.05, 0.5, True, program) == []


def test_a_worker_that_answers_no_ping_is_lost(monkeypatch):
    async def program(lost):
        while not lost:
            await asyncio.sleep(0.01)
        return lost

    assert meet(monkeypatch, 0.01, 0.1, False, program) == ["it has been silent for 0 s"]  # 0.1, rounded
