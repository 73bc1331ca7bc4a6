"""`hvd.Strategy`: a YAML file, and what `compile` and `fit` need of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import keras

from hvdext.callbacks.broadcast import BroadcastGlobalVariablesCallback
from hvdext.callbacks.metrics import MetricAverageCallback
from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.process_sets import ProcessSet
from hvdext.common.arguments import suggests_keywords, unknown_keyword
from hvdext.config.call import Answer, Call, RankLists, Target, plain
from hvdext.config.position import Position, shown, suggestion
from hvdext.config.yaml_file import plain_copy, read, write
from hvdext.consensus.consensus import ConsensusAveraging
from hvdext.consensus.warmup import WarmupPerturbation
from hvdext.gradients.apply_hook import hooks_of
from hvdext.gradients.optimizer import DistributedOptimizer
from hvdext.strategy.reading import OPTIMIZERS, READER, read_sync
from hvdext.sync.monitor.monitor import SyncMonitor
from hvdext.sync.whom import Hierarchical

T = TypeVar("T")
NONE = "none"  # what a file writes for a section that is to have no effect

_GRADIENTS = Target("gradients", DistributedOptimizer, given=("optimizer",))
_BROADCAST = Target("broadcast", BroadcastGlobalVariablesCallback, given=("local_variables",))
_WARMUP = Target("warmup", WarmupPerturbation)
_CONSENSUS = Target("consensus", ConsensusAveraging)
_MONITOR = Target("monitor", SyncMonitor)
_METRICS = {"average": Target("average", MetricAverageCallback)}


@dataclass(frozen=True)
class Strategy:
    """The whole distributed set-up of a training, as one file says.

        strategy = hvd.Strategy.load("diloco.yaml")
        hvd.init(process_sets=strategy.process_sets)
        strategy.compile(model, keras.optimizers.AdamW(1e-3), loss="mse")
        model.fit(data, callbacks=strategy.callbacks())

    Make one with `load` or `from_dict`. Its sections, each with the arguments of its Python twin:

    | section | Python twin | left out |
    |---|---|---|
    | `optimizer` | a Keras optimizer: `{class: SGD, learning_rate: 0.1}` | the one given to `compile` |
    | `gradients` | `hvd.DistributedOptimizer`, or `none`: no gradients are exchanged | its defaults |
    | `sync` | `hvd.callbacks.ParameterSync` or a preset of `hvd.sync`, one or a list | none |
    | `broadcast` | `hvd.callbacks.BroadcastGlobalVariablesCallback`, or `none` | on, without `warmup` |
    | `warmup` | `hvd.callbacks.WarmupPerturbation` | none |
    | `metrics` | `average`: `hvd.callbacks.MetricAverageCallback` | none |
    | `consensus` | `hvd.callbacks.ConsensusAveraging` | none |
    | `monitor` | `hvd.callbacks.SyncMonitor` | none |

    Where there is `sync`, `gradients` must be said. A file is checked whole when it is loaded.
    """

    optimizer: Call | None
    gradients: Call | None
    sync: tuple[Call, ...]
    broadcast: Call | None
    warmup: Call | None
    metrics: Answer | None
    monitor: Call | None
    consensus: Call | None
    position: Position = field(compare=False, repr=False)

    # -- from and to files -------------------------------------------------------------------------------

    @classmethod
    @suggests_keywords
    def load(cls, path: str | os.PathLike) -> Strategy:
        """Reads and checks a file; `hvd.init()` need not have been called.

        TensorFlow makes its devices when an optimizer in the file is checked: choose them before.

        Args:
            path: of a YAML file.

        Raises:
            OSError: if it cannot be read.
            TypeError, ValueError: if it is empty, no YAML or breaks a rule; the message names the file, the
                keys that lead there, the rule and the value received.
        """
        return cls._read(read(path), Position(os.fspath(path)))

    @classmethod
    @suggests_keywords
    def from_dict(cls, settings: Mapping[str, Any]) -> Strategy:
        """As `load`, of what a file holds.

        Args:
            settings: sections by name, with mappings, lists, text, numbers, booleans and None in them.

        Raises:
            TypeError, ValueError: as `load`.
        """
        position = Position("Strategy.from_dict")
        return cls._read(plain_copy(settings, position), position)

    def to_dict(self) -> dict[str, Any]:
        """All sections spelled out, for `from_dict`."""
        written = {}
        for section in _SECTIONS:
            value = getattr(self, section)
            if section == "sync":
                value = value[0] if len(value) == 1 else value or None
            if value is not None or section in ("gradients", "broadcast"):
                written[section] = NONE if value is None else plain(value)
        return written

    @suggests_keywords
    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_dict()` to a YAML file at `path`."""
        write(self.to_dict(), path)

    # -- training ----------------------------------------------------------------------------------------

    @property
    def process_sets(self) -> list[ProcessSet]:
        """Every process set that the file names, once; for `hvd.init(process_sets=...)`."""
        found = [members for part in (self.gradients, *self.sync) for members in _sets(part)]
        return [ProcessSet(members) for members in dict.fromkeys(found)]

    def compile(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer | str | None = None,
        loss: Any = None,
        **arguments: Any,
    ) -> None:
        """Compiles `model`, its optimizer exchanging gradients as the file says; every rank must call it.

        Args:
            model: a Keras model.
            optimizer: as in `model.compile`; left out where the file has one.
            loss: as in `model.compile`.
            **arguments: as in `model.compile`.

        Raises:
            ValueError: on every rank alike, if the ranks' files differ, a rank is in none of its process sets
                or there is no optimizer, or two.
            RuntimeError: before `hvd.init()`.
        """
        ready = self._agreed(lambda rank: self._optimizer(optimizer, rank))
        model.compile(ready, loss, **arguments)

    @suggests_keywords
    def callbacks(
        self,
        others: Sequence[keras.callbacks.Callback] = (),
        *,
        warmup: Mapping[str, Any] | None = None,
        consensus: Mapping[str, Any] | None = None,
    ) -> list[keras.callbacks.Callback]:
        """Fresh callbacks for one training, in the order that they need. Every rank must call it.

            broadcast and warm-up      all begin with the same weights
            average of the metrics     before who reads the logs
            syncs                      before who saves the model
            monitor                    after the syncs that it looks at
            others                     early stopping, checkpoints, logs
            consensus                  after all who stop the training or change weights

        Args:
            others: callbacks of your own.
            warmup: what a file cannot hold of `WarmupPerturbation`'s arguments: `{"probe": (x, y)}`.
            consensus: the same of `ConsensusAveraging`: `{"evaluate": test_data}`.

        Raises:
            ValueError: on every rank alike, if the ranks' files differ, a rank is in none of its process sets
                or an argument breaks its rule.
            RuntimeError: before `hvd.init()`.
        """
        data = {"warmup": warmup, "consensus": consensus}
        given = {name: sorted(values) for name, values in data.items() if values}
        before, after = self._agreed(lambda rank: self._made(rank, data), given)
        return [*before, *others, *after]

    # -- parts -------------------------------------------------------------------------------------------

    @classmethod
    def _read(cls, settings: Any, position: Position) -> Strategy:
        if not isinstance(settings, Mapping) or not settings:
            raise position.error(
                f"there must be a mapping of sections: {', '.join(_SECTIONS)}. Received: {shown(settings)}."
            )
        for section, value in settings.items():
            if section not in _SECTIONS:
                raise position.key(str(section)).error(
                    f"there is no section {shown(section)}. {suggestion(section, _SECTIONS)}"
                )
            if value is None:
                raise position.key(section).error(
                    f"`{section}` must not be empty: {{}} stands for its defaults, {NONE} for no such thing. "
                    "Received: nothing after the colon."
                )
        parts = {
            section: reader(settings[section], position.key(section))
            for section, reader in _SECTIONS.items()
            if section in settings and settings[section] != NONE and settings[section] is not False
        }
        if "gradients" not in settings:
            if "sync" in parts:
                raise position.error(
                    "`gradients` must be given where `sync` is: gradients: none, for ranks that train on "
                    "their own between exchanges, or with select or process_set those that are not synced. "
                    f"Received: {', '.join(settings)}."
                )
            parts["gradients"] = READER.call(_GRADIENTS, {}, position.key("gradients"))
        if "broadcast" not in settings and "warmup" not in parts:
            parts["broadcast"] = READER.call(_BROADCAST, {"root_rank": 0}, position.key("broadcast"))
        named: dict[str, Any] = {
            section: parts.get(section, () if section == "sync" else None) for section in _SECTIONS
        }
        strategy = cls(**named, position=position)
        strategy._check()
        return strategy

    def _check(self):
        """Makes everything once, for the checks of the Python way; each rank makes its own later."""
        if self.gradients is None and not self.sync and self.consensus is None:
            raise self.position.key("gradients").error(
                "`gradients` must not be none without `sync` or `consensus`: the ranks would never hear of "
                "each other. Received: gradients: none."
            )
        if self.monitor is not None and not self.sync:
            raise self.position.key("monitor").error("`monitor` needs `sync`, to watch. Received: no `sync`.")
        if self.gradients is not None:
            self.gradients.make(optimizer=keras.optimizers.SGD())
        if self.optimizer is not None:
            self.optimizer.make()
        self._made(
            None, {name: {"score": _no_score} for name in ("warmup", "consensus") if self._scores(name)}
        )

    def _scores(self, section):
        """Whether the file asks for a choice that needs scores, and so for data given to `callbacks`."""
        call = getattr(self, section)
        wishes = {} if call is None else call.arguments
        return "best" in (wishes.get("unify"), wishes.get("take")) or wishes.get("weight_by") == "score"

    def _optimizer(self, optimizer, rank):
        own = self.optimizer
        if (optimizer is None) == (own is None):
            raise self.position.key("optimizer").error(
                "there must be an optimizer here or in strategy.compile(model, optimizer), and not in both. "
                f"Received: {'neither' if optimizer is None else 'both'}."
            )
        optimizer = keras.optimizers.get(optimizer) if own is None else own.make()
        if self.gradients is not None:
            return self.gradients.make(rank, optimizer=optimizer)
        if hooks_of(optimizer):
            raise self.position.key("gradients").error(
                "`optimizer` must not exchange gradients with gradients: none. "
                f"Received: {optimizer.name!r}, which hvd.DistributedOptimizer has been given before."
            )
        return optimizer

    def _made(self, rank, data) -> tuple[list, list]:
        """The callbacks before and after the user's own."""

        def made(section):
            return self._callback(section, rank, data.get(section) or {})

        syncs = [call.make(rank) for call in self.sync]
        before = [*made("broadcast"), *made("warmup"), *made("metrics"), *syncs, *made("monitor")]
        return before, made("consensus")

    def _callback(self, section, rank, data) -> list:
        call = getattr(self, section)
        if call is None:
            if data:
                raise self.position.key(section).error(
                    f"the section `{section}` must be there for callbacks({section}=...). Received: none."
                )
            return []
        for name in data:
            if name not in call.target.data:
                raise call.position.error(
                    unknown_keyword(f"callbacks({section}=...)", name, call.target.data)
                )
        return [call.make(rank, **data)]

    def _agreed(self, make: Callable[[int], T], given: Mapping[str, object] | None = None) -> T:
        """What `make` returns for this rank, once all ranks know that their files say the same."""
        comm: Communicator = current()
        made, problem = None, None
        try:
            made = make(comm.ranks[comm.rank])
        except (TypeError, ValueError) as error:  # told to the other ranks first, who would wait for this one
            problem = str(error)
        facts = dict(_leaves(self.to_dict())) | {f"callbacks({k}=...)": v for k, v in (given or {}).items()}
        agreement.check(comm, "hvd.Strategy", facts, problem)
        return made  # type: ignore[return-value]


