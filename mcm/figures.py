"""The figures of the report: each function takes arrays and returns HTML with embedded pictures.

S samples, N patches, C channels, H W pixels.
"""

import re
from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from cache_tools.images import encode_view
from cache_tools.preview import pca_colors, png, saved, sheet
from mcm.page import charts, gallery, picture
from mcm.scorecard import DEAD

Array = npt.NDArray[Any]

# The browser draws the text. The salt makes the names in the file, and so its bytes, deterministic.
STYLE: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "mcm", "font.size": 9}
STYLE |= {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}
STYLE |= {"axes.grid": True, "grid.alpha": 0.25}
LEGEND: dict[str, Any] = {"loc": "outside lower left", "ncols": 2, "frameon": False, "fontsize": 8}
WIDE = 3.8  # inches of a chart
LOWEST = -1.0  # the axes clip R^2 here; far negative values would compress the rest
R2 = f"R^2, not below {LOWEST:g}"
THUMBNAIL, TINY = 384, 64  # pixels of an embedded picture; JPEG blurs the patches of a tiny one
RANKED, SHOWN = 4, 3  # best and worst channels each, and pictures per channel
WEAKER = ("contrast", "jpeg")  # for these, a larger strength changes a picture less
# "k-NN folded-noise:0.25": method and input, kind, strength; probes of few labels are left out.
COLUMN = re.compile(r"((?:k-NN|linear) (?:full|folded))-([a-z]+):([0-9.e+-]+)")
# What a group of curves means, by the first word of its names.
MEANINGS = {
    "r2": "Share of the target's variance that is predicted on held-out pictures; 0 is the mean.",
    "rank": "Effective number of dimensions; a fall towards 1 is a collapse.",
    "grad": "Norm of the gradient before it is clipped; a jump precedes a divergence.",
    "images": "Pictures per second of all processes, without the evaluations.",
    "wait": "Share of the time in which a step waits for its batch; 0 is best.",
    "knn": "k-NN accuracy on frozen features, as a fraction.",
}


