"""Layers whose gradients stay on their rank, as in Horovod's `Partial...` names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import keras
import tensorflow as tf

from hvdext.collectives.compression import Compression
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords
from hvdext.gradients.optimizer import DistributedOptimizer
from hvdext.gradients.options import ExchangeOptions, old_groups
from hvdext.gradients.tape import DistributedGradientTape
from hvdext.keras_tools.selection import identity_of


@suggests_keywords
def PartialDistributedOptimizer(
    optimizer: keras.optimizers.Optimizer,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Compression = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: ReduceOp = ReduceOp.AVERAGE,
    groups: int | Sequence[Sequence] | None = None,
    process_set: ProcessSet | None = None,
    local_layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None = None,
    scale_local_gradients: bool = True,
    *,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    uneven_batches: bool = False,
) -> keras.optimizers.Optimizer:
    """A `hvd.DistributedOptimizer` that leaves the gradients of some layers on their rank.

    Layers need not be built yet: those without variables are asked again at the first step.

    Args:
        optimizer: this and the others without a description: see `hvd.DistributedOptimizer`.
        name: see there.
        device_dense: see there.
        device_sparse: see there.
        compression: see there.
        sparse_as_dense: see there.
        gradient_predivide_factor: see there.
        op: see there.
        groups: see there.
        process_set: see there.
        local_layers: a layer or a model, or several, whose gradients are not exchanged; None: none. Each rank
            may have others, of other shapes.
        scale_local_gradients: divide the local gradients by the number of ranks.
        backward_passes_per_step: see there.
        average_aggregated_gradients: see there.
        uneven_batches: see there.

    Returns:
        `optimizer`.

    Raises:
        TypeError: if `local_layers` holds something that is not a Keras layer.
        ValueError: at the first step, if layers that were not built before leave nothing to exchange.

    Other errors are those of `hvd.DistributedOptimizer`.
    """
    layers = _layers(local_layers)
    known = [variable for layer in layers for variable in layer.variables]
    select = _outside(layers, known) if layers else None
    options = ExchangeOptions.from_arguments(locals(), groups=groups or None)
    distributed = DistributedOptimizer(
        optimizer,
        name=name,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        uneven_batches=uneven_batches,
        **options.as_arguments(),
    )
    for variable in known:
        distributed.register_local_var(variable)
    return distributed


class PartialDistributedGradientTape(DistributedGradientTape):
    """A `hvd.DistributedGradientTape` that leaves the gradients of some layers on their rank.

    Layers need not be built yet: each call of `gradient()` asks them for their variables.

    Args:
        local_layers: a layer or a model, or several, whose gradients are not exchanged; None: none. Each rank
            may have others, of other shapes.

    The other arguments are those of `hvd.DistributedGradientTape`.

    Raises:
        TypeError: if `local_layers` holds something that is not a Keras layer.
    """

    @suggests_keywords
    def __init__(
        self,
        gradtape: tf.GradientTape,
        device_dense: str = "",
        device_sparse: str = "",
        compression: Compression = Compression.none,
        sparse_as_dense: bool = False,
        op: ReduceOp = ReduceOp.AVERAGE,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: int | Sequence[Sequence] | None = None,
        process_set: ProcessSet | None = None,
        local_layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None = None,
        scale_local_gradients: bool = True,
    ):
        self._local_layers = _layers(local_layers)
        self._registered: set[int] = set()
        options = ExchangeOptions.from_arguments(locals(), groups=old_groups(num_groups, groups), select=None)
        super().__init__(gradtape, **options.as_arguments())

    def _exchange(self, sources):
        for layer in self._local_layers:
            for variable in layer.variables:
                if identity_of(variable) not in self._registered:
                    self._registered.add(identity_of(variable))
                    self.register_local_source(variable)
        return super()._exchange(sources)


def _layers(local_layers) -> list[keras.layers.Layer]:
    if local_layers is None:
        return []
    if isinstance(local_layers, keras.layers.Layer):
        return [local_layers]
    layers = list(local_layers) if isinstance(local_layers, Iterable) else [local_layers]
    strangers = [layer for layer in layers if not isinstance(layer, keras.layers.Layer)]
    if strangers:
        raise TypeError(
            "`local_layers` must be a Keras layer, several or None. "
            f"Received: {strangers[0]!r} of type {type(strangers[0]).__name__}."
        )
    return layers


def _outside(layers: Sequence[keras.layers.Layer], known: Sequence) -> Callable[[object], bool]:
    """Selects all but those variables of `layers` that did not exist yet when `known` was listed."""
    registered = {identity_of(variable) for variable in known}

    def is_exchanged(variable) -> bool:
        late = {identity_of(v) for layer in layers for v in layer.variables} - registered
        return identity_of(variable) not in late

    is_exchanged.__name__ = f"everything but local_layers={[layer.name for layer in layers]}"
    return is_exchanged
