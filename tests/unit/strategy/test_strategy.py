"""hvd.Strategy: each file equals its Python twin; wrong files say where and what; ranks hold one file."""

import enum
import weakref
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml

import hvdext as hvd
from hvdext.comm.communicator import SoloComm
from hvdext.comm.current import use
from hvdext.comm.process_sets import ProcessSet
from hvdext.gradients.apply_hook import hook_of
from hvdext.sync.rule import Outer
from hvdext.testing import run_ranks
from tests.multiprocess.programs import strategy_programs

FILES = sorted(strategy_programs.FILES.glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "strategy.yaml"
        path.write_text(text)
        return path

    return write


def _model():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="head")])


def _settings_of(thing):
    """What a callback or an exchange has been told, down to plain values."""
    if isinstance(thing, Outer):
        optimizer = keras.optimizers.serialize(thing.new_optimizer())
        optimizer["config"].pop("name")  # numbered through the process
        return optimizer, thing.alpha
    if isinstance(thing, (str, int, float, bool, type(None), enum.Enum)):
        return thing
    if isinstance(thing, (list, tuple)):
        return [_settings_of(item) for item in thing]
    if isinstance(thing, ProcessSet):
        return thing.ranks
    if type(thing).__module__.startswith("hvdext") and hasattr(thing, "__dict__"):
        parts = {k: v for k, v in vars(thing).items() if not isinstance(v, weakref.ref)}
        return type(thing).__name__, {k: _settings_of(v) for k, v in parts.items()}
    return type(thing).__name__


def _hook_settings(optimizer):
    hook = hook_of(optimizer)
    if hook is None:
        return None
    accumulator = hook.accumulator and (hook.accumulator.passes, hook.accumulator.average)
    return _settings_of(hook.exchange), accumulator


# -- the files in examples ----------------------------------------------------------------------------------


def test_each_method_has_a_file_and_a_twin():
    assert [path.stem for path in FILES] == sorted(strategy_programs.TWINS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_equals_twin(path):
    strategy = hvd.Strategy.load(path)
    options, optimizer, callbacks = strategy_programs.TWINS[path.stem](hvd)
    with use(SoloComm()):
        model = _model()
        strategy.compile(model, None if optimizer else keras.optimizers.SGD(name="sgd"), "mse")
        made = strategy.callbacks()
    twin = optimizer or keras.optimizers.SGD(name="sgd")
    if options is not None:
        hvd.DistributedOptimizer(twin, **options)
    assert _hook_settings(model.optimizer) == _hook_settings(twin)
    own, other = model.optimizer.get_config(), twin.get_config()
    assert own | {"name": None} == other | {"name": None}
    assert [_settings_of(callback) for callback in made] == [_settings_of(callback) for callback in callbacks]


def test_comparison_sees_differences():
    """What the test above relies on."""
    a, b = (
        hvd.sync.DiLoCo(8),
        hvd.sync.DiLoCo(8, outer=keras.optimizers.SGD(0.6, momentum=0.9, nesterov=True)),
    )
    assert _settings_of(a) == _settings_of(hvd.sync.DiLoCo(8)) != _settings_of(b)
    assert _settings_of(hvd.callbacks.ConsensusAveraging()) != _settings_of(
        hvd.callbacks.ConsensusAveraging(check_every=3)
    )
    plain, halved = (hvd.DistributedOptimizer(keras.optimizers.SGD(), compression=c) for c in hvd.Compression)
    assert _hook_settings(plain) != _hook_settings(halved)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_round_trip(path, tmp_path):
    strategy = hvd.Strategy.load(path)
    assert hvd.Strategy.from_dict(strategy.to_dict()) == strategy
    strategy.save(tmp_path / "saved.yaml")
    assert hvd.Strategy.load(tmp_path / "saved.yaml") == strategy
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text()) == strategy.to_dict()


def test_every_file_explains_itself():
    for path in FILES:
        lines = path.read_text().splitlines()
        assert lines[0].startswith("# ")
        assert any(line.startswith(("# Paper: ", "# Papers: ")) for line in lines)
        assert max(map(len, lines)) <= 110


# -- forms --------------------------------------------------------------------------------------------------


