"""Headers that Horovod asks for where newer TensorFlow versions no longer keep them.

Only Horovod's XLA ops, which exist on GPUs alone, include them. Nothing of TensorFlow or Horovod is
changed here: the compiler is given extra folders to look in.
"""

from __future__ import annotations

from pathlib import Path

# Folders below TensorFlow's include folder that its own headers expect on the include path.
_BUNDLED = (
    "external/highwayhash",
    "external/farmhash_archive/src",
)

# (the path Horovod includes, where newer TensorFlow versions keep the same header)
_MOVED = (("tensorflow/compiler/xla/client/xla_builder.h", "xla/hlo/builder/xla_builder.h"),)


def extra_include_dirs(tensorflow_include: Path, scratch: Path) -> list[Path]:
    """Returns the folders to add to the include path for this TensorFlow.

    Args:
        tensorflow_include: TensorFlow's own include folder.
        scratch: an existing folder in which forwarding headers may be written.
    """
    found = [tensorflow_include / name for name in _BUNDLED]
    found = [folder for folder in found if folder.is_dir()]
    forwarding = scratch / "forwarding-headers"
    for old, new in _MOVED:
        if not (tensorflow_include / old).exists() and (tensorflow_include / new).exists():
            header = forwarding / old
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(f'#include "{new}"\n', encoding="utf-8")
    if forwarding.is_dir():
        found.append(forwarding)
    return found
