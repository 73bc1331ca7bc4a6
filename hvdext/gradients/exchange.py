"""The gradient exchange: what leaves this rank, how it is combined, what comes back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import tensorflow as tf

from hvdext.collectives.adasum import adasum
from hvdext.collectives.compression import Compression, allreduce_fp16, check_compression
from hvdext.collectives.reduce_op import ReduceOp
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.names import cleaned
from hvdext.comm.process_sets import ProcessSet
from hvdext.gradients import buckets
from hvdext.gradients.accumulation import kind_of
from hvdext.gradients.tensors import is_overwritten, map_gradient
from hvdext.keras_tools.selection import Select, check_select, described, identity_of, path_of, selected


class GradientExchange:
    """Combines gradients over the ranks.

    Dense gradients travel in buckets (`hvdext.gradients.buckets`). Sparse ones (`tf.IndexedSlices`) are
    gathered, so that the optimizer sees the slices of all ranks as it would see those of one large batch.
    Gradients of variables that are not selected stay local.

    With one rank everything comes back as it is.

    Args:
        name: part of the collectives' names; the same on all ranks, different for exchanges that may
            run at the same time.
        op: a `ReduceOp`.
        compression: a `Compression`.
        sparse_as_dense: sum sparse gradients as dense tensors.
        gradient_predivide_factor: with Average, divide by it before the sum and by size / factor after.
        groups: a number of buckets, or lists of variables that travel together; None: by bytes.
        process_set: the ranks to combine over; None: all.
        select: which variables are exchanged; see `hvdext.keras_tools.selection`.
        scale_local_gradients: divide the gradients that stay local by the number of ranks, so that
            their updates keep pace with averaged ones.
        device_dense: TensorFlow device for the exchange of dense gradients; "": where they are.
        device_sparse: the same for sparse ones.

    Raises:
        TypeError, ValueError: if an argument breaks its rule.
    """

    def __init__(
        self,
        name: str,
        *,
        op: ReduceOp = ReduceOp.AVERAGE,
        compression: Compression = Compression.none,
        sparse_as_dense: bool = False,
        gradient_predivide_factor: float = 1.0,
        groups: int | Sequence[Sequence] | None = None,
        process_set: ProcessSet | None = None,
        select: Select = None,
        scale_local_gradients: bool = True,
        device_dense: str = "",
        device_sparse: str = "",
    ):
        _check_arguments(op, compression, gradient_predivide_factor, groups, process_set)
        check_select(select)
        self.name = cleaned(name)
        self._op = op
        self._compression = compression
        self._sparse_as_dense = sparse_as_dense
        self._predivide = float(gradient_predivide_factor)
        self._groups = groups
        self._process_set = process_set
        self._select = select
        self._scale_local = scale_local_gradients
        self._device_dense = device_dense
        self._device_sparse = device_sparse
        self._local: list = []

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
        comm = current()
        if self._process_set is not None:
            comm = comm.subset(self._process_set.ranks)
        if self._op is ReduceOp.ADASUM and comm.size & (comm.size - 1):
            raise ValueError(
                f"`op=Adasum` needs a power-of-two number of ranks. Received: {comm.size} ranks."
            )
        return comm

    def agree(self, subject: str, gradients, variables, settings: dict[str, object]) -> None:
        """Compares variables, kinds of gradients and settings over the ranks; see `agreement.check`.

        Args:
            subject: whose they are.
            gradients: None on a rank without any, which hears what the others agree on.
            variables: the variables they belong to.
            settings: what else must agree.
        """
        if gradients is None:
            agreement.check(self.comm(), subject, None)
            return
        facts: dict[str, object] = {
            "exchange name": self.name,
            "op": self._op.value,
            "compression": self._compression.value,
            "sparse_as_dense": self._sparse_as_dense,
            "gradient_predivide_factor": self._predivide,
            "scale_local_gradients": self._scale_local,
            "number of variables": len(variables),
        }
        problem = None
        try:
            facts |= self._gradient_facts(gradients, variables)
        except ValueError as error:  # told to the other ranks first, who would wait for this one
            problem = str(error)
        agreement.check(self.comm(), subject, facts | settings, problem)

    def _gradient_facts(self, gradients, variables):
        shared = self.is_shared(variables)
        facts = {
            f"variable {i}": f"{described(v)}, {kind_of(g)} gradient, {'exchanged' if s else 'local'}"
            for i, (g, v, s) in enumerate(zip(gradients, variables, shared, strict=True))
        }
        dense = self._dense_indices(gradients, variables, shared)
        facts["buckets"] = self._buckets(dense, variables)
        return facts

    def is_shared(self, variables: Sequence) -> list[bool]:
        """Says of each of `variables` whether its gradient is exchanged.

        Raises:
            ValueError: if a pattern matches none of them.
        """
        local = {identity_of(variable) for variable in self._local}
        chosen = selected(variables, self._select)
        return [c and identity_of(v) not in local for c, v in zip(chosen, variables, strict=True)]

    def combine(
        self, gradients: Sequence, variables: Sequence, contributors: tf.Tensor | None = None
    ) -> list:
        """Returns what every rank applies: one gradient per variable, None where there was none.

        Call it on every rank of the exchange, with gradients of the same kinds and shapes.

        Args:
            gradients: `tf.Tensor`, `tf.IndexedSlices` or None, one per variable.
            variables: the variables they belong to.
            contributors: how many ranks an average is over, a float64 scalar; None: all of them.
        """
        comm = self.comm()
        result: list[Any] = list(gradients)
        if comm.size == 1:
            return result
        shared = self.is_shared(variables)
        dense = self._dense_indices(gradients, variables, shared)
        jobs: list[tuple[int, Any]] = []  # (when it is ready, what to do)
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if not shared[i]:
                if self._scale_local and not is_overwritten(variables[i]):
                    result[i] = map_gradient(lambda g: g / comm.size, gradient)
            elif is_overwritten(variables[i]):
                jobs.append((i, partial(self._maximum, comm, result, i)))
            elif i not in dense:
                jobs.append((i, partial(self._gather, comm, result, i)))
        for number, members in enumerate(self._buckets(dense, variables)):
            jobs.append((min(members), partial(self._reduce, comm, result, variables, members, number)))
        # TensorFlow keeps collectives in the order in which they are written: last layer first, as
        # backward produces them.
        for _, job in sorted(jobs, key=lambda job: -job[0]):
            job()
        if contributors is not None:
            self._rescale(result, variables, shared, comm.size / contributors)
        return result

    def _rescale(self, result, variables, shared, factor):
        """Turns averages over all ranks into averages over those that contribute."""
        for i, variable in enumerate(variables):
            averaged = self._op is ReduceOp.AVERAGE if shared[i] else self._scale_local
            if averaged and not is_overwritten(variable):
                result[i] = map_gradient(lambda g: g * tf.cast(factor, g.dtype), result[i])

    def _reduce(self, comm, result, variables, members, number):
        """Replaces the dense gradients of one bucket by their combination."""
        with tf.device(self._device_dense or None):
            tensors = [_dense(result[i], variables[i]) for i in members]
            combined = self._combined(comm, tensors, f"hvdext.grad.{self.name}.{number}")
        for i, tensor in zip(members, combined, strict=True):
            result[i] = tensor

    def _combined(self, comm, tensors, name):
        if self._op is ReduceOp.ADASUM:
            return adasum(comm, tensors, name)
        before, after = 1.0, 1.0
        if self._op is ReduceOp.AVERAGE:
            before, after = 1 / self._predivide, self._predivide / comm.size
        dtype = tensors[0].dtype
        # The engine's own float16 sum is slow and rounds every partial sum to float16.
        half = dtype == tf.float16 or (self._compression is Compression.fp16 and dtype.size > 2)
        reduce = allreduce_fp16 if half else type(comm).allreduce
        return reduce(comm, tensors, name, prescale=before, postscale=after)

    def _gather(self, comm, result, index):
        """Replaces a sparse gradient by the slices of all ranks."""
        slices = result[index]
        name = f"hvdext.grad.{self.name}.sparse{index}"
        values = slices.values
        with tf.device(self._device_sparse or None):
            half = self._compression is Compression.fp16 and values.dtype.size > 2
            wire = tf.float16 if half else values.dtype
            values = tf.cast(comm.allgather(tf.cast(values, wire), f"{name}.values"), values.dtype)
            indices = comm.allgather(slices.indices, f"{name}.indices")
            if self._op is ReduceOp.AVERAGE:
                values = values / comm.size
        result[index] = tf.IndexedSlices(values, indices, slices.dense_shape)

    def _maximum(self, comm, result, index):
        # float8 training writes scales and amax histories through "gradients": one process with the
        # whole batch would have seen the largest, as Keras' own accumulation does.
        gradient = result[index]
        everyone = comm.allgather(gradient[tf.newaxis], f"hvdext.grad.{self.name}.maximum{index}")
        result[index] = tf.ensure_shape(tf.reduce_max(everyone, axis=0), gradient.shape)

    def _dense_indices(self, gradients, variables, shared):
        sparse = [isinstance(g, tf.IndexedSlices) and not self._sparse_as_dense for g in gradients]
        refused = [path_of(v) for v, a, b in zip(variables, sparse, shared, strict=True) if a and b]
        if self._op is ReduceOp.ADASUM and refused:
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
        picked = [variables[i] for i in dense]
        kinds = [tf.as_dtype(v.dtype).name for v in picked]
        if self._groups is None:
            sizes = [tf.TensorShape(v.shape).num_elements() * _item_bytes(v) for v in picked]
            lists = buckets.buckets(sizes, kinds)
        elif isinstance(self._groups, int):
            lists = buckets.grouped(len(dense), kinds, self._groups)
        else:
            _check_groups(self._groups, variables)
            place = {identity_of(v): i for i, v in enumerate(picked)}
            named = [[place[identity_of(v)] for v in g if identity_of(v) in place] for g in self._groups]
            lists = buckets.grouped(len(dense), kinds, [group for group in named if group])
        return [[dense[i] for i in members] for members in lists]


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


def _check_arguments(op, compression, predivide, groups, process_set):
    if op not in (ReduceOp.AVERAGE, ReduceOp.SUM, ReduceOp.ADASUM):
        raise ValueError(f"`op` must be hvd.Average, hvd.Sum or hvd.Adasum. Received: op={op!r}.")
    check_compression(compression, op)
    is_factor = isinstance(predivide, (int, float)) and not isinstance(predivide, bool)
    if not is_factor or not 0 < predivide < math.inf:
        raise ValueError(
            "`gradient_predivide_factor` must be a positive number. "
            f"Received: gradient_predivide_factor={predivide!r}."
        )
    if predivide != 1 and op is not ReduceOp.AVERAGE:
        raise ValueError(
            "`gradient_predivide_factor` needs op=Average. "
            f"Received: gradient_predivide_factor={predivide} with op={op.value}."
        )
    is_number = isinstance(groups, int) and not isinstance(groups, bool) and groups >= 1
    is_lists = isinstance(groups, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in groups)
    if groups is not None and not is_number and not is_lists:
        raise ValueError(
            "`groups` must be a positive number of groups or a list of lists of variables. "
            f"Received: groups={groups!r}."
        )
    if process_set is not None and not isinstance(process_set, ProcessSet):
        raise TypeError(f"`process_set` must be a hvd.ProcessSet. Received: process_set={process_set!r}.")


def _item_bytes(variable):
    return tf.as_dtype(variable.dtype).size


def _dense(gradient, variable):
    return tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape)