def _sync(settings):
    strategy = hvd.Strategy.from_dict({"gradients": "none", "sync": settings})
    with use(SoloComm()):
        (sync,) = [c for c in strategy.callbacks() if isinstance(c, hvd.callbacks.ParameterSync)]
    return sync.settings


@pytest.mark.parametrize(
    ("settings", "field", "expected"),
    [
        ({"when": {"every": 8}}, "when", hvd.sync.Every(8)),
        ({"when": {"every": {"steps": 8, "delay": 5}}}, "when", hvd.sync.Every(8, delay=5)),
        ({"when": "every_epoch"}, "when", hvd.sync.EveryEpoch()),
        ({"when": {"at_end": None}}, "when", hvd.sync.AtEnd()),
        ({"when": {"always": 9}}, "when", hvd.sync.Always(9)),
        ({"when": "every_epoch", "what": "*/kernel"}, "what", hvd.sync.Matching("*/kernel")),
        ({"when": "every_epoch", "what": ["a/*", "b/*"]}, "what", hvd.sync.Matching("a/*", "b/*")),
        (
            {"when": "every_epoch", "what": {"all_but": {"patterns": "head/*", "slots": True}}},
            "what",
            ~hvd.sync.Matching("head/*", slots=True),
        ),
        (
            {"when": {"every": 8}, "what": {"rotating": {"fragments": 4, "what": {"all": {"slots": True}}}}},
            "what",
            hvd.sync.Rotating(4, what=hvd.sync.All(slots=True)),
        ),
        (
            {"when": {"every": 8}, "wire": {"format": "int4", "rounding": "error_feedback"}},
            "wire",
            hvd.sync.Wire("int4", "error_feedback"),
        ),
        ({"when": {"every": 8}, "whom": "ring"}, "whom", hvd.sync.Ring()),
        ({"when": {"every": 8}, "whom": {"pairs": 3}}, "whom", hvd.sync.Pairs(3)),
        ({"when": {"every": 8}, "rule": {"pull": {"alpha": 0.5}}}, "rule", hvd.sync.Pull(0.5)),
        ({"when": {"every": 8}, "rule": {"mean": "steps"}}, "rule", hvd.sync.Mean("steps")),
        ({"preset": "AsyncGossip", "whom": "exponential"}, "whom", hvd.sync.Exponential()),
        ({"preset": "PartialSync", "what": {"rotating": 2}, "every": 4}, "what", hvd.sync.Rotating(2)),
    ],
)
def test_forms_of_answers(settings, field, expected):
    assert getattr(_sync(settings), field) == expected


def test_optimizers_and_schedules():
    outer = {
        "class": "SGD",
        "learning_rate": {"class": "CosineDecay", "initial_learning_rate": 1, "decay_steps": 4},
    }
    optimizer = _sync({"when": {"every": 8}, "rule": {"outer": {"optimizer": outer, "alpha": 0.5}}}).rule
    rate = optimizer.new_optimizer()._learning_rate
    np.testing.assert_allclose(float(rate(2)), 0.5, rtol=1e-6)
    assert optimizer.alpha == 0.5


def test_several_syncs_and_their_order(write):
    strategy = hvd.Strategy.load(
        write(
            "gradients: none\n"
            "sync:\n"
            "- {preset: PartialSync, what: 'head/*', every: 4}\n"
            "- {when: every_epoch, what: {all_but: 'head/*'}}\n"
            "metrics: average\nmonitor: {}\nconsensus: {}\n"
        )
    )
    mine = [keras.callbacks.TerminateOnNaN()]
    with use(SoloComm()):
        first, second = strategy.callbacks(mine), strategy.callbacks(mine)
    assert [type(callback).__name__ for callback in first] == [
        "BroadcastGlobalVariablesCallback",
        "MetricAverageCallback",
        "ParameterSync",
        "ParameterSync",
        "SyncMonitor",
        "TerminateOnNaN",
        "ConsensusAveraging",
    ]
    assert not {*map(id, first)} & {*map(id, second)} - {id(mine[0])}
    assert first[2].settings.when == hvd.sync.Every(4)


