"""One model on several devices of one process: planned, drawn, placed, trained, saved.

    python examples/place_devices.py
    python examples/place_devices.py --places 4 --balance measured --data fashion-mnist --epochs 3

With enough GPUs the places are GPUs; else the CPU is split into as many logical devices, which shows where
everything goes but makes nothing faster. The same model without a plan is trained beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets
import keras
import numpy as np
import tensorflow as tf

import hvdext as hvd


def main():
    options = parse_arguments()
    devices = split_the_cpu(options.places)
    keras.utils.set_random_seed(options.seed)
    train, test = datasets.load(options.data)
    model = build_model(train[0].shape[1:])

    plan = hvd.plan(model, options.places, options.balance, pins={"stem": 0, "head": options.places - 1})
    print(plan.table())
    options.output.mkdir(parents=True, exist_ok=True)
    plan.draw(options.output / "plan.png")
    plan.save(options.output / "plan.yaml")  # may be edited, and loaded with hvd.Plan.load

    placed = hvd.place(model, plan, devices)

    accuracies = []
    for each in (model, placed):
        keras.utils.set_random_seed(options.seed)
        each.compile(
            keras.optimizers.Adam(0.002),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        each.fit(*train, batch_size=64, epochs=options.epochs, verbose=2 if each is placed else 0)
        accuracies.append(each.evaluate(*test, verbose=0, return_dict=True)["accuracy"])

    print()
    variables = placed.trainable_variables + placed.optimizer.variables[2:]
    for place, device in enumerate(devices):
        here = [v for v in variables if v.value.device.endswith(device.removeprefix("/"))]
        megabytes = sum(np.prod(v.shape) * 4 for v in here) / 1e6
        print(f"place {place} on {device}: {len(here)} variables and optimizer slots, {megabytes:.2f} MB")
    file = options.output / "placed.keras"
    placed.save(file)
    opened = keras.models.load_model(file)  # plain Keras, one device
    apart = np.abs(np.subtract(opened(test[0]), placed(test[0]))).max()
    print(f"test accuracy placed {accuracies[1]:.4f}, on one device {accuracies[0]:.4f}")
    print(f"largest difference of the outputs, placed and opened by plain Keras: {apart:.1e}")
    print(f"plan: {options.output / 'plan.png'}, {options.output / 'plan.yaml'}; model: {file}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument("--places", type=int, default=2)
    parser.add_argument("--balance", choices=["parameters", "memory", "flops", "measured"], default="flops")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("output"))
    return parser.parse_args()


def split_the_cpu(places):
    """Names of as many devices as there are places; before TensorFlow's first operation."""
    if len(tf.config.list_physical_devices("GPU")) >= places:
        return [f"/device:GPU:{i}" for i in range(places)]
    logical = [tf.config.LogicalDeviceConfiguration() for _ in range(places)]
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], logical)
    return [f"/device:CPU:{i}" for i in range(places)]


def build_model(shape):
    """A small residual network: what skips a block may cross from place to place, too."""
    image = keras.Input(shape, name="image")
    x = keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="stem")(image)
    for block in range(3):
        y = keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name=f"conv_{block}a")(x)
        y = keras.layers.BatchNormalization(momentum=0.9, name=f"norm_{block}a")(y)
        y = keras.layers.ReLU(name=f"relu_{block}a")(y)
        y = keras.layers.Conv2D(16, 3, padding="same", use_bias=False, name=f"conv_{block}b")(y)
        y = keras.layers.BatchNormalization(momentum=0.9, name=f"norm_{block}b")(y)
        x = keras.layers.ReLU(name=f"relu_{block}b")(keras.layers.Add(name=f"add_{block}")([x, y]))
    x = keras.layers.Flatten(name="flat")(keras.layers.MaxPooling2D(name="pool")(x))
    x = keras.layers.Dense(64, activation="relu", name="dense")(x)
    return keras.Model(image, keras.layers.Dense(10, name="head")(x), name="small_resnet")


if __name__ == "__main__":
    main()
