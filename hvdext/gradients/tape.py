"""`DistributedGradientTape`: the gradient exchange for custom loops without an optimizer hook."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence

import keras
import tensorflow as tf

from hvdext.collectives.compression import Compression
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords
from hvdext.gradients.exchange import GradientExchange
from hvdext.gradients.options import ExchangeOptions, old_groups
from hvdext.gradients.sums import marked
from hvdext.gradients.weighing import warn_of_masks
from hvdext.keras_tools.autograph import without_autograph
from hvdext.keras_tools.lookups import note_sparse_lookups
from hvdext.keras_tools.loss_reduction import listen_to_losses
from hvdext.keras_tools.numbering import renumbered
from hvdext.keras_tools.selection import Select, path_of

_AGREED = "gradient exchanges that the ranks of the job have compared"  # in the ledger's notes


class DistributedGradientTape:
    """A `tf.GradientTape` whose `gradient()` returns gradients combined over the ranks.

    Use it instead of `DistributedOptimizer`, not with it: gradients would be combined twice.

        with hvd.DistributedGradientTape(tf.GradientTape()) as tape:
            loss = loss_fn(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)

    Args:
        gradtape: the tape to record with.
        device_dense, device_sparse, compression, sparse_as_dense, op, gradient_predivide_factor, groups,
        process_set, scale_local_gradients, select: as for `hvd.DistributedOptimizer`.
        num_groups: Horovod's old name for a number in `groups`; 0: unset.

    Everything else a tape has (`watch`, `stop_recording`, `jacobian`, ...) is the recording tape's own,
    and local.
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
        scale_local_gradients: bool = True,
        *,
        select: Select = None,
    ):
        if not isinstance(gradtape, tf.GradientTape):
            raise TypeError(f"`gradtape` must be a tf.GradientTape. Received: {gradtape!r}.")
        note_sparse_lookups()
        listen_to_losses(warn_of_masks)
        self._tape = gradtape
        self._local: list = []
        self._options = ExchangeOptions.from_arguments(locals(), groups=old_groups(num_groups, groups))

    def __enter__(self) -> DistributedGradientTape:
        self._tape.__enter__()
        return self

    def __exit__(self, *exc_info) -> None:
        self._tape.__exit__(*exc_info)

    def __getattr__(self, name):
        return getattr(self._tape, name)

    def register_local_source(self, source) -> None:
        """Keeps the gradient of the variable or tensor `source` local.

        Ranks may have others, of other shapes, and another number of them.
        """
        self._local.append(source)

    @without_autograph
    def gradient(
        self,
        target,
        sources,
        output_gradients=None,
        unconnected_gradients=tf.UnconnectedGradients.NONE,
        *,
        use_generic_names: bool = False,
    ):
        """As `tf.GradientTape.gradient`, combined over the ranks.

        Every rank must call it, with the same sources but for local ones. The first call for a set of sources
        compares their names, shapes and kinds over the ranks; watched tensors have no names, and are matched
        by their places.

        Args:
            target: as there.
            sources: Keras or TensorFlow variables, or watched tensors, in any structure.
            output_gradients: as there.
            unconnected_gradients: as there.
            use_generic_names: accepted for Horovod's sake: names never come from TensorFlow's.

        Raises:
            TypeError: if a source is neither a variable nor a tensor.
            ValueError: on every rank alike, if the ranks' sources or settings differ.
        """
        gradients = self._tape.gradient(target, sources, output_gradients, unconnected_gradients)
        flat_gradients = _flat(gradients, sources)
        flat_sources = tf.nest.flatten(sources)
        exchange = self._exchange(flat_sources)
        agreed = exchange.comm().ledger.notes.setdefault(_AGREED, set())
        if exchange.name not in agreed:
            with tf.init_scope():
                exchange.agree("DistributedGradientTape", flat_gradients, flat_sources, {})
            agreed.add(exchange.name)
        combined = exchange.combine(marked(flat_gradients, flat_sources), flat_sources)
        return tf.nest.pack_sequence_as(sources, combined)

    def get_local_and_global_gradients(
        self, target, sources, output_gradients=None, use_generic_names: bool = False
    ) -> tuple[list[tuple], list[tuple]]:
        """`gradient`, parted into what stays on this rank and what has been combined.

        Args:
            target: as for `gradient`.
            sources: as for `gradient`.
            output_gradients: as for `gradient`.
            use_generic_names: as for `gradient`.

        Returns:
            Two lists of pairs (source, gradient), in the order of `sources`: the local ones and the others.

        Raises:
            TypeError, ValueError: as `gradient`.
        """
        gradients = self.gradient(target, sources, output_gradients, use_generic_names=use_generic_names)
        flat_sources = tf.nest.flatten(sources)
        local: list[tuple] = []
        combined: list[tuple] = []
        shared = self._exchange(flat_sources).is_shared(flat_sources)
        for source, gradient, s in zip(flat_sources, _flat(gradients, sources), shared, strict=True):
            (combined if s else local).append((source, gradient))
        return local, combined

    def _exchange(self, sources):
        """Named after what it does: a new tape is made for every step, the collectives stay the same."""
        strangers = [s for s in sources if not isinstance(s, (tf.Tensor, tf.Variable, keras.Variable))]
        if strangers:
            raise TypeError(
                "`sources` must be variables or tensors; use the recording tape's own `gradient` for others. "
                f"Received: {strangers}."
            )
        # Functions print their address and variables their values, which differ between ranks.
        plain = (str, int, float, enum.Enum, ProcessSet, type(None))
        given = self._options.as_arguments()
        options = {name: value for name, value in given.items() if isinstance(value, plain)}
        exchange = GradientExchange("tape", self._options)
        for source in self._local:
            exchange.register_local_var(source)
        try:
            shared = exchange.is_shared(sources)
        except ValueError:  # which `agree` meets as well, and tells the other ranks
            shared = [True] * len(sources)
        named = _named([source for source, s in zip(sources, shared, strict=True) if s])
        digest = hashlib.sha256(repr((named, options)).encode()).hexdigest()[:8]
        exchange.name = f"tape-{digest}"
        return exchange


def _named(sources):
    """What ranks know sources by. A tensor's shape may change with the batch, for one of them first."""
    return [
        (
            path,
            source.shape.rank if isinstance(source, tf.Tensor) else tuple(source.shape),
            tf.as_dtype(source.dtype).name,
        )
        for path, source in zip(renumbered(list(map(path_of, sources))), sources, strict=True)
    ]


def _flat(gradients, sources):
    """One gradient per source, with `tf.IndexedSlices` kept whole and None kept in place."""
    tf.nest.assert_same_structure(sources, gradients)
    return tf.nest.flatten(gradients)
