"""The figures of a report as plots: one picture for each benchmark, one part of it for each unit."""

from __future__ import annotations

from pathlib import Path


def draw(name: str, figures: list[dict], folder: Path) -> Path:
    """Writes `folder/name.png`: medians as bars, from the lowest to the highest measurement as lines.

    Args:
        name: of the benchmark.
        figures: what `measuring.figure` has noted.
        folder: of the report.
    """
    from matplotlib.figure import Figure

    units = list(dict.fromkeys(each["unit"] for each in figures))
    parts = {unit: [each for each in figures if each["unit"] == unit] for unit in units}
    heights = [1 + len(part) for part in parts.values()]
    plot = Figure(figsize=(11, 1 + 0.32 * sum(heights)), layout="constrained")
    rows = plot.subplots(len(units), 1, squeeze=False, height_ratios=heights)
    for axes, (unit, part) in zip(rows[:, 0], parts.items(), strict=True):
        medians = [each["median"] for each in part]
        below = [each["median"] - min(each["values"]) for each in part]
        above = [max(each["values"]) - each["median"] for each in part]
        axes.barh(range(len(part)), medians, xerr=[below, above], color="#9db8d9", ecolor="#405060")
        for i, median in enumerate(medians):
            axes.text(0.01, i, f"{median:.4g}", transform=axes.get_yaxis_transform(), va="center")
        axes.set_yticks(range(len(part)), [each["what"] for each in part])
        axes.invert_yaxis()
        axes.set(xlabel=unit, ylim=(len(part) - 0.4, -0.6))
        if min(medians) > 0 and max(medians) > 30 * min(medians):
            axes.set_xscale("log")
    path = folder / f"{name}.png"
    plot.savefig(path, dpi=110)
    return path
