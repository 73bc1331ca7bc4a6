"""Private names of libraries stand in `hvdext/keras_tools/` only, and those in there are listed.

When this fails: give the access a function with a good name in `hvdext/keras_tools/`, and call that.
"""

import textwrap

import pytest

from hvdext.keras_tools.private_names import PRIVATE_NAMES
from tests.unit.keras_tools.private_uses import ROOT, House, imported, names_of

_ROOM, _TABLE = "hvdext/keras_tools/", "hvdext/keras_tools/private_names.py"
LISTED = frozenset(name for names in PRIVATE_NAMES.values() for name in names)

_HOROVOD = "Horovod 0.28.1, the one release that is supported, has no public name for it"
_EXIT = "Python's own name, documented: ends a process in which something hangs"
ALLOWED = {
    ("comm/horovod_comm.py", "_basics"): _HOROVOD,
    ("comm/horovod_comm.py", "_get_process_set_ids_and_ranks"): _HOROVOD,
    ("comm/horovod_comm.py", "_temp_process_set_object"): _HOROVOD,
    ("comm/registration.py", "_basics"): _HOROVOD,
    ("comm/registration.py", "_remove_process_set_impl"): _HOROVOD,
    ("comm/watchdog.py", "_exit"): _EXIT,
    ("serving/worker/process.py", "_exit"): _EXIT,
    ("comm/grid.py", "_asdict"): "Python's own name, documented: a namedtuple as a dict",
    ("common/log.py", "_getframe"): "Python's own name, documented: who has called",
    ("common/signals.py", "_getframe"): "Python's own name, documented: who has called",
    ("serving/protocols/tf_serving.py", "_bytes"): "no name, but the end of some names in TensorFlow Serving",
}

# Owners to suggest where a name is not listed yet; the first that has the name.
_LIKELY = (
    "keras.Variable",
    "keras.Operation",
    "keras.Layer",
    "keras.Model",
    "keras.Function",
    "keras.Sequential",
    "keras.optimizers.Optimizer",
    "keras.layers.Dense",
    "keras.layers.MultiHeadAttention",
    "keras.src.ops.node",
    "keras.src.backend.common.masking",
    "keras.src.models.functional.Functional",
    "keras.src.trainers.compile_utils.CompileLoss",
    "keras.src.backend.tensorflow.trainer.TFEpochIterator",
    "keras.src.saving.saving_lib",
    *PRIVATE_NAMES,
)


@pytest.fixture(scope="module")
def uses():
    return list(House(ROOT, LISTED).uses())


@pytest.mark.slow
def test_private_names_stand_in_one_room_only(uses):
    outside = [use for use in uses if not use.file.startswith(_ROOM)]
    found = {(use.file.removeprefix("hvdext/"), use.name) for use in outside}
    wrong = [use for use in outside if (use.file.removeprefix("hvdext/"), use.name) not in ALLOWED]
    assert not wrong, f"only {_ROOM} may name what is private to a library:\n" + "\n".join(map(str, wrong))
    assert not ALLOWED.keys() - found, "allowed, but not there any more"


def test_private_names_in_that_room_are_listed(uses):
    inside = [use for use in uses if use.file.startswith(_ROOM) and use.file != _TABLE]
    wrong = [f"{use} is not listed. Add to {_TABLE}: {_line(use)}" for use in inside if not _is_listed(use)]
    assert not wrong, "\n".join(wrong)


def test_all_that_is_listed_is_used():
    texts = [file.read_text() for file in (ROOT / "keras_tools").glob("*.py") if file.name not in _TABLE]
    stale = [name for name in LISTED if not any(name in text for text in texts)]
    assert not stale, f"take out of {_TABLE}, since nobody uses it: {stale}"
    for owner, names in PRIVATE_NAMES.items():
        assert list(names) == sorted(names), f"{owner}: names in the order of the alphabet"


