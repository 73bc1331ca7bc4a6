"""`hvd.join()`: this rank has no more batches."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from hvdext.comm.current import current
from hvdext.comm.watchdog import JOIN
from hvdext.common.arguments import suggests_keywords
from hvdext.gradients.apply_hook import hook_of
from hvdext.keras_tools.optimizers import trained_by


@suggests_keywords
def join(
    optimizer: keras.optimizers.Optimizer | None = None, variables: Sequence | None = None
) -> int | None:
    """Waits for the ranks that still have batches, without holding them up; every rank calls it.

    With an optimizer (a custom loop; `hvd.callbacks.UnevenBatches` does it in `model.fit`), this rank applies
    every update of the others, an average over the ranks that still contribute, and all ranks hold the
    same weights when it returns:

        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1), uneven_batches=True)
        for epoch in range(epochs):
            for x, y in my_batches:
                train_step(x, y)
            hvd.join(optimizer)

    Without one, as in Horovod: this rank adds zeros to the others' uncompressed `hvd.allreduce`s with Sum or
    Average (which go on dividing by the number of all ranks); other collectives fail meanwhile, among them
    the first step of an optimizer, in which ranks compare their settings. Updates made by the others are
    missing here, so broadcast the variables from the rank that is returned. Unlike Horovod's it can be
    repeated.

    Args:
        optimizer: what `hvd.DistributedOptimizer(..., uneven_batches=True)` returned, or a
            `LossScaleOptimizer` around it. It must be built (have variables).
        variables: the optimizer's trainable variables; default: those it was built with.

    Returns:
        Without an optimizer: the last rank that joined. With one: None.

    Raises:
        ValueError: if `optimizer` is not distributed, does not expect uneven batches or is not built.
    """
    comm = current()
    if optimizer is None:
        return comm.join(JOIN)
    hook = hook_of(optimizer)
    if hook is None or not hook.expects_uneven_batches:
        raise ValueError(
            "`optimizer` must come from hvd.DistributedOptimizer(..., uneven_batches=True). "
            f"Received: {optimizer!r}, which {'is not distributed' if hook is None else 'lacks it'}."
        )
    if variables is None:
        if not optimizer.built:
            raise ValueError(
                "`optimizer` must be built, since a rank without any batch cannot know its variables: call "
                f"optimizer.build(model.trainable_variables). Received: the unbuilt {optimizer.name!r}."
            )
        variables = trained_by(optimizer)
    hook.join(optimizer, list(variables))
    return None
