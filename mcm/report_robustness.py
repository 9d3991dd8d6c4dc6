"""The robustness card of the report: accuracy against the strength of each corruption."""

import re
from collections.abc import Mapping, Sequence

from mcm.figures import LEGEND, _chart, _svg
from mcm.page import charts, picture

WEAKER = ("contrast", "jpeg")  # for these, a larger strength changes a picture less
# "k-NN folded-noise:0.25": method and input, kind, strength; probes of few labels are left out.
COLUMN = re.compile(r"((?:k-NN|linear) (?:full|folded))-([a-z]+):([0-9.e+-]+)")


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
        _figure(rows, base, kind, sorted(strengths, reverse=kind in WEAKER))
        for (base, kind), strengths in sorted(found.items())
    ]
    about = "Mean over the seeds; a band reaches from the lowest to the highest seed."
    return f"<h3>Robustness</h3><p>{about}</p>{charts(figures)}" if figures else ""


def _figure(
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
