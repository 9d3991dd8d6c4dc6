"""The report: one static HTML file of tables, figures, configurations and provenance of runs."""

import html
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cache_tools.errors import CorruptionError, UsageError, found_at
from cache_tools.records import read_json, read_record
from cache_tools.schema import CacheIdentity
from cache_tools.storage import work_dir, write_atomic
from mcm import checkpoint, figures
from mcm.dense_probe import DenseResult
from mcm.draw import color
from mcm.page import charts, page, table
from mcm.probe import ProbeResult
from mcm.run_dir import last_eval, read_metrics, recorded
from mcm.runs import state
from mcm.tables import FIT, Cells, Table, fine_tuned, held_out, percent, probed, seeded, table_lines

FEW = 20  # classes of a confusion matrix; a table has as many confused pairs
ABLATIONS = {"columns", "rows"}  # keys of a results.json
RANDOM = "random init"
RELOAD_S = 30  # a page with a running RUN loads itself again
# A metric by a word in the names of its columns: the title of its figure, and what it means.
METRICS = {
    "k-NN": ("k-NN accuracy", "Frozen features; the nearest training pictures vote."),
    "R^2": ("R^2, held-out", "Share of the target's variance that is predicted; 0 is the mean."),
    " AP": ("AP", "Average precision of COCO, over IoU thresholds from 0.5 to 0.95."),
    "mIoU": ("mIoU", "Intersection over union of the pixels, averaged over the classes."),
    "linear": ("linear probe, top-1", "Frozen features; a linear classifier of the labels."),
    "fine-tuned": ("fine-tuned, top-1", "All layers are trained on the labels."),
}
NEGATIVE = (
    " R^2 of full input is negative, because the encoder was trained on masked input;"
    " `probe --input folded` measures features that correct this."
)


def report(runs: Sequence[Path], out: Path, note: str = "") -> dict[str, Table]:
    """Write the HTML file and return its tables by the sha256 of their DATASET.

    While a RUN trains, the page loads itself again, to show the file of a later call.

    Raises: UsageError for a folder that is not a RUN, a CACHE or an ablation, or a folder `out`.
    """
    if out.is_dir():
        advice = "name a file, such as report.html"
        raise UsageError(f"--out {out}: expected a file name; found {found_at(out)}; {advice}")
    tables, sections = defaultdict[str, Table](Table), dict[str, str]()
    labels = _labels(runs)
    rows = _rows(labels)
    for path, label in labels.items():
        if (path / "cache.json").is_file():
            sections[f"teacher {label}"] = _add_teacher(tables, path, label)
        elif (path / "run.json").is_file():
            _add_run(tables, path, label, rows)
            sections[label] = _run_section(path)
        elif ABLATIONS <= (results := _json(path / "results.json")).keys():
            sections[f"ablations {label}"] = ablation_html(results)
        else:
            expected = "a RUN (run.json), a CACHE (cache.json) or an ablation (results.json)"
            raise UsageError(f"{path}: expected {expected}; found {found_at(path)}")
    links = [f'<a href="#{i}">{html.escape(name)}</a>' for i, name in enumerate(sections)]
    body = f"<p>{html.escape(note)}</p>" if note else ""
    body += f"<nav>{' '.join(links)}</nav>" if len(links) > 1 else ""
    for data, cells in tables.items():
        body += f"<h2>Results on DATASET {data[:12]}</h2>{_compared(cells.cells())}"
        body += table(
            table_lines("model", cells.cells()), f"{caption(data)}; click a column to sort"
        )
    for i, (name, section) in enumerate(sections.items()):
        body += f"<h2 id={i}>{html.escape(name)}</h2>{section}"
    training = any((run / "run.json").is_file() and state(run)[0] == "running" for run in runs)
    write_atomic(out, page("Masked Channel Modeling", body, RELOAD_S * training))
    return dict(tables)


def _compared(rows: Cells) -> str:
    """Return one chart per metric with at least two values; `rows` has values per column."""
    groups = defaultdict[str, list[str]](list)
    for column in dict.fromkeys(column for values in rows.values() for column in values):
        if word := next((word for word in METRICS if word in column), ""):
            groups[word].append(column)
    found = []
    for word, columns in groups.items():
        title, meaning = METRICS[word]
        shown = [row for row, values in rows.items() if values.keys() & set(columns)]
        series = {c: [rows[row].get(c, ()) for row in shown] for c in columns}
        if sum(len(values) for cells in series.values() for values in cells) < 2:
            continue
        if any(value < 0 for values in series.get(FIT["r2_full"], ()) for value in values):
            meaning += NEGATIVE
        found.append(figures.dots(title, series, shown, meaning))
    return charts(found) + figures.robustness(rows)


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
    for file in sorted(work_dir(cache).glob("teacher*.json")):
        result = read_record(ProbeResult, file)
        if result.features in (None, "mean") and result.teacher:
            tables[data].put(f"teacher {label}", probed(result), label)
            section = f"<pre>{result.teacher.text()}</pre>"
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
        cell = {f"mIoU {dense.input}{seeded(dense.seed)}": dense.miou}
        tables[dense.data_sha256].put(row, cell, label)
    if facts.get("kind") == "finetune":
        init = facts["init_weights"]
        digest = re.sub("(?<=sha256:.{12}).*", "", init)
        row = rows.get(init, f"{facts['init']} ({digest})")
        tables[facts["dataset_sha256"]].put(row, fine_tuned(run), label)
    elif values := held_out(run):
        data = (facts.get("cache") or {}).get("dataset_sha256", facts["cache_sha256"])
        tables[data].put(label, values, label)


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def ablation_lines(results: dict[str, Any]) -> list[list[str]]:
    """Return the header and the rows as text."""
    return table_lines("variant", _values(results))


