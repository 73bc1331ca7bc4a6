"""Tensors as messages of bytes: what goes in comes out, and as many bytes travel as the formula says."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from hvdext.placement.pipeline.messages import Channel, Spec, bytes_of, has_header, pack, unpack
from hvdext.testing import run_ranks

CASES = {
    "rows": [(tf.float32, (None, 3), (4, 3))],
    "no rows": [(tf.float32, (None, 3), (0, 3))],
    "scalar": [(tf.float64, (), ())],
    "two open axes": [(tf.float16, (None, None), (2, 5))],
    "many": [
        (tf.bool, (None, 2), (3, 2)),
        (tf.bfloat16, (None,), (3,)),
        (tf.int64, (4,), (4,)),
        (tf.uint8, (None, 1), (3, 1)),
        (tf.complex64, (None, 2, 2), (3, 2, 2)),
    ],
}
BYTES = {"rows": 48, "no rows": 0, "scalar": 8, "two open axes": 16 + 20, "many": 8 * 9 + 6 + 6 + 32 + 3 + 96}


def tensors_of(case):
    rng = np.random.default_rng(0)
    return [tf.cast(rng.integers(0, 5, shape), dtype) for dtype, _, shape in case]


@pytest.mark.parametrize("name", CASES)
def test_pack_and_unpack(name):
    specs = [Spec(shape, dtype) for dtype, shape, _ in CASES[name]]
    tensors = tensors_of(CASES[name])
    message = tf.function(lambda: pack(tensors, specs))()
    assert message.dtype == tf.uint8
    assert len(message) == bytes_of([tuple(t.shape) for t in tensors], specs) == BYTES[name]
    assert has_header(specs) == (name not in ("rows", "no rows"))
    for there, here in zip(tf.function(unpack)(message, specs), tensors, strict=True):
        assert there.dtype == here.dtype
        np.testing.assert_array_equal(there.numpy(), here.numpy())


def test_a_channel_sends_one_way_and_counts_bytes():
    specs = [Spec(shape, dtype) for dtype, shape, _ in CASES["many"]]

    def program(comm):
        channel = Channel(comm)

        @tf.function(autograph=False)
        def exchange(here):
            if comm.rank == 1:
                channel.send(tensors_of(CASES["many"]), specs, "hvdext.demo.one")
                return []
            return channel.receive(specs, "hvdext.demo.one", here)

        received = [exchange(tf.constant(n)) for n in range(2)]  # nothing is folded into a constant
        return [t.numpy() for t in received[1]], comm.traffic()["demo"].bytes

    (received, nothing), (_, sent) = run_ranks(2, program)
    assert (nothing, sent) == (0, 2 * BYTES["many"])
    for there, here in zip(received, tensors_of(CASES["many"]), strict=True):
        np.testing.assert_array_equal(there, here.numpy())
