"""Between exchanges of weights the ranks train on their own: no gradients are exchanged as well."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from hvdext.comm.communicator import Communicator
from hvdext.gradients.apply_hook import hooks_of
from hvdext.keras_tools.optimizers import trained_by
from hvdext.keras_tools.selection import identity_of, path_of
from hvdext.sync.pieces import Piece


def refuse_exchanged_gradients(
    comm: Communicator,
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer | None,
    fragments: Sequence[Sequence[Piece]],
) -> None:
    """Refuses weights that exchanged gradients keep equal anyway, among all ranks that would average them.

    Args:
        comm: who exchanges weights.
        model: whose they are.
        optimizer: what trains them; None: nobody knows.
        fragments: what is exchanged.

    Raises:
        ValueError: if the optimizer exchanges the gradients of any of it.
    """
    if optimizer is None or comm.size == 1:
        return
    trained = {identity_of(p.variable): p.variable for ps in fragments for p in ps if p.kind == "trainable"}
    for hook in hooks_of(optimizer):
        if not set(comm.ranks) <= set(hook.exchange.comm().ranks):
            continue
        own = trained_by(hook.optimizer) or model.trainable_variables
        shared = hook.exchange.is_shared(own)
        twice = [path_of(v) for v, s in zip(own, shared, strict=True) if s and identity_of(v) in trained]
        if twice:
            raise ValueError(
                "`ParameterSync` (hvd.sync.DiLoCo, LocalSGD, ...) needs ranks that train on their own in "
                "between: compile with the plain optimizer, without hvd.DistributedOptimizer, or let that "
                "exchange the gradients of other variables (`select`) or ranks (`process_set`) only. "
                f"Received: {hook.optimizer.name!r}, which exchanges those of {twice} at every step."
            )
