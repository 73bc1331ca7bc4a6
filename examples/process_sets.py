"""Two models at once, each trained by its own half of the ranks, then used as an ensemble of all.

    horovodrun -np 4 python examples/process_sets.py

With four ranks, ranks 0 and 2 train one model and ranks 1 and 3 the other.
"""

from __future__ import annotations

import datasets
import keras
import numpy as np

import hvdext as hvd

EPOCHS, BATCH = 8, 16


def main():
    hvd.init(process_sets="dynamic")
    even = hvd.add_process_set(range(0, hvd.size(), 2))
    odd = hvd.add_process_set(range(1, hvd.size(), 2)) if hvd.size() > 1 else even
    mine = even if even.included() else odd

    train, test = datasets.load("digits")
    keras.utils.set_random_seed(hvd.rank() % 2)  # each set its own start and its own order
    model = keras.Sequential(
        [
            keras.Input(train[0].shape[1:]),
            keras.layers.Flatten(),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(
        hvd.DistributedOptimizer(keras.optimizers.Adam(0.003), process_set=mine),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    hvd.broadcast_variables(model.variables, root_rank=mine.ranks[0], process_set=mine)

    length = len(train[0]) // mine.size()
    x, y = (array[mine.rank() :: mine.size()][:length] for array in train)  # dealt within the set
    model.fit(x, y, BATCH, epochs=EPOCHS, verbose=0)

    # Averaging over all ranks counts both models alike, since the sets are of one size.
    alone = model.predict(test[0], verbose=0)
    together = hvd.allreduce(alone).numpy()
    accuracies = hvd.allgather_object((mine.ranks, accuracy_of(alone, test[1])))
    same_within = hvd.allgather_object((mine.ranks, float(np.sum(model.get_weights()[0]))))
    if hvd.rank() == 0:
        for ranks, accuracy in dict(accuracies).items():
            print(f"model of ranks {list(ranks)}: test accuracy {accuracy:.4f}")
        print(f"both together: test accuracy {accuracy_of(together, test[1]):.4f}")
        different = len({total for _, total in same_within})
        print(f"different models: {different}")


def accuracy_of(probabilities, labels):
    return float(np.mean(np.argmax(probabilities, axis=1) == labels))


if __name__ == "__main__":
    main()
