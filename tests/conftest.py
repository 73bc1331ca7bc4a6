"""Settings that every test needs before TensorFlow's first operation."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import tensorflow as tf

# What the ranks run lies beside the tests that start them; tests with threads run some of it, too.
_HELPERS = ("serving", "serving/http", "serving/worker", "inference/predict", "placement")
_HERE = Path(__file__).parent
sys.path.extend([str(_HERE / "multiprocess"), *(str(_HERE / "unit" / folder) for folder in _HELPERS)])
from quick_building import build_quickly

pytest.register_assert_rewrite(
    "callback_programs",
    "cases",
    "collective_programs",
    "consensus_programs",
    "deploy_programs",
    "drop_in_programs",
    "elastic_programs",
    "exchange_programs",
    "overflow_programs",
    "pipeline_programs",
    "predict_programs",
    "process_set_programs",
    "refusal_programs",
    "runtime_programs",
    "slice_programs",
    "strategy_programs",
    "sync_programs",
    "uneven_programs",
    "warmup_programs",
)

# Ranks as threads: each waiting collective holds one inter-op thread.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(64)

build_quickly()
