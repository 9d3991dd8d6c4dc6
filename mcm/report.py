"""One static HTML file about runs: tables of accuracies and ablations, figures, configurations and provenance."""

import html
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from mcm.figures import Array, channel_figures, channel_maps, curves, dots, samples
from mcm.probe import ProbeResult
from mcm.run_dir import last_eval, read_metrics, recorded

FIT = {"r2_masked": "R^2 masked", "r2_full": "R^2 full"}  # held out; masked at the run's ratio, and full
ABLATIONS = {"columns", "rows"}  # of a results.json
MINUTES = "minutes"  # of an ablation's row
RANDOM = "random init"
STYLE = "body{font:15px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}td,th{padding:.3em .8em;\
border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#f4f4f4;\
padding:1em;overflow:auto}img{max-width:100%}"


class Table(dict[str, dict[str, float]]):
    """Rows of columns: accuracies and R^2 of models on one DATASET, as fractions of 1."""

    def put(self, row: str, values: Mapping[str, float], run: str) -> None:
        """Fill cells of a row; a second, different value for a cell goes to a row that names its run."""
        for column, value in values.items():
            taken = self.get(row, {}).get(column, value)
            self.setdefault(row if taken == value else f"{row} ({run})", {})[column] = value

    def lines(self) -> list[list[str]]:
        """Return the header and the rows as text, accuracies in percent."""
        columns = dict.fromkeys(column for cells in self.values() for column in cells)
        rows = [[row, *(_shown(name, cells.get(name)) for name in columns)] for row, cells in self.items()]
        return [["model", *columns], *rows]


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column in FIT.values():
        return f"{value:.3f}"
    return f"{value if column == MINUTES else 100 * value:.1f}"


def probed(result: ProbeResult) -> dict[str, float]:
    """Return the accuracies of a probe by column; a column names the input, the features, the shots and the seed."""
    label = result.label + _seed(result.seed)
    found = {f"k-NN {label}": result.knn, f"linear {label}": result.linear}
    return {column: value for column, value in found.items() if value is not None}


def fine_tuned(run: Path, seeded: bool = True) -> dict[str, float]:
    """Return the last accuracy of a fine-tuning run by column; a column names the shots and, if `seeded`, the seed."""
    config = recorded(run)["config"]
    shots = f", {shots} shots" if (shots := config["data"]["shots"]) else ""
    column = ("linear (LARS)" if config["frozen"] else "fine-tuned") + shots
    column += _seed(config["train"]["seed"]) if seeded else ""
    newest = last_eval(run)
    return {column: newest["top1"]} if newest else {}


def held_out(run: Path) -> dict[str, float]:
    """Return the last held-out R^2 of a pre-training run by column."""
    newest = last_eval(run)
    return {column: newest[key] for key, column in FIT.items() if key in newest}


def _seed(seed: int) -> str:
    return f", seed {seed}" if seed else ""


def report(runs: Sequence[Path], out: Path, note: str = "") -> dict[str, Table]:
    """Write the HTML file and return its tables by the sha256 of their DATASET.

    Raises: UsageError for a folder that is no RUN, no CACHE and holds no ablation, or where `out` is a folder.
    """
    if out.is_dir():
        raise UsageError(f"--out {out}: expected the name of a file; found {found_at(out)}")
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
    page = f"<!doctype html><meta charset=utf-8><title>Masked Channel Modeling</title><style>{STYLE}</style>{body}\n"
    write_atomic(out, printable(page).encode())
    return dict(tables)


def caption(data: str) -> str:
    """Return the line above a table of the DATASET with this sha256."""
    return f"DATASET {data[:12]}: accuracy in percent; the linear probe is fitted by LBFGS"


