"""Building Horovod for the installed TensorFlow, and finding out what an engine can do.

Importing this package imports neither TensorFlow nor Horovod.
"""

from hvdext.common.public_names import unknown_name
from hvdext.engine.build import build_horovod
from hvdext.engine.errors import EngineError
from hvdext.engine.record import installed_fixes, missing_protections

__all__ = ["EngineError", "build_horovod", "installed_fixes", "missing_protections"]


def __getattr__(name: str) -> None:
    raise unknown_name(__name__, name, __all__)
