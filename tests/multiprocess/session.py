"""All programs in one launch per number of ranks: starting ranks takes longer than most programs."""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback

import cases
import keras
from quick_building import build_quickly, optimize_no_graphs

TABLES = (
    "callback_programs",
    "exchange_programs",
    "overflow_programs",
    "saving_programs",
    "process_set_programs",
    "refusal_programs",
    "elastic_programs",
    "uneven_programs",
    "sync_programs",
    "strategy_programs",
    "consensus_programs",
    "deploy_programs",
    "predict_programs",
    "warmup_programs",
    "collective_programs",
    "drop_in_programs",
    "runtime_programs",  # after the others: it begins a second job
    "slice_programs",  # and so does this one, with four ranks
    "pipeline_programs",
)


def alone() -> dict:
    """The references: every case in plain Keras, in this one process."""
    optimize_no_graphs()
    results = {}
    for name, case in cases.CASES.items():
        results[name] = _result(cases.train_alone, case)
        keras.utils.clear_session(free_memory=False)
    assert "hvdext" not in sys.modules
    return results


def on_ranks() -> dict:
    """Every case and every program on this rank, by name."""
    import exchange_programs
    import refusal_programs

    import hvdext as hvd

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
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    build_quickly()
    for name, program in programs(size).items():
        # Names that Keras makes up count from the start again: a program may make more on one rank. Python
        # frees the memory when it thinks fit: looking through all of TensorFlow takes 0.3 s each time.
        keras.utils.clear_session(free_memory=False)
        results[name] = _result(program.run, hvd)
    return results


def programs(size: int) -> dict:
    """The programs of all tables for `size` ranks, by name."""
    found = {}
    for table in TABLES:
        for name, program in importlib.import_module(table).PROGRAMS.items():
            if size in program.sizes:
                found[name] = program
    return found


def _result(action, argument):
    """What `action` returns, or the error it ends with: the other programs have their turn anyway."""
    start = time.monotonic()
    try:
        result = {"value": action(argument)}
    except Exception:
        result = {"error": traceback.format_exc()}
    return result | {"seconds": time.monotonic() - start}
