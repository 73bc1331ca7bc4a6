"""What ranks must refuse, all of them alike. Each program returns the error its rank has seen."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from tests.multiprocess.programs.exchange_programs import (
    Program,
    applied,
    apply_sgd,
    assert_all,
    everyone,
    gradients_of,
    make_variables,
    mean,
)

_MISMATCH = "MismatchError"


def _error(action):
    try:
        action()
    except (ValueError, RuntimeError, TypeError) as error:
        return [type(error).__name__, str(error)]
    return ["no error", ""]


def _model(hvd, units=5, optimizer=None, **compile):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(units, activation="relu", name="hidden"),
            keras.layers.Dense(1, name="out"),
        ]
    )
    optimizer = hvd.DistributedOptimizer(optimizer or keras.optimizers.SGD(0.1, momentum=0.9))
    model.compile(optimizer, "mse", **compile)
    return model


def _fit(model, steps=2, **options):
    model.fit(np.ones((4 * steps, 4)), np.ones((4 * steps, 1)), batch_size=4, verbose=0, **options)


def _heads_of_its_own(hvd):
    """A task each: the gradients of the heads, which have one shape, do not belong together."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b")])
    model.set_weights([np.ones_like(w) for w in model.get_weights()])
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0, name="tasks"))

    @tf.function
    def step(tasks):
        with tf.GradientTape() as tape:
            outputs = dict(zip("ab", model(np.ones((2, 4), "float32")), strict=True))
            loss = tf.add_n([tf.reduce_mean(outputs[task]) for task in tasks])
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    step("ab")
    before = model.get_weights()
    try:
        step("ab"[hvd.rank() % 2])
    except tf.errors.InvalidArgumentError as error:
        apart = max(np.abs(w - v).max() for w, v in zip(before, model.get_weights(), strict=True))
        return ["which gradients of 'tasks'" in str(error).replace("\\", ""), float(apart)]
    return ["no error", 0.0]


def _weights_of_its_own(hvd):
    """Rank 0 has loaded its best weights between two trainings."""
    model = _model(hvd)
    _fit(model, callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)])
    if hvd.rank() == 0:
        model.set_weights([w + 1 for w in model.get_weights()])
    before = model.get_weights()
    try:
        _fit(model)
    except tf.errors.InvalidArgumentError as error:
        apart = max(np.abs(w - v).max() for w, v in zip(before, model.get_weights(), strict=True))
        return ["do not hold the same" in str(error) and "hidden/kernel]" in str(error), float(apart)]
    return ["no error", 0.0]


def _check_refused(ranks):
    assert ranks == [[True, 0.0]] * len(ranks)


def _program(action, kind, *fragments, sizes=(2, 3, 4)):
    def check(ranks):
        assert {name for name, _ in ranks} == {kind}
        (text,) = {message for _, message in ranks}  # the same on every rank
        for fragment in fragments:
            assert fragment in text

    return Program(lambda hvd: _error(lambda: action(hvd)), check, sizes)


def _other_model(hvd):
    _fit(_model(hvd, units=6 if hvd.rank() == 1 else 5))


def _other_setting(hvd):
    _fit(_model(hvd, optimizer=keras.optimizers.SGD(0.1, momentum=0.8 if hvd.rank() == 1 else 0.9)))


def _other_optimizer(hvd):
    make = keras.optimizers.Adam if hvd.rank() == 1 else keras.optimizers.SGD
    _fit(_model(hvd, optimizer=make(name="same")))


def _other_steps(hvd):
    _fit(
        _model(hvd),
        steps=3 if hvd.rank() == 1 else 2,
        callbacks=[hvd.callbacks.BroadcastGlobalVariablesCallback(0)],
    )


def _other_rate_meanwhile(hvd):
    model = _model(hvd)
    model.set_weights([np.full_like(w, 0.5) for w in model.get_weights()])

    def change(epoch, logs):
        model.optimizer.learning_rate = 0.1 + hvd.rank()

    callback = keras.callbacks.LambdaCallback(on_epoch_end=change)
    _fit(model, epochs=2, callbacks=[callback])


