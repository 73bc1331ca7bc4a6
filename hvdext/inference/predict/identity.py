"""Which model is it? Digests of its weights and of what it computes with them."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import keras

from hvdext.collectives.digest import digest
from hvdext.inference.deploy.saved_model import SavedModel
from hvdext.keras_tools.models import flat_layers, is_built, model_variables

_WITHOUT_EFFECT = re.compile(  # on predictions
    r"build_config|compile_config|name|seed|trainable|\w+_(constraint|initializer|regularizer)"
)


def weights_digest(model: keras.Model) -> str | None:
    """The SHA-256 of the weights; None if the model has none yet. States of generators stay out."""
    if isinstance(model, SavedModel):
        return digest(sorted(model.function.variables, key=lambda variable: variable.name))
    if not is_built(model):
        return None
    weights = {id(variable) for variable in model.variables}
    return digest([variable for variable in model_variables(model) if id(variable) in weights])


def architecture_digest(model: keras.Model) -> str | None:
    """The SHA-256 of the configuration, whatever layers are called; None if Keras cannot write it down."""
    if isinstance(model, SavedModel):
        return model.graph_digest
    try:
        config = json.loads(model.to_json())
    except Exception:  # layers of the user's own need not have a configuration
        return None
    names = {layer.name: f"layer {i}" for i, layer in enumerate(flat_layers(model))}
    text = json.dumps(_essence(config, names), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _essence(config: Any, names: dict[str, str]) -> Any:
    """Without what does not matter; code of lambdas stays out, since it holds the places of its sources."""
    if isinstance(config, dict):
        if config.get("class_name") == "__lambda__":
            return "a lambda"
        return {
            names.get(key, key): _essence(value, names)
            for key, value in config.items()
            if not _WITHOUT_EFFECT.fullmatch(key)
        }
    if isinstance(config, list):
        return [_essence(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config
