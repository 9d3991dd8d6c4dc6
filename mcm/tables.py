"""The results of runs as tables: a row per model or variant, a column per measurement."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mcm.backbones import load_encoder
from mcm.memory import forward_macs
from mcm.probe import ProbeResult
from mcm.run_dir import last_eval, read_metrics, recorded

# Held-out R^2 of masked input at the run's ratio, and of full input without and with second fill.
FIT = {"r2_masked": "R^2 masked", "r2_full": "R^2 full", "r2_filled": "R^2 full, filled"}
# The metric of each task of fine-tuning, and what a column says of it.
HEADLINES = {"top1": "", "miou": ", mIoU", "box_ap": ", box AP"}
TRAIN_R2, MINUTES = "R^2 train", "minutes"  # columns of an ablation
RATE = ", lr "  # in the name of a row of an ablation, before its learning rate
HELD_OUT_TRAIN = "k-NN folded, held-out train"  # a column that chooses the learning rate
GMAC = "GMAC"  # 1e9 multiply-adds of the forward of one picture

Cells = Mapping[str, Mapping[str, Sequence[float]]]  # values by row and column, one per seed


class Table(dict[str, dict[str, float]]):
    """Accuracies and R^2 of models on one DATASET by row and column, as fractions of 1."""

    def put(self, row: str, values: Mapping[str, float], run: str) -> None:
        """Fill cells of a row; a second value that differs goes to a row named after `run`."""
        for column, value in values.items():
            taken = self.get(row, {}).get(column, value)
            self.setdefault(row if taken == value else f"{row} ({run})", {})[column] = value

    def cells(self) -> Cells:
        """Return the table with a list of one value per cell."""
        return {row: {name: [x] for name, x in values.items()} for row, values in self.items()}


def table_lines(head: str, rows: Cells) -> list[list[str]]:
    """Return the header and the rows as text.

    A cell is the mean ± sample std over its values, accuracies in percent.
    """
    columns = dict.fromkeys(column for values in rows.values() for column in values)
    last = {*FIT.values(), TRAIN_R2, MINUTES, GMAC}
    ordered = sorted(columns, key=lambda column: column in last)
    body = [[row, *(_cell(c, values.get(c, ())) for c in ordered)] for row, values in rows.items()]
    return [[head, *ordered], *body]


def _cell(column: str, values: Sequence[float]) -> str:
    shown = _shown(column, statistics.mean(values)) if values else "-"
    return shown + (f" ± {_shown(column, statistics.stdev(values))}" if len(values) > 1 else "")


def _shown(column: str, value: float) -> str:
    if column in FIT.values() or column == TRAIN_R2:
        return f"{value:.3f}"
    if column == GMAC:
        return f"{value:.3g}"
    return f"{value:.1f}" if column == MINUTES else percent(value)


def percent(value: float | None) -> str:
    """Return a fraction of 1 in percent, or "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def probed(result: ProbeResult) -> dict[str, float]:
    """Return the accuracies of a probe by column.

    A column names the input, the features, the shots and the seed.
    """
    label = result.label + seeded(result.seed)
    found = {f"k-NN {label}": result.knn, f"linear {label}": result.linear}
    return {column: value for column, value in found.items() if value is not None}


def fine_tuned(run: Path, with_seed: bool = True) -> dict[str, float]:
    """Return the last headline metric of a fine-tuning run by column.

    A column names the shots and, with `with_seed`, the seed.
    """
    config = recorded(run)["config"]
    shots = f", {shots} shots" if (shots := config["data"]["shots"]) else ""
    column = ("linear (LARS)" if config["frozen"] else "fine-tuned") + shots
    column += seeded(config["train"]["seed"]) if with_seed else ""
    newest = last_eval(run)
    return {f"{column}{unit}": newest[key] for key, unit in HEADLINES.items() if key in newest}


def seeded(seed: int) -> str:
    """Return the part of a column that names a seed other than 0."""
    return f", seed {seed}" if seed else ""


def held_out(run: Path) -> dict[str, float]:
    """Return the last held-out R^2 of a pre-training run by column."""
    newest = last_eval(run)
    return {column: newest[key] for key, column in FIT.items() if key in newest}


def training_fit(run: Path) -> dict[str, float]:
    """Return R^2 of the last training rows, against the held-out variance, and the cost.

    The inputs are the run's own: R^2 compares with "R^2 masked", or "R^2 full" without masks.
    """
    newest, losses = last_eval(run), [line["loss"] for line in read_metrics(run) if "loss" in line]
    model: Any = load_encoder(str(run)).masked
    view = torch.zeros(1, *recorded(run)["size"], 3, dtype=torch.uint8)
    found = {GMAC: forward_macs(model, view) / 1e9, MINUTES: _minutes(run)}
    kind = "masked" if "r2_masked" in newest else "full"
    if f"r2_{kind}" in newest and not recorded(run)["config"]["loss"]["cls"]:
        share = losses[-1] / newest[f"loss_{kind}"]
        found[TRAIN_R2] = 1 - share * (1 - newest[f"r2_{kind}"])
    return found


def _minutes(run: Path) -> float:
    """Return the minutes of training and saving, without evaluation."""
    rows, seconds, before = recorded(run)["config"]["train"]["global_batch"], 0.0, 0
    for line in read_metrics(run):
        if "images_per_s" in line:
            seconds += (line["step"] - before) * rows / line["images_per_s"]
            before = line["step"]
    return seconds / 60


def best_rates(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the rows, and of a sweep the row with the best learning rate; mark it.

    The best rate has the highest k-NN accuracy of folded inputs on held-out rows of "train".
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"].rpartition(RATE)[0] or row["name"], []).append(row)

    def score(row: dict[str, Any]) -> float:
        return float(statistics.mean(row["values"].get(HELD_OUT_TRAIN) or [0.0]))

    best = [max(group, key=score) for group in groups.values()]
    for row in best:
        if RATE in row["name"]:
            row["mark"] = f"{row['mark']} chosen lr".strip()
    return [row["name"] for row in best]
