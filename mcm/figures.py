"""The figures of the report: each function takes arrays and returns an <img> with an embedded PNG.

S samples, N patches, C channels, H W pixels.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure

from cache_tools.preview import pca_colors, png, sheet
from mcm.scorecard import DEAD

Array = npt.NDArray[Any]

STYLE: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.grid": True, "grid.alpha": 0.25, "font.size": 9}
LOWEST = -1.0  # the axes clip R^2 here; far negative values would compress the rest
R2 = f"R^2, not below {LOWEST:g}"
RANKED, SHOWN = 4, 3  # best and worst channels each, and pictures per channel


def curves(series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Plot series (step, value) by name; names with one prefix, such as "r2", share an axis."""
    if not series:
        return "<p>no metrics yet</p>"
    groups: dict[str, list[str]] = {}
    for name in series:
        groups.setdefault(name.removeprefix("eval ").split("_")[0], []).append(name)
    figure, axes = _panels(len(groups), 3, 2.6)
    last = max(points[-1][0] for points in series.values())
    together = sorted(groups.items(), key=lambda group: len(group[1]), reverse=True)
    for axis, (group, names) in zip(axes, together, strict=True):
        for name in names:
            steps, values = zip(*series[name], strict=True)
            marker = "." if len(steps) < 20 else None
            axis.plot(steps, values, linewidth=1, marker=marker, label=name)
        axis.set(title=names[0] if len(names) == 1 else group, xlabel="step", xlim=(0, 1.03 * last))
        if len(names) > 1:
            axis.legend(fontsize=8)
        if group == "r2":
            axis.set(title=R2, ylim=(max(LOWEST, axis.get_ylim()[0]), None))
    return _image(figure)


def channel_figures(channels: Mapping[str, Array]) -> str:
    """Plot the R^2 [C] of channels that vary: a histogram, and R^2 against the target's std."""
    varying, std_C = _varying(channels), channels["target_std"]
    kinds = [kind for kind in ("masked", "full") if f"r2_{kind}" in channels]
    r2 = {kind: channels[f"r2_{kind}"][varying].clip(LOWEST) for kind in kinds}
    figure, (counts, against) = _panels(2, 2, 3.6)
    counts.hist(list(r2.values()), 50, histtype="stepfilled", alpha=0.55, label=list(r2))
    counts.set(title="channels by R^2", xlabel=R2, ylabel="channels")
    for kind, values in r2.items():
        against.scatter(std_C[varying], values, s=10, alpha=0.55, linewidths=0, label=kind)
    label = f"std of the target; {len(std_C) - len(varying)} constant channels are not shown"
    against.set(title="R^2 against std of the target", xlabel=label, ylabel=R2, xscale="log")
    for axis in (counts, against):
        axis.legend(fontsize=8)
    return _image(figure)


def channel_maps(
    tensors: Mapping[str, Array], channels: Mapping[str, Array], grid: Sequence[int]
) -> str:
    """Show the target above the prediction of the channels with the best and the worst R^2."""
    kind = "masked" if "r2_masked" in channels else "full"
    r2_C, varying = channels[f"r2_{kind}"], _varying(channels)
    order = varying[np.argsort(-r2_C[varying])]
    picked = [*order[:RANKED], *order[RANKED:][-RANKED:]]
    lines: list[list[Any]] = []
    for i, view in enumerate(tensors["views"][:SHOWN]):
        lines += [[view], [None]]
        for channel in picked:
            maps = [tensors[name][:SHOWN, :, channel] for name in ("target", "prediction")]
            # Percentiles, because one outlier token would compress the colors of the others.
            low, high = np.percentile(maps[0], [1, 99])
            for line, map_N in zip(lines[-2:], (maps[0][i], maps[1][i]), strict=True):
                line.append(((map_N - low) / max(high - low, 1e-6)).reshape(grid))
    figure, axes = sheet(lines)
    for axis, channel in zip(axes[0, 1:], picked, strict=True):
        axis.set_title(f"channel {channel}, R^2 {r2_C[channel]:.3f}", fontsize=8)
    title = f"best and worst channels by R^2 of {kind} input"
    figure.suptitle(f"{title}: target above prediction, in the target's range")
    return _image(figure)


def _varying(channels: Mapping[str, Array]) -> Array:
    """Return the indices of the channels whose target varies; a dead channel has no R^2."""
    std_C = channels["target_std"]
    return np.flatnonzero(std_C > DEAD * np.median(std_C))


def samples(tensors: Mapping[str, Array], grid: Sequence[int]) -> str:
    """Show views [S, H, W, 3] above PCA colors of target and prediction [S, N, C].

    The target gives the PCA basis of both.
    """
    target, shape = tensors["target"], (len(tensors["target"]), *grid, 3)
    names = ("target", "prediction")
    lines = {name: pca_colors(tensors[name], target).reshape(shape) for name in names}
    return pictures({"view": tensors["views"]} | lines)


def pictures(lines: Mapping[str, Any]) -> str:
    """Show lines of pictures [S, H, W, 3] by name, one above another."""
    figure, axes = sheet([*lines.values()])
    for axis, name in zip(axes[:, 0], lines, strict=True):
        axis.set_ylabel(name)
    return _image(figure)


def dots(columns: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str]) -> str:
    """Plot one axis per column, one line per row, in percent: a dot per seed, a bar at the mean."""
    figure, axes = _panels(len(columns), 3, 0.9 + 0.24 * len(rows))
    for i, (axis, (title, cells)) in enumerate(zip(axes, columns.items(), strict=True)):
        for y, values in enumerate(cells):
            percent, dot = 100 * np.array(values), {"alpha": 0.55, "markersize": 5}
            axis.plot(percent, [y] * len(values), "o", color="C0", markeredgewidth=0, **dot)
            if len(values):
                axis.plot(percent.mean(), y, "|", color="C3", markersize=13, markeredgewidth=2)
        axis.set(title=title, xlabel="%", yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        axis.set_yticklabels([] if i % 3 else rows)
    return _image(figure)


def _panels(count: int, columns: int, height: float) -> tuple[Figure, Array]:
    """Return a figure and its `count` axes."""
    rows = -(-count // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(12, height * rows), layout="constrained")
        axes: Array = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _image(figure: Figure) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}">'
