"""One rank of an elastic training that loses a rank and gets another: `elastic_job.py hosts_file`.

Two ranks begin. Rank 1 kills itself in the second epoch. The other goes on alone, offers the launcher a new
host in the third epoch, and ends with a new rank 1. `effective_weights` says what must come out.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

EPOCHS, STEPS, ROWS = 3, 4, 4
RATE = 0.1
KILLED = (1, 2)  # epoch and batch after which rank 1 is lost; batches are committed in pairs
NEW_HOST = "127.1:1"


def batch(epoch: int, step: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of one rank: float32 of shapes (ROWS, 3) and (ROWS, 1)."""
    generator = np.random.default_rng([7, epoch, step, rank])
    x = generator.normal(size=(ROWS, 3)).astype("float32")
    return x, np.sin(x.sum(axis=1, keepdims=True)) + 0.1 * rank


def effective_weights(history: list) -> tuple[np.ndarray, float]:
    """Plain SGD on the mean squared error of a linear model, in NumPy.

    Args:
        history: (epoch, step, ranks) of each step that counts; its gradient is the mean over the ranks.
    """
    kernel, bias = np.zeros((3, 1)), 0.0
    for epoch, step, ranks in history:
        rows = [batch(epoch, step, rank) for rank in range(ranks)]
        x, y = (np.concatenate(column).astype("float64") for column in zip(*rows, strict=True))
        error = 2 * (x @ kernel + bias - y) / len(x)
        kernel, bias = kernel - RATE * x.T @ error, bias - RATE * error.sum()
    return kernel, bias


def _say(what: str) -> None:
    print(f"{time.time():.2f} {what}", flush=True)


def main(hosts: Path) -> None:
    import keras
    import tensorflow as tf

    import hvdext as hvd

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(4)
    hvd.init(process_sets="dynamic")
    if NEW_HOST not in hosts.read_text():
        hvd.add_process_set(hvd.ProcessSet([0]))  # which its member must outlive; one of all would be none
    born_as = [hvd.rank(), hvd.size()]
    dense = keras.layers.Dense(1, kernel_initializer="zeros", name="out")
    model = keras.Sequential([keras.Input((3,)), dense])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, name="sgd"))
    model.compile(optimizer, "mse", jit_compile=False)
    # Rank 0 begins at zero as the reference does; what the others hold must not matter.
    dense.bias.assign([5.0 * hvd.rank()])
    state = hvd.elastic.KerasState(model, epoch=0, batch=0, history=[])
    resets: list[int] = []
    state.register_reset_callbacks([lambda: resets.append(hvd.size())])

    class Fate(keras.callbacks.Callback):
        """Writes the history, then does to this rank what the test has planned."""

        def on_train_batch_end(self, _, logs=None):
            # A new rank 1 begins in a later epoch.
            if hvd.rank() == 1 and (state.epoch, state.batch - 1) == KILLED:
                _say("KILLED")
                os.kill(os.getpid(), signal.SIGKILL)

        def on_train_batch_begin(self, _, logs=None):
            state.history.append((state.epoch, state.batch, hvd.size()))
            if hvd.size() == 1 and state.epoch == KILLED[0] + 1:
                self._take_in_another()

        def _take_in_another(self):
            state.history.pop()
            hosts.write_text(hosts.read_text() + NEW_HOST + "\n")
            _say("OFFERED")
            end = time.monotonic() + 30
            while time.monotonic() < end:
                state.commit()  # raises once the launcher has announced the new host
                time.sleep(0.1)

    @hvd.elastic.run
    def train(state):
        _say(f"BEGIN {state.epoch} {state.batch} of {hvd.size()} ranks")
        ahead = [(e, s) for e in range(EPOCHS) for s in range(STEPS)][STEPS * state.epoch + state.batch :]
        x, y = (np.stack(column) for column in zip(*(batch(*at, hvd.rank()) for at in ahead), strict=True))
        model.fit(
            tf.data.Dataset.from_tensor_slices((x, y)),
            epochs=EPOCHS - state.epoch,
            steps_per_epoch=STEPS,
            verbose=0,
            callbacks=[
                hvd.callbacks.BroadcastGlobalVariablesCallback(0),
                hvd.elastic.CommitStateCallback(state, batches_per_commit=2),
                hvd.elastic.UpdateBatchStateCallback(state),
                hvd.elastic.UpdateEpochStateCallback(state),
                hvd.callbacks.MetricAverageCallback(),
                Fate(),
            ],
        )
        return "trained"

    outcome = train(state)
    result = {
        "outcome": outcome,
        "born as": born_as,
        "resets": resets,
        "epoch": state.epoch,
        "batch": state.batch,
        "iterations": int(optimizer.iterations),
        "history": state.history,
        "kernel": dense.kernel.numpy().tolist(),
        "bias": dense.bias.numpy().tolist(),
        "difference": hvd.largest_difference(model.variables),
    }
    Path(os.environ["TEST_RESULTS"], f"{hvd.rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
