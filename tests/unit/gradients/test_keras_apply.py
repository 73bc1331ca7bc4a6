"""What stands in front of Keras' `apply`: stages in a written order, and nothing until one is needed."""

import pytest

from hvdext.gradients.keras_apply import ORDER, put_before
from tests.multiprocess.launching.launch import run_python


@pytest.fixture
def optimizer_class():
    """A class with an `apply` that notes what arrives, as Keras' would apply it."""

    class Plain:
        def __init__(self):
            self.seen = []

        def apply(self, grads, trainable_variables=None):
            self.seen.append(("keras", grads, trainable_variables))

    return Plain


def _stage(name, change=lambda grads: grads):
    def stage(optimizer, grads, trainable_variables, proceed):
        optimizer.seen.append((name, grads, trainable_variables))
        proceed(change(grads), trainable_variables)

    return stage


@pytest.mark.parametrize("put", [ORDER, ORDER[::-1]], ids=["first first", "last first"])
def test_stages_run_in_the_written_order_whichever_came_first(optimizer_class, put):
    for name in put:
        put_before(optimizer_class, name, _stage(name))
    optimizer = optimizer_class()
    optimizer.apply([1.0], ["v"])
    assert optimizer.seen == [(name, [1.0], ["v"]) for name in ("exchange", "slices", "keras")]


def test_the_next_stage_gets_what_the_one_before_hands_on(optimizer_class):
    put_before(optimizer_class, "slices", _stage("slices", lambda grads: [2 * g for g in grads]))
    put_before(optimizer_class, "exchange", _stage("exchange", lambda grads: [g + 1 for g in grads]))
    optimizer = optimizer_class()
    optimizer.apply([1.0])
    assert optimizer.seen == [("exchange", [1.0], None), ("slices", [2.0], None), ("keras", [4.0], None)]


def test_a_stage_may_keep_what_it_gets(optimizer_class):
    put_before(optimizer_class, "exchange", lambda *arguments: None)
    put_before(optimizer_class, "slices", _stage("slices"))
    optimizer = optimizer_class()
    optimizer.apply([1.0])
    assert optimizer.seen == []


def test_a_stage_that_is_put_twice_runs_once(optimizer_class):
    for _ in range(2):
        put_before(optimizer_class, "slices", _stage("slices"))
    optimizer = optimizer_class()
    optimizer.apply([1.0])
    assert [name for name, *_ in optimizer.seen] == ["slices", "keras"]


def test_optimizers_that_exist_already_and_subclasses_are_met(optimizer_class):
    before = type("Sub", (optimizer_class,), {})()
    put_before(optimizer_class, "slices", _stage("slices"))
    before.apply([1.0])
    assert [name for name, *_ in before.seen] == ["slices", "keras"]


def test_a_stage_without_a_place_is_our_own_bug(optimizer_class):
    with pytest.raises(AssertionError, match="anywhere"):
        put_before(optimizer_class, "anywhere", _stage("anywhere"))


UNTOUCHED = """
import keras
from keras.optimizers import LossScaleOptimizer, Optimizer

plain = Optimizer.apply, LossScaleOptimizer.apply
import hvdext as hvd
from hvdext.gradients import optimizer as _
from hvdext.placement.slices import layer, saving, updates

optimizer = keras.optimizers.SGD()
assert (Optimizer.apply, LossScaleOptimizer.apply) == plain, "imported"
{use}
assert [Optimizer.apply is plain[0], LossScaleOptimizer.apply is plain[1]] == {untouched}, "used"
"""

CUT = """
from hvdext.testing import run_ranks
run_ranks(2, lambda comm: hvd.ColumnDense(4).build((None, 3)))
"""


# In a process of its own: other tests of this one have put stages there.
@pytest.mark.parametrize(
    ("use", "untouched"),
    [
        ("keras.optimizers.LossScaleOptimizer(optimizer)", [True, True]),
        ("hvd.DistributedOptimizer(optimizer)", [True, False]),
        (CUT, [False, False]),
    ],
    ids=["nothing", "distributed", "cut"],
)
def test_keras_is_untouched_until_hvdext_is_used(use, untouched):
    program = UNTOUCHED.format(use=use, untouched=untouched)
    ended = run_python(program, timeout=120)
    assert ended.returncode == 0, ended.stderr
