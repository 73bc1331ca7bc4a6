"""A copy of Horovod's tests with another import line, and with what is plainly Keras 2 said as in Keras 3."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

FILES = ("test/parallel/test_tensorflow2_keras.py", "test/parallel/test_tensorflow.py")
_HELPERS = ("test/parallel/base_test_tensorflow.py", "test/utils/common.py")
_SHIMS = Path(__file__).parent / "shims"

# (what, instead): regular expressions, tried on every file.
_CHANGES = (
    # hvdext for Horovod.
    (r"import horovod\.tensorflow(\.keras)? as hvd\b", "import hvdext as hvd"),
    (r"import horovod\.keras as hvd_keras", "import hvdext as hvd_keras"),
    (r"hvd\.(util\.)?_executing_eagerly\(\)", "_executing_eagerly()"),
    # Packages that only Horovod's tests need.
    (r"^import mock$", "from unittest import mock"),
    # Each mode a test of its own: the first that fails would hide the other.
    (r"^from tensorflow.python.framework.test_util import run_all_in_graph_and_eager_modes$", "import modes"),
    (r"^run_all_in_graph_and_eager_modes\((\w+)\)$", r"modes.in_both_modes(\1)"),
    # What is private to Horovod and Keras 2.
    (r"\b(\w+)\._agg_helper\.counter\.numpy\(\)", r"__import__('modes').micro_batches(\1)"),
    (r"\bopt\._compute_gradients\(loss=loss, ", "__import__('modes').plain_gradients(loss, "),
    # Keras 3.
    (r",\s*experimental_run_tf_function=False", ""),
    (r",\s*input_length=10", ""),
    (r",\s*fused=False", ""),
    (r"\blr=(0\.\d+)", r"learning_rate=\1"),
    (r"optimizer\.lr\.numpy\(\)", "optimizer.learning_rate.numpy()"),
    (r"keras\.layers\.ThresholdedReLU\((0\.\d+)\)", r"keras.layers.ReLU(threshold=\1)"),
    (r"keras\.losses\.mean_squared_error\b", "keras.losses.mse"),
    (r"\b(\w+)\.ref\(\)", r"id(\1)"),
)


def mended_copy(source: Path, folder: Path) -> list[Path]:
    """Writes the test files of a checkout and their helpers into `folder`, changed; returns the test files.

    Args:
        source: a checkout of Horovod's repository.
        folder: an empty folder, which gets the checkout's sub-folders.

    Raises:
        FileNotFoundError: if `source` is no such checkout.
    """
    for name in (*FILES, *_HELPERS):
        text = (source / name).read_text()
        for pattern, instead in _CHANGES:
            text = re.sub(pattern, instead, text, flags=re.MULTILINE)
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for shim in _SHIMS.glob("*.py"):
        shutil.copy(shim, folder / "test/parallel")
    return [folder / name for name in FILES]
