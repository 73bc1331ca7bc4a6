"""`pipeline`: a model whose layers are spread over ranks, trained by micro-batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import keras
import numpy as np

from hvdext.comm import agreement
from hvdext.comm.communicator import Communicator
from hvdext.comm.current import current
from hvdext.comm.failures import alike
from hvdext.comm.grid import Grid, neighbours
from hvdext.comm.names import cleaned
from hvdext.common.arguments import suggests_keywords
from hvdext.keras_tools.deferred import give_value, has_value
from hvdext.keras_tools.derived import derive_anew
from hvdext.keras_tools.functional import Calls, calls_of, clone, inputs_like, name_alike, unallocated
from hvdext.keras_tools.layers import cloned
from hvdext.keras_tools.models import flat_layers
from hvdext.keras_tools.overrides import overrides_problem
from hvdext.placement.pipeline.messages import Channel
from hvdext.placement.pipeline.model import PipelineModel, Settings
from hvdext.placement.pipeline.repeating import require_repeatable
from hvdext.placement.pipeline.running import Runner
from hvdext.placement.pipeline.schedule import problem_of, programs
from hvdext.placement.pipeline.stages import Chunk, Stage, cut
from hvdext.placement.pipeline.vocabularies import hand_on_vocabularies, vocabularies_of
from hvdext.placement.pipeline.whole_model import WholeModel
from hvdext.placement.plan.plan import Plan
from hvdext.placement.slices.layer import SlicedLayer


@suggests_keywords
def pipeline(
    model: keras.Model | Callable[[], keras.Model],
    plan: Plan,
    microbatches: int,
    schedule: str = "1f1b",
    *,
    grid: Grid | None = None,
    recompute: bool = False,
) -> PipelineModel:
    """Spreads the layers of `model` over the ranks: rank r holds and trains the layers at place r of `plan`.

    ```python
    hvd.init(process_sets="dynamic")
    plan = hvd.plan(build_model, places=hvd.size())
    model = hvd.pipeline(build_model, plan, microbatches=8)
    model.compile("adam", "mse")
    model.fit(x, y, batch_size=64)  # on every rank; x is used by the first, y by the last
    model.save("model.keras")  # on every rank: the whole model, for plain Keras
    ```

    Every rank calls it with the same arguments. A batch is cut into micro-batches of equally many rows, which
    follow each other through the stages; the update is that of the whole batch.

    Args:
        model: a function without arguments that returns a Sequential or functional model (no rank then ever
            holds more than its stage), or such a model, built: its values are copied and it stays as it is.
        plan: which layer is where (`hvd.plan`): as many places as the pipeline has ranks; a multiple of that
            for "interleaved"; any number on one rank alone.
        microbatches: into how many a batch is cut; must divide its rows. Increase it for less waiting at the
            start and the end of a batch: ranks work for m / (m + p - 1) of the time at best.
        schedule: "1f1b" (forward and backward passes in turns: rank r of p keeps the activations of p - r
            micro-batches), "eager-1f1b" (forward passes earlier, so that ranks compute while messages are on
            their way: 2 (p - r) - 1), "gpipe" (all forward passes, then all backward: those of m) or
            "interleaved" (1f1b over several places per rank: place i is on rank i mod p, less waiting and
            more messages; `microbatches` must be a multiple of p).
        grid: a `hvd.Grid`, for several pipelines side by side; None: all ranks are one pipeline.
        recompute: keep only what enters a stage, and make its forward pass once more before its backward
            pass: less memory for a third more work.

    Returns:
        A Keras model of this rank's layers.

    Raises:
        ValueError: on every rank alike, if an argument breaks its rule or the ranks' arguments differ; if the
            model cannot be cut, or `plan` is a plan for another one.
        RuntimeError: if `hvd.init()` has not been called.
    """
    grid = grid if grid is not None else Grid(pipeline=current().size)
    comm = grid.pipeline
    _require_arguments_alike(comm, model, plan, microbatches, schedule, recompute)
    calls, values, chunks = alike(
        comm, lambda: _read(model, plan), "hvd.pipeline could not cut the model", "hvdext.placement.read"
    )
    whole = calls.model
    facts = {f"variable {i}": f"{v.path} {tuple(v.shape)} {v.dtype}" for i, v in enumerate(whole.variables)}
    agreement.check(
        comm,
        f"hvd.pipeline of model {whole.name!r}",
        {"model": whole.name, **facts, **vocabularies_of(calls)},
        _slices_problem(whole, grid),
    )
    agreement.check(grid.slices, f"hvd.pipeline of model {whole.name!r}", vocabularies_of(calls))
    hand_on_vocabularies(grid.data, whole)
    stages = {chunk.number: Stage(chunk) for chunk in chunks[comm.rank :: comm.size]}
    _give_values(list(stages.values()), values, grid.data)
    if recompute:
        require_repeatable(comm, list(stages.values()))
    runner = Runner(
        rank=comm.rank,
        stages=stages,
        last=len(chunks) - 1,
        boundaries=[chunk.gives for chunk in chunks[:-1]],
        channels=_channels(comm),
        name=cleaned(whole.name),
        recompute=recompute,
    )
    back = [any(parcel.has_gradient for parcel in chunk.gives) for chunk in chunks[:-1]]
    shape = (schedule, comm.size, len(chunks), microbatches)
    training = programs(*shape, gradients=back)[comm.rank]
    inference = programs(*shape, training=False)[comm.rank]
    return PipelineModel(
        WholeModel(calls, plan, comm, grid.slices, grid.data, grid.everyone),
        runner,
        Settings(microbatches, training, inference),
    )


def _require_arguments_alike(comm: Communicator, model, plan, microbatches, schedule, recompute) -> None:
    problem = None
    if not isinstance(model, keras.Model) and not callable(model):
        problem = (
            "`model` must be a Keras model, or a function without arguments that returns one. "
            f"Received: model={model!r}."
        )
    elif not isinstance(plan, Plan):
        problem = f"`plan` must be a hvd.Plan. Received: plan={plan!r}."
    elif not isinstance(recompute, bool):
        problem = f"`recompute` must be True or False. Received: recompute={recompute!r}."
    else:
        problem = problem_of(schedule, comm.size, plan.places, microbatches)
    facts = {
        "plan": hashlib.sha256(repr(getattr(plan, "stages", None)).encode()).hexdigest()[:8],
        "microbatches": microbatches,
        "schedule": schedule,
        "recompute": recompute,
    }
    agreement.check(comm, "hvd.pipeline", facts, problem)


def _require_open_rows(calls: Calls) -> None:
    """Stages see micro-batches, and batches of any number of rows for predictions."""
    for name, tensor in zip(calls.inputs, calls.model.inputs, strict=True):
        if tuple(tensor.shape[:1]) != (None,):
            raise ValueError(
                "`model` must take batches of any number of rows: keras.Input(shape), without the batch's "
                "axis, or model.build((None, ...)). "
                f"Received: input {name!r} of shape {tuple(tensor.shape)}."
            )


def _read(model, plan) -> tuple[Calls, Callable, list[Chunk]]:
    """The model's calls, what gives its variables' values, and its chunks; without the other ranks."""
    whole, values = _without_values(model)
    plan.check(whole)
    calls = calls_of(whole)
    _require_open_rows(calls)
    return calls, values, cut(calls, plan)


def _slices_problem(model, grid) -> str | None:
    """What is wrong with the ranks among which layers are cut: they must be at the same stage."""
    for layer in flat_layers(model):
        if isinstance(layer, SlicedLayer) and layer.comm.ranks != grid.slices.ranks:
            return (
                "`grid` of cut layers must be that of the pipeline, along whose slices they are cut. "
                f"Received: {layer.name!r} among the ranks {layer.comm.ranks}, and grid={grid!r}."
            )
    return None


def _without_values(model):
    """The model's graph, and a function that gives a variable's value; None: the initial one."""
    if not isinstance(model, keras.Model):
        whole, scope = unallocated(model)
        _require_plain(whole)
        if whole.compiled:
            raise ValueError(
                "`model` must be a function that builds a model and leaves it uncompiled: compile what "
                f"hvd.pipeline returns. Received: {model!r}, which compiles {whole.name!r}."
            )
        return whole, scope.get_current_value
    _require_plain(model)
    whole, _ = unallocated(lambda: clone(model, cloned, inputs_like(model)))
    name_alike(model, whole)
    values = {id(mine): given for mine, given in zip(whole.variables, model.variables, strict=True)}
    return whole, lambda variable: values[id(variable)].numpy()


def _require_plain(model) -> None:
    """Refuses what cannot be cut, or would be left out."""
    calls_of(model)
    problem = overrides_problem(model, "hvd.pipeline")
    if problem is not None:
        raise ValueError(problem)


def _give_values(stages, value_of, replicas: Communicator) -> None:
    """Allocates the stages' variables: as the whole model would have them, and the same in all pipelines."""
    for stage in stages:
        for variable in stage.variables:
            if has_value(variable):
                continue
            value = value_of(variable)
            give_value(variable, None if value is None else np.asarray(value))
    # The states of random generators stay: pipelines side by side draw different masks if their seeds differ.
    weights = [variable for stage in stages for variable in stage.weights]
    if replicas.size > 1 and weights:
        values = replicas.broadcast([v.value for v in weights], 0, "hvdext.placement.start")
        for variable, value in zip(weights, values, strict=True):
            variable.assign(value)
    derive_anew(stages)


def _channels(comm: Communicator) -> dict[int, Channel]:
    """To the rank's neighbours, by their rank in the pipeline."""
    channels = {}
    for pair in neighbours(comm.ranks):
        if comm.ranks[comm.rank] in pair:
            other = pair[0] if pair[1] == comm.ranks[comm.rank] else pair[1]
            channels[comm.ranks.index(other)] = Channel(comm.subset(pair))
    return channels
