"""Which models a server is told to serve: `[NAME[:VERSION]=]PATH`, and the repository's folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True, order=True)
class Named:
    """A model's file under the name and version that clients use."""

    name: str
    version: int
    path: Path


def parse_model(text: str) -> Named:
    """What `[NAME[:VERSION]=]PATH` means. The name is the file's, the version 1, unless they are given.

    A folder whose name is a number is a version of the folder above it. Folders may be called after values
    (`runs/lr=0.1`): what stands before the first "=" is a label only if it can be a name, and a path that is
    there as a whole has none.

    Raises:
        ValueError: if it means nothing.
    """
    label, found, place = text.partition("=")
    name, colon, number = label.partition(":")
    labelled = bool(found) and _NAME.fullmatch(name) is not None and not os.path.lexists(text)
    path = Path(place if labelled else text)
    if not (place if labelled else text):
        raise ValueError(f"must be [NAME[:VERSION]=]PATH. Received: {text!r}.")
    if labelled:
        if colon and not _VERSION.fullmatch(number):
            raise ValueError(f"a version must be a whole number, 1 or more. Received: {text!r}.")
        version = int(number) if colon else 1
    elif _VERSION.fullmatch(path.name) and path.absolute().parent.name:
        name, version = path.absolute().parent.name, int(path.name)
    else:
        name, version = path.absolute().name.removesuffix(".keras"), 1
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name must begin with a letter or digit and have letters, digits and _.- only, at most 128; "
            f"NAME=PATH gives one. Received: {text!r}."
        )
    return Named(name, version, path)


def parse_models(texts: list[str]) -> list[Named]:
    """All of them.

    Raises:
        ValueError: if two have the same name and version.
    """
    models: dict[tuple[str, int], Named] = {}
    for text in texts:
        model = parse_model(text)
        other = models.setdefault((model.name, model.version), model)
        if other is not model:
            raise ValueError(
                f"each model must have a name and version of its own: NAME:VERSION=PATH. Received: "
                f"{str(other.path)!r} and {str(model.path)!r}, both {model.name}:{model.version}."
            )
    return list(models.values())


def in_repository(folder: Path) -> list[Named]:
    """What a repository holds; other files in it are none of the server's business.

    <folder>/<name>.keras                     version 1
    <folder>/<name>/<version>/model.keras
    <folder>/<name>/<version>/                a SavedModel

    Raises:
        OSError: if it cannot be read.
        ValueError: if a version is there twice.
    """
    found = [
        Named(path.name.removesuffix(".keras"), 1, path)
        for path in folder.glob("*.keras")
        if _NAME.fullmatch(path.name.removesuffix(".keras"))
    ]
    for path in folder.glob("*/*/"):
        if not _NAME.fullmatch(path.parent.name) or not _VERSION.fullmatch(path.name):
            continue
        if (path / "model.keras").is_file():
            found.append(Named(path.parent.name, int(path.name), path / "model.keras"))
        elif (path / "saved_model.pb").is_file():
            found.append(Named(path.parent.name, int(path.name), path))
    models = {(model.name, model.version): model for model in found}
    if len(models) < len(found):
        raise ValueError(f"a repository must hold each version once. Received: {sorted(map(str, found))}.")
    return sorted(found)
