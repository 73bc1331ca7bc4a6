"""All habits by name: every script beside this file."""

import importlib
from pathlib import Path

_NO_SCRIPTS = {"every", "way"}

HABITS = {
    path.stem: importlib.import_module(f"tests.multiprocess.habits.{path.stem}").main
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in _NO_SCRIPTS
}
