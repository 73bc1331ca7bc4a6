"""What the tests of plans share: graphs made without Keras."""

import pytest

from hvdext.placement.plan.graph import Graph, Layer, Tensor


def _graph_of(layers, edges, *, inputs=("x",), shared=(), name="model", outputs=()):
    """A graph from `{path: parameters or Layer}` and `[(producer, bytes, [consumers])]`.

    A layer given by its parameters weighs four bytes for each, keeps no activations and does twice as many
    operations.
    """
    made = [Layer(path, "InputLayer", is_input=True) for path in inputs]
    for path, layer in layers.items():
        if isinstance(layer, int):
            layer = Layer(path, "Dense", layer, 4 * layer, 4 * layer, 0, 2 * layer)
        made.append(layer)
    tensors = []
    for producer, size, consumers in edges:
        times = sum(tensor.producer == producer for tensor in tensors)
        tensor_name = f"{producer}@{times}" if times else producer
        tensors.append(Tensor(tensor_name, producer, tuple(consumers), (None, size // 4), "float32", size))
    return Graph(name, tuple(made), tuple(tensors), tuple(outputs), tuple(shared))


def _chain(*parameters, size=8):
    """Layers l0, l1, ... one after another with the same tensor between any two."""
    paths = [f"l{i}" for i in range(len(parameters))]
    edges = [(a, size, [b]) for a, b in zip(["x", *paths], paths, strict=False)]
    return _graph_of(dict(zip(paths, parameters, strict=True)), edges)


@pytest.fixture(scope="session")
def graph_of():
    """Makes a graph from its layers and edges."""
    return _graph_of


@pytest.fixture(scope="session")
def chain():
    """Makes a graph of layers one after another."""
    return _chain
