"""Do the states of a metric add up over shares of the data?

They do if `update_state` only ever adds to them what the batch alone decides, and a reset makes them 0. All
metrics of Keras are like that. Of a metric of the user's own, the source of its `update_state` says so where
it adds in plain sight: `self.v.assign_add(...)`, `self.v.assign(self.v + ...)`, an inner metric that is
updated, the inherited method that is called.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

_ADDING = ("assign_add", "assign_sub")
_ADDITIONS = ("add",)  # functions as which `+` is written as well
_PLAIN_PROPERTIES = ("dtype", "name")  # of a metric, which say nothing of its states
_CONTAINERS = (list, tuple, dict, set)


def states_add_up(metric: keras.metrics.Metric) -> bool:
    """Whether the states of all shares of the data, added up, are those of the whole.

    True also for a class whose `update_state` cannot be judged but whose `result` is that of a metric of
    Keras': what it reads are sums.

    Args:
        metric: any, built.
    """
    if _is_of_keras(type(metric)):
        return True
    adds = _adds(metric, type(metric).__mro__)
    if adds is None:
        adds = _is_of_keras(_owner(type(metric).__mro__, "result"))
    return bool(adds) and _resets_to_zero(metric)


def _resets_to_zero(metric):
    return not any(np.any(keras.ops.convert_to_numpy(v)) for v in metric.stateless_reset_state())


def _owner(classes, method):
    return next((cls for cls in classes if method in vars(cls)), None)


def _is_of_keras(cls):
    is_own = cls is not None and cls.__module__.partition(".")[0] == "keras"
    return is_own and cls is not keras.metrics.Metric  # whose methods do nothing


def _adds(metric, classes):
    """Whether the first `update_state` among `classes` only adds; None: nobody can tell."""
    owner = _owner(classes, "update_state")
    if "update_state" in vars(metric) or owner is None:
        return None
    if _is_of_keras(owner):
        return True
    code = _parsed(vars(owner)["update_state"])
    if code is None or not code.args.args:
        return None

    def inherited(name):
        above = classes[classes.index(owner) + 1 :]
        names = [cls.__name__ for cls in above]
        return _adds(metric, above[names.index(name) :] if name in names else above)

    reader = _Reader(metric, code.args.args[0].arg, inherited)
    for statement in code.body:
        reader.visit(statement)
    return reader.verdict


def _parsed(function: Any) -> ast.FunctionDef | None:
    function = inspect.unwrap(getattr(function, "python_function", function))  # that of a `tf.function`
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source, as in an interactive session
        return None
    return found if isinstance(found, ast.FunctionDef) else None


class _Reader(ast.NodeVisitor):
    """Reads an `update_state`.

    Attributes:
        verdict: True as long as all that was read only adds; None once something cannot be judged; False once
            something does not add.
    """

    def __init__(self, metric: keras.metrics.Metric, itself: str, inherited: Callable[[str], bool | None]):
        self.verdict: bool | None = True
        self._metric = metric
        self._itself = itself  # what the method calls the metric
        self._inherited = inherited

    def visit_Call(self, node: ast.Call) -> None:
        """Calls are where states change."""
        function = node.func
        if isinstance(function, ast.Attribute):
            if function.attr == "update_state" and self._is_inherited(node):
                self._note(self._inherited(_last_name(function.value)))
                self._visit_all([a for a in node.args if not self._is_itself(a)], node.keywords)
                return
            owner = self._attribute(function.value)
            if owner is not None:
                self._change(node, function, owner)
                return
            place = function.value
            if function.attr in _ADDING and isinstance(place, ast.Subscript) and self._attribute(place.value):
                self._visit_all([place.slice, *node.args], node.keywords)  # one of a list of states
                return
            if self._is_itself(function.value):  # a method of its own, or a function that it was given
                value = getattr(self._metric, function.attr, None)
                if inspect.ismethod(value) and value.__self__ is self._metric:
                    self._note(None)
                self._visit_all(node.args, node.keywords)
                return
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """States that are read decide what is added, or go on under another name."""
        if not self._is_itself(node.value):
            self.generic_visit(node)
        elif not isinstance(node.ctx, ast.Load):
            self._note(False)  # a number of Python's
        elif not self._is_no_state(node.attr):
            self._note(None)

    def visit_Name(self, node: ast.Name) -> None:
        """The metric itself is given away."""
        if self._is_itself(node):
            self._note(None)

    def _change(self, node, function, owner):
        """A method of an attribute is called."""
        value = getattr(self._metric, owner, None)
        if isinstance(value, keras.Variable):
            if function.attr == "assign" and len(node.args) == 1:
                terms, taken_off = _terms(node.args[0])
                kept = [t for t in terms if self._is_value_of(t, owner)]
                self._note(len(kept) == 1)
                self._visit_all([t for t in terms if t not in kept], taken_off, node.keywords)
                return
            self._note(True if function.attr in _ADDING else None)
        elif isinstance(value, keras.metrics.Metric):
            self._note(states_add_up(value) if function.attr == "update_state" else None)
        elif isinstance(value, _CONTAINERS):
            self._note(False)  # kept outside of the states
        self._visit_all(node.args, node.keywords)

    def _visit_all(self, *groups):
        for node in [node for group in groups for node in group]:
            self.visit(node)

    def _note(self, verdict):
        if self.verdict is not False and verdict is not True:
            self.verdict = verdict

    def _is_itself(self, node):
        return isinstance(node, ast.Name) and node.id == self._itself

    def _is_inherited(self, node):
        """`super().update_state(...)`, or that of a base class with the metric as its first argument."""
        owner = node.func.value
        is_super = (
            isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
        )
        return is_super or bool(node.args and self._is_itself(node.args[0]))

    def _attribute(self, node):
        """`name` of `self.name`."""
        is_one = isinstance(node, ast.Attribute) and self._is_itself(node.value)
        return node.attr if is_one else None

    def _is_value_of(self, node, name):
        """`self.name`, also as `self.name.value` or `self.name.read_value()`."""
        if isinstance(node, ast.Call) and not node.args:
            node = node.func
        if self._attribute(node) is None and isinstance(node, ast.Attribute):
            node = node.value if node.attr in ("value", "read_value") else node
        return self._attribute(node) == name

    def _is_no_state(self, name):
        if isinstance(getattr(type(self._metric), name, None), property):
            return name in _PLAIN_PROPERTIES
        held = keras.tree.flatten(getattr(self._metric, name, None))
        return not any(isinstance(one, (keras.Variable, keras.metrics.Metric)) for one in held)


def _terms(node):
    """What a sum is made of: what is added in it, and what is taken off."""
    left = right = None
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        left, right = node.left, node.right
    elif isinstance(node, ast.Call) and len(node.args) == 2 and _last_name(node.func) in _ADDITIONS:
        left, right = node.args
    if left is None:
        return [node], []
    terms, taken_off = _terms(left)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return terms, [*taken_off, right]
    more, more_taken_off = _terms(right)
    return [*terms, *more], [*taken_off, *more_taken_off]


def _last_name(node):
    """`c` of `a.b.c`; empty if the expression ends otherwise."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