def _is_listed(use):
    if use.owner:
        return use.name in PRIVATE_NAMES.get(use.owner, ()) or f"{use.owner}.{use.name}" in PRIVATE_NAMES
    return use.name in LISTED


def _line(use):
    """What to write into the table."""
    owner = use.owner or next((path for path in _LIKELY if _has(path, use.name)), "its owner")
    return f'under "{owner}": {{ "{use.name}": "what it is for" }}'


def _has(path, name):
    try:
        return name in names_of(path)
    except (AttributeError, ImportError):
        return False


# -- the search itself ----------------------------------------------------------------------------------


def found_in(tmp_path, source, listed=()):
    folder = tmp_path / "hvdext"
    folder.mkdir()
    (folder / "one.py").write_text(textwrap.dedent(source))
    return [(use.line, use.name, use.owner) for use in House(folder, frozenset(listed)).uses()]


@pytest.mark.parametrize(
    "line",
    [
        "model._flatten_layers()",
        "model.layers[0]._flatten_layers()",
        "model._flatten_layers = None",
        "getattr(model, '_flatten_layers')",
        "NAME = '_flatten_layers'",
        "vars(model)['_flatten_layers']",
        "model.evaluate(_flatten_layers=True)",
    ],
)
def test_an_access_is_found(tmp_path, line):
    assert found_in(tmp_path, f"import keras\n{line}") == [(2, "_flatten_layers", "")]


@pytest.mark.parametrize(
    ("line", "name", "owner"),
    [
        ("from keras.src.saving import saving_lib", "saving_lib", "keras.src.saving"),
        ("from keras import src", "src", "keras"),
        ("from keras.utils import _hidden", "_hidden", "keras.utils"),
        ("import tensorflow.python.eager as eager", "eager", "tensorflow.python"),
        ("import keras; keras.src.backend", "src", "keras"),
    ],
)
def test_an_import_is_found(tmp_path, line, name, owner):
    assert (1, name, owner) in found_in(tmp_path, line)


def test_what_is_in_a_private_module_is_found_by_its_alias(tmp_path):
    source = "from keras.src.backend.common import global_state as state\nstate.get_global_attribute"
    owner = "keras.src.backend.common.global_state"
    assert (2, "get_global_attribute", owner) in found_in(tmp_path, source)


def test_names_of_ones_own_are_not(tmp_path):
    source = """
        '''_docstring'''
        import keras

        class Own:
            _level = 0

            def __init__(self):
                self._value = 1

            def _method(self):
                return self._anything

        def _function(own):
            return own._value, own._method(), own._level, own.__dict__, _function, "_hvdext_mark"
    """
    assert found_in(tmp_path, source) == []
    (tmp_path / "hvdext" / "one.py").unlink()
    (tmp_path / "hvdext").rmdir()
    assert found_in(tmp_path, source, listed=["_value"]) == [(15, "_value", "")]


def test_a_class_of_kerass_is_looked_at_more_closely(tmp_path):
    source = """
        import keras

        class Base(keras.layers.Dense):
            def __init__(self):
                self._ours = self._flatten_layers()

            def _untrack_variable(self):
                pass

        class Derived(Base):
            def call(self, x):
                return self._ours, self._losses, self._unheard_of, super()._set_mask_metadata(x)
    """
    assert [(line, name) for line, name, _ in found_in(tmp_path, source)] == [
        (6, "_flatten_layers"),
        (8, "_untrack_variable"),
        (13, "_losses"),
        (13, "_set_mask_metadata"),
        (13, "_unheard_of"),
    ]


def test_a_line_for_the_table_is_suggested(tmp_path):
    (tmp_path / "hvdext").mkdir()
    (tmp_path / "hvdext" / "one.py").write_text("layer._flatten_layers")
    (use,) = House(tmp_path / "hvdext").uses()
    assert _line(use) == 'under "keras.Layer": { "_flatten_layers": "what it is for" }'


def test_the_owners_of_suggestions_exist():
    for path in _LIKELY:
        imported(path)
