"""All programs in one launch per number of ranks: starting ranks takes longer than most programs."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import traceback
from pathlib import Path

import keras

from tests.multiprocess.habits.every import HABITS
from tests.multiprocess.habits.way import Alone, Ranks
from tests.multiprocess.launching.quick_building import build_quickly, optimize_no_graphs
from tests.multiprocess.programs import cases

_PROGRAMS = Path(cases.__file__).parent
# After the others: the first begins a second job, and so does the next, with four ranks.
_LAST = ("runtime_programs", "slice_programs", "pipeline_programs")


def alone() -> dict:
    """The references: every case in plain Keras, in this one process."""
    optimize_no_graphs()
    results = {}
    for name, case in cases.CASES.items():
        results[name] = _result(cases.train_alone, case)
        keras.utils.clear_session(free_memory=False)
    _as_users_have_it()
    for name, main in HABITS.items():
        results[f"habit {name}"] = _result(main, Alone())
        keras.utils.clear_session(free_memory=False)
    assert "hvdext" not in sys.modules
    return results


def on_ranks() -> dict:
    """Every case and every program on this rank, by name."""
    import hvdext as hvd
    from tests.multiprocess.programs import exchange_programs, refusal_programs

    results = {"fit before init": _result(refusal_programs.fit_before_init, hvd)}
    sets = [hvd.ProcessSet(members) for members in exchange_programs.SETS]
    size = int(os.environ["HOROVOD_SIZE"])
    hvd.init(process_sets=sets if size == 4 else None)
    if size > 2:  # with two ranks the cases train as they do for users
        optimize_no_graphs()
    for name, case in cases.CASES.items():
        if size not in case.sizes:
            continue
        keras.config.set_floatx(case.floatx)
        results[name] = _result(cases.train_shared, case)
        keras.utils.clear_session(free_memory=False)
    _as_users_have_it()
    for name, main in HABITS.items() if size == 2 else ():
        results[f"habit {name}"] = _result(main, Ranks(hvd))
        keras.utils.clear_session(free_memory=False)
    build_quickly()
    gc.freeze()  # to Python's collector a graph being built looks like much work
    gc.set_threshold(20_000)
    for name, program in programs(size).items():
        # Names that Keras makes up count from the start again: a program may make more on one rank. Python
        # frees the memory when it thinks fit: looking through all of TensorFlow takes 0.3 s each time.
        keras.utils.clear_session(free_memory=False)
        results[name] = _result(program.run, hvd)
    return results


def _as_users_have_it():
    """Keras' own precision, whatever the last case has left."""
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def programs(size: int) -> dict:
    """The programs of all tables for `size` ranks, by name."""
    found = {}
    tables = {path.stem for path in _PROGRAMS.glob("*_programs.py")}
    for table in (*sorted(tables - set(_LAST)), *_LAST):
        for name, program in importlib.import_module(f"{cases.__package__}.{table}").PROGRAMS.items():
            if size in program.sizes:
                found[name] = program
    return found


def _result(action, argument):
    """What `action` returns, or the error it ends with: the other programs have their turn anyway."""
    start, computing = time.monotonic(), time.process_time()
    try:
        result = {"value": action(argument)}
    except Exception:
        result = {"error": traceback.format_exc()}
    used = {"seconds": time.monotonic() - start, "computing": time.process_time() - computing}
    return result | used
