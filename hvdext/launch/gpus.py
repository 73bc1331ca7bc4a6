"""One GPU for each rank."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from hvdext.common.launcher import rank_info
from hvdext.common.log import warn

CHOICES = ("local_rank", None)


def take_gpu(environ: Mapping[str, str]) -> None:
    """Leaves to TensorFlow this rank's GPU alone, whose memory it takes as it needs it.

    Of a host with fewer GPUs than ranks some take the same one. Where the script has chosen visible devices
    before, or there is no GPU, nothing happens.

    Args:
        environ: this process's environment.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus or tf.config.get_visible_devices("GPU") != gpus:
        return
    info = rank_info(environ)
    mine = gpus[info.local_rank % len(gpus)]
    try:
        tf.config.set_visible_devices(mine, "GPU")
        if tf.config.experimental.get_memory_growth(mine) is None:
            tf.config.experimental.set_memory_growth(mine, True)
    except RuntimeError:
        if len(gpus) > 1 and info.local_rank > 0:
            warn(
                "TensorFlow had set up its devices before hvd.init(): this rank goes on with the GPU that it "
                "takes by itself, the first one of its host. Call hvd.init() at the top of the script."
            )
        return
    except ValueError:  # the script has divided its memory
        pass
    shares = info.local_size > len(gpus) and "CUDA_VISIBLE_DEVICES" not in environ
    if shares and info.local_rank == 0:
        warn(f"{info.local_size} ranks of this host share {len(gpus)} GPU(s), and take memory as needed.")
