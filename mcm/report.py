"""One static HTML file on some runs: tables of accuracies and ablations, figures, configuration and provenance."""

import html
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cache_tools.errors import CorruptionError, UsageError, found_at
from cache_tools.records import read_json, read_record
from cache_tools.storage import run_folder, write_atomic
from mcm.figures import Array, channel_figures, channel_maps, curves, dots, samples
from mcm.probe import ProbeResult
from mcm.run_folder import last_eval, read_metrics

FIT = {"r2_masked": "R^2 masked", "r2_full": "R^2 full"}  # held out; masked at the run's ratio, and full
ABLATIONS = {"columns", "rows"}  # of a results.json
MINUTES = "minutes"  # of an ablation's row
RANDOM = "random init"
CAPTION = "accuracy in percent; the linear probe is fitted by LBFGS"
STYLE = "body{font:15px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}td,th{padding:.3em .8em;\
border-bottom:1px solid #ccc;text-align:right}td:first-child,th:first-child{text-align:left}pre{background:#f4f4f4;\
padding:1em;overflow:auto}img{max-width:100%}"


@dataclass
class Table:
    """Accuracies and R^2 as fractions of 1: one row a model, in the order given; not measured, no cell."""

    cells: dict[str, dict[str, float]] = field(default_factory=dict)

    def put(self, row: str, column: str, value: float | None, run: str) -> None:
        """Fill a cell; a second, other value for it gets a row of its own that names its run."""
        if value is not None:
            taken = self.cells.get(row, {}).get(column)
            row = row if taken in (None, value) else f"{row} ({run})"
            self.cells.setdefault(row, {})[column] = value

    def lines(self) -> list[list[str]]:
        """Header and rows as text, accuracies in percent."""
        columns = dict.fromkeys(column for cells in self.cells.values() for column in cells)
        rows = [[row, *(_shown(name, cells.get(name)) for name in columns)] for row, cells in self.cells.items()]
        return [["model", *columns], *rows]

    def text(self) -> str:
        """Aligned columns for a terminal."""
        lines = self.lines()
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        return "\n".join(
            "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
            for name, *cells in lines
        )


def _shown(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column in FIT.values():
        return f"{value:.3f}"
    return f"{value if column == MINUTES else 100 * value:.1f}"


def report(runs: Sequence[Path], out: Path, note: str = "") -> Table:
    """Write the HTML file and return its table.

    Raises: UsageError for a folder that is no RUN, no CACHE and holds no ablations.
    """
    if out.is_dir():
        raise UsageError(f"--out {out}: expected the name of a file; found {found_at(out)}")
    table = Table()
    sections = []
    labels = _labels(runs)
    for path, label in labels.items():
        if (path / "cache.json").is_file():
            if (probed := run_folder(path) / "probe.json").is_file():
                teacher = _add_probe(table, f"teacher {label}", probed, label).teacher
                text = teacher.text() if teacher else "probed by an older version"
                sections.append(f"<h2>teacher {html.escape(label)}</h2><pre>{text}</pre>")
        elif (path / "run.json").is_file():
            _add_run(table, path, labels)
            sections.append(_run_section(path, label))
        elif ABLATIONS <= (results := _json(path / "results.json")).keys():
            sections.append(ablation_html(results))
        else:
            expected = "a RUN (run.json), a CACHE (cache.json) or an ablation (results.json)"
            raise UsageError(f"{path}: expected {expected}; found {found_at(path)}")
    header = f"<p>{html.escape(note)}</p>" if note else ""
    overview = _html_table(table.lines(), CAPTION) if table.cells else ""
    body = f"<h1>Masked Channel Modeling</h1>{header}{overview}{''.join(sections)}"
    page = f"<!doctype html><meta charset=utf-8><title>Masked Channel Modeling</title><style>{STYLE}</style>{body}\n"
    write_atomic(out, page.encode())
    return table


def _labels(runs: Sequence[Path]) -> dict[Path, str]:
    """The name of each folder, or its path where another folder has the same name."""
    names = [run.name for run in dict.fromkeys(runs)]
    return {run: run.name if names.count(run.name) == 1 else str(run) for run in runs}


def _add_probe(table: Table, row: str, file: Path, run: str) -> ProbeResult:
    result = read_record(ProbeResult, file)
    table.put(row, f"k-NN {result.label}", result.knn, run)
    table.put(row, f"linear {result.label}", result.linear, run)
    return result


def _add_run(table: Table, run: Path, labels: dict[Path, str]) -> None:
    """A pre-training run is a row; a fine-tuning run fills a cell in the row of what it began from."""
    label = labels[run]
    for file in sorted((run / "probe").glob("*.json"), reverse=True):  # random init's row comes first
        _add_probe(table, RANDOM if file.name.startswith("untrained-") else label, file, label)
    newest = last_eval(run)
    for name, column in FIT.items():
        table.put(label, column, newest.get(name), label)
    facts = _json(run / "run.json")
    if (init := facts.get("init")) is not None:
        given = [name for other, name in labels.items() if os.path.realpath(other) == os.path.realpath(init)]
        row = RANDOM if init == "random" else given[0] if given else init
        column = "linear (LARS)" if facts.get("config", {}).get("frozen") else "fine-tuned top-1"
        table.put(row, column, newest.get("top1"), label)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _html_table(lines: Sequence[Sequence[str]], caption: str) -> str:
    rows = [[html.escape(cell) for cell in line] for line in lines]
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f"<table><caption>{caption}</caption><tr>{head}</tr>{body}</table>"


def ablation_lines(results: dict[str, Any]) -> list[list[str]]:
    """Header and rows as text: mean and sample std over the seeds that are done, accuracies in percent."""

    def cell(column: str, values: Sequence[float]) -> str:
        shown = _shown(column, statistics.mean(values) if values else None)
        return f"{shown} ± {_shown(column, statistics.stdev(values))}" if len(values) > 1 else shown

    columns = results["columns"]
    rows = [[_row_name(row), *(cell(c, row["values"].get(c, ())) for c in columns)] for row in results["rows"]]
    return [["variant", *columns], *rows]


def ablation_markdown(results: dict[str, Any]) -> str:
    """The table in GitHub's Markdown."""
    head, *rows = [[cell.replace("|", "\\|") for cell in line] for line in ablation_lines(results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---", *["---:"] * (len(head) - 1)], *rows))


def ablation_html(results: dict[str, Any]) -> str:
    """The table, and every accuracy of every seed in a figure."""
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
    """Points (step, value) of every number in the log; those of evaluations are called "eval NAME"."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        for name, value in {**line, **{f"eval {k}": v for k, v in line.get("eval", {}).items()}}.items():
            if isinstance(value, int | float) and name not in ("step", "epoch", "time"):
                series.setdefault(name, []).append((line["step"], value))
    return series


def _tensors(path: Path) -> dict[str, Array]:
    """The arrays of a file, float32 where they are float16; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        return {k: x.astype(np.float32) if x.dtype == np.float16 else x for k, x in load_file(path).items()}
    except SafetensorError as error:
        raise CorruptionError(f"{path}: expected safetensors: {error}; remove it, or resume the run") from error