def _read_syncs(value: Any, position: Position) -> tuple[Call, ...]:
    if not isinstance(value, list):
        return (read_sync(value, position),)
    if not value:
        raise position.error("`sync` must hold at least one, or be none. Received: [].")
    return tuple(read_sync(item, position.item(number)) for number, item in enumerate(value))


def _arguments_of(target: Target) -> Callable[[Any, Position], Call]:
    return lambda value, position: READER.call(target, value, position)


_SECTIONS: dict[str, Callable[[Any, Position], Any]] = {
    "optimizer": lambda value, position: READER.tagged(OPTIMIZERS, "class", value, position),
    "gradients": _arguments_of(_GRADIENTS),
    "sync": _read_syncs,
    "broadcast": _arguments_of(_BROADCAST),
    "warmup": _arguments_of(_WARMUP),
    "metrics": lambda value, position: READER.choice(_METRICS, value, position),
    "monitor": _arguments_of(_MONITOR),
    "consensus": _arguments_of(_CONSENSUS),
}


def _sets(part: Any) -> Iterator[tuple[int, ...]]:
    """The members of every process set in a call."""
    if isinstance(part, RankLists):
        yield from (tuple(sorted(members)) for members in part.sets)
    elif isinstance(part, Answer):
        yield from _sets(part.call)
    elif isinstance(part, Call):
        if part.target.function is Hierarchical:
            yield from (tuple(sorted(members)) for members in part.arguments["groups"])
        for value in part.arguments.values():
            yield from _sets(value)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """Each value in nested mappings with the keys that lead to it; ranks compare them one by one."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, value


def _no_score(model: keras.Model) -> float:
    """Stands for the data that `callbacks` is given later."""
    return 0.0