def _values(results: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the values of the finished seeds by row and column; a name has the row's mark."""
    rows = results["rows"]
    marks = (f" ({row['mark']})" if row["mark"] else "" for row in rows)
    return {f"{row['name']}{mark}": row["values"] for row, mark in zip(rows, marks, strict=True)}


def ablation_html(results: dict[str, Any]) -> str:
    """Return charts of every value of every seed, and the table, as HTML."""
    compared = _compared(_values(results))
    caption = "mean ± sample std over the seeds; accuracies in percent"
    note = html.escape(results.get("note", ""))
    return f"<p>{note}</p>{compared}{table(ablation_lines(results), caption)}"


def _run_section(run: Path) -> str:
    parts = [figures.curves(_series(read_metrics(run)))]
    if newest := last_eval(run):
        lines = [list(newest), [f"{value:.4g}" for value in newest.values()]]
        parts.append(table(lines, "last evaluation; scores are fractions of 1"))
    shown, channels = _tensors(run / "samples.safetensors"), _tensors(run / "channels.safetensors")
    grid = _json(run / "run.json").get("grid", ())
    parts += [figures.samples(shown, grid)] if shown else []
    parts += ["<h3>channels</h3>", figures.channel_figures(channels)] if channels else []
    parts += [figures.channel_maps(shown, channels, grid)] if shown and channels else []
    if classes := _json(run / "classes.json"):
        columns = (map(percent, values) for name, values in classes.items() if name != "class")
        lines = [list(classes), *map(list, zip(classes["class"], *columns, strict=True))]
        bars = [f"border-left:1em solid rgb{color(k)}" for k in range(len(lines) - 1)]
        caption = "classes of the last evaluation in percent, with the colors of the drawings"
        parts.append(table(lines, caption, bars))
    if drawings := _tensors(run / "shown.safetensors"):
        parts.append(_drawn(drawings, recorded(run)["classes"]))
    for name in ("config.toml", "env.json", "run.json"):
        if (file := run / name).is_file():
            toml = name.endswith("toml")
            text = file.read_text("utf-8", "replace") if toml else json.dumps(_json(file), indent=2)
            summary = f"<summary>{name}</summary>"
            parts.append(f"<details>{summary}<pre>{html.escape(text)}</pre></details>")
    return "".join(parts)


def _drawn(drawings: Mapping[str, figures.Array], classes: Sequence[str]) -> str:
    """Return pictures of the last evaluation, and which classes were taken for which."""
    found = ""
    if "truth" in drawings:
        shown = {name: drawings[name] for name in ("truth", "predicted")}
        found = figures.pictures(shown, "Held-out pictures: the truth above the prediction.")
    for name in ("wrong", "right"):
        if name in drawings:
            facts = drawings[f"{name}_facts"].tolist()
            texts = [
                f"{classes[int(k)]}, predicted {classes[int(j)]}, {p:.0%}" for k, j, p in facts
            ]
            caption = f"The most probable {name} predictions on held-out pictures."
            found += figures.pictures({name: drawings[name]}, caption, texts)
    if "confusion" in drawings:
        found += confusion_tables(drawings["confusion"], classes, "truth" not in drawings)
    return found


def confusion_tables(counts_R3: figures.Array, classes: Sequence[str], accuracy: bool) -> str:
    """Return the confusion from lines (true, predicted, count): a chart, or the FEW worst pairs.

    With `accuracy`, add a table of the accuracy of each class.
    """
    true, predicted, count = counts_R3.T
    totals = np.bincount(true, count, len(classes))
    share = 100 * count / totals[true]
    order = [row for row in np.argsort(-count, kind="stable") if true[row] != predicted[row]]
    pairs = [
        [classes[k] for k in counts_R3[row, :2]] + [f"{share[row]:.1f}"] for row in order[:FEW]
    ]
    found = ""
    if len(classes) <= FEW:
        matrix = np.zeros((len(classes),) * 2)
        matrix[true, predicted] = share
        found = figures.confusion(matrix, classes)
    elif pairs:
        caption = "most confused classes, in percent of the true class"
        found = table([["true class", "predicted class", "share"], *pairs], caption)
    if accuracy:
        right = np.bincount(true, share * (true == predicted), len(classes))
        cells = zip(classes, totals.tolist(), right.tolist(), strict=True)
        lines = [["class", "pictures", "accuracy"]]
        for name, total, percent in cells:
            lines.append([name, f"{total:.0f}", f"{percent:.1f}" if total else "-"])
        found += table(lines, "held-out accuracy of each class, in percent")
    return found


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


def _tensors(path: Path) -> dict[str, figures.Array]:
    """Return the arrays of a safetensors file, float16 as float32, or {} for a missing file."""
    if not path.is_file():
        return {}
    try:
        found = load_file(path)
    except SafetensorError as error:
        advice = "remove the file, or resume the run"
        raise CorruptionError(f"{path}: expected safetensors; found {error}; {advice}") from error
    return {k: x.astype(np.float32) if x.dtype == np.float16 else x for k, x in found.items()}
