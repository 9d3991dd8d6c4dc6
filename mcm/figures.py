"""Every figure of the report: arrays in, an <img> that holds its own PNG out.

Letters: S samples, N patches, C channels, H W pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure

from cache_tools.preview import pca_colours

Array = npt.NDArray[Any]
Points = Sequence[tuple[int, float]]

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 9}
LOWEST = -1.0  # R^2 can be far below zero, and would leave no room for what matters
RANKED, SHOWN = 4, 3  # channels of each end, and pictures of each
GROUPS = {  # one axis each: its title, and its series with their names in the legend
    "loss": {
        "loss": "train",
        "eval loss": "held out",
        "eval loss_masked": "held out, masked",
        "eval loss_full": "held out, full",
    },
    "held-out R^2": {"eval r2_masked": "masked", "eval r2_full": "full"},
    "held-out loss of masked input": {"eval loss_hidden": "hidden values", "eval loss_visible": "visible values"},
    "effective rank": {"eval rank_features": "features", "eval rank_target": "target"},
    "k-NN accuracy, full input": {"eval knn_full": ""},
    "held-out accuracy": {"eval top1": "top-1", "eval top5": "top-5"},
    "gradient norm": {"grad_norm": ""},
    "learning rate": {"lr": ""},
    "images a second": {"images_per_s": ""},
    "share of time waiting for data": {"wait_share": ""},
}


def curves(series: Mapping[str, Points]) -> str:
    """What belongs together in one axis over the steps; a name that no group has in an axis of its own."""
    if not series:
        return "<p>no metrics yet</p>"
    grouped, last = {name for group in GROUPS.values() for name in group}, max(p[-1][0] for p in series.values())
    panels = [(title, {k: label for k, label in group.items() if k in series}) for title, group in GROUPS.items()]
    panels = [panel for panel in panels if panel[1]] + [(name, {name: ""}) for name in series if name not in grouped]
    figure, axes = _panels(len(panels), 3, 2.6)
    for axis, (title, group) in zip(axes, panels, strict=True):
        for name, label in group.items():
            points = series[name]
            axis.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 20 else None, label=label)
        axis.set(title=title, xlabel="step", xlim=(0, 1.03 * last))
        if len(group) > 1:
            axis.legend(fontsize=8)
        if "R^2" in title:
            _clip(axis, "y", [value for name in group for _, value in series[name]])
    return _image(figure)


def channel_figures(channels: Mapping[str, Array], overall: Mapping[str, float]) -> str:
    """Every channel's R^2 [C], masked and full: how many have which, and which std of the target has which."""
    kinds = [kind for kind in ("masked", "full") if f"r2_{kind}" in channels]
    std_C, dead_C = channels["target_std"], _dead(channels["target_std"])
    place_C = np.where(dead_C, std_C[~dead_C].min(initial=1.0) / 2, std_C)  # zero has no place on a log axis
    figure, (counts, against) = _panels(2, 2, 3.6)
    everything = np.concatenate([channels[f"r2_{kind}"] for kind in kinds])
    bins = np.linspace(max(LOWEST, everything.min()), max(everything.max(), 0.0), 50)
    for kind, colour in zip(kinds, ("C0", "C1"), strict=False):
        r2_C, of_all = channels[f"r2_{kind}"], overall.get(f"r2_{kind}")
        counts.hist(r2_C.clip(bins[0]), bins, color=colour, alpha=0.55, label=kind)
        if of_all is not None:
            line = f"{kind}, all channels: {of_all:.3f}"
            counts.axvline(max(of_all, bins[0]), color=colour, linestyle="--", linewidth=1, label=line)
        against.scatter(place_C, r2_C.clip(LOWEST), s=10, alpha=0.55, linewidths=0, color=colour, label=kind)
    counts.set(title="channels by R^2", xlabel="R^2", ylabel="channels")
    label = "std of the target" + f"; {dead_C.sum()} constant channels leftmost" * bool(dead_C.any())
    against.set(title="R^2 against std of the target", xlabel=label, ylabel="R^2", xscale="log")
    _clip(counts, "x", everything)
    _clip(against, "y", everything)
    for axis in (counts, against):
        axis.legend(fontsize=8)
    return _image(figure)


