"""Wrong arguments: each error names argument, rule and the value received."""

import keras
import pytest
import tensorflow as tf

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use


def sgd(**arguments):
    return keras.optimizers.SGD(0.1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"op": "average"}, ValueError, r"`op` must be hvd.Average.* Received: op='average'"),
        ({"op": None}, ValueError, r"`op` must be .* Received: op=None"),
        (
            {"backward_passes_per_step": 0},
            ValueError,
            r"`backward_passes_per_step` must be .* at least 1.*=0\.",
        ),
        ({"backward_passes_per_step": 1.5}, ValueError, r"integer .* backward_passes_per_step=1.5"),
        ({"backward_passes_per_step": True}, ValueError, r"backward_passes_per_step=True"),
        ({"compression": "fp16"}, ValueError, r"`compression` must be hvd.Compression.* compression='fp16'"),
        (
            {"gradient_predivide_factor": 0},
            ValueError,
            r"`gradient_predivide_factor` must be a positive .*=0",
        ),
        (
            {"gradient_predivide_factor": True},
            ValueError,
            r"`gradient_predivide_factor` must be a positive .*=True",
        ),
        (
            {"gradient_predivide_factor": float("inf")},
            ValueError,
            r"`gradient_predivide_factor` must be a positive .*=inf",
        ),
        (
            {"gradient_predivide_factor": 2.0, "op": hvd.Sum},
            ValueError,
            r"`gradient_predivide_factor` needs op=Average. Received: .*=2.0 with op=Sum",
        ),
        (
            {"compression": hvd.Compression.fp16, "op": hvd.Adasum},
            ValueError,
            r"`compression` must be hvd.Compression.none with op=Adasum",
        ),
        ({"groups": -1}, ValueError, r"`groups` must be a positive number .* groups=-1"),
        ({"num_groups": 2, "groups": 3}, ValueError, r"`num_groups` must .* num_groups=2, groups=3"),
        (
            {"num_groups": 2, "groups": [[]]},
            ValueError,
            r"`num_groups` must .* num_groups=2, groups=\[\[\]\]",
        ),
        ({"num_groups": -2}, ValueError, r"`num_groups` must be a positive number.* num_groups=-2"),
        ({"groups": [1, 2]}, ValueError, r"`groups` must be .* list of lists .* groups=\[1, 2\]"),
        (
            {"process_set": [0, 1]},
            TypeError,
            r"`process_set` must be a hvd.ProcessSet.* process_set=\[0, 1\]",
        ),
        ({"select": 3}, TypeError, r"`select` must be a pattern.* select=3"),
        ({"select": []}, ValueError, r"`select` must hold at least one pattern"),
    ],
)
def test_wrong_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        hvd.DistributedOptimizer(sgd(), **arguments)


def test_an_optimizer_by_its_name():
    assert isinstance(hvd.DistributedOptimizer("adam"), keras.optimizers.Adam)
    with pytest.raises(ValueError, match=r"or the name of one. Received: optimizer='sgdd'"):
        hvd.DistributedOptimizer("sgdd")


@pytest.mark.parametrize("wrong", [3, None, tf.Module(), keras.optimizers.SGD])
def test_no_keras_optimizer(wrong):
    with pytest.raises(TypeError, match=r"`optimizer` must be a Keras 3 optimizer.* Received: "):
        hvd.DistributedOptimizer(wrong)


def test_wrapped_twice():
    optimizer = hvd.DistributedOptimizer(sgd(name="mine"))
    with pytest.raises(ValueError, match=r"`optimizer` must not be distributed already.* 'mine'"):
        hvd.DistributedOptimizer(optimizer)
    with pytest.raises(ValueError, match="`optimizer` must not be distributed already"):
        hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer))


def test_two_ways_to_accumulate():
    with pytest.raises(ValueError, match=r"`backward_passes_per_step` must be 1 .*=2 and .*_steps=3"):
        hvd.DistributedOptimizer(sgd(gradient_accumulation_steps=3), backward_passes_per_step=2)


def test_accumulation_within_a_multi_optimizer():
    choice = keras.optimizers.OptimizerMap(sgd(gradient_accumulation_steps=3))
    with pytest.raises(
        ValueError, match="`gradient_accumulation_steps` must be None inside a MultiOptimizer"
    ):
        hvd.DistributedOptimizer(keras.optimizers.MultiOptimizer(choice))