def _labels(runs: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each folder, or its path where another folder has the same name."""
    names = [run.name for run in dict.fromkeys(runs)]
    return {run: run.name if names.count(run.name) == 1 else str(run) for run in runs}


def _rows(labels: Mapping[Path, str]) -> dict[str, str]:
    """Return the row of each checkpoint's weights; weights that a later checkpoint followed have a row of their own."""
    rows = {"untrained": RANDOM, "random": RANDOM}
    for run, label in labels.items():
        steps = checkpoint.complete(run)
        for path in steps:
            rows[checkpoint.weights(path)] = label if path == steps[-1] else f"{label} at {path.name}"
    return rows


def _add_teacher(tables: dict[str, Table], cache: Path, label: str) -> str:
    """Add the probes of a CACHE's mean features to the table of its DATASET; returns its section."""
    section, data = "", read_record(CacheIdentity, cache / "cache.json").dataset_sha256
    for file in sorted(work_dir(cache).glob("probe*.json")):
        result = read_record(ProbeResult, file)
        if result.features in (None, "mean") and result.teacher:
            tables[data].put(f"teacher {label}", probed(result), label)
            section = f"<h2>teacher {html.escape(label)}</h2><pre>{result.teacher.text()}</pre>"
    return section


def _add_run(tables: dict[str, Table], run: Path, label: str, rows: Mapping[str, str]) -> None:
    """Add a RUN's figures: a pre-training run is a row, a fine-tuning run fills a cell of the weights it began with."""
    facts = recorded(run)
    for file in sorted((run / "probe").glob("*.json"), reverse=True):  # random init's row comes first
        result = read_record(ProbeResult, file)
        row = rows.get(result.weights, f"{label} at {result.weights}")
        tables[result.data_sha256].put(row, probed(result), label)
    for file in sorted((run / "dense").glob("*.json"), reverse=True):
        dense = read_record(DenseResult, file)
        row, column = rows.get(dense.weights, f"{label} at {dense.weights}"), f"mIoU {dense.input}{_seed(dense.seed)}"
        tables[dense.data_sha256].put(row, {column: dense.miou}, label)
    if facts.get("kind") == "finetune":
        init = facts["init_weights"]
        row = rows.get(init, f"{facts['init']} ({init})")
        tables[facts["dataset_sha256"]].put(row, fine_tuned(run), label)
    elif figures := held_out(run):
        tables[(facts.get("cache") or {}).get("dataset_sha256", facts["cache_sha256"])].put(label, figures, label)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _html_table(lines: Sequence[Sequence[str]], caption: str) -> str:
    rows = [[html.escape(cell) for cell in line] for line in lines]
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><caption>{html.escape(caption)}</caption><tr>{head}</tr>{body}</table>"


def ablation_lines(results: dict[str, Any]) -> list[list[str]]:
    """Return the header and the rows as text: mean and sample std over the finished seeds, accuracies in percent."""

    def cell(column: str, values: Sequence[float]) -> str:
        shown = _shown(column, statistics.mean(values) if values else None)
        return f"{shown} ± {_shown(column, statistics.stdev(values))}" if len(values) > 1 else shown

    columns = results["columns"]
    rows = [[_row_name(row), *(cell(c, row["values"].get(c, ())) for c in columns)] for row in results["rows"]]
    return [["variant", *columns], *rows]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in GitHub's Markdown, its columns aligned."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    first, *others = (max(3, *map(len, column)) for column in zip(*lines, strict=True))
    rule = ["-" * first, *("-" * (width - 1) + ":" for width in others)]
    padded = [[n.ljust(first), *map(str.rjust, cells, others)] for n, *cells in [lines[0], rule, *lines[1:]]]
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def ablation_html(results: dict[str, Any]) -> str:
    """Return the table as HTML, with a figure of every accuracy of every seed."""
    rows, others = results["rows"], {*FIT.values(), MINUTES}
    cells = {c: [row["values"].get(c, []) for row in rows] for c in results["columns"] if c not in others}
    figure = dots(cells, [_row_name(row) for row in rows]) if cells else ""
    note, caption = html.escape(results.get("note", "")), "mean ± sample std over the seeds; accuracies in percent"
    return f"<h2>ablations</h2><p>{note}</p>{_html_table(ablation_lines(results), caption)}{figure}"


def _row_name(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['mark']})" if row["mark"] else str(row["name"])


def _run_section(run: Path, label: str) -> str:
    parts = [f"<h2>{html.escape(label)}</h2>", curves(_series(read_metrics(run)))]
    shown, channels = _tensors(run / "samples.safetensors"), _tensors(run / "channels.safetensors")
    grid = _json(run / "run.json").get("grid", ())
    parts += [samples(shown, grid)] if shown else []
    parts += ["<h3>channels</h3>", channel_figures(channels)] if channels else []
    parts += [channel_maps(shown, channels, grid)] if shown and channels else []
    for name in ("config.toml", "env.json", "run.json"):
        if (file := run / name).is_file():
            toml = name.endswith("toml")
            text = file.read_text("utf-8", "replace") if toml else json.dumps(_json(file), indent=2)
            parts.append(f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>")
    return "".join(parts)


def _series(metrics: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the points (step, value) of every number in the log; evaluations have the name "eval NAME"."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in {**line, **{f"eval {k}": v for k, v in line.get("eval", {}).items()}}.items():
            if isinstance(value, int | float) and name not in ("step", "epoch", "time"):
                series.setdefault(name, []).append((line["step"], value))
    return series


def _tensors(path: Path) -> dict[str, Array]:
    """Return the arrays of a file, float16 ones as float32; a missing file has none."""
    if not path.is_file():
        return {}
    try:
        return {k: x.astype(np.float32) if x.dtype == np.float16 else x for k, x in load_file(path).items()}
    except SafetensorError as error:
        raise CorruptionError(f"{path}: expected safetensors: {error}; remove it, or resume the run") from error
