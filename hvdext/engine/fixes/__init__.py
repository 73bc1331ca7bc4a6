"""The scripted edits to Horovod's source: what is changed, where, and why."""

from hvdext.engine.fixes.applying import FIXES, PROTECTIONS, apply, digest
from hvdext.engine.fixes.edits import Edit, Fix, FixError
from hvdext.engine.fixes.stock import STALL_CHECK, STATEFUL_OPS

__all__ = [
    "FIXES",
    "PROTECTIONS",
    "STALL_CHECK",
    "STATEFUL_OPS",
    "Edit",
    "Fix",
    "FixError",
    "apply",
    "digest",
]
