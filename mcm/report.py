"""The report: one static HTML file of tables, figures, configurations and provenance of runs."""

import html
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cache_tools.errors import CorruptionError, UsageError, found_at
from cache_tools.records import printable, read_json, read_record
from cache_tools.schema import CacheIdentity
from cache_tools.storage import work_dir, write_atomic
from mcm import checkpoint
from mcm.dense_probe import DenseResult
from mcm.draw import color
from mcm.figures import Array, channel_figures, channel_maps, curves, dots, pictures, samples
from mcm.probe import ProbeResult
from mcm.run_dir import last_eval, read_metrics, recorded

# Held-out R^2 of masked input at the run's ratio, and of full input without and with second fill.
FIT = {"r2_masked": "R^2 masked", "r2_full": "R^2 full", "r2_filled": "R^2 full, filled"}
# The metric of each task of fine-tuning, and what a column says of it.
HEADLINES = {"top1": "", "miou": ", mIoU", "box_ap": ", box AP"}
ABLATIONS = {"columns", "rows"}  # keys of a results.json
MINUTES = "minutes"  # a column of an ablation
RANDOM = "random init"
STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}"
    "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}"
    "pre{background:#f4f4f4;padding:1em;overflow:auto}img{max-width:100%}"
)


class Table(dict[str, dict[str, float]]):
    """Accuracies and R^2 of models on one DATASET by row and column, as fractions of 1."""

    def put(self, row: str, values: Mapping[str, float], run: str) -> None:
        """Fill cells of a row; a second value that differs goes to a row named after `run`."""
        for column, value in values.items():
            taken = self.get(row, {}).get(column, value)
            self.setdefault(row if taken == value else f"{row} ({run})", {})[column] = value

    def lines(self) -> list[list[str]]:
        """Return the header and the rows as text, accuracies in percent."""
        columns = dict.fromkeys(column for cells in self.values() for column in cells)
        rows = [[row, *(_shown(name, self[row].get(name)) for name in columns)] for row in self]
        return [["model", *columns], *rows]


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column in FIT.values():
        return f"{value:.3f}"
    return f"{value:.1f}" if column == MINUTES else _percent(value)


def probed(result: ProbeResult) -> dict[str, float]:
    """Return the accuracies of a probe by column.

    A column names the input, the features, the shots and the seed.
    """
    label = result.label + _seed(result.seed)
    found = {f"k-NN {label}": result.knn, f"linear {label}": result.linear}
    return {column: value for column, value in found.items() if value is not None}


def fine_tuned(run: Path, seeded: bool = True) -> dict[str, float]:
    """Return the last headline metric of a fine-tuning run by column.

    A column names the shots and, if `seeded`, the seed.
    """
    config = recorded(run)["config"]
    shots = f", {shots} shots" if (shots := config["data"]["shots"]) else ""
    column = ("linear (LARS)" if config["frozen"] else "fine-tuned") + shots
    column += _seed(config["train"]["seed"]) if seeded else ""
    newest = last_eval(run)
    return {f"{column}{unit}": newest[key] for key, unit in HEADLINES.items() if key in newest}


def held_out(run: Path) -> dict[str, float]:
    """Return the last held-out R^2 of a pre-training run by column."""
    newest = last_eval(run)
    return {column: newest[key] for key, column in FIT.items() if key in newest}


def _seed(seed: int) -> str:
    return f", seed {seed}" if seed else ""