def _stops_alone(hvd):
    model = _model(hvd)
    model.set_weights([np.full_like(w, 0.5) for w in model.get_weights()])

    def stop(epoch, logs):
        model.stop_training = hvd.rank() == 0

    callback = keras.callbacks.LambdaCallback(on_epoch_end=stop)
    _fit(model, epochs=2, callbacks=[callback])


def _order_of_its_own(hvd):
    hvd.data.shard(tf.data.Dataset.range(64).shuffle(64, seed=hvd.rank()), batch_size=2)


def _other_vocabulary(hvd):
    words = keras.layers.StringLookup(vocabulary=["a", "b", "c"][:: -1 if hvd.rank() else 1])
    model = keras.Sequential([keras.Input((1,), dtype="string"), words, keras.layers.Embedding(4, 1)])
    model.set_weights([np.ones_like(w) for w in model.get_weights()])
    model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse")
    model.fit(tf.constant([["a"], ["b"]]), np.ones((2, 1, 1)), verbose=0)


def _other_passes(hvd):
    applied(hvd, gradients_of(0), backward_passes_per_step=2 if hvd.rank() == 1 else 3)


def _other_op(hvd):
    applied(hvd, gradients_of(0), op=hvd.Sum if hvd.rank() == 1 else hvd.Average)


def _other_root(hvd):
    hvd.broadcast_variables([keras.Variable(1.0)], root_rank=hvd.rank() % 2)


def _in_a_compiled_function(hvd):
    tf.function(lambda: hvd.allreduce(tf.ones(3), name="compiled"), jit_compile=True)()


def _wrong_pattern(hvd):
    applied(hvd, gradients_of(0), select="*/gamma")


def _wrong_pattern_on_one(hvd):
    applied(hvd, gradients_of(0), select="*/gamma" if hvd.rank() == 1 else None)


def _root_too_large(hvd):
    hvd.broadcast_variables([keras.Variable(1.0)], root_rank=7)


def _clipped_with_local_part(hvd):
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=0.5)
    variables = make_variables()
    optimizer = hvd.DistributedOptimizer(optimizer, select="*_kernel")
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)


def _clipped_with_registered_variable(hvd):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0, global_clipnorm=0.5))
    variables = make_variables()
    optimizer.register_local_var(variables[2])
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)


def _clipped_with_local_part_on_one(hvd):
    optimizer = keras.optimizers.SGD(1.0, global_clipnorm=0.5)
    variables = make_variables()
    optimizer = hvd.DistributedOptimizer(optimizer, select="*_kernel" if hvd.rank() == 1 else None)
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)


def _stranger_in_groups(hvd):
    variables = make_variables()
    stranger = keras.Variable(np.zeros(2), dtype="float64", name="stranger")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), groups=[[variables[0], stranger]])
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)


def _repeated_in_groups_on_one(hvd):
    variables = make_variables()
    again = [variables[1]] if hvd.rank() == 1 else []
    groups = [[variables[0], variables[1]], [variables[3], *again]]
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), groups=groups)
    apply_sgd(optimizer, gradients_of(hvd.rank()), variables)


def _other_op_of_a_tape(hvd):
    """The first tape over the source is alike on all ranks, the second is not."""
    source = tf.Variable([1.0, 2.0], name="source")
    for op in (hvd.Average, hvd.Adasum if hvd.rank() == 1 else hvd.Sum):
        with hvd.DistributedGradientTape(tf.GradientTape(), op=op) as tape:
            loss = tf.reduce_sum(source)
        tape.gradient(loss, [source])


def _scaled_accumulation_in_keras(hvd):
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(inner))
    _fit(_wrapped_already(optimizer))


def _wrapped_already(optimizer):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def fit_before_init(hvd):
    """Called before `hvd.init()`."""
    return _error(lambda: _fit(_model(hvd)))