def test_accumulation_in_a_member_that_a_function_chooses():
    member = sgd(gradient_accumulation_steps=3)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.MultiOptimizer(lambda variable: member))
    with (
        use(SoloComm()),
        pytest.raises(ValueError, match=r"`gradient_accumulation_steps` must be None .*=3 on"),
    ):
        _apply(optimizer)


def test_a_member_of_a_multi_optimizer_that_is_distributed_already():
    member = hvd.DistributedOptimizer(sgd(name="mine"))
    message = r"`optimizer` must not hold one that is distributed already.* MultiOptimizer with 'mine'"
    choice = keras.optimizers.OptimizerMap(sgd(), {"v": member})
    with pytest.raises(ValueError, match=message):
        hvd.DistributedOptimizer(keras.optimizers.MultiOptimizer(choice))
    chosen_late = hvd.DistributedOptimizer(keras.optimizers.MultiOptimizer(lambda variable: member))
    with use(SoloComm()), pytest.raises(ValueError, match=message):
        _apply(chosen_late)


def test_a_group_with_a_variable_that_is_not_trained():
    variables = [keras.Variable([1.0], name=name) for name in ("a", "b", "c")]
    gradients = [tf.constant([1.0])] * 2
    optimizer = hvd.DistributedOptimizer(sgd(), groups=[[variables[2], variables[0]]])
    with (
        use(SoloComm()),
        pytest.raises(ValueError, match=r"`groups` must .* not trained: \['c'\]; repeated: \[\]"),
    ):
        optimizer.apply(gradients, variables[:2])


def test_a_variable_in_two_groups():
    variables = [keras.Variable([1.0], name=name) for name in ("a", "b")]
    gradients = [tf.constant([1.0])] * 2
    optimizer = hvd.DistributedOptimizer(sgd(), groups=[variables, [variables[0]]])
    with (
        use(SoloComm()),
        pytest.raises(ValueError, match=r"`groups` must .* not trained: \[\]; repeated: \['a'\]"),
    ):
        optimizer.apply(gradients, variables)


def test_no_groups_is_horovods_number_for_unset():
    with use(SoloComm()):
        assert _apply(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0), groups=0)) == [-1.0]


def test_num_groups_is_an_old_name():
    with pytest.warns(UserWarning, match="`num_groups` is Horovod's old name for `groups`"):
        hvd.DistributedOptimizer(sgd(), num_groups=2)


def test_the_same_object_comes_back():
    optimizer = sgd()
    assert hvd.DistributedOptimizer(optimizer) is optimizer
    assert type(optimizer) is keras.optimizers.SGD


def test_the_tape_checks_its_arguments_when_it_is_made():
    with pytest.raises(TypeError, match=r"`gradtape` must be a tf.GradientTape. Received: 3"):
        hvd.DistributedGradientTape(3)
    with pytest.raises(ValueError, match="`op` must be"):
        hvd.DistributedGradientTape(tf.GradientTape(), op="sum")
    with pytest.raises(ValueError, match="`num_groups` must be"):
        hvd.DistributedGradientTape(tf.GradientTape(), num_groups=1, groups=2)


def _apply(optimizer):
    variable = keras.Variable([1.0], name="v")
    optimizer.apply([tf.constant([2.0])], [variable])
    return variable.numpy().tolist()


def test_apply_before_init():
    with pytest.raises(RuntimeError, match=r"call `hvd.init\(\)`"):
        _apply(hvd.DistributedOptimizer(keras.optimizers.SGD(1.0)))


def test_a_process_set_without_this_rank():
    optimizer = hvd.DistributedOptimizer(sgd(), process_set=hvd.ProcessSet([1]))
    with (
        use(SoloComm()),
        pytest.raises(ValueError, match=r"`process_set` must contain .*ProcessSet\(\[1\]\)"),
    ):
        _apply(optimizer)


def test_one_rank_applies_its_own_gradients():
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    with use(SoloComm()) as comm:
        assert _apply(optimizer) == [-1.0]
        assert comm.traffic() == {}
