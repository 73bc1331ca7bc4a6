"""What `test_devices.py` runs in a process that begins with four logical CPU devices.

A program returns nothing, and raises where something is wrong.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import hvdext as hvd
from hvdext.placement.devices import beside_inputs

layers = keras.layers


def mlp():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="relu"),
            layers.Dropout(0.3, seed=7),
            layers.Dense(8, activation="tanh", kernel_regularizer="l2"),
            layers.Dense(8, activity_regularizer="l2"),
            layers.Dense(3),
        ],
        name="mlp",
    )


def cnn_with_skips():
    x = image = keras.Input((6, 6, 2), name="image")
    for i in range(3):
        y = layers.Conv2D(4, 3, padding="same", name=f"conv{i}")(x)
        y = layers.BatchNormalization(name=f"norm{i}")(y)
        x = layers.Concatenate(name=f"cat{i}")([layers.ReLU(name=f"relu{i}")(y), image, x])
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(3, name="head")(x), name="cnn")


def shared_layers():
    """A layer before and after another, a nested model called twice, a layer that builds its own inside."""

    @keras.saving.register_keras_serializable("tests")
    class Block(layers.Layer):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.inner = layers.Dense(units, activation="relu")
            self.scale = keras.Variable(1.5, name="scale")

        def call(self, x):
            return self.inner(x) * self.scale

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    tower = keras.Sequential(
        [keras.Input((6,)), layers.Dense(6, name="a"), layers.LayerNormalization(name="b")], name="tower"
    )
    shared = layers.Dense(6, activation="tanh", name="shared")
    x = keras.Input((6,), name="x")
    y = tower(shared(x))
    y = Block(6, name="block")(y) + x
    return keras.Model(x, layers.Dense(3, name="head")(tower(shared(y))), name="shared_layers")


def many_inputs_and_outputs():
    """Tokens with a mask and numbers in, two targets out; a nested model with two inputs."""
    tokens, numbers = keras.Input((5,), dtype="int32", name="tokens"), keras.Input((6,), name="numbers")
    x = layers.Embedding(11, 6, mask_zero=True, name="embedding")(tokens)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.GlobalAveragePooling1D(name="mean")(x)  # of what the mask leaves
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    join = keras.Model([a, b], layers.Add(name="add")([layers.Dense(6, name="left")(a), b]), name="join")
    y = join([x, numbers])
    outputs = {"first": layers.Dense(3, name="first")(y), "second": layers.Dense(1, name="second")(x)}
    return keras.Model({"tokens": tokens, "numbers": numbers}, outputs, name="many")


def _data(model, samples=24):
    """Inputs and targets that fit `model`."""
    rng = np.random.default_rng(3)

    def numbers(tensor):
        shape = (samples, *tensor.shape[1:])
        return (
            rng.integers(0, 11, shape).astype("int32")
            if tensor.dtype == "int32"
            else rng.normal(size=shape).astype("float32")
        )

    if isinstance(model, keras.Sequential):
        return numbers(model.inputs[0]), numbers(model.outputs[0])
    return keras.tree.map_structure(numbers, model.input), keras.tree.map_structure(numbers, model.output)


def _device(variable):
    return tf.DeviceSpec.from_string(getattr(variable, "value", variable).device).device_index


def _close(a, b, tolerance=1e-5):
    for one, other in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=tolerance, rtol=tolerance)


def everything(build):
    """One model at two and at four places: names, devices, outputs, gradients, six steps; then files."""
    keras.utils.set_random_seed(1)
    model = build()
    x, y = _data(model)
    plans = [hvd.plan(model, places, forward_only=False, crossing=0.1) for places in (2, 4)]
    copies = [hvd.place(model, plan) for plan in plans]
    gradients = _gradients(model, x)
    for plan, placed in zip(plans, copies, strict=True):
        assert type(placed) is type(model)
        assert placed.name == model.name
        assert [v.path for v in placed.variables] == [v.path for v in model.variables]
        assert getattr(placed, "output_names", None) == getattr(model, "output_names", None)
        _variables_are_where_the_plan_says(plan, placed)
        _close(model.get_weights(), placed.get_weights(), 0)
        _close(model(x), placed(x))
        _close(gradients, _gradients(placed, x))

    histories = []
    for each in (model, *copies):
        each.compile(keras.optimizers.Adam(0.01, clipnorm=1.0), "mse")
        histories.append(each.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"])
        assert int(each.optimizer.iterations) == 6
        _close(histories[0], histories[-1])
        _close(model.get_weights(), each.get_weights())
        _close(_values(model.optimizer), _values(each.optimizer))
    for plan, placed in zip(plans, copies, strict=True):
        _slots_are_beside_their_variables(placed)
        _variables_are_where_the_plan_says(plan, placed)

    if build in (mlp, shared_layers):
        _files_and_weights(build, model, copies[0], x, y)


def _files_and_weights(build, model, placed, x, y):
    _close(model.evaluate(x, y, verbose=0), placed.evaluate(x, y, verbose=0))
    predicted = placed.predict(x, verbose=0)
    _close(model(x), predicted)
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "model.keras"))
        placed.save(file)
        opened = keras.models.load_model(file)
        assert all("call" not in vars(layer) for layer in opened.layers)
        _close(opened(x), predicted)
        _close(_values(opened.optimizer), _values(placed.optimizer))
    again = build()
    again.set_weights(placed.get_weights())
    _close(again(x), predicted)
    placed.set_weights([weight * 0.5 for weight in model.get_weights()])
    _close([weight * 0.5 for weight in model.get_weights()], placed.get_weights(), 0)


def _values(optimizer):
    return [variable.numpy() for variable in optimizer.variables]


def _variables_are_where_the_plan_says(plan, placed):
    used = set()
    for path in plan.assignment:
        layer = placed
        for name in path.split("/"):
            layer = next((own for own in getattr(layer, "layers", []) if own.name == name), None)
        for variable in getattr(layer, "variables", []):
            used.add(_device(variable))
            assert _device(variable) == plan.place_of(path), (path, variable.path, _device(variable))
    assert len(used) > 1


def _slots_are_beside_their_variables(model):
    names = {v.path.replace("/", "_"): _device(v) for v in model.trainable_variables}
    found = 0
    for slot in model.optimizer.variables[2:]:
        owner = max((n for n in names if slot.path.split("/")[-1].startswith(n + "_")), key=len)
        assert _device(slot) == names[owner], slot.path
        found += 1
    assert found == 2 * len(names)


def _gradients(model, x):
    state = [v.numpy() for v in model.variables]
    with tf.GradientTape() as tape:
        outputs = keras.tree.flatten(model(x, training=True))
        loss = sum(tf.reduce_sum(output * output) for output in outputs)
    found = tape.gradient(loss, model.trainable_variables)
    for variable, value in zip(model.variables, state, strict=True):
        variable.assign(value)
    return [tf.convert_to_tensor(gradient) for gradient in found]


def computation_is_where_the_plan_says():
    """Matrix products, forward and backward, updates, and what goes from one device to the other."""
    x = keras.Input((6,), name="x")
    h = layers.Dense(7, use_bias=False, name="a")(x)
    h = layers.Dense(8, use_bias=False, name="b")(h)
    model = keras.Model(x, layers.Dense(9, use_bias=False, name="c")(h))
    placed = hvd.place(model, hvd.plan(model, 2, pins={"a": 0, "b": 1}), devices=["/CPU:3", "CPU:1"])
    placed.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    data = (tf.zeros((4, 6)), tf.zeros((4, 9)))
    graph = tf.function(placed.train_step).get_concrete_function(data).graph

    def devices(kind, word=""):
        operations = [op for op in graph.get_operations() if op.type == kind and word in op.name]
        return [tf.DeviceSpec.from_string(op.device).device_index for op in operations]

    # Forward a, b, c; backward c (both operands), b (both), a (its kernel only).
    assert devices("MatMul") == [3, 1, 1, 1, 1, 1, 1, 3], devices("MatMul")
    assert devices("AssignVariableOp", "sgd") == [3, 1, 1], devices("AssignVariableOp", "sgd")
    assert set(devices("Mul", "sgd")) == {3, 1}
    heavy = [
        op for op in graph.get_operations() for t in op.outputs if t.shape.num_elements() in (42, 56, 72)
    ]
    for op in heavy:
        where = {tf.DeviceSpec.from_string(t.device).device_index for t in (*op.inputs, *op.outputs)}
        assert len(where - {None}) <= 1, (op.type, op.name, where)


def tensors_cross_once():
    """What two layers of another device take is brought there once, and its gradient back once."""
    x = keras.Input((6,), name="x")
    a = layers.Dense(6, use_bias=False, name="a")(x)
    b = layers.Dense(6, use_bias=False, name="b")(a)
    model = keras.Model(x, layers.Add(name="add")([layers.ReLU(name="relu")(a), b]))
    placed = hvd.place(model, hvd.plan(model, 2, pins={"a": 0, "b": 1, "relu": 1}), ["CPU:2", "CPU:3"])

    @tf.function
    def gradient(x):
        with beside_inputs():
            with tf.GradientTape() as tape:
                y = placed(x)
            return tape.gradient(y, placed.trainable_variables)

    operations = gradient.get_concrete_function(tf.zeros((4, 6))).graph.get_operations()
    crossings = [
        tuple(tf.DeviceSpec.from_string(t.device).device_index for t in (op.inputs[0], op.outputs[0]))
        for op in operations
        if op.type == "Identity"
    ]
    assert crossings.count((2, 3)) == crossings.count((3, 2)) == 1, crossings
    _close(gradient(tf.ones((4, 6))), _gradients_of(model, tf.ones((4, 6))))


def _gradients_of(model, x):
    with tf.GradientTape() as tape:
        y = model(x)
    return tape.gradient(y, model.trainable_variables)


def frozen_layers_stay_frozen():
    model = cnn_with_skips()
    model.get_layer("conv1").trainable = False
    model.get_layer("norm0").gamma.trainable = False
    placed = hvd.place(model, hvd.plan(model, 2))
    assert [v.path for v in placed.trainable_variables] == [v.path for v in model.trainable_variables]


def from_a_builder():
    def build():
        model = cnn_with_skips()
        model.get_layer("head").bias.assign([1.0, 2.0, 3.0])
        return model

    plan = hvd.plan(build, 2)
    placed = hvd.place(build, plan)
    assert placed.get_layer("head").bias.numpy().tolist() == [1.0, 2.0, 3.0]
    assert np.std(placed.get_layer("head").kernel) > 0.1
    x, y = _data(placed)
    placed.compile("adam", "mse")
    placed.fit(x, y, verbose=0)
    _variables_are_where_the_plan_says(plan, placed)


def state_outside_of_variables():
    normal = layers.Normalization(name="normal")
    normal.adapt(np.array([[1.0, 2.0], [3.0, 6.0]]))
    model = keras.Sequential([keras.Input((2,)), normal, layers.Dense(2)])
    placed = hvd.place(model, hvd.plan(model, 2))
    _close(model.predict(np.ones((3, 2)), verbose=0), placed.predict(np.ones((3, 2)), verbose=0))


def mixed_precision_and_eager():
    with_policy = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    keras.config.set_dtype_policy(with_policy)
    try:
        model = cnn_with_skips()
        placed = hvd.place(model, hvd.plan(model, 2))
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = _data(model)
    for m in (model, placed):
        m.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
        m.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    _close(model.get_weights(), placed.get_weights())


def its_own_training_step():
    class Own(keras.Model):
        def train_step(self, data):
            return {**super().train_step(data), "own": 1.0}

    x = keras.Input((4,))
    model = Own(x, layers.Dense(2)(layers.Dense(3)(x)))
    placed = hvd.place(model, hvd.plan(model, 2))
    placed.compile("sgd", "mse")
    assert placed.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0).history["own"] == [1.0]

    class Whole(Own):
        def __init__(self):
            x = keras.Input((4,))
            super().__init__(x, layers.Dense(2)(layers.Dense(3)(x)))

    whole = Whole()
    message = _message(lambda: hvd.place(whole, hvd.plan(whole, 2)))
    assert message.endswith("Received: Whole 'whole', which has one, and Own.train_step."), message


def refusals():
    model = mlp()
    plan = hvd.plan(model, 4)
    assert "`plan` must be a plan, from hvd.plan(model, places)." in _message(lambda: hvd.place(model, 2))
    assert "`plan` must be a plan for the model" in _message(lambda: hvd.place(cnn_with_skips(), plan))
    for devices, expected in [
        (["/CPU:0"], "`devices` must hold one device for each of the 4 places."),
        ("/CPU:0", "`devices` must be a list of names"),
        (["/CPU:0", "/CPU:1", "/CPU:2", "/CPU:4"], "Received: '/CPU:4'."),
        (["/CPU:0", "/CPU:1", "/CPU:2", "nonsense"], "Received: 'nonsense'."),
    ]:
        message = _message(lambda devices=devices: hvd.place(model, plan, devices))
        assert expected in message, message
    five = hvd.plan(model, 5)
    message = _message(lambda: hvd.place(model, five))
    assert "Received: 5 places, and there are ['/device:CPU:0', " in message, message
    assert hvd.place(model, five, ["/CPU:0", "/CPU:1"] * 2 + ["CPU:0"]).built

    class Forgets(layers.Layer):
        def __init__(self, units=2, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(units)

        def call(self, x):
            return self.dense(x)

        def get_config(self):
            return {"name": self.name}

    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(Forgets(5, name="forgets")(x)))
    message = _message(lambda: hvd.place(model, hvd.plan(model, 2)))
    assert "`get_config` describes in full" in message, message
    assert "Forgets 'forgets'" in message, message


def _message(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("nothing was raised")


PROGRAMS = {
    **{
        build.__name__: lambda build=build: everything(build)
        for build in (mlp, cnn_with_skips, shared_layers, many_inputs_and_outputs)
    },
    **{
        program.__name__: program
        for program in (
            computation_is_where_the_plan_says,
            tensors_cross_once,
            frozen_layers_stay_frozen,
            from_a_builder,
            state_outside_of_variables,
            mixed_precision_and_eager,
            its_own_training_step,
            refusals,
        )
    },
}


def main(result):
    """Writes into the file `result` what went wrong, by program."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    problems = {}
    for name, program in PROGRAMS.items():
        keras.utils.clear_session()
        try:
            program()
            problems[name] = None
        except Exception:
            problems[name] = traceback.format_exc()
    Path(result).write_text(json.dumps(problems))


if __name__ == "__main__":
    main(sys.argv[1])