def report(runs: Sequence[Path], out: Path, note: str = "") -> dict[str, Table]:
    """Write the HTML file and return its tables by the sha256 of their DATASET.

    Raises: UsageError for a folder that is not a RUN, a CACHE or an ablation, or a folder `out`.
    """
    if out.is_dir():
        advice = "name a file, such as report.html"
        raise UsageError(f"--out {out}: expected a file name; found {found_at(out)}; {advice}")
    tables, sections, labels = defaultdict[str, Table](Table), [], _labels(runs)
    rows = _rows(labels)
    for path, label in labels.items():
        if (path / "cache.json").is_file():
            sections.append(_add_teacher(tables, path, label))
        elif (path / "run.json").is_file():
            _add_run(tables, path, label, rows)
            sections.append(_run_section(path, label))
        elif ABLATIONS <= (results := _json(path / "results.json")).keys():
            sections.append(ablation_html(results))
        else:
            expected = "a RUN (run.json), a CACHE (cache.json) or an ablation (results.json)"
            raise UsageError(f"{path}: expected {expected}; found {found_at(path)}")
    header = f"<p>{html.escape(note)}</p>" if note else ""
    overview = "".join(_html_table(table.lines(), caption(data)) for data, table in tables.items())
    body = f"<h1>Masked Channel Modeling</h1>{header}{overview}{''.join(sections)}"
    head = f"<meta charset=utf-8><title>Masked Channel Modeling</title><style>{STYLE}</style>"
    write_atomic(out, printable(f"<!doctype html>{head}{body}\n").encode())
    return dict(tables)


def caption(data: str) -> str:
    """Return the line above a table of the DATASET with this sha256."""
    return f"DATASET {data[:12]}: accuracy in percent; the linear probe is fitted by LBFGS"


def _labels(runs: Sequence[Path]) -> dict[Path, str]:
    """Return the label of each folder: its name, or its path where two folders share a name."""
    names = [run.name for run in dict.fromkeys(runs)]
    return {run: run.name if names.count(run.name) == 1 else str(run) for run in runs}


def _rows(labels: Mapping[Path, str]) -> dict[str, str]:
    """Return the table row of each checkpoint's weights.

    A run's last checkpoint has the run's label. Each earlier checkpoint has its own row.
    """
    rows = {"untrained": RANDOM, "random": RANDOM}
    for run, label in labels.items():
        steps = checkpoint.complete(run)
        for path in steps:
            at = "" if path == steps[-1] else f" at {path.name}"
            rows[checkpoint.weights(path)] = label + at
    return rows


def _add_teacher(tables: dict[str, Table], cache: Path, label: str) -> str:
    """Add the probes of a CACHE's mean features to the table of its DATASET; return its section."""
    section, data = "", read_record(CacheIdentity, cache / "cache.json").dataset_sha256
    for file in sorted(work_dir(cache).glob("probe*.json")):
        result = read_record(ProbeResult, file)
        if result.features in (None, "mean") and result.teacher:
            tables[data].put(f"teacher {label}", probed(result), label)
            section = f"<h2>teacher {html.escape(label)}</h2><pre>{result.teacher.text()}</pre>"
    return section


def _add_run(tables: dict[str, Table], run: Path, label: str, rows: Mapping[str, str]) -> None:
    """Add a RUN's results to the tables.

    A pre-training run is a row. A fine-tuning run fills a cell in the row of its initial weights.
    """
    facts = recorded(run)
    # In reverse order, the probes of the untrained model come first, and so does their row.
    for file in sorted((run / "probe").glob("*.json"), reverse=True):
        result = read_record(ProbeResult, file)
        row = rows.get(result.weights, f"{label} at {result.weights}")
        tables[result.data_sha256].put(row, probed(result), label)
    for file in sorted((run / "dense").glob("*.json"), reverse=True):
        dense = read_record(DenseResult, file)
        row = rows.get(dense.weights, f"{label} at {dense.weights}")
        cell = {f"mIoU {dense.input}{_seed(dense.seed)}": dense.miou}
        tables[dense.data_sha256].put(row, cell, label)
    if facts.get("kind") == "finetune":
        init = facts["init_weights"]
        row = rows.get(init, f"{facts['init']} ({init})")
        tables[facts["dataset_sha256"]].put(row, fine_tuned(run), label)
    elif values := held_out(run):
        data = (facts.get("cache") or {}).get("dataset_sha256", facts["cache_sha256"])
        tables[data].put(label, values, label)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _html_table(
    lines: Sequence[Sequence[str]], caption: str, colors: Sequence[tuple[int, int, int]] = ()
) -> str:
    """Return a table of a header and rows; a row has a bar in its color, if there is one."""

    def row(tag: str, cells: Sequence[str], style: str = "") -> str:
        texts = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
        return f"<tr{style}>{texts}</tr>"

    styles = [f' style="border-left:1em solid rgb{color}"' for color in colors]
    styled = zip_longest(lines[1:], styles, fillvalue="")
    body = row("th", lines[0]) + "".join(row("td", line, style) for line, style in styled)
    return f"<table><caption>{html.escape(caption)}</caption>{body}</table>"


