"""A picture of a plan: every layer's load, the places, and what crosses between them. Needs matplotlib."""

from __future__ import annotations

import os
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from hvdext.placement.plan.table import bytes_text, count_text

if TYPE_CHECKING:
    from hvdext.placement.plan.assignment import Assignment

_NAMED = 48  # models with at most so many layers have all of them named
_LABELS = 14  # of the others so many: where a place begins, and the heaviest
_UNITS = {
    "parameters": "parameters",
    "memory": "bytes in training",
    "flops": "operations per sample",
    "measured": "seconds",
}
_STEP = 1.4  # from one box to the next; a box is 1 wide and 1 high
_LEVEL = 0.16  # from one arrow above or below the boxes to the next
_ARROW = {"arrowstyle": "-|>", "color": "0.25", "shrinkA": 0, "shrinkB": 0}


def draw(plan: Assignment, path: str | os.PathLike) -> None:
    """Draws `plan` into the image file at `path`; its ending says which format, such as `.png`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "Plan.draw needs matplotlib: pip install matplotlib. Plan.table() needs nothing."
        ) from None

    # A figure of its own, not pyplot's: the user's backend and figures stay as they are.
    figure = Figure(figsize=(max(12.0, 3.1 * plan.places), 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{plan.model}: {len(plan.graph.placed)} layers at {plan.places} places, balanced by {plan.balance}"
    )
    layers, places = figure.subplots(2, 1, height_ratios=(1.25, 1))
    _draw_layers(layers, plan)
    _draw_places(places, plan)
    figure.savefig(path, dpi=110)


def _color(place: int) -> str:
    return f"C{place % 10}"


def _draw_layers(axes: Any, plan: Assignment) -> None:
    """One bar for each layer, in the order in which they are called."""
    layers = plan.graph.placed
    loads = [plan.load_of(layer) for layer in layers]
    places = [plan.assignment[layer.path] for layer in layers]
    axes.bar(range(len(layers)), loads, width=0.85, color=[_color(place) for place in places])
    for i in range(1, len(layers)):
        if places[i] != places[i - 1]:
            axes.axvline(i - 0.5, color="0.6", linewidth=0.8, linestyle="--")
    shown = _labelled(loads, places)
    axes.set_xticks(shown, [layers[i].path for i in shown], rotation=90, fontsize=7)
    for label, i in zip(axes.get_xticklabels(), shown, strict=True):
        label.set_color(_color(places[i]))
    axes.set_xlim(-0.7, len(layers) - 0.3)
    axes.set_ylim(0, 1.05 * max(loads) or 1.0)
    axes.set_ylabel(_UNITS[plan.balance])
    axes.yaxis.set_major_formatter(
        lambda value, _: bytes_text(value) if plan.balance == "memory" else count_text(value)
    )
    axes.spines[["top", "right"]].set_visible(False)


def _labelled(loads: list[float], places: list[int]) -> list[int]:
    """The numbers of the layers that are named below the axis: all, or some that have room."""
    n = len(loads)
    if n <= _NAMED:
        return list(range(n))
    begins = [i for i in range(n) if i == 0 or places[i] not in places[:i]]
    heaviest = sorted(range(n), key=lambda i: -loads[i])
    shown: list[int] = []
    for i in begins + heaviest:
        if len(shown) < _LABELS + len(begins) and all(abs(i - other) >= n / 70 for other in shown):
            shown.append(i)
    return sorted(shown)


def _draw_places(axes: Any, plan: Assignment) -> None:
    """One box for each place, and an arrow for each pair of places with something between them."""
    for place, cost in enumerate(plan.costs):
        left = _STEP * place
        axes.add_patch(_box(left, 0.0, 1.0, 1.0, edgecolor=_color(place), facecolor="none", linewidth=1.5))
        # Filled from below as far as the place's share of the load goes.
        axes.add_patch(_box(left, 0.0, 1.0, cost.share, facecolor=_color(place), alpha=0.25, linewidth=0))
        names = [path for path in plan.layers_of(place) if not plan.graph.by_path[path].is_input]
        lines = [
            _short(names[0]),
            *(["..."] if len(names) > 2 else []),
            *([_short(names[-1])] if len(names) > 1 else []),
            "",
            f"{cost.layers} layer{'s' * (cost.layers > 1)}, {100 * cost.share:.1f} % of the load",
            f"{count_text(cost.parameters)} parameters",
            f"weights {bytes_text(cost.weight_bytes)}",
            f"in training {bytes_text(cost.memory_bytes)}",
            f"{count_text(cost.flops)} operations/sample",
            *([f"{cost.seconds:.3g} s"] if cost.seconds else []),
        ]
        axes.text(
            left + 0.5, 1.04, f"place {place}", ha="center", va="bottom", weight="bold", color=_color(place)
        )
        axes.text(left + 0.5, 0.5, "\n".join(lines), ha="center", va="center", fontsize=8)
    above, below = _draw_arrows(axes, plan)
    axes.set_xlim(-0.1, _STEP * (plan.places - 1) + 1.1)
    axes.set_ylim(-0.04 - _LEVEL * below, 1.16 + _LEVEL * above)
    axes.set_axis_off()


def _draw_arrows(axes: Any, plan: Assignment) -> tuple[int, int]:
    """Returns how many levels of arrows there are above and below the boxes."""
    between: dict[tuple[int, int], list[int]] = defaultdict(list)
    for crossing in plan.crossings:
        between[crossing.source, crossing.target].append(crossing.tensor.bytes)
    above: list[list[tuple[int, int]]] = []
    below: list[list[tuple[int, int]]] = []
    for source, target in sorted(between, key=lambda pair: (abs(pair[1] - pair[0]), pair)):
        sizes = between[source, target]
        text = [bytes_text(sum(sizes)), f"{len(sizes)} tensor{'s' * (len(sizes) > 1)}"]
        if target == source + 1:
            start, end = _STEP * source + 1.0, _STEP * target
            axes.annotate("", (end, 0.5), (start, 0.5), arrowprops=_ARROW)
            axes.text((start + end) / 2, 0.53, "\n".join(text), ha="center", va="bottom", fontsize=7.5)
            continue
        levels = below if target < source else above
        level = _level_for(levels, source, target)
        edge, sign = (0.0, -1) if target < source else (1.12, 1)
        height = edge + sign * _LEVEL * (level + 0.6)
        # Leaves and arrives beside the middle, so that arrows of neighbours do not lie upon each other.
        start, end = (_STEP * place + 0.5 + side for place, side in ((source, 0.3), (target, -0.3)))
        axes.plot([start, start, end], [edge, height, height], color=_ARROW["color"], linewidth=1)
        axes.annotate("", (end, edge), (end, height), arrowprops=_ARROW)
        va = "top" if sign < 0 else "bottom"
        middle = (start + end) / 2
        axes.text(middle, height + sign * 0.01, ", ".join(text), ha="center", va=va, fontsize=7.5)
    return len(above), len(below)


def _level_for(levels: list[list[tuple[int, int]]], source: int, target: int) -> int:
    """The level nearest to the boxes at which the way from `source` to `target` meets no other."""
    low, high = sorted((source, target))
    for number, taken in enumerate(levels):
        if all(high <= a or b <= low for a, b in taken):
            taken.append((low, high))
            return number
    levels.append([(low, high)])
    return len(levels) - 1


def _box(left: float, bottom: float, width: float, height: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((left, bottom), width, height, **style)


def _short(path: str, most: int = 28) -> str:
    return path if len(path) <= most else f"...{path[3 - most :]}"