def test_numbers_with_exponents_are_numbers(write):
    strategy = hvd.Strategy.load(write("optimizer: {class: Adam, learning_rate: 1e-3}\n"))
    assert strategy.to_dict()["optimizer"]["learning_rate"] == 1e-3


def test_defaults(write):
    strategy = hvd.Strategy.load(write("metrics: average"))
    assert strategy.to_dict() == {"gradients": {}, "broadcast": {"root_rank": 0}, "metrics": "average"}
    without = hvd.Strategy.load(write("broadcast: none\ngradients: {op: Sum}"))
    assert without.to_dict() == {"gradients": {"op": "Sum"}, "broadcast": "none"}


def test_data_that_files_cannot_hold(write):
    strategy = hvd.Strategy.load(write("warmup: {unify: best}\nconsensus: {take: best}\n"))
    probe = (np.zeros((2, 3)), np.zeros((2, 1)))
    with use(SoloComm()):
        warmup, consensus = strategy.callbacks(warmup={"probe": probe}, consensus={"score": abs})
        assert warmup._probe is probe
        assert consensus._options.score is abs
        with pytest.raises(ValueError, match=r"yaml: warmup: `probe` \(or `score`\) must be given"):
            strategy.callbacks(consensus={"score": abs})
        with pytest.raises(ValueError, match=r"no argument `prob`\. Did you mean `probe`\?"):
            strategy.callbacks(warmup={"prob": probe}, consensus={"score": abs})
        with pytest.raises(ValueError, match=r"warmup: the section `warmup` must be there"):
            hvd.Strategy.load(write("consensus: {}")).callbacks(warmup={"probe": probe})


def test_optimizer_is_given_once(write):
    strategy = hvd.Strategy.load(write("optimizer: Adam"))
    with use(SoloComm()):
        with pytest.raises(ValueError, match=r"optimizer: there must be an optimizer .* Received: both"):
            strategy.compile(_model(), "sgd")
        with pytest.raises(ValueError, match="Received: neither"):
            hvd.Strategy.load(write("gradients: {}")).compile(_model())
        local = hvd.Strategy.load(write("gradients: none\nconsensus: {}"))
        with pytest.raises(ValueError, match="must not exchange gradients with gradients: none"):
            local.compile(_model(), hvd.DistributedOptimizer(keras.optimizers.SGD()))
    with pytest.raises(RuntimeError, match=r"hvd\.init"):
        strategy.callbacks()


# -- bad files ----------------------------------------------------------------------------------------------

