"""Settings that every test needs before TensorFlow's first operation."""

import gc
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Processes that tests start import what they run from here, too.
os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

import pytest
import tensorflow as tf

from tests.multiprocess.launching.launch import forked_python
from tests.multiprocess.launching.quick_building import build_quickly

# Ranks as threads: each waiting collective holds one inter-op thread.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(64)

# Test files are rewritten anyway; what ranks run and what helps the tests has assertions, too.
pytest.register_assert_rewrite("tests.clients", "tests.multiprocess.programs", "tests.unit")

_MANY = 100_000  # new objects, as many as some graphs have; a collection then takes 0.1 s


def pytest_addoption(parser):
    parser.addoption("--plain", action="store_true", help="build graphs as TensorFlow and Keras do for users")


def pytest_configure(config):
    if not config.getoption("plain"):
        build_quickly()
    if config.getoption("numprocesses", None):
        forked_python()  # before the workers start, so that these share the servers
    # All that has been imported stays. What tests leave is collected between them: Python looks through all
    # objects when it thinks fit, which takes seconds after some hundred tests, and one test pays for it.
    gc.freeze()
    gc.set_threshold(20 * _MANY)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish():
    if gc.get_count()[0] > _MANY:
        gc.collect()
        gc.freeze()  # what is left are caches: not looked through again
