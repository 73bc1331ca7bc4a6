"""Predicts images on all ranks with a trained model, is interrupted half-way, and goes on from there.

    horovodrun -np 4 python examples/train.py          # makes output/model.keras
    horovodrun -np 4 python examples/batch_predict.py
    python examples/batch_predict.py                   # one process: the same predictions, bit by bit

Rank 0 writes the predictions to output/predictions, batch by batch; no rank holds all of them. An
interruption is played here by a batch that cannot be read. A rank that is killed leaves the same behind:
start the script again with --resume.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import datasets
import keras
import numpy as np
import tensorflow as tf

import hvdext as hvd


def main():
    options = parse_arguments()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    if hvd.rank() == 0 and not options.resume:
        shutil.rmtree(options.output, ignore_errors=True)
    hvd.barrier()
    model = hvd.deploy(options.model, compile=True)  # only rank 0 needs to have the file
    _, (images, labels) = datasets.load("digits")
    data = Images(images, options.batch_size)

    if not options.resume:
        data.broken = len(data) // 2
        try:
            hvd.predict(model, data, output=options.output)
        except OSError as error:
            say(f"interrupted: {error}")
        data.broken = None

    logits = hvd.predict(model, data, output=options.output, resume=True)
    if hvd.rank() == 0:  # an array in a file; the other ranks have None
        accuracy = np.mean(np.argmax(logits, axis=1) == labels)
        print(f"{hvd.size()} ranks: {len(logits)} images, test accuracy {accuracy:.4f}")
        print(f"predictions: {options.output / 'predictions.npy'}")

    _, accuracy = hvd.evaluate(model, images, labels)  # all ranks get the result
    say(f"by hvd.evaluate: test accuracy {accuracy:.4f}")


class Images(keras.utils.PyDataset):
    """Batches that could come from anywhere; each rank asks for its own only.

    Attributes:
        broken: the batch that cannot be read; None: all can.
    """

    def __init__(self, images, batch_size):
        super().__init__()
        self._images = images
        self._batch_size = batch_size
        self.broken = None

    def __len__(self):
        return -(-len(self._images) // self._batch_size)

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("this batch cannot be read now")
        return (self._images[index * self._batch_size : (index + 1) * self._batch_size],)


def say(text):
    if hvd.rank() == 0:
        print(text)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("output/model.keras"), help="made by train.py")
    parser.add_argument("--output", type=Path, default=Path("output/predictions"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--resume", action="store_true", help="go on with what --output holds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