LOCAL = "gradients: none\n"
ERRORS = {
    "empty": ("", r"strategy.yaml: the file must hold at least one section"),
    "comments only": ("# nothing\n", "empty file"),
    "no YAML": ("gradients: [", r"strategy.yaml: line 1, column \d+: "),
    "no mapping": ("- gradients", "must be a mapping of sections"),
    "twice": (
        "gradients: {}\nmetrics: average\ngradients: {}",
        r"line 3, column 1: the key 'gradients'.*line 1",
    ),
    "twice inside": ("gradients: {op: Sum, op: Average}", "the key 'op' must not stand twice"),
    "a date": ("gradients: 2020-01-01", "Object of type date"),
    "a loop": ("gradients: &a {select: [*a]}", "Circular"),
    "an object": ("gradients: !!python/object:os.system {}", "could not determine a constructor"),
    "no such section": (
        "gradient: {}",
        r"gradient: there is no section 'gradient'\. Did you mean `gradients`\?",
    ),
    "nothing after the colon": (LOCAL + "consensus:", "consensus: `consensus` must not be empty"),
    "no gradients": ("sync: {preset: LocalSGD, every: 8}", "`gradients` must be given where `sync` is"),
    "nobody meets": (LOCAL, "the ranks would never hear of each other"),
    "nothing to watch": ("monitor: {}", "monitor: `monitor` needs `sync`"),
    "unknown argument": ("gradients: {backward_passes: 2}", "Did you mean `backward_passes_per_step`"),
    "type": (
        "gradients: {backward_passes_per_step: '2'}",
        r"gradients.backward_passes_per_step: .* must be a whole number.*='2', text",
    ),
    "bool for a number": (
        LOCAL + "sync: {preset: LocalSGD, every: true}",
        r"sync.every: .*=true, true or false",
    ),
    "list for a number": (LOCAL + "sync: {preset: LocalSGD, every: [8]}", "sync.every: .*a list or mapping"),
    "op": ("gradients: {op: average}", r"gradients.op: .*Did you mean `Average`"),
    "op not for gradients": ("gradients: {op: Max}", "gradients.op: `op` must"),
    "groups of variables": ("gradients: {groups: [[1]]}", "gradients.groups: .* a whole number or null"),
    "select": ("gradients: {select: []}", "gradients.select: `select` must hold"),
    "preset": (
        LOCAL + "sync: {preset: DiLoko, every: 8}",
        r"sync.preset: there is no 'DiLoko'. Did you mean `DiLoCo`",
    ),
    "preset's argument": (
        LOCAL + "sync: {preset: DiLoCo, evry: 8}",
        r"sync.evry: `DiLoCo` has no argument.*`every`",
    ),
    "argument missing": (LOCAL + "sync: {preset: DiLoCo}", "sync: `every` must be given"),
    "neither": (LOCAL + "sync: {what: all}", "sync: there must be a `preset`, or `when`"),
    "unknown question": (LOCAL + "sync: {wen: always}", r"sync.wen: .*Did you mean `when`"),
    "interval": (
        LOCAL + "sync: {when: {every: 0}}",
        "sync.when.every.steps: `steps` must be an integer of at least 1",
    ),
    "delay": (
        LOCAL + "sync: {when: {every: {steps: 32, delay: 33}}}",
        "strategy.yaml: sync.when.every.delay: `delay` must be at most `steps`, 32",
    ),
    "in a list": (
        LOCAL + "sync: [{when: always}, {when: {every: {steps: 4, delya: 1}}}]",
        r"sync\[1\].when.every.delya: `every` has no argument `delya`. Did you mean `delay`",
    ),
    "a level too high": (LOCAL + "sync: {when: {every: 32, delay: 5}}", "arguments one level below"),
    "no such answer": (LOCAL + "sync: {when: evry}", r"sync.when: there is no 'evry'. Did you mean `every`"),
    "fragments": (
        LOCAL + "sync: {when: {every: 2}, what: {rotating: 3}}",
        "sync: `steps` must be at least the number",
    ),
    "alpha": (
        LOCAL + "sync: {when: {every: 2}, rule: {pull: 2}}",
        r"sync.rule.pull.alpha: `alpha` must lie in \(0, 1\]",
    ),
    "merge alpha": (
        LOCAL + "sync: {when: {every: 2}, rule: {outer: {optimizer: SGD, alpha: 2}}}",
        r"sync.rule.outer.alpha: `alpha` must lie in \[0, 1\]",
    ),
    "no optimizer": (
        LOCAL + "sync: {when: {every: 2}, rule: {outer: {optimizer: {class: Dense}}}}",
        "sync.rule.outer.optimizer.class: there is no 'Dense'",
    ),
    "optimizer without class": (
        LOCAL + "sync: {when: {every: 2}, rule: {outer: {optimizer: {momentum: 1}}}}",
        "optimizer: there must be a mapping with the key `class`",
    ),
    "optimizer's argument": (
        "optimizer: {class: SGD, momentun: 0.5}",
        "optimizer.momentun: .*Did you mean `momentum`",
    ),
    "optimizer's type": (
        "optimizer: {class: SGD, nesterov: 1}",
        "optimizer.nesterov: `nesterov` must be true or",
    ),
    "optimizer's value": ("optimizer: {class: SGD, momentum: 2}", "optimizer.momentum: "),
    "wire": (
        LOCAL + "sync: {when: {every: 2}, wire: int9}",
        "sync.wire: `wire` must be one of .*Did you mean 'int8'",
    ),
    "contradiction": (
        LOCAL + "sync: {when: {every: 2}, whom: ring, rule: {outer: SGD}}",
        "sync.rule: `rule` must do",
    ),
    "ranks": (
        LOCAL + "sync: {when: {every: 2}, whom: {group: [0, 0]}}",
        "sync.whom.group.process_set: `process_set` must be",
    ),
    "rank in two sets": ("gradients: {process_set: [[0, 1], [1, 2]]}", "process_set: .*no rank in two"),
    "groups": (
        LOCAL + "sync: {when: {every: 2}, whom: {hierarchical: {groups: [[0, 1], [1]], every: 2}}}",
        "sync.whom.hierarchical.groups: `groups` must be",
    ),
    "warm-up": ("warmup: {fraction: 2}", r"warmup.fraction: `fraction` must lie in \(0, 1\]"),
    "data": ("warmup: {probe: 3}", "warmup.probe: `probe` is data or a function"),
    "consensus": ("consensus: {last_epochs: 0}", "consensus.last_epochs: "),
    "metrics": ("metrics: mean", r"metrics: there is no 'mean'. There are: average"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_files(name, write):
    text, message = ERRORS[name]
    path = write(text)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        hvd.Strategy.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_from_dict_names_itself():
    with pytest.raises(ValueError, match=r"^Strategy.from_dict: gradients.op: "):
        hvd.Strategy.from_dict({"gradients": {"op": "Sun"}})
    with pytest.raises(ValueError, match="not JSON serializable"):
        hvd.Strategy.from_dict({"optimizer": {"class": "SGD", "learning_rate": object()}})


def test_from_dict_keeps_a_copy():
    settings = {"gradients": {"process_set": ((0, 1), (2, 3))}}
    strategy = hvd.Strategy.from_dict(settings)
    assert strategy.to_dict()["gradients"] == {"process_set": [[0, 1], [2, 3]]}
    strategy.to_dict()["gradients"]["process_set"].clear()
    settings.clear()
    assert [s.ranks for s in strategy.process_sets] == [(0, 1), (2, 3)]


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        hvd.Strategy.load(Path("no/such.yaml"))


# -- several ranks ------------------------------------------------------------------------------------------


def _message_of(action):
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


def test_ranks_with_different_files():
    def one_rank(comm):
        every = [8, 8, 16][comm.rank]
        strategy = hvd.Strategy.from_dict(
            {"gradients": "none", "sync": {"preset": "LocalSGD", "every": every}}
        )
        model = _model()
        return _message_of(strategy.callbacks), _message_of(lambda: strategy.compile(model, "sgd"))

    results = run_ranks(3, one_rank)
    assert len(set(results)) == 1
    for message in results[0]:
        assert message.startswith("The ranks disagree about hvd.Strategy:")
        assert "sync.every: ranks 0, 1: 8; rank 2: 16" in message


def test_each_rank_takes_the_set_it_is_in():
    strategy = hvd.Strategy.from_dict(
        {
            "gradients": {"process_set": [[0, 1], [2, 3]]},
            "sync": {"when": {"every": 4}, "whom": {"group": [[2, 0], [1, 3]]}},
        }
    )
    assert [s.ranks for s in strategy.process_sets] == [(0, 1), (2, 3), (0, 2), (1, 3)]

    def one_rank(comm):
        model = _model()
        strategy.compile(model, keras.optimizers.SGD())
        _, sync = strategy.callbacks()
        exchange = hook_of(model.optimizer).exchange
        return exchange.options.process_set.ranks, sync.settings.whom.process_set.ranks

    inside, across = zip(*run_ranks(4, one_rank), strict=True)
    assert inside == ((0, 1), (0, 1), (2, 3), (2, 3))
    assert across == ((0, 2), (1, 3), (0, 2), (1, 3))


def test_rank_in_no_set():
    strategy = hvd.Strategy.from_dict({"gradients": {"process_set": [[0], [1]]}})
    messages = run_ranks(3, lambda comm: _message_of(lambda: strategy.compile(_model(), "sgd")))
    assert len(set(messages)) == 1
    assert "gradients.process_set: `process_set` must hold every rank" in messages[0]
    assert "rank 2: " in messages[0]


def test_groups_are_process_sets():
    hierarchical = hvd.Strategy.load(strategy_programs.FILES / "hierarchical.yaml")
    assert [s.ranks for s in hierarchical.process_sets] == [(0, 1), (2, 3)]
