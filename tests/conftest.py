"""Settings that every test needs before TensorFlow's first operation."""

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Processes that tests start import what they run from here, too.
os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

import pytest
import tensorflow as tf

from tests.multiprocess.launching.quick_building import build_quickly

# Ranks as threads: each waiting collective holds one inter-op thread.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(64)

# Test files are rewritten anyway; what ranks run and what helps the tests has assertions, too.
pytest.register_assert_rewrite("tests.clients", "tests.multiprocess.programs", "tests.unit")

build_quickly()
