"""A model's bytes from the front to a host that has no file of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import numpy as np

from hvdext.serving.transport.frames import Frame
from hvdext.serving.transport.peer import Peer


def send_chunks(peer: Peer, find: Callable[[str], Iterator[bytes]]) -> None:
    """Sends a model chunk by chunk, each when the receiver asks for it: memory for one at a time.

    Args:
        peer: the receiver, whose facts have the model's digest.
        find: gives the chunks by the digest; raises LookupError if there is no such model.
    """
    try:
        chunks = find(str(peer.facts.get("digest")))
    except LookupError as error:
        peer.send({"kind": "failed", "error": str(error)})
        return
    under_way: set[asyncio.Task] = set()  # a task that nobody holds may vanish

    async def send_next():
        try:
            chunk = await asyncio.to_thread(next, chunks, None)
        except OSError as error:
            peer.send({"kind": "failed", "error": str(error)})
            return
        if chunk is None:
            peer.send({"kind": "end"})
        else:
            peer.send({"kind": "chunk"}, {"bytes": np.frombuffer(chunk, np.uint8)})

    def on_frame(frame: Frame) -> None:
        task = asyncio.ensure_future(send_next())
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    peer.on_frame = on_frame
