"""`mcm-train ablate`: the rows of a plan, each as commands of `mcm-train`, and one table of them.

Several processes share a plan by one lock per run folder: start the same command once per GPU.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveFloat

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError, check_output
from cache_tools.records import Record, config_file, load_toml, read_record, sha256_hex
from cache_tools.storage import file_sha256, try_lock, work_dir, write_atomic
from cache_tools.weights import weights_file
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.probe import ProbeResult, check_kind, labelled, record_name
from mcm.report import FIT, MINUTES, ablation_lines, fine_tuned, held_out, markdown, probed, report
from mcm.run_dir import ExitRecord, read_metrics, recorded, software

UNDERFITTED = 0.2  # held-out R^2; below it, an accuracy says little about the target
WAIT_S = 2.0  # between two looks at the runs of other processes
# `mcm-train` as a process that saves and stops when the ablation ends, whatever that died of.
COMMAND = """
from mcm.cli import app
from cache_tools.processes import stop_with_launcher
stop_with_launcher()
app()
"""
MARKS = {"Collapsed": "collapsed", "Diverged": "diverged"}  # an error of exit.json to its mark


class Row(Record):
    """A line of the table: `set` changes the base; `cache` names another cache beside CACHE.

    A row with an `init`, "random" or timm:NAME, is not pre-trained; `set` changes its fine-tuning.
    """

    set: tuple[str, ...] = ()
    cache: str = ""
    init: Annotated[str, Field(pattern="^(random|timm:.+)?$")] = ""
    finetune: str = ""


class Plan(Record):
    """What is compared. `set` changes the base of every row.

    With `lr`, every row that is pre-trained becomes one row per learning rate.
    """

    note: str = ""
    base: str
    set: tuple[str, ...] = ()
    finetune: str = ""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    lr: tuple[PositiveFloat, ...] = ()
    inputs: tuple[str, ...] = ("full", "folded", "masked:8")
    rows: dict[str, Row]

    def all_rows(self) -> dict[str, Row]:
        """Return the rows with the plan's overrides, one per learning rate."""
        rows = {}
        for name, row in self.rows.items():
            for lr in self.lr if self.lr and not row.init else (None,):
                rate = () if lr is None else (f"optim.lr={lr}",)
                changes = row.set if row.init else (*self.set, *row.set, *rate)
                rows[name + (f", lr {lr:g}" if rate else "")] = row.model_copy(
                    update={"set": changes, "finetune": row.finetune or self.finetune}
                )
        return rows


@dataclass(frozen=True)
class Step:
    """A command of `mcm-train` that writes to the folder `run`; `key` has digests for its paths."""

    run: Path
    args: tuple[str, ...]
    key: str
    files: tuple[Path, ...] = ()  # a probe's results

    @property
    def record(self) -> Path:
        """Return the path of the file that is written once the step is done; the file holds the mark."""
        return work_dir(self.run) / "ablate" / f"{self.args[0]}-{sha256_hex(self.key.encode())}"

    @property
    def mark(self) -> str | None:
        """Return "" for a step that is done, why a training cannot go on, or None for a step that is left."""
        done = self.record.is_file() and all(file.is_file() for file in self.files)
        return self.record.read_text() if done else None