def curves(series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Plot series (step, value) by name; names with one prefix, such as "r2", share a chart.

    A chart with one point in each series is left out.
    """
    groups: dict[str, list[str]] = {}
    for name in series:
        groups.setdefault(name.removeprefix("eval ").split("_")[0], []).append(name)
    found = []
    for group, names in sorted(groups.items(), key=lambda item: len(item[1]), reverse=True):
        if max(len(series[name]) for name in names) == 1:
            continue
        title = R2 if group == "r2" else names[0] if len(names) == 1 else group
        figure, axis = _chart(title)
        for name in names:
            steps, values = zip(*series[name], strict=True)
            marker = "." if len(steps) < 20 else None
            axis.plot(steps, values, linewidth=1, marker=marker, label=name)
        axis.set(xlabel="step", xlim=(0, None))
        if len(names) > 1:
            figure.legend(**LEGEND)
        if group == "r2":
            axis.set(ylim=(max(LOWEST, axis.get_ylim()[0]), None))
        ends = (f"{name} {series[name][-1][1]:.4g} at step {series[name][-1][0]}" for name in names)
        found.append(picture(_svg(figure), f"curves: {', '.join(ends)}", MEANINGS.get(group, "")))
    return charts(found)


def dots(
    title: str, series: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], meaning: str
) -> str:
    """Plot one line per row with the values of each series: a dot per seed, a bar at the mean.

    R^2 is drawn as it is, but not below LOWEST; other values are drawn in percent.
    """
    is_r2 = title.startswith("R^2")
    height = 0.9 + 0.26 * len(rows) + 0.17 * len(series)
    figure, axis = _chart(title if is_r2 else f"{title}, %", height)
    best = (-np.inf, "")
    for i, (name, cells) in enumerate(series.items()):
        offset = 0.6 * ((i + 0.5) / len(series) - 0.5)
        axis.plot([], [], "o", color=f"C{i}", label=name)
        for y, values in enumerate(cells):
            best = max([best, *((value, rows[y]) for value in values)])
            shown = np.maximum(values, LOWEST) if is_r2 else 100 * np.array(values)
            axis.plot(shown, [y + offset] * len(shown), "o", color=f"C{i}", alpha=0.6)
            if len(shown) > 1:
                axis.plot(shown.mean(), y + offset, "|", color=f"C{i}", markersize=12)
    labels = [fill(row, 24, break_long_words=False) for row in rows]
    axis.set(yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.5, -0.5))
    figure.legend(**LEGEND)
    alt = f"{title} of {', '.join(rows)}; the best is {best[1]} with {best[0]:.3f}"
    return picture(_svg(figure), alt, meaning)


def robustness(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return a chart per method, input and kind of corruption; "" without a corrupted result.

    `rows` holds the accuracies of each seed by row and column. A line is the mean of a row over its
    seeds, from the clean pictures to the strongest corruption; its band reaches from the lowest to
    the highest seed.
    """
    found: dict[tuple[str, str], set[float]] = {}
    for column in {column for cells in rows.values() for column in cells}:
        if match := COLUMN.fullmatch(column):
            found.setdefault((match[1], match[2]), set()).add(float(match[3]))
    figures = [
        _strengths(rows, base, kind, sorted(strengths, reverse=kind in WEAKER))
        for (base, kind), strengths in sorted(found.items())
    ]
    about = "Mean over the seeds; a band reaches from the lowest to the highest seed."
    return f"<h3>Robustness</h3><p>{about}</p>{charts(figures)}" if figures else ""


def _strengths(
    rows: Mapping[str, Mapping[str, Sequence[float]]], base: str, kind: str,
    strengths: Sequence[float],
) -> str:  # fmt: skip
    columns = [base, *(f"{base}-{kind}:{strength:g}" for strength in strengths)]
    (figure, axis), ends = _chart(f"{base}, {kind}, %", 3.4), []
    for name, cells in rows.items():
        known = [(i, cells[column]) for i, column in enumerate(columns) if cells.get(column)]
        if len(known) > 1:
            x, seeds = zip(*known, strict=True)
            y = [100 * sum(values) / len(values) for values in seeds]
            low, high = ([100 * pick(values) for values in seeds] for pick in (min, max))
            axis.plot(x, y, marker=".", linewidth=1, label=name)
            axis.fill_between(x, low, high, alpha=0.15, linewidth=0)
            ends.append(f"{name} {y[0]:.1f} to {y[-1]:.1f}")
    labels = ["clean", *(f"{strength:g}" for strength in strengths)]
    axis.set(xlabel="strength", xticks=range(len(labels)), xticklabels=labels)
    figure.legend(**LEGEND)
    return picture(_svg(figure), f"{base}, {kind}: {'; '.join(ends)}")


def confusion(percent_KK: Array, classes: Sequence[str]) -> str:
    """Plot the percent of each true class (line) that is predicted as each class (column)."""
    side = 1.2 + 0.36 * len(classes)
    figure, axis = _chart("confusion, % of the true class", max(2.8, side), max(WIDE, side + 1))
    axis.pcolormesh(percent_KK, cmap="Blues", vmax=150)  # dark text is readable on every color
    for (k, j), value in np.ndenumerate(percent_KK):
        if value >= 0.5:
            axis.text(j + 0.5, k + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8)
    places = np.arange(len(classes)) + 0.5
    axis.set(xticks=places, yticks=places, yticklabels=classes, xlabel="predicted", ylabel="true")
    axis.set_xticklabels(classes, rotation=90)
    axis.grid(False)
    axis.invert_yaxis()
    worst = np.where(np.eye(len(classes), dtype=bool), -1, percent_KK)
    k, j = divmod(int(worst.argmax()), len(classes))
    alt = f"confusion matrix; most confused: {worst[k, j]:.0f} % of {classes[k]} as {classes[j]}"
    return picture(_svg(figure), alt, "The diagonal is right; shares below 0.5 % are left out.")


def channel_figures(channels: Mapping[str, Array]) -> str:
    """Plot the R^2 [C] of channels that vary: a histogram, and R^2 against the target's std."""
    varying, std_C = _varying(channels), channels["target_std"]
    kinds = [kind for kind in ("masked", "full") if f"r2_{kind}" in channels]
    r2 = {kind: channels[f"r2_{kind}"][varying].clip(LOWEST) for kind in kinds}
    (first, counts), (second, against) = _chart("channels by R^2"), _chart("R^2 by channel")
    counts.hist(list(r2.values()), 50, histtype="stepfilled", alpha=0.55, label=list(r2))
    counts.set(xlabel=R2, ylabel="channels")
    for kind, values in r2.items():
        against.scatter(std_C[varying], values, s=10, alpha=0.55, linewidths=0, label=kind)
    against.set(xlabel="std of the target", ylabel=R2, xscale="log")
    for figure in (first, second):
        figure.legend(**LEGEND)
    means = ", ".join(f"{kind} {values.mean():.3f}" for kind, values in r2.items() if len(values))
    alt = f"mean over the channels, not below {LOWEST:g}: {means}"
    caption = f"{len(std_C) - len(varying)} constant channels of {len(std_C)} are not shown."
    both = ((first, "Histogram of R^2"), (second, "R^2 against the std of the target"))
    return charts([picture(_svg(one), f"{name}, {alt}", caption) for one, name in both])


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
    caption = (
        f"The channels with the best and the worst R^2 of {kind} input: the target above the"
        " prediction, in the target's range."
    )
    return picture(png(figure), "maps of single channels over the patches", caption)


def _varying(channels: Mapping[str, Array]) -> Array:
    """Return the indices of the channels whose target varies; a dead channel has no R^2."""
    std_C = channels["target_std"]
    return np.flatnonzero(std_C > DEAD * np.median(std_C))


def samples(tensors: Mapping[str, Array], grid: Sequence[int]) -> str:
    """Show views [S, H, W, 3] above PCA colors of target and prediction [S, N, C].

    The target gives the PCA basis of both.
    """
    target, shape = tensors["target"], (len(tensors["target"]), *grid, 3)
    lines = {"view": tensors["views"]}
    for name in ("target", "prediction"):
        colors = pca_colors(tensors[name], target).reshape(shape)
        lines[name] = (255 * colors).round().astype(np.uint8)
    caption = (
        "Views, their target features and the prediction from masked input."
        " The colors are three principal components of the target."
    )
    return pictures(lines, caption)


def pictures(lines: Mapping[str, Array], caption: str, names: Sequence[str] = ()) -> str:
    """Show pictures uint8 [S, H, W, 3]; those of several lines lie one above another.

    `names` has a caption for each of the S pictures.
    """
    columns = []
    for i, column in enumerate(zip(*lines.values(), strict=True)):
        cells = {f"{line} {i + 1}": _small(rgb) for line, rgb in zip(lines, column, strict=True)}
        columns.append((cells, names[i] if names else ""))
    return gallery(columns, caption)


def _small(rgb_HW3: Array) -> bytes:
    """Return a picture of at most THUMBNAIL pixels as a JPEG file, or a tiny one as a PNG file."""
    image = Image.fromarray(rgb_HW3)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return encode_view(np.asarray(image), "png" if max(image.size) <= TINY else "jpeg:90:444")


def _chart(title: str, height: float = 2.8, width: float = WIDE) -> tuple[Figure, Any]:
    """Return a figure and its only axis."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(subplot_kw={"title": title})


def _svg(figure: Figure) -> bytes:
    """Return the figure as an SVG file without a background. The bytes are deterministic."""
    with rc_context(STYLE):
        return saved(figure, format="svg", transparent=True, metadata={"Date": None})
