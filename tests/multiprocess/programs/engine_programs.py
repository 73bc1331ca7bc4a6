"""The engine's own collectives, for every dtype and operation it has, against NumPy.

Each rank knows what all bring, compares what it gets, and hands on a digest: bits are alike on all ranks.
"""

from __future__ import annotations

import hashlib
import os

import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import Program

_FLOATS = ("float16", "float32", "float64")
_INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "int64")
_MOVED = (*_FLOATS, *_INTEGERS, "bool")
_SOME = ("float16", "float32", "int32", "bool")
# What the engine's operations of TensorFlow take.
_REDUCED = (*_FLOATS, "uint8", "int8", "int32", "int64")
_SCATTERED = (*_FLOATS, "int32", "int64")
_LENGTHS = (1, 1000, 100_003, 700_001)  # the last ones take several rounds and shares
_OPERATIONS = {"Sum": np.add, "Min": np.minimum, "Max": np.maximum, "Product": np.multiply}
SETS = ([0, 1, 2], [0, 1], [0, 2])  # of ranks on hosts a, b, a, b: across both, nobody's, one host's
_TOLERANCE = {"float16": 2e-3, "float32": 1e-6, "float64": 1e-14}


def _brought(dtype, length, rank):
    numbers = np.random.default_rng([length, rank]).integers(1, 4, length)
    if dtype in _FLOATS:
        numbers = numbers * np.random.default_rng([length, rank, 1]).normal(1, 0.1, length)
    return numbers.astype(dtype) if dtype != "bool" else numbers > 2


def _equal(got, want, dtype, what):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), np.asarray(want, np.float64), rtol=_TOLERANCE.get(dtype, 0), err_msg=what
    )


def _reduced(all_, how, dtype):
    """As the engine does: float16 in float32, in the order of ranks."""
    wide = np.float32 if dtype == "float16" else np.dtype(dtype)
    return how.reduce([a.astype(wide) for a in all_]).astype(dtype)