def channel_maps(tensors: Mapping[str, Array], channels: Mapping[str, Array], grid: Sequence[int]) -> str:
    """Target beside prediction of the channels with the best and the worst R^2, on pictures that were shown."""
    kind = "masked" if "r2_masked" in channels else "full"
    varying = np.flatnonzero(~_dead(channels["target_std"]))  # a constant channel has no R^2
    order = varying[np.argsort(-channels[f"r2_{kind}"][varying])]
    ends = {"best": order[:RANKED], "worst": order[RANKED:][-RANKED:]}
    return "".join(_maps(tensors, channels[f"r2_{kind}"], grid, *end, kind) for end in ends.items() if len(end[1]))


def _dead(std_C: Array) -> Array:
    """Which channels do not vary, but for rounding."""
    dead_C: Array = std_C <= 1e-4 * np.median(std_C)
    return dead_C


def _maps(tensors: Mapping[str, Array], r2_C: Array, grid: Sequence[int], end: str, picked: Array, kind: str) -> str:
    views = tensors["views"][:SHOWN]
    ratios = [1.0] + [2 * grid[1] / grid[0] + 0.15] * RANKED
    figure = Figure(figsize=(12, 1.3 * len(views) + 0.6), layout="constrained")
    rows = figure.subplots(len(views), len(ratios), squeeze=False, width_ratios=ratios)
    for row, view in zip(rows, views, strict=True):
        row[0].imshow(view)
    for column, channel in enumerate(picked, 1):
        target, prediction = (tensors[name][: len(views), :, channel] for name in ("target", "prediction"))
        low, high = np.percentile(target, [1, 99])  # one outlier token would leave no colours to the others
        rows[0, column].set_title(f"channel {channel}, R^2 {r2_C[channel]:.3f}", fontsize=9)
        for row, left, right in zip(rows, target, prediction, strict=True):
            gap = np.full((grid[0], 1), np.nan)
            row[column].imshow(np.hstack([left.reshape(grid), gap, right.reshape(grid)]), vmin=low, vmax=high)
    for axis in rows.ravel():
        axis.set_axis_off()
    figure.suptitle(f"the {end} channels by R^2 of {kind} input: target left, prediction right, in the target's range")
    return _image(figure)


def samples(tensors: Mapping[str, Array], grid: Sequence[int]) -> str:
    """Views [S, H, W, 3] beside the PCA colours of target and prediction [S, N, C], in one basis: the target's."""
    target = tensors["target"]
    rows = [pca_colours(tensors[name], target).reshape(len(target), *grid, 3) for name in ("target", "prediction")]
    figure = Figure(figsize=(1.4 * len(target), 4.4), layout="constrained")
    axes = figure.subplots(3, len(target), squeeze=False)
    for label, pictures, row in zip(("view", "target", "prediction"), (tensors["views"], *rows), axes, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    return _image(figure)


def dots(columns: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str]) -> str:
    """An axis a column: in percent a dot a seed and a bar for their mean, the rows from top to bottom."""
    figure, axes = _panels(len(columns), 3, 0.9 + 0.24 * len(rows))
    for i, (axis, (title, cells)) in enumerate(zip(axes, columns.items(), strict=True)):
        for y, values in enumerate(cells):
            percent = 100 * np.array(values)
            axis.plot(percent, np.full(len(values), y), "o", color="C0", alpha=0.55, markersize=5, markeredgewidth=0)
            if len(values):
                axis.plot(percent.mean(), y, "|", color="C3", markersize=13, markeredgewidth=2)
        axis.set(title=title, xlabel="%", yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticklabels([] if i % 3 else rows)
    return _image(figure)


def _panels(count: int, columns: int, height: float) -> tuple[Figure, Array]:
    """A figure of `count` axes."""
    rows = -(-count // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(12, height * rows), layout="constrained")
        axes: Array = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _clip(axis: Any, side: str, values: Sequence[float] | Array) -> None:
    """Show no R^2 below LOWEST, and say so."""
    if min(values) < LOWEST:
        axis.set(**{f"{side}lim": (LOWEST - 0.05, max(*values, 0.0) + 0.05)})
        axis.set_title(f"{axis.get_title()} (clipped at {LOWEST:g}, lowest {min(values):.4g})")


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
