"""The models' files on the front's host: the repository, and what is served of it and of the command line."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from hvdext.inference.deploy import manifest
from hvdext.serving.scheduler import model_names
from hvdext.serving.scheduler.batching import Waiting
from hvdext.serving.scheduler.files import look_at
from hvdext.serving.scheduler.model_names import Named
from hvdext.serving.scheduler.registry import Registry, Version
from hvdext.serving.settings import Settings


class Catalog:
    """Finds models by name, never by a path that a client gives.

    Args:
        settings: how the ranks serve.
        registry: the versions that are served.
        repository: a folder; None: none.
    """

    def __init__(self, settings: Settings, registry: Registry, repository: Path | None):
        self._settings = settings
        self._registry = registry
        self._repository = repository
        self._uids = itertools.count(1)

    def held(self) -> list[Named]:
        """What the repository holds now.

        Raises:
            OSError, ValueError: if it cannot be read.
        """
        return [] if self._repository is None else model_names.in_repository(self._repository)

    async def look_at(self, models: Iterable[Named]) -> list[Version]:
        """Versions of some models as their files are now; the registry is left alone.

        Raises:
            OSError, ValueError: if one cannot be read, or is no model.
        """
        versions = []
        for model in models:
            files, identity = await asyncio.to_thread(look_at, model.path)
            versions.append(
                Version(
                    name=model.name,
                    number=model.version,
                    uid=next(self._uids),
                    path=model.path,
                    manifest=files,
                    identity=identity,
                    waiting=Waiting(self._settings.max_batch_size, self._settings.max_delay),
                )
            )
        return versions

    def chunks(self, digest: str) -> Iterator[bytes]:
        """The bytes of a model that is served.

        Raises:
            LookupError: if it is not.
        """
        for version in self._registry:
            if version.manifest.digest == digest:
                return manifest.chunks(version.path, version.manifest)
        raise LookupError("the front has no such model any more")