class _Checks:
    def __init__(self, members):
        import horovod.tensorflow as engine
        from horovod.common import process_sets

        numbers = engine.mpi_ops._basics._get_process_set_ids_and_ranks()
        self.engine, self.members = engine, members
        self.set = next(
            process_sets._temp_process_set_object(number)
            for number, ranks in numbers.items()
            if list(ranks) == members
        )
        self.rank, self.size = members.index(engine.rank()), len(members)
        self.digest = hashlib.sha256()

    def call(self, collective, *arguments, **settings):
        return getattr(self.engine, collective)(*arguments, process_set=self.set, **settings)

    def note(self, got):
        self.digest.update(np.ascontiguousarray(got).tobytes())

    def reductions(self, dtype, length):
        all_ = [_brought(dtype, length, rank) for rank in range(self.size)]
        mine = tf.constant(all_[self.rank])
        for name, how in _OPERATIONS.items():
            what = f"{name} {dtype} {length}"
            got = self.call("allreduce", mine, op=getattr(self.engine, name), name=what).numpy()
            _equal(got, _reduced(all_, how, dtype), dtype, what)
            self.note(got)

    def scaled(self, dtype, length):
        all_ = [_brought(dtype, length, rank) for rank in range(self.size)]
        pair = [tf.constant(all_[self.rank][: length // 3]), tf.constant(all_[self.rank][length // 3 :])]
        what = f"scaled {dtype} {length}"
        got = self.call(
            "grouped_allreduce",
            pair,
            op=self.engine.Sum,
            prescale_factor=0.5,
            postscale_factor=4.0,
            name=what,
        )
        _equal(np.concatenate([t.numpy() for t in got]), 2 * np.sum(all_, 0, np.float64), dtype, what)
        self.note(got[0].numpy())

    def moves(self, dtype, length):
        """Lengths differ from rank to rank, and one rank has nothing."""
        counts = [0 if rank == 1 else length // (rank + 1) for rank in range(self.size)]
        all_ = [_brought(dtype, count, rank) for rank, count in enumerate(counts)]
        got = self.call("allgather", tf.constant(all_[self.rank]), name=f"gather {dtype} {length}").numpy()
        np.testing.assert_array_equal(got, np.concatenate(all_))
        self.note(got)
        same = [_brought(dtype, length, rank) for rank in range(self.size)]
        root = self.size - 1
        got = self.call(
            "broadcast", tf.constant(same[self.rank]), self.members[root], name=f"broadcast {dtype} {length}"
        )
        self.note(got.numpy())
        np.testing.assert_array_equal(got.numpy(), same[root])

    def alltoall(self, dtype, length):
        splits = [
            [(length * (to + 1)) // (3 * (of + 1)) for to in range(self.size)] for of in range(self.size)
        ]
        all_ = [_brought(dtype, sum(of), rank) for rank, of in enumerate(splits)]
        got, received = self.call(
            "alltoall",
            tf.constant(all_[self.rank]),
            splits=splits[self.rank],
            name=f"alltoall {dtype} {length}",
        )
        want = [np.split(a, np.cumsum(of))[self.rank] for a, of in zip(all_, splits, strict=True)]
        np.testing.assert_array_equal(got.numpy(), np.concatenate(want))
        np.testing.assert_array_equal(received.numpy(), [len(part) for part in want])

    def reducescatter(self, dtype, length):
        all_ = [_brought(dtype, length, rank) for rank in range(self.size)]
        what = f"reducescatter {dtype} {length}"
        got = self.call("reducescatter", tf.constant(all_[self.rank]), op=self.engine.Sum, name=what)
        parts = np.array_split(_reduced(all_, np.add, dtype), self.size)
        _equal(got.numpy(), parts[self.rank], dtype, what)

    def pieces(self, dtype, length):
        """What hvdext itself hands over: several tensors as one message, one of them with nothing in it."""
        from hvdext.comm.one_message import allreduce_as_one

        cuts = [0, 0, length // 3, length]
        all_ = [_brought(dtype, length, rank) for rank in range(self.size)]

        ops, number = self.engine.mpi_ops, self.set.process_set_id
        name = f"pieces_{dtype}_{length}"

        @tf.function
        def reduce(*tensors):
            fresh = [t + tf.zeros([], t.dtype) for t in tensors]  # of this step: may be reduced in place
            how = {"reduce_op": self.engine.Sum, "prescale_factor": 2.0, "postscale_factor": 0.25}
            sent = [*fresh, tensors[-1]]
            return allreduce_as_one(ops, sent, name, process_set_id=number, **how), tensors

        mine = [tf.constant(part) for part in np.split(all_[self.rank], cuts[1:-1])]
        got, kept = reduce(*mine)
        total = np.sum(all_, 0, np.float64) * 0.5
        want = [*np.split(total, cuts[1:-1]), total[cuts[-2] :]]
        for part, expected in zip(got, want, strict=True):
            _equal(part, expected, dtype, f"pieces {dtype} {length}")
            self.note(part.numpy())
        for before, after in zip(mine, kept, strict=True):
            np.testing.assert_array_equal(before, after)  # what others read is left alone


def _digest(members, dtypes):
    checks = _Checks(members)
    for dtype in dtypes:
        for length in _LENGTHS if dtype in ("float16", "float32") else _LENGTHS[:3]:
            checks.moves(dtype, length)
            checks.alltoall(dtype, length)
            if dtype in _REDUCED:
                checks.reductions(dtype, length)
            if dtype in _FLOATS:
                checks.scaled(dtype, length)
                checks.pieces(dtype, length)
            if dtype in _SCATTERED and length >= checks.size:
                checks.reducescatter(dtype, length)
    return checks.digest.hexdigest()


def _run(hvd):
    return {"digest": _digest(list(range(hvd.size())), _MOVED)}


def _check(ranks):
    assert len({rank["digest"] for rank in ranks}) == 1, ranks


def elsewhere() -> dict:
    """A launch of its own. Ranks of the same letter in HVDEXT_LOCALS, if it is set, share memory."""
    names = os.environ.get("HVDEXT_LOCALS")
    if names is not None:
        os.environ["HVDEXT_LOCAL"] = names[int(os.environ["HOROVOD_RANK"])]
    import hvdext as hvd
    from hvdext.engine.shared_memory import shared_memory

    hvd.init(process_sets=[hvd.ProcessSet(members) for members in SETS])
    digests = {str(m): _digest(m, _SOME) for m in (list(range(hvd.size())), *SETS) if hvd.rank() in m}
    hvd.barrier()  # who leaves ends the job
    return {"memory": shared_memory(), "digests": digests}


PROGRAMS = {"the engine's collectives": Program(_run, _check)}
