"""Horovod's interface of a compressor."""

import pytest
import tensorflow as tf

import hvdext as hvd


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_fp16_and_back(dtype):
    values = tf.constant([1.0, 0.1, 65504.0], dtype)
    sent, context = hvd.Compression.fp16.compress(values)
    assert sent.dtype == tf.float16
    back = hvd.Compression.fp16.decompress(sent, context)
    assert back.dtype == values.dtype
    assert back.numpy().tolist() == tf.cast(tf.cast(values, tf.float16), dtype).numpy().tolist()


@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_integers_travel_as_they_are(compression):
    compression = hvd.Compression[compression]
    sent, context = compression.compress([1, 2])
    assert context is None
    assert compression.decompress(sent, context).numpy().tolist() == [1, 2]


def test_nothing_is_done():
    sent, context = hvd.Compression.none.compress(tf.constant([0.1]))
    assert (sent.dtype, context) == (tf.float32, None)
