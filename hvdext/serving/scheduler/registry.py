"""The models that a server has: versions, where each is loaded, and which one answers. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hvdext.inference.deploy.manifest import Manifest
from hvdext.serving.scheduler.batching import Waiting
from hvdext.serving.scheduler.files import Identity
from hvdext.serving.service import DEFAULT_SIGNATURE, ModelVersion, Signature, State, UnknownModel


@dataclass(eq=False)
class Version:
    """One version of a model.

    Attributes:
        name: the model's.
        number: the version.
        uid: its number in the talk with the workers, never used twice.
        path: of its file or folder on the front's host.
        manifest: what the file was when it was added.
        identity: of those files, by which a rank on the same host knows them.
        waiting: its requests.
        loading: replicas that load it now, or as soon as they have loaded others, by index.
        ready: replicas that answer, by index, and their ranks.
        failures: why it cannot be loaded, by rank.
        losses: how often each replica lost a rank that was loading it, since it last lived through that.
        survived: True once a replica has lived through its loading, whether it could be loaded or not.
        settled: True once every replica there was has loaded it or failed, and one has loaded it.
        unloading: True once it takes no more requests.
        signatures: by name, the default first; known once it has been loaded.
        platform: likewise.
        in_flight: requests being computed.
        batches: done so far.
        rows: done so far.
        padded_rows: rows added to fill up batches.
        batch_sizes: how many batches had how many rows, without padding.
    """

    name: str
    number: int
    uid: int
    path: Path
    manifest: Manifest
    identity: Identity
    waiting: Waiting
    loading: set[int] = field(default_factory=set)
    ready: dict[int, tuple[int, ...]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    losses: Counter[int] = field(default_factory=Counter)
    survived: bool = False
    settled: bool = False
    unloading: bool = False
    signatures: dict[str, Signature] = field(default_factory=dict)
    platform: str = ""
    in_flight: int = 0
    batches: int = 0
    rows: int = 0
    padded_rows: int = 0
    batch_sizes: Counter[int] = field(default_factory=Counter)

    @property
    def key(self) -> tuple[str, int]:
        """Its name and number."""
        return self.name, self.number

    @property
    def state(self) -> State:
        """Where it is in its life."""
        if self.unloading:
            return State.UNLOADING
        if self.settled and self.ready:
            return State.READY
        if self.loading or (self.ready and not self.settled):
            return State.LOADING
        return State.UNAVAILABLE

    @property
    def alone(self) -> str:
        """Why requests to the default signature are computed one by one; empty if they are not."""
        found = self.signatures.get(DEFAULT_SIGNATURE)
        return "" if found is None else found.alone

    @property
    def failed(self) -> bool:
        """Whether it was tried, and has never been loaded."""
        return bool(self.failures) and not (self.loading or self.ready or self.settled)

    @property
    def reason(self) -> str:
        """Why it does not answer; empty if it does."""
        if self.state is State.READY:
            return ""
        if self.unloading:
            return "it is being unloaded"
        if self.loading:
            return "it is being loaded"
        if self.failures:
            rank, text = min(self.failures.items())
            return f"rank {rank}: {text}"
        return "no rank is there to answer"

    def settle(self) -> None:
        """Opens the version to requests once nobody loads it for the first time any more."""
        if not self.loading and self.ready:
            self.settled = True

    def public(self) -> ModelVersion:
        """As clients see it."""
        ranks = sorted(rank for ranks in self.ready.values() for rank in ranks)
        return ModelVersion(
            name=self.name,
            version=self.number,
            state=self.state,
            reason=self.reason,
            signature=self.signatures.get(DEFAULT_SIGNATURE),
            digest=self.manifest.digest,
            platform=self.platform,
            ranks=tuple(ranks),
            others={name: one for name, one in self.signatures.items() if name != DEFAULT_SIGNATURE},
        )


class Registry:
    """All versions of all models."""

    def __init__(self) -> None:
        self._versions: dict[tuple[str, int], Version] = {}

    def __iter__(self) -> Iterator[Version]:
        return iter(list(self._versions.values()))

    def get(self, key: tuple[str, int]) -> Version | None:
        """The version of a name and number; None if there is none."""
        return self._versions.get(key)

    def add(self, version: Version) -> None:
        """Adds a version that is not there yet; they stay sorted."""
        assert version.key not in self._versions
        self._versions = dict(sorted({**self._versions, version.key: version}.items()))

    def remove(self, version: Version) -> None:
        """Removes a version, but not another that has been added in its place."""
        if self._versions.get(version.key) is version:
            del self._versions[version.key]

    def of(self, name: str) -> list[Version]:
        """All versions of a model, the lowest first.

        Raises:
            UnknownModel: if there is none.
        """
        versions = [version for version in self if version.name == name]
        if not versions:
            names = sorted({name for name, _ in self._versions})
            known = ", ".join(names) or "there is none"
            raise UnknownModel(f"The name must be that of a model: {known}. Received: {name!r}.")
        return versions

    def find(self, name: str, number: int | None = None) -> Version:
        """One version; without a number, the highest that is ready, or else the highest.

        Raises:
            UnknownModel: if there is none.
        """
        versions = self.of(name)
        if number is None:
            ready = [version for version in versions if version.state is State.READY]
            return (ready or versions)[-1]
        for version in versions:
            if version.number == number:
                return version
        numbers = ", ".join(str(version.number) for version in versions)
        raise UnknownModel(f"The version of {name!r} must be one of: {numbers}. Received: {number}.")
