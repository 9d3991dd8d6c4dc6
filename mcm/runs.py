"""`mcm-train runs`: the state, progress and best metrics of the RUNs below a folder."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import McmError, UsageError
from cache_tools.records import read_json, read_record
from cache_tools.storage import is_locked, work_dir
from mcm.run_dir import ExitRecord, read_metrics, recorded

# An exit code of exit.json to its state; another code is "failed".
STATES = {0: "done", 75: "stopped"}
METRICS = ("top1", "miou", "box_ap", "mask_ap", "knn_full", "r2_masked", "r2_full")
AGES = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def runs(folder: Path) -> list[dict[str, Any]]:
    """Return a description of each RUN below `folder`, by path, which can be written as JSON.

    Raises: UsageError if there is none.
    """
    found = []
    for path, names, files in os.walk(folder):
        if "run.json" in files:
            found.append(_described(Path(path)))
        if {"run.json", "cache.json", "dataset.json"} & set(files):
            names.clear()  # a RUN holds no other RUN, and the folders of a CACHE are many
    if not found:
        raise UsageError(f"{folder}: expected a RUN (run.json) in it or below it; found none")
    return sorted(found, key=lambda run: str(run["run"]))


def _described(run: Path) -> dict[str, Any]:
    """Return the facts of a RUN; a damaged file gives the state "damaged" and the error."""
    dated = [run / name for name in ("run.json", "metrics.jsonl", "exit.json")]
    newest = max(file.stat().st_mtime for file in dated if file.is_file())
    facts: dict[str, Any] = {"run": str(run), "age_s": round(time.time() - newest)}
    try:
        facts["state"], facts["message"] = state(run)
        return facts | _progress(run)
    except (McmError, KeyError) as error:
        return facts | {"state": "damaged", "message": str(error)}


def state(run: Path) -> tuple[str, str]:
    """Return the state and the message of exit.json; without it, the run was killed at its start.

    Without locks on its file system, a killed run cannot be told from a running one.
    """
    path = run / "exit.json"
    ended = read_record(ExitRecord, path) if path.is_file() else ExitRecord(code=None, message="")
    if ended.code is not None:
        return STATES.get(ended.code, "failed"), ended.message
    held = is_locked(work_dir(run) / "lock")
    return {True: "running", False: "killed", None: "unknown"}[held], ""


def _progress(run: Path) -> dict[str, Any]:
    facts, lines = recorded(run), read_metrics(run)
    config, environment = facts["config"], run / "env.json"
    evals = [line["eval"] for line in lines if "eval" in line]
    names = [name for name in METRICS if any(name in scores for scores in evals)]
    rows = read_json(environment).get("rows", 0) if environment.is_file() else 0
    if facts["kind"] == "pretrain":
        rows -= rows % CHUNK_ROWS
    return {
        "kind": facts["kind"],
        "step": lines[-1]["step"] if lines else 0,
        "steps": config["schedule"]["epochs"] * (rows // config["train"]["global_batch"]),
        "images_per_s": next((x["images_per_s"] for x in lines[::-1] if "images_per_s" in x), None),
        "best": {name: max(s[name] for s in evals if name in s) for name in names},
    }


def lines(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the header and the rows of a table."""
    rows = [["run", "state", "kind", "step", "images/s", "best", "changed"]]
    for run in found:
        unit, seconds = next(age for age in AGES if run["age_s"] >= age[1] or age[1] == 1)
        speed = run.get("images_per_s")
        best = ", ".join(f"{name} {value:.3f}" for name, value in run.get("best", {}).items())
        text = best if best and run["state"] not in ("failed", "damaged") else run["message"]
        rows.append([
            run["run"],
            run["state"],
            run.get("kind", "-"),
            f"{run.get('step', '-')}/{run.get('steps') or '?'}",
            "-" if speed is None else f"{speed:.4g}",
            text[:100] + " ..." * (len(text) > 100) or "-",
            f"{run['age_s'] // seconds} {unit} ago",
        ])  # fmt: skip
    return rows