class Ablation:
    """A plan in the folder `out`, which holds run folders in runs/ and finetune/."""

    def __init__(self, plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None, workers: int) -> None:
        """Read every configuration, cache and dataset before a command runs.

        Raises: UsageError.
        """
        check_output(out, "an ablation")
        self.plan, self.rows = plan, plan.all_rows()
        self.cache, self.data, self.out, self.weights = cache, data, out, weights
        self.workers, self.failed = workers, dict[Step, int]()
        for kind in plan.inputs:
            check_kind(kind)
        for name in self.rows:
            if len(twins := [other for other in self.rows if _folder(other, 0) == _folder(name, 0)]) > 1:
                raise UsageError(f"the plan: expected rows with folders of their own; found {twins}; rename one")
        self.digests = {str(data): labelled(Dataset(data)).sha256}
        if weights is not None:
            file, chosen = weights_file(weights)
            self.digests[str(weights)] = f"{file_sha256(file)}{chosen}"
        self.digests |= {str(path): Cache(path).sha256 for path in map(self._cache_of, self.rows.values())}
        base = config_file(plan.base)
        self.configs = {n: load_toml(PretrainConfig, base, row.set) for n, row in self.rows.items() if not row.init}
        self.first = next(iter(self.configs), "")  # "random" is what this row began with
        teacher = work_dir(cache) / "probe.json"
        self.teacher = self._step(out, "probe", cache, "--features", "mean", files=(teacher,))
        self.steps = {(name, seed): list(self._steps(name, seed)) for seed in plan.seeds for name in self.rows}

    def _cache_of(self, row: Row) -> Path:
        return self.cache.parent / row.cache if row.cache else self.cache

    def _steps(self, name: str, seed: int) -> Iterator[Step]:
        """The commands of a row in order."""
        row, init, seeded = self.rows[name], self.rows[name].init, ("--set", f"train.seed={seed}")
        if source := self.first if init == "random" else "" if init else name:
            trained, run = self.rows[source], self.out / "runs" / _folder(source, seed)
            paths = ("--cache", self._cache_of(trained), "--out", run)
            yield self._step(run, "pretrain", self.plan.base, *paths, *_sets(trained.set), *seeded)
            kinds = self.plan.inputs if self.configs[source].mask.mode != "none" else ("full",)
            names = [record_name(kind, self.digests[str(self.data)], 0, bool(init)) for kind in kinds]
            options = [*(f"--input={kind}" for kind in kinds), *["--untrained"] * bool(init)]
            files = tuple(run / "probe" / name for name in names)
            yield self._step(run, "probe", run, "--data", self.data, *options, files=files)
            self.digests[str(run)] = run.name
            init = init or str(run)
        if row.finetune:
            changes = row.set if row.init else ()
            load_toml(FinetuneConfig, config_file(row.finetune), changes)
            weights = ("--weights", self.weights) if self.weights and init.startswith("timm:") else ()
            run = self.out / "finetune" / _folder(name, seed)
            paths = ("--data", self.data, "--init", init, *weights, "--out", run)
            yield self._step(run, "finetune", row.finetune, *paths, *_sets(changes), *seeded)
        elif init.startswith("timm:"):
            raise UsageError(f"the plan: expected a `finetune` for rows.{name}, which has an init; found none")

    def _step(self, run: Path, *parts: object, files: tuple[Path, ...] = ()) -> Step:
        args, digests = tuple(map(str, parts)), self.digests | {str(run): run.name}
        return Step(run, args, " ".join(digests.get(arg, arg) for arg in args), files)

    def run(self) -> None:
        """Run every row with the first seed, then with the next, and wait for other processes."""
        left = [[self.teacher], *self.steps.values()]
        while left := [steps for steps in left if not self._advance(steps)]:
            time.sleep(WAIT_S)

    def _advance(self, steps: list[Step]) -> bool:
        """Run the steps that are left; returns False when another process works on one."""
        for step in steps:
            if step.mark is None and step not in self.failed:
                with try_lock(work_dir(step.run) / "ablate" / "lock") as ours:
                    if not ours or not _is_idle(step.run):
                        return False
                    if step.mark is None:
                        self._run(step)
            if step in self.failed or step.mark:
                return True
        return True

    def _run(self, step: Step) -> None:
        """Run a step, and record that it is done or that it failed."""
        print(f"{step.run}: {step.args[0]}", flush=True)
        workers = ["--workers", str(self.workers)] if step.args[0] == "probe" else []
        with subprocess.Popen([sys.executable, "-c", COMMAND, *step.args, *workers], stdin=subprocess.PIPE) as process:
            try:
                process.wait()
            except KeyboardInterrupt:
                process.terminate()
                print("stopping: the running command saves and ends", file=sys.stderr, flush=True)
                process.wait()
                raise
        mark = _mark(step.run / "exit.json") if process.returncode == 1 else ""
        if process.returncode and not mark:
            self.failed[step] = process.returncode
            print(f"{step.run}: {step.args[0]} failed with exit code {process.returncode}", file=sys.stderr, flush=True)
        else:
            write_atomic(step.record, mark.encode())

    def results(self) -> dict[str, Any]:
        """Return the table: the values of every row over its seeds, as fractions of 1, and minutes."""
        rows = [_row("teacher's features", [self.teacher])]
        for name, row in self.rows.items():
            steps = [step for seed in self.plan.seeds for step in self.steps[name, seed]]
            rows.append(_row(name, [step for step in steps if not row.init or step.args[0] != "pretrain"]))
        found = dict.fromkeys(column for row in rows for column in row["values"])
        columns = sorted(found, key=lambda column: column in {*FIT.values(), MINUTES})
        facts = {"config": self.plan.model_dump(mode="json"), "software": software()}
        return {"note": self.plan.note, "columns": columns, "rows": rows, **facts}


def ablate(
    plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None = None, workers: int = 4
) -> dict[Step, int]:
    """Run what is left of a plan and write OUT/results.json, table.md and report.html.

    Returns the steps that failed with their exit codes.
    Raises: UsageError before a command runs; KeyboardInterrupt once the running command has ended.
    """
    ablation = Ablation(plan, cache, data, out, weights, workers)
    try:
        ablation.run()
    finally:  # an interrupted ablation has a table too
        results = ablation.results()
        write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
        write_atomic(out / "table.md", markdown(ablation_lines(results)).encode())
        report([out], out / "report.html")
    return ablation.failed


def _folder(name: str, seed: int) -> str:
    return f"{re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-')}-s{seed}"


def _sets(changes: tuple[str, ...]) -> list[str]:
    return [arg for change in changes for arg in ("--set", change)]


def _is_idle(run: Path) -> bool:
    """Return whether no command trains in a run; the command of a killed ablation still saves."""
    with try_lock(work_dir(run) / "lock") as idle:
        return idle


def _mark(file: Path) -> str:
    message = read_record(ExitRecord, file).message if file.is_file() else ""
    return MARKS.get(message.partition(":")[0], "")


def _row(name: str, steps: Sequence[Step]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for step in steps:
        for column, value in _figures(step).items() if step.mark == "" else ():
            values.setdefault(column, []).append(value)
    fit = [mean(values[column]) for column in FIT.values() if column in values]
    mark = next((step.mark for step in steps if step.mark), "")
    return {"name": name, "values": values, "mark": mark or "underfitted" * (bool(fit) and max(fit) < UNDERFITTED)}


def _figures(step: Step) -> dict[str, float]:
    """Return what a finished step measured, by column."""
    if step.args[0] == "probe":
        results = [read_record(ProbeResult, file) for file in step.files]
        return {column: value for result in results for column, value in probed(result).items()}
    if step.args[0] == "finetune":
        return fine_tuned(step.run, seeded=False)
    return held_out(step.run) | {MINUTES: _minutes(step.run)}


def _minutes(run: Path) -> float:
    """Return the minutes of training and saving, without evaluation."""
    rows, seconds, before = recorded(run)["config"]["train"]["global_batch"], 0.0, 0
    for line in read_metrics(run):
        if "images_per_s" in line:
            seconds += (line["step"] - before) * rows / line["images_per_s"]
            before = line["step"]
    return seconds / 60
