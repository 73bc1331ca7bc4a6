"""Words for JSON Schemas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hvdext.serving.protocols.tensors import DTYPES

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
ANY_LIST: Schema = {"type": "array", "items": {}}  # some readers of a description ask for `items`
DATATYPE: Schema = {"type": "string", "enum": list(DTYPES)}


def object_of(required: dict[str, Schema], optional: dict[str, Schema] | None = None, **more: Any) -> Schema:
    """An object with these properties."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        **more,
    }


def list_of(items: Schema, length: int | None = None, least: int = 0) -> Schema:
    """A list, of a fixed length or of any."""
    if length is not None:
        return {"type": "array", "items": items, "minItems": length, "maxItems": length}
    return {"type": "array", "items": items, "minItems": least}


def any_of(schemas: Iterable[Schema]) -> Schema:
    """One of them; the schema itself if there is one."""
    found = list(schemas)
    return found[0] if len(found) == 1 else {"anyOf": found}