PROGRAMS = {
    "other model": _program(
        _other_model, _MISMATCH, "rank 1", "hidden/kernel (4, 5)", "hidden/kernel (4, 6)", "(6, 1)"
    ),
    "other setting": _program(_other_setting, _MISMATCH, "rank 1", "'momentum': 0.9", "'momentum': 0.8"),
    "other optimizer": _program(_other_optimizer, _MISMATCH, "rank 1: 'Adam'", "'SGD'"),
    "other steps": _program(_other_steps, _MISMATCH, "model.fit", "steps per epoch", "rank 1: 3", ": 2"),
    "other passes": _program(_other_passes, _MISMATCH, "backward_passes_per_step", "rank 1: 2", ": 3"),
    "other op": _program(_other_op, _MISMATCH, "op", "rank 1: 'Sum'", "'Average'"),
    "other root": _program(_other_root, _MISMATCH, "root_rank", ": 0", ": 1"),
    "in a compiled function": _program(
        _in_a_compiled_function,
        "RuntimeError",
        "hvdext.user.allreduce.compiled",
        "function that XLA compiles",
    ),
    "wrong pattern": _program(_wrong_pattern, "ValueError", "`select` must match", "'*/gamma'", "scale"),
    "wrong pattern on one rank": _program(
        _wrong_pattern_on_one, _MISMATCH, "`select` must match", "'*/gamma'", "rank 1: "
    ),
    "root too large": _program(_root_too_large, "ValueError", "`root_rank`", "root_rank=7"),
    "accumulation in Keras with loss scale": _program(
        _scaled_accumulation_in_keras, "ValueError", "`gradient_accumulation_steps` must be None", "=2"
    ),
    "global_clipnorm with a local part": _program(
        _clipped_with_local_part,
        "ValueError",
        "`global_clipnorm` must be None",
        "=0.5",
        "'first_bias', 'scale'",
    ),
    "global_clipnorm with a registered variable": _program(
        _clipped_with_registered_variable, "ValueError", "`global_clipnorm` must be None", "local ['scale']"
    ),
    "global_clipnorm with a local part on one rank": _program(
        _clipped_with_local_part_on_one,
        _MISMATCH,
        "The ranks disagree",
        "first_bias",
        "the others are local",
    ),
    "stranger in groups": _program(
        _stranger_in_groups, "ValueError", "`groups` must hold", "not trained: ['stranger']"
    ),
    "repeated variable in groups on one rank": _program(
        _repeated_in_groups_on_one,
        _MISMATCH,
        "`groups` must hold",
        "repeated: ['first_bias']",
        "rank 1: ",
    ),
    "other op of a tape": _program(
        _other_op_of_a_tape,
        _MISMATCH,
        "DistributedGradientTape",
        "'Sum'",
        "rank 1: 'Adasum'",
        sizes=(2, 4),
    ),
    "adasum on three ranks": _program(
        lambda hvd: applied(hvd, gradients_of(0), op=hvd.Adasum),
        "ValueError",
        "power-of-two",
        "3 ranks",
        sizes=(3,),
    ),
    "a learning rate that changes on one rank": _program(
        _other_rate_meanwhile, _MISMATCH, "learning_rate", "AsOneProcess", "before epoch 2"
    ),
    "a rank that stops alone": _program(_stops_alone, _MISMATCH, "AsOneProcess", "rank 0: the end"),
    "an order of its own": _program(_order_of_its_own, "ValueError", "same order", "ShuffleDataset.seed2"),
    "a vocabulary of its own": _program(_other_vocabulary, _MISMATCH, "vocabulary 0", "rank 0: "),
    "a head on each rank": Program(_heads_of_its_own, _check_refused, sizes=(2, 4)),
    "weights of its own": Program(_weights_of_its_own, _check_refused, sizes=(2, 4)),
    # After all this, the ranks can still talk.
    "afterwards": Program(
        lambda hvd: applied(hvd, gradients_of(hvd.rank())),
        lambda ranks: assert_all(ranks, mean(everyone(len(ranks)))),
    ),
}
