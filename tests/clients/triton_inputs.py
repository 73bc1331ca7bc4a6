"""What tests hand to the protocol's own client."""

import pytest

triton = pytest.importorskip("tritonclient.http")


def asked(name, array, datatype, binary):
    """An input that the client sends as JSON or as bytes."""
    tensor = triton.InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor
