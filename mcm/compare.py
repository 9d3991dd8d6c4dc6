"""Paired comparison of the rows of an ablation: differences with bootstrap intervals over pictures.

R pictures of "val".
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mcm.probe import ProbeResult, unpacked

DRAWS, PERCENTILES = 10_000, (2.5, 97.5)  # of the bootstrap; its generator has seed 0

Hits = dict[str, npt.NDArray[np.float64]]  # the share of hits [R] of each picture by column


def hits(results: Iterable[ProbeResult]) -> Hits:
    """Return the hits of one run by column, and their mean over the corruptions of each input."""
    found, corrupted = Hits(), defaultdict[str, list[npt.NDArray[np.float64]]](list)
    for result in results:
        for name, text in (("k-NN", result.knn_hits), ("linear", result.linear_hits)):
            if text is not None:
                values = unpacked(text, result.val_rows).astype(np.float64)
                found[f"{name} {result.label}"] = values
                if result.corruption:
                    corrupted[f"{name} {result.input}, corrupted"].append(values)
    return found | {column: np.mean(parts, axis=0) for column, parts in corrupted.items()}


def interval(difference_R: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Return the mean, and the 95 % interval of its bootstrap over pictures.

    The pictures of one value are drawn together, which gives the same distribution.
    """
    values, counts = np.unique(difference_R.round(9), return_counts=True)
    share = counts / len(difference_R)
    drawn = np.random.default_rng(0).multinomial(len(difference_R), share, DRAWS) @ values
    low, high = np.percentile(drawn / len(difference_R), PERCENTILES)
    return float(difference_R.mean()), float(low), float(high)


def differences(
    rows: Mapping[str, Mapping[int, Hits]], controls: Collection[str]
) -> list[dict[str, Any]]:
    """Return, for each column and row, its difference to the best control over their common seeds.

    `rows` holds the hits by row and seed. The best control has the highest mean accuracy.
    """
    columns = dict.fromkeys(c for seeds in rows.values() for found in seeds.values() for c in found)
    table = []
    for column in columns:
        seeds = {
            name: {seed: found[column] for seed, found in runs.items() if column in found}
            for name, runs in rows.items()
        }
        scores = {name: np.mean([*seeds[name].values()]) for name in controls if seeds.get(name)}
        if not scores:
            continue
        best = max(scores, key=lambda name: scores[name])
        for name, own in seeds.items():
            common = own.keys() & seeds[best].keys()
            if common and name != best:
                mean, low, high = interval(
                    np.mean([own[seed] - seeds[best][seed] for seed in sorted(common)], axis=0)
                )
                facts = {"column": column, "row": name, "control": best, "seeds": sorted(common)}
                table.append(facts | {"difference": mean, "low": low, "high": high})
    return table


def difference_lines(table: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the header and the differences as text, in points: one line per measurement."""
    names = list(dict.fromkeys(e[key] for key in ("row", "control") for e in table))
    lines: dict[str, dict[str, str]] = {}
    for entry in table:
        points = (100 * entry[key] for key in ("difference", "low", "high"))
        line = lines.setdefault(entry["column"], {entry["control"]: "best control"})
        line[entry["row"]] = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*points)
    body = [[column, *(line.get(name, "-") for name in names)] for column, line in lines.items()]
    return [["points above the best control", *names], *body]