def ablation_lines(results: dict[str, Any]) -> list[list[str]]:
    """Return the header and the rows as text.

    A cell is the mean ± sample std over the finished seeds, accuracies in percent.
    """

    def cell(column: str, values: Sequence[float]) -> str:
        shown = _shown(column, statistics.mean(values) if values else None)
        std = f" ± {_shown(column, statistics.stdev(values))}" if len(values) > 1 else ""
        return shown + std

    columns, rows = results["columns"], results["rows"]
    lines = [[_row_name(r), *(cell(c, r["values"].get(c, ())) for c in columns)] for r in rows]
    return [["variant", *columns], *lines]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in GitHub's Markdown, its columns aligned."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    first, *others = (max(3, *map(len, column)) for column in zip(*lines, strict=True))
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    ruled = [lines[0], rule, *lines[1:]]
    padded = [[name.ljust(first), *map(str.rjust, cells, others)] for name, *cells in ruled]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def ablation_html(results: dict[str, Any]) -> str:
    """Return the table as HTML, with a figure of every accuracy of every seed."""
    rows, others = results["rows"], {*FIT.values(), MINUTES}
    columns = [column for column in results["columns"] if column not in others]
    cells = {column: [row["values"].get(column, []) for row in rows] for column in columns}
    figure = dots(cells, [_row_name(row) for row in rows]) if cells else ""
    caption = "mean ± sample std over the seeds; accuracies in percent"
    table = _html_table(ablation_lines(results), caption)
    return f"<h2>ablations</h2><p>{html.escape(results.get('note', ''))}</p>{table}{figure}"


def _row_name(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['mark']})" if row["mark"] else str(row["name"])


def _run_section(run: Path, label: str) -> str:
    parts = [f"<h2>{html.escape(label)}</h2>", curves(_series(read_metrics(run)))]
    shown, channels = _tensors(run / "samples.safetensors"), _tensors(run / "channels.safetensors")
    grid = _json(run / "run.json").get("grid", ())
    parts += [samples(shown, grid)] if shown else []
    parts += ["<h3>channels</h3>", channel_figures(channels)] if channels else []
    parts += [channel_maps(shown, channels, grid)] if shown and channels else []
    if table := _json(run / "classes.json"):
        columns = (map(_percent, values) for name, values in table.items() if name != "class")
        lines = [list(table), *map(list, zip(table["class"], *columns, strict=True))]
        caption = "classes of the last evaluation in percent, with the colors of the drawings"
        parts.append(_html_table(lines, caption, list(map(color, range(len(lines) - 1)))))
    if drawings := _tensors(run / "shown.safetensors"):
        parts.append(pictures({name: drawings[name] for name in ("truth", "predicted")}))
    for name in ("config.toml", "env.json", "run.json"):
        if (file := run / name).is_file():
            toml = name.endswith("toml")
            text = file.read_text("utf-8", "replace") if toml else json.dumps(_json(file), indent=2)
            summary = f"<summary>{name}</summary>"
            parts.append(f"<details>{summary}<pre>{html.escape(text)}</pre></details>")
    return "".join(parts)


def _series(metrics: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, value) of every number in the log by name.

    A number of an evaluation has the name "eval NAME".
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        evaluated = {f"eval {name}": value for name, value in line.get("eval", {}).items()}
        for name, value in (line | evaluated).items():
            if isinstance(value, int | float) and name not in ("step", "epoch", "time"):
                series.setdefault(name, []).append((line["step"], value))
    return series


def _tensors(path: Path) -> dict[str, Array]:
    """Return the arrays of a safetensors file, float16 as float32, or {} for a missing file."""
    if not path.is_file():
        return {}
    try:
        found = load_file(path)
    except SafetensorError as error:
        advice = "remove the file, or resume the run"
        raise CorruptionError(f"{path}: expected safetensors; found {error}; {advice}") from error
    return {k: x.astype(np.float32) if x.dtype == np.float16 else x for k, x in found.items()}
