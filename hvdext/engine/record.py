"""What the installed Horovod says about how it was built.

The build adds one small file to the Horovod package. Reading it needs neither TensorFlow nor
Horovod to be imported, so any part of hvdext may ask at any time.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import pprint
from pathlib import Path
from typing import Any

from hvdext.common.launcher import on_mpi
from hvdext.engine.fixes import FIXES, PROTECTIONS, Fix
from hvdext.engine.target import Target

RECORD_FILE = "_hvdext_fixes.py"

_HEADER = '''"""How this Horovod was built; written by `hvdext build-horovod`, read by hvdext."""

'''


def write_record(package: Path, target: Target, fixes: tuple[Fix, ...] = FIXES) -> None:
    """Adds the record to the source of the Horovod package before it is built.

    Args:
        package: the folder `horovod` of the unpacked source.
        target: what is being built.
        fixes: the source fixes that have been applied.
    """
    record = {
        "key": target.key,
        "fixes": [fix.name for fix in fixes],
        "digest": target.fixes,
        "transports": list(target.options.transports),
        "tensorflow": target.tensorflow,
        "python": target.python,
        "horovod": target.horovod,
    }
    text = _HEADER + "RECORD = " + pprint.pformat(record, sort_dicts=False) + "\n"
    (package / RECORD_FILE).write_text(text, encoding="utf-8")


def horovod_folder() -> Path | None:
    """Returns the folder of the installed Horovod package; None if there is none."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def installed_record() -> dict[str, Any] | None:
    """Returns the installed engine's record; None if hvdext did not build it."""
    folder = horovod_folder()
    return None if folder is None else read_record(folder)


def read_record(package: Path) -> dict[str, Any] | None:
    """Returns the record in a Horovod package; None if it has none.

    Args:
        package: the folder of the Horovod package.
    """
    try:
        module = ast.parse((package / RECORD_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, SyntaxError):
        return None
    for statement in module.body:
        if isinstance(statement, ast.Assign):
            return ast.literal_eval(statement.value)
    return None


def installed_fixes() -> frozenset[str]:
    """Returns the names of the source fixes that the installed Horovod was built with.

    The set is empty if Horovod is missing or somebody else built it.
    """
    record = installed_record()
    return frozenset() if record is None else frozenset(record["fixes"])


def missing_protections() -> list[str]:
    """Returns one sentence per protection that the installed Horovod lacks.

    What concerns Gloo alone is left out in a process that MPI started. The list is empty if nothing is
    missing, and also without any Horovod: then there is one process and nothing to protect.
    """
    if horovod_folder() is None:
        return []
    present = installed_fixes()
    controllers = {"mpi"} if on_mpi(os.environ) else {"gloo", "mpi"}
    return [
        fix.without
        for fix in PROTECTIONS
        if fix.name not in present and controllers.intersection(fix.controllers)
    ]
