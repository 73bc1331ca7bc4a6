"""The gradient exchange: what leaves this rank, how it is combined, what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from hvdext.collectives.adasum import adasum
from hvdext.collectives.compression import Compression, allreduce_fp16
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.names import cleaned
from hvdext.gradients import buckets
from hvdext.gradients.accumulation import kind_of
from hvdext.gradients.batch_sizes import BatchSizes
from hvdext.gradients.options import ExchangeOptions
from hvdext.gradients.pattern import Pattern
from hvdext.gradients.sums import added_up
from hvdext.gradients.tensors import is_overwritten, map_gradient
from hvdext.keras_tools.numbering import renumbered
from hvdext.keras_tools.selection import described, identity_of, path_of, selected


class GradientExchange:
    """Combines gradients over the ranks.

    Dense gradients travel in buckets (`hvdext.gradients.buckets`). Sparse ones (`tf.IndexedSlices`) are
    gathered, so that the optimizer sees the slices of all ranks as it would see those of one large batch
    (`hvdext.gradients.sums`). Gradients of variables that are not selected stay local.

    With one rank everything comes back as it is.

    Args:
        name: part of the collectives' names; different for exchanges that may run at the same time.
        options: what is exchanged, how and with whom.
        is_numbered: whether the name may hold a number that Keras has given, by counting what a process has
            made: then all ranks take that of the first one.
    """

    def __init__(self, name: str, options: ExchangeOptions, *, is_numbered: bool = False):
        self.name = cleaned(name)
        self._is_numbered = is_numbered
        self.options = options
        self._local: list = []
        self._sizes: BatchSizes | None = None

    def register_local_var(self, variable) -> None:
        """Keeps the gradient of `variable` local from now on. Call it before the first step."""
        self._local.append(variable)

    def comm(self) -> Communicator:
        """The ranks this exchange combines over.

        Raises:
            RuntimeError: before `hvd.init()`.
            ValueError: if this rank is not in `process_set`, or Adasum gets a number of ranks that is
                not a power of two.
        """
        options, comm = self.options, current()
        if options.process_set is not None:
            comm = comm.subset(options.process_set.ranks)
        if options.op is ReduceOp.ADASUM and comm.size & (comm.size - 1):
            raise ValueError(
                f"`op=Adasum` needs a power-of-two number of ranks. Received: {comm.size} ranks."
            )
        return comm

    def agree(self, subject: str, gradients, variables, settings: dict[str, object]) -> None:
        """Compares variables, kinds of gradients and settings over the ranks; see `agreement.check`.

        Names count without the numbers that Keras gives. From now on the ranks have one name for it.

        Args:
            subject: whose they are.
            gradients: None on a rank without any, which hears what the others agree on.
            variables: the variables they belong to.
            settings: what else must agree.
        """
        self._compare(subject, gradients, variables, settings)
        if self._is_numbered and self.comm().size > 1:
            self.name = self.comm().allgather_object(self.name, "hvdext.exchange.name")[0]

    def _compare(self, subject, gradients, variables, settings):
        if gradients is None:
            agreement.check(self.comm(), subject, None)
            return
        options = self.options
        facts: dict[str, object] = {
            "exchange name": renumbered([self.name]) if self._is_numbered else self.name,
            "op": options.op.value,
            "compression": options.compression.value,
            "sparse_as_dense": options.sparse_as_dense,
            "gradient_predivide_factor": options.gradient_predivide_factor,
            "scale_local_gradients": options.scale_local_gradients,
        }
        problem = None
        try:
            facts |= self._gradient_facts(gradients, variables)
        except ValueError as error:  # told to the other ranks first, who would wait for this one
            problem = str(error)
        agreement.check(self.comm(), subject, facts | settings, problem)

    def _gradient_facts(self, gradients, variables):
        """What is exchanged, counted without what stays local: each rank may keep others for itself."""
        shared = self.is_shared(variables)
        pairs = [(v, g) for v, g, s in zip(variables, gradients, shared, strict=True) if s]
        told = described([v for v, _ in pairs])
        lists = self._buckets(self._dense_indices(gradients, variables, shared), variables)
        return {
            "number of variables that are exchanged (the others are local)": len(pairs),
            **{f"variable {i}": f"{told[i]}, {kind_of(g)} gradient" for i, (_, g) in enumerate(pairs)},
            "buckets": _renumbered(lists, shared),
        }

    def is_shared(self, variables: Sequence) -> list[bool]:
        """Says of each of `variables` whether its gradient is exchanged.

        Raises:
            ValueError: if a pattern matches none of them.
        """
        local = {identity_of(variable) for variable in self._local}
        chosen = selected(variables, self.options.select)
        return [c and identity_of(v) not in local for c, v in zip(chosen, variables, strict=True)]

    def combine(
        self,
        gradients: Sequence,
        variables: Sequence,
        contributors: tf.Tensor | None = None,
        places: Sequence[int | None] = (),
        rows: tf.Tensor | None = None,
    ) -> list:
        """Returns what every rank applies: one gradient per variable, None where there was none.

        Call it on every rank of the exchange, with gradients of the same kinds and shapes.

        Args:
            gradients: `tf.Tensor`, `tf.IndexedSlices` or None, one per variable; `marked`.
            variables: the variables they belong to.
            contributors: how many ranks an average is over, a float64 scalar; None: all of them.
            places: where the variables stand among all that are exchanged, where some steps may leave some
                out; empty: there.
            rows: of the batch, where all ranks' should have as many; None: nobody looks.
        """
        comm = self.comm()
        if comm.size == 1:
            return [added_up(g, v) for g, v in zip(gradients, variables, strict=True)]
        result: list[Any] = list(gradients)
        shared = self.is_shared(variables)
        dense = self._dense_indices(gradients, variables, shared)
        lists = self._buckets(dense, variables)
        numbers = _numbers(shared)
        pattern = self._pattern(gradients, variables, shared, lists, places)
        jobs: list[tuple[int, Any]] = []  # (when it is ready, what to do)
        gathers: list[tuple[int, Any]] = []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if not shared[i]:
                if self.options.scale_local_gradients and not is_overwritten(variables[i]):
                    result[i] = map_gradient(lambda g: g / comm.size, gradient)
            elif is_overwritten(variables[i]):
                gathers.append((i, partial(self._maximum, comm, result, i, numbers[i])))
            elif i not in dense:
                gathers.append((i, partial(self._gather_slices, comm, result, i, numbers[i])))
        for number, members in enumerate(lists or [[]] * any(shared)):
            name = f"hvdext.grad.{self.name}.{number}"
            told = None if number else rows
            reduce = partial(self._reduce, comm, result, variables, members, name, pattern, told)
            jobs.append((min(members, default=0), reduce))
        # TensorFlow keeps collectives in the order in which they are written: last layer first, as
        # backward produces them.
        checked = [job() for _, job in sorted(jobs, key=lambda job: -job[0])]
        # Whose gradient is gathered must be known by then: one that is none elsewhere would wait for ever.
        with tf.control_dependencies(checked[:1]):
            for _, job in sorted(gathers, key=lambda job: -job[0]):
                job()
        if contributors is not None:
            self._rescale(result, variables, shared, comm.size / contributors)
        return [added_up(g, v) for g, v in zip(result, variables, strict=True)]

    def _rescale(self, result, variables, shared, factor):
        """Turns averages over all ranks into averages over those that contribute."""
        options = self.options
        for i, variable in enumerate(variables):
            averaged = options.op is ReduceOp.AVERAGE if shared[i] else options.scale_local_gradients
            if averaged and not is_overwritten(variable):
                result[i] = map_gradient(lambda g: g * tf.cast(factor, g.dtype), result[i])

    def _pattern(self, gradients, variables, shared, lists, places):
        """What is exchanged in this step: which gradients, of which kinds, in which messages."""
        trio = list(zip(variables, gradients, shared, strict=True))
        exchanged = [(path_of(v), kind_of(g)) for v, g, s in trio if s]
        missing, sparse = ([path for path, kind in exchanged if kind == k] for k in ("no", "sparse"))
        where = [place for place, s in zip(places, shared, strict=True) if s] if places else []
        # The shape of a tensor that is no variable may change from step to step.
        tensors = [v for v, _, s in trio if s and isinstance(v, tf.Tensor)]
        shapes = [tuple(v.shape) for v in tensors if v.shape.is_fully_defined()]
        return Pattern(
            ([kind for _, kind in exchanged], (_renumbered(lists, shared), where), shapes),
            f"The ranks disagree about which gradients of {self.name!r} there are in this step. On this one "
            f"there is no gradient of {missing or 'no variable'}, a sparse one of {sparse or 'no variable'}. "
            "What takes part in the loss of one rank must take part in that of every rank: add 0 * the rest.",
        )

    def _reduce(self, comm, result, variables, members, name, pattern, rows):
        """Replaces the dense gradients of one bucket by their combination; what it returns is checked."""
        op = self.options.op
        with tf.device(self.options.device_dense or None):
            tensors = [_dense(result[i], variables[i]) for i in members]
            dtype = tensors[0].dtype if tensors else tf.float32
            are_sizes_told = rows is not None and op is not ReduceOp.ADASUM and dtype.size >= 4
            sizes = [self._batch_sizes.numbers(comm, rows, dtype)] if are_sizes_told else []
            *combined, bits = self._combined(comm, [*tensors, *sizes, pattern.bits(dtype)], name)
            copies = comm.size if op is ReduceOp.SUM else 1
            *combined, bits = pattern.checked([*combined, bits], bits, copies, comm.size)
            if are_sizes_told:
                self._batch_sizes.look(comm, combined.pop() * (comm.size // copies))
        for i, tensor in zip(members, combined, strict=True):
            result[i] = tensor
        return bits

    @property
    def _batch_sizes(self):
        if self._sizes is None:
            self._sizes = BatchSizes()
        return self._sizes

    def _combined(self, comm, tensors, name):
        if self.options.op is ReduceOp.ADASUM:
            return adasum(comm, tensors, name)
        before, after = 1.0, 1.0
        if self.options.op is ReduceOp.AVERAGE:
            factor = self.options.gradient_predivide_factor
            before, after = 1 / factor, factor / comm.size
        dtype = tensors[0].dtype
        # The engine's own float16 sum is slow and rounds every partial sum to float16.
        half = dtype == tf.float16 or (self.options.compression is Compression.fp16 and dtype.size > 2)
        reduce = allreduce_fp16 if half else type(comm).allreduce
        return reduce(comm, tensors, name, prescale=before, postscale=after)

    def _gather_slices(self, comm, result, index, number):
        """Replaces a sparse gradient by the slices of all ranks."""
        slices = result[index]
        name = f"hvdext.grad.{self.name}.sparse{number}"
        values = slices.values
        with tf.device(self.options.device_sparse or None):
            half = self.options.compression is Compression.fp16 and values.dtype.size > 2
            wire = tf.float16 if half else values.dtype
            values = tf.cast(comm.allgather(tf.cast(values, wire), f"{name}.values"), values.dtype)
            indices = comm.allgather(slices.indices, f"{name}.indices")
            if self.options.op is ReduceOp.AVERAGE:
                values = values / comm.size
        result[index] = tf.IndexedSlices(values, indices, slices.dense_shape)

    def _maximum(self, comm, result, index, number):
        # float8 training writes scales and amax histories through "gradients": one process with the
        # whole batch would have seen the largest, as Keras' own accumulation does.
        gradient = result[index]
        everyone = comm.allgather(gradient[tf.newaxis], f"hvdext.grad.{self.name}.maximum{number}")
        result[index] = tf.ensure_shape(tf.reduce_max(everyone, axis=0), gradient.shape)

    def _dense_indices(self, gradients, variables, shared):
        sparse = [isinstance(g, tf.IndexedSlices) and not self.options.sparse_as_dense for g in gradients]
        refused = [path_of(v) for v, a, b in zip(variables, sparse, shared, strict=True) if a and b]
        if self.options.op is ReduceOp.ADASUM and refused:
            raise ValueError(
                "`op=Adasum` is defined for dense gradients: pass `sparse_as_dense=True`. Received: "
                f"sparse gradients for {refused}."
            )
        return [
            i
            for i, g in enumerate(gradients)
            if g is not None and shared[i] and not sparse[i] and not is_overwritten(variables[i])
        ]

    def _buckets(self, dense, variables):
        """Which dense gradients travel together, as lists of indices into all gradients."""
        groups = self.options.groups
        picked = [variables[i] for i in dense]
        kinds = [tf.as_dtype(v.dtype).name for v in picked]
        if groups is None:
            # Those of unknown length count as nothing: all ranks must come to the same buckets.
            sizes = [(tf.TensorShape(v.shape).num_elements() or 0) * _item_bytes(v) for v in picked]
            lists = buckets.buckets(sizes, kinds)
        elif isinstance(groups, int):
            lists = buckets.grouped(len(dense), kinds, groups)
        else:
            _check_groups(groups, variables)
            place = {identity_of(v): i for i, v in enumerate(picked)}
            named = [[place[identity_of(v)] for v in g if identity_of(v) in place] for g in groups]
            lists = buckets.grouped(len(dense), kinds, [group for group in named if group])
        return [[dense[i] for i in members] for members in lists]


def _numbers(shared):
    """The places of exchanged gradients among themselves, by their indices: what stays local differs."""
    return {i: n for n, i in enumerate(i for i, s in enumerate(shared) if s)}


def _renumbered(lists, shared):
    numbers = _numbers(shared)
    return [[numbers[i] for i in members] for members in lists]


def _check_groups(groups, variables):
    named = [variable for group in groups for variable in group]
    known = {identity_of(variable) for variable in variables}
    strangers = [path_of(variable) for variable in named if identity_of(variable) not in known]
    repeated = sorted({path_of(v) for v in named if sum(identity_of(v) == identity_of(w) for w in named) > 1})
    if strangers or repeated:
        raise ValueError(
            "`groups` must hold trainable variables, each at most once. Received: "
            f"not trained: {strangers}; repeated: {repeated}."
        )


def _item_bytes(variable):
    return tf.as_dtype(variable.dtype).size


def _dense(gradient, variable):
    return tf.ensure_shape(tf.convert_to_tensor(added_up(gradient, variable)), variable.shape)
