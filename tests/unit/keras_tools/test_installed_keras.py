"""Whether the installed Keras and TensorFlow have the private names that hvdext uses.

A release that has renamed one fails here, with a sentence for each; `hvdext/keras_tools/` is to be mended.
"""

import re

import keras
import pytest
import tensorflow as tf

from hvdext.keras_tools.private_names import PRIVATE_NAMES, SINCE
from tests.unit.keras_tools.private_uses import ROOT, names_of

_VERSIONS = f"Keras {keras.__version__}, TensorFlow {tf.__version__}"


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in PRIVATE_NAMES.items() for name in names]
)
def test_the_name_is_there(owner, name):
    since = SINCE.get(f"{owner}.{name}", (3, 12))
    if tuple(map(int, keras.__version__.split(".")[:2])) < since:
        pytest.skip(f"in Keras since {since[0]}.{since[1]}")
    problem = missing(owner, name)
    assert problem is None, problem


def missing(owner, name):
    """What is to be said where `owner` has no `name`; None where it has."""
    try:
        if name in names_of(owner):
            return None
    except (AttributeError, ImportError):
        name = f"{name}, nor {owner} itself"
    purpose = PRIVATE_NAMES.get(owner, {}).get(name.split(",")[0], "unknown")
    return f"{owner} has no {name} ({purpose}) in {_VERSIONS}; used in {_users(name.split(',')[0])}."


def _users(name):
    found = []
    for file in sorted((ROOT / "keras_tools").glob("*.py")):
        lines = file.read_text().splitlines() if file.name != "private_names.py" else []
        for number, line in enumerate(lines, 1):
            if re.search(rf"\b{name}\b", line):
                found.append(f"hvdext/keras_tools/{file.name}:{number}")
    return ", ".join(found) or "no file"


def test_a_name_that_has_gone_is_told_in_a_sentence():
    told = missing("keras.Model", "_gone")
    assert told == f"keras.Model has no _gone (unknown) in {_VERSIONS}; used in no file."
    assert missing("keras.src.gone", "_x").startswith("keras.src.gone has no _x, nor keras.src.gone itself (")
    assert "hvdext/keras_tools/models.py:" in _users("_flatten_layers")
