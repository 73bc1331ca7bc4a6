"""Patterns and predicates on variable paths."""

from types import SimpleNamespace

import pytest

from hvdext.keras_tools.selection import check_select, path_of, selected

VARIABLES = [SimpleNamespace(path=p) for p in ("a/kernel", "a/bias", "b/kernel")]


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (None, [True, True, True]),
        ("*/kernel", [True, False, True]),
        ("a/*", [True, True, False]),
        (["a/bias", "b/*"], [False, True, True]),
        (lambda v: v.path.startswith("b"), [False, False, True]),
    ],
)
def test_selected(select, expected):
    assert selected(VARIABLES, select) == expected


def test_a_pattern_matches_the_whole_path():
    with pytest.raises(
        ValueError, match=r"`select` must match .* 'kernel', which matches none of \['a/kernel'"
    ):
        selected(VARIABLES, "kernel")


def test_every_pattern_must_match():
    with pytest.raises(ValueError, match=r"'c/\*'"):
        selected(VARIABLES, ["a/*", "c/*"])


def test_a_predicate_must_select_something():
    def nothing(variable):
        return False

    with pytest.raises(ValueError, match="nothing"):
        selected(VARIABLES, nothing)


@pytest.mark.parametrize("wrong", [3, [1, 2], {"a"}])
def test_what_is_no_selection(wrong):
    with pytest.raises(TypeError, match="`what` must be a pattern, a list of patterns or a function"):
        check_select(wrong, "what")


def test_no_patterns_at_all():
    with pytest.raises(ValueError, match=r"at least one pattern. Received: \[\]"):
        check_select([])


def test_tensorflow_variables_go_by_their_name():
    assert path_of(SimpleNamespace(name="w:0")) == "w:0"
