"""`SyncBatchNormalization`: the statistics of all ranks' batches together."""

from __future__ import annotations

import keras
import tensorflow as tf

from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.names import cleaned, numbered
from hvdext.keras_tools.batch_norm import BatchNormalization


@keras.saving.register_keras_serializable(package="hvdext")
class SyncBatchNormalization(BatchNormalization):
    """Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167) over the batches of all ranks.

    In training, mean and variance are those of one process with all ranks' rows, whether the ranks hold
    equally many or not, and so are the gradients and the moving statistics. Each call exchanges three
    numbers per channel forward and two backward. Inference exchanges nothing.

    Where hvdext is importable, saved models load as they are, once `import hvdext` has been followed by a
    mention of `hvdext.SyncBatchNormalization`. Plain Keras loads them with a class of the same name, by which
    it finds the weights in the file:

        class SyncBatchNormalization(keras.layers.BatchNormalization):
            pass

        known = {"hvdext>SyncBatchNormalization": SyncBatchNormalization}
        model = keras.saving.load_model(path, custom_objects=known)

    Args:
        fused: Horovod's argument; must be False.
        **kwargs: as for `keras.layers.BatchNormalization`, except `synchronized`, which must not be True. The
            layer's name must be the same on all ranks.

    Raises:
        ValueError: if an argument breaks its rule.
    """

    exchanges_forward = True  # what `hvd.callbacks.UnevenBatches` asks of every layer

    def __init__(self, fused: bool | None = False, **kwargs):
        if fused or fused is None:
            raise ValueError(
                "`fused` must be False: a fused kernel sees this rank's batch only. Drop the argument. "
                f"Received: fused={fused!r}."
            )
        if kwargs.get("synchronized"):
            raise ValueError(
                "`synchronized` is for tf.distribute; hvd.SyncBatchNormalization is synchronized by Horovod. "
                f"Drop the argument. Received: synchronized={kwargs['synchronized']!r}."
            )
        super().__init__(**kwargs)

    def moments(
        self, inputs: tf.Tensor, mask: tf.Tensor | None, axes: list[int]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Those of all ranks' inputs together; see `hvdext.keras_tools.batch_norm`."""
        comm = current()
        if comm.size == 1:
            return super().moments(inputs, mask, axes)
        return moments(comm, inputs, mask, axes, numbered(f"hvdext.sync_bn.{cleaned(self.name)}"))


def moments(
    comm: Communicator, inputs: tf.Tensor, mask: tf.Tensor | None, axes: list[int], name: str
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance over `axes` of all ranks' inputs together.

    Each rank sends its count, mean and variance, and all combine them by the formula of Chan, Golub and
    LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample variances"), which loses
    no digits where the mean is large. The gradient is that of the sum of all ranks' losses: averaged over the
    ranks, gradients equal those of one process with the whole batch.

    Args:
        comm: the ranks.
        inputs: floating; ranks may differ in the lengths of `axes`.
        mask: None, or the shape of `inputs` without its last axis: which values count.
        axes: all axes but that of the channels.
        name: the collective's name; `<name>.gradient` is that of its gradient.

    Returns:
        Mean and variance, shape (channels,), the same bits on every rank; 0 where nothing counts.
    """

    @tf.custom_gradient
    def combined(x):
        x = tf.stop_gradient(x)  # eagerly the tape would record what follows, too
        counts = _counts(x, mask)
        mine = _local_moments(x, counts, axes)
        everyone = comm.allgather(mine[tf.newaxis], name)
        everyone = tf.ensure_shape(everyone, [comm.size, *mine.shape])
        shares = tf.math.divide_no_nan(everyone[:, 0], tf.reduce_sum(everyone[:, 0], 0))
        mean = tf.reduce_sum(shares * everyone[:, 1], 0)
        spread = tf.math.squared_difference(everyone[:, 1], mean)
        variance = tf.reduce_sum(shares * (everyone[:, 2] + spread), 0)
        total = tf.reduce_sum(everyone[:, 0], 0)

        def gradient(by_mean, by_variance):
            sums = comm.allreduce([tf.stack([by_mean, by_variance])], numbered(f"{name}.gradient"))[0]
            return _input_gradient(x, counts, axes, mean, total, sums)

        return (mean, variance), gradient

    return combined(inputs)


def _counts(x, mask):
    """1 where a value counts and 0 where it does not, in the shape of `x`; None: all count."""
    if mask is None:
        return None
    return tf.broadcast_to(tf.cast(tf.cast(mask, tf.bool), x.dtype)[..., tf.newaxis], tf.shape(x))


def _local_moments(x, counts, axes):
    """This rank's count, mean and variance of each channel, shape (3, channels)."""
    # Not 0 * x, which is no zero where a masked value is infinite.
    used = x if counts is None else tf.where(counts > 0, x, 0)
    count = tf.reduce_sum(tf.ones_like(x) if counts is None else counts, axes, keepdims=True)
    mean = tf.math.divide_no_nan(tf.reduce_sum(used, axes, keepdims=True), count)
    squares = tf.math.squared_difference(x, mean)
    used = squares if counts is None else tf.where(counts > 0, squares, 0)
    variance = tf.math.divide_no_nan(tf.reduce_sum(used, axes, keepdims=True), count)
    return tf.stack([tf.squeeze(part, axes) for part in (count, mean, variance)])


@tf.custom_gradient
def _no_second_gradient(x):
    def gradient(_):
        raise LookupError("hvd.SyncBatchNormalization has first derivatives only.")

    return tf.identity(x), gradient


def _input_gradient(x, counts, axes, mean, total, sums):
    """d(sum of losses) / dx: (mean's gradient + 2 (x - mean) variance's gradient) / total count."""
    shape = [1 if axis in axes else -1 for axis in range(x.shape.rank)]
    by_mean, by_variance = tf.unstack(tf.math.divide_no_nan(sums, total))
    result = tf.reshape(by_mean, shape) + 2 * (x - tf.reshape(mean, shape)) * tf.reshape(by_variance, shape)
    return _no_second_gradient(result if counts is None else tf.where(counts > 0, result, 0))
