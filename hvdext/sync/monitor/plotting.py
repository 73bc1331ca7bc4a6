"""A picture of what a `SyncMonitor` has seen."""

from __future__ import annotations

import math
from pathlib import Path

from hvdext.sync.monitor.records import Records

_NAMED_LAYERS = 6  # more than that are drawn without names
_SHARES = {
    "share_overlapped": ("exchanging while training goes on", "tab:green"),
    "share_waiting": ("training waits", "tab:red"),
}


def plot(records: Records, path: Path, title: str) -> None:
    """Draws the curves as a PNG of four panels; needs matplotlib.

    Args:
        records: what has been seen.
        path: of the file to write.
        title: above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, not pyplot's: the user's backend and figures stay as they are.
    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2)
    _divergence(figure.add_subplot(grid[0, 0]), records)
    _bytes(figure.add_subplot(grid[0, 1]), records)
    time = figure.add_subplot(grid[1, 0])
    _time(time, records)
    halves = grid[1, 1].subgridspec(2, 1)
    noise_scale = figure.add_subplot(halves[0])
    _noise_scale(noise_scale, records)
    _staleness(figure.add_subplot(halves[1], sharex=noise_scale), records)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not time and not records.staleness.x:  # not one exchange
            axes.set_xlim(0, 1)
    figure.savefig(path, format="png", dpi=120)


def _divergence(axes, records):
    layers = {name: curve for name, curve in records.layers.items() if curve.x}
    for name, curve in layers.items():
        few = len(layers) <= _NAMED_LAYERS
        style = {"label": name} if few else {"color": "tab:gray"}
        axes.plot(curve.x, curve.y, alpha=0.45, linewidth=1, **style)
    if not 0 < len(layers) <= _NAMED_LAYERS:
        axes.plot([], [], color="tab:gray", alpha=0.45, linewidth=1, label="single layers")
    curve, farthest = records.divergence, records.farthest
    marker = "o" if len(curve.x) == 1 else None
    axes.plot(farthest.x, farthest.y, color="tab:red", marker=marker, label="farthest rank")
    axes.plot(curve.x, curve.y, color="black", marker=marker, label="all ranks, root mean square")
    axes.set(title="How far the ranks are apart", xlabel="step", ylabel="distance to the mean (L2 norm)")
    values = [*curve.y, *(y for layer in layers.values() for y in layer.y)]
    if values and min(values) > 0:
        _logarithmic(axes)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the names
    else:
        axes.set_ylim(0, 1.35 * max(values, default=0.0) or 1.0)
    axes.legend(fontsize="small", ncols=2, loc="upper left")


def _bytes(axes, records):
    from matplotlib.ticker import EngFormatter

    sent, synchronous = records.sent, records.synchronous
    axes.plot(synchronous.x, synchronous.y, color="tab:orange", label="with gradients at every step")
    axes.plot(sent.x, sent.y, color="tab:blue", label="sent")
    title = "Bytes sent by this rank"
    if sent.y and synchronous.y[-1] > sent.y[-1] > 0:
        title += f": {synchronous.y[-1] / sent.y[-1]:.3g} times fewer"
    axes.set(title=title, xlabel="step", ylabel="bytes so far")
    if sent.y and min(*sent.y, *synchronous.y) > 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max([*sent.y, *synchronous.y], default=0.0) or 1000.0)
    axes.yaxis.set_major_formatter(EngFormatter("B"))
    axes.legend(fontsize="small", loc="lower right")


def _time(axes, records):
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = range(1, len(records.epochs) + 1)
    for key, (label, colour) in _SHARES.items():
        shares = [100 * epoch[key] for epoch in records.epochs]
        axes.plot(epochs, shares, color=colour, marker="o", markersize=3, label=label, clip_on=not shares)
    axes.set(title="Time spent on exchanges", xlabel="epoch", ylabel="share of the epoch's time")
    largest = max((100 * epoch[key] for epoch in records.epochs for key in _SHARES), default=0.0)
    axes.set_ylim(0, 1.3 * largest or 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize="small")


def _noise_scale(axes, records):
    curve = records.noise_scale
    axes.plot(curve.x, curve.y, color="tab:purple")
    axes.set(title="Gradient noise scale and staleness", ylabel="noise scale\n(samples)")
    axes.tick_params(labelbottom=False)
    if curve.x:
        _logarithmic(axes)
    else:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", va="center", color="gray")
        axes.set_yticks([])


def _staleness(axes, records):
    from matplotlib.ticker import MaxNLocator

    curve = records.staleness
    axes.plot(curve.x, curve.y, color="tab:brown", marker="o", markersize=2, linewidth=1, clip_on=not curve.x)
    largest = max((y for y in curve.y if math.isfinite(y)), default=0.0)
    axes.set(xlabel="step", ylabel="staleness\n(steps)", ylim=(0, max(1.0, 1.1 * largest)))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))


def _logarithmic(axes):
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
