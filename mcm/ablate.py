"""Ablations: run each row of a plan as commands of `mcm-train`, and collect one table.

Several processes can share one plan: start the same command once per GPU. Each run folder has a
lock.
"""

import json
import os
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

from cache_tools import storage
from cache_tools.cache import Cache
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError, check_output
from cache_tools.records import Record, config_file, load_toml, read_json, read_record, sha256_hex
from cache_tools.weights import weights_file
from mcm import tables
from mcm.compare import Hits, difference_lines, differences, hits
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.corruptions import Corruption
from mcm.page import markdown
from mcm.probe import ProbeResult, check_kind, record_name
from mcm.report import ablation_lines, report
from mcm.run_dir import ExitRecord, software

UNDERFITTED = 0.2  # held-out R^2 below which an accuracy says little about the target
OVERFITTED = 0.1  # R^2 of training rows minus held-out R^2
WAIT_S = 2.0  # seconds between two checks of the runs of other processes
# Runs `mcm-train` as a process that saves and stops when the ablation ends for any reason.
COMMAND = """
from mcm.cli import app
from cache_tools.processes import stop_with_launcher
stop_with_launcher({})
app()
"""
MARKS = {"Collapsed": "collapsed", "Diverged": "diverged"}  # an error in exit.json to its mark


class Row(Record):
    """A row of the table.

    `set` overrides the base configuration. `cache` names another cache in the folder of CACHE.
    A row with an `init`, "random" or timm:NAME, is not pre-trained.
    Its `set` overrides the fine-tuning configuration.
    """

    set: tuple[str, ...] = ()
    cache: str = ""
    init: Annotated[str, Field(pattern="^(random|timm:.+)?$")] = ""
    finetune: str = ""


class Plan(Record):
    """The rows to compare; `set` overrides the base configuration of every row.

    With `lr`, each pre-trained row becomes one row per learning rate.
    """

    note: str = ""
    base: str
    set: tuple[str, ...] = ()
    finetune: str = ""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    lr: tuple[PositiveFloat, ...] = ()
    inputs: tuple[str, ...] = ("full", "folded", "masked:8")
    corrupt: tuple[str, ...] = ()
    rows: dict[str, Row]

    def all_rows(self) -> dict[str, Row]:
        """Return the rows with the plan's overrides, one per learning rate."""
        rows = {}
        for name, row in self.rows.items():
            for lr in self.lr if self.lr and not row.init else (None,):
                rate = () if lr is None else (f"optim.lr={lr}",)
                changes = row.set if row.init else (*self.set, *row.set, *rate)
                update = {"set": changes, "finetune": row.finetune or self.finetune}
                rows[name + (f"{tables.RATE}{lr:g}" if rate else "")] = row.model_copy(
                    update=update
                )
        return rows


@dataclass(frozen=True)
class Step:
    """A command of `mcm-train` that writes to the folder `run`.

    `key` is the command with a digest in place of each path.
    """

    run: Path
    args: tuple[str, ...]
    key: str
    files: tuple[Path, ...] = ()  # a probe's results

    @property
    def record(self) -> Path:
        """Return the path of the file that marks the step as done; the file holds the mark."""
        return (
            storage.work_dir(self.run)
            / "ablate"
            / f"{self.args[0]}-{sha256_hex(self.key.encode())}"
        )

    @property
    def mark(self) -> str | None:
        """Return "" for a finished step, the reason of a failed one, or None for an open step."""
        done = self.record.is_file() and all(file.is_file() for file in self.files)
        return self.record.read_text() if done else None

    def results(self) -> list[ProbeResult]:
        """Return the results of a probe."""
        return [read_record(ProbeResult, file) for file in self.files]


class Ablation:
    """The steps of a plan; the folder `out` holds the run folders in runs/ and finetune/."""

    def __init__(
        self, plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None, workers: int
    ) -> None:
        """Read every configuration, cache and dataset before a command runs.

        Raises: UsageError for one that is invalid.
        """
        check_output(out, "an ablation", own=("runs", "finetune"))
        self.plan, self.rows = plan, plan.all_rows()
        self.cache, self.data, self.out, self.weights = cache, data, out, weights
        self.workers, self.failed = workers, dict[Step, int]()
        for kind in plan.inputs:
            check_kind(kind)
        self.corruptions = ["", *(f"-{Corruption.parse(text)}" for text in plan.corrupt)]
        for name in self.rows:
            twins = [other for other in self.rows if _folder(other, 0) == _folder(name, 0)]
            if len(twins) > 1:
                expected = "expected row names that give different folders"
                raise UsageError(f"the plan: {expected}; found {twins}; rename one")
        self.digests = {str(data): Dataset(data).labeled().sha256}
        if weights is not None:
            file, chosen = weights_file(weights)
            self.digests[str(weights)] = f"{storage.file_sha256(file)}{chosen}"
        caches = map(self._cache_of, self.rows.values())
        self.digests |= {str(path): Cache(path).sha256 for path in caches}
        base, trained = config_file(plan.base), {n: r for n, r in self.rows.items() if not r.init}
        self.configs = {n: load_toml(PretrainConfig, base, r.set) for n, r in trained.items()}
        self.first = next(iter(self.configs), "")  # "random" means the initial weights of this row
        teacher = storage.work_dir(cache) / "teacher.json"
        self.teacher = self._step(out, "probe", cache, "--features", "mean", files=(teacher,))
        keys = [(name, seed) for seed in plan.seeds for name in self.rows]
        self.steps = {key: list(self._steps(*key)) for key in keys}

    def _cache_of(self, row: Row) -> Path:
        return self.cache.parent / row.cache if row.cache else self.cache

    def _steps(self, name: str, seed: int) -> Iterator[Step]:
        """Yield the commands of a row in order."""
        row, init, seeded = self.rows[name], self.rows[name].init, ("--set", f"train.seed={seed}")
        if source := self.first if init == "random" else "" if init else name:
            trained, run = self.rows[source], self.out / "runs" / _folder(source, seed)
            paths = ("--cache", self._cache_of(trained), "--out", run)
            yield self._step(run, "pretrain", self.plan.base, *paths, *_sets(trained.set), *seeded)
            has_masks = self.configs[source].mask.hides
            kinds = [k for k in self.plan.inputs if has_masks or not k.startswith("masked")]
            data = self.digests[str(self.data)]
            labels = [f"{kind}{corruption}" for kind in kinds for corruption in self.corruptions]
            names = [record_name(label, data, 0, bool(init)) for label in labels]
            options = [*(f"--input={kind}" for kind in kinds), *["--untrained"] * bool(init)]
            options += [f"--corrupt={text}" for text in self.plan.corrupt]
            files = tuple(run / "probe" / name for name in names)
            yield self._step(run, "probe", run, "--data", self.data, *options, files=files)
            folded = run / "folded"
            self.digests |= {str(run): run.name, str(folded): f"{run.name}/folded"}
            if row.finetune and not init and "folded" in kinds:
                args = ("export", run, folded, "--folded", "probed")
                yield self._step(run, *args, files=(folded / "config.json",))
                init = str(folded)
            init = init or str(run)
        if row.finetune:
            changes = row.set if row.init else ()
            load_toml(FinetuneConfig, config_file(row.finetune), changes)
            is_given = self.weights and init.startswith("timm:")
            weights = ("--weights", self.weights) if is_given else ()
            run = self.out / "finetune" / _folder(name, seed)
            paths = ("--data", self.data, "--init", init, *weights, "--out", run)
            yield self._step(run, "finetune", row.finetune, *paths, *_sets(changes), *seeded)
        elif init.startswith("timm:"):
            expected = f"expected a `finetune` for rows.{name}, because it has an `init`"
            raise UsageError(f"the plan: {expected}; found none; add one to the row or the plan")

    def _step(self, run: Path, *parts: object, files: tuple[Path, ...] = ()) -> Step:
        args, digests = tuple(map(str, parts)), self.digests | {str(run): run.name}
        return Step(run, args, " ".join(digests.get(arg, arg) for arg in args), files)

    def run(self) -> None:
        """Run every row, one seed after another; wait for steps that other processes run."""
        left = [[self.teacher], *self.steps.values()]
        while left := [steps for steps in left if not self._advance(steps)]:
            time.sleep(WAIT_S)

    def _advance(self, steps: list[Step]) -> bool:
        """Run the open steps of a row; return False when another process runs one of them."""
        for step in steps:
            if step.mark is None and step not in self.failed:
                with storage.try_lock(storage.work_dir(step.run) / "ablate" / "lock") as ours:
                    if not ours or storage.is_locked(storage.work_dir(step.run) / "lock"):
                        return False
                    if step.mark is None:
                        self._run(step)
            if step in self.failed or step.mark:
                return True
        return True

    def _run(self, step: Step) -> None:
        """Run a step, and record that it finished or failed."""
        print(f"{step.run}: {step.args[0]}", flush=True)
        if step.args[0] == "export":
            storage.remove_tree(Path(step.args[2]))  # of a killed ablation
        workers = ["--workers", str(self.workers)] if step.args[0] == "probe" else []
        command = [sys.executable, "-c", COMMAND.format(os.getpid()), *step.args, *workers]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            try:
                process.wait()
            except KeyboardInterrupt:
                process.terminate()
                print("stopping: the running command saves and exits", file=sys.stderr, flush=True)
                process.wait()
                raise
        mark = _mark(step.run / "exit.json") if process.returncode == 1 else ""
        if process.returncode and not mark:
            self.failed[step] = process.returncode
            text = f"{step.run}: {step.args[0]} failed with exit code {process.returncode}"
            print(text, file=sys.stderr, flush=True)
        else:
            storage.write_atomic(step.record, mark.encode())

    def results(self) -> dict[str, Any]:
        """Return the table: each row's values over its seeds, as fractions of 1, and minutes."""
        rows = [_row("teacher's features", [self.teacher])]
        for name, row in self.rows.items():
            steps = [step for seed in self.plan.seeds for step in self.steps[name, seed]]
            own = [step for step in steps if not row.init or step.args[0] != "pretrain"]
            rows.append(_row(name, own))
        chosen = tables.best_rates(rows[1:])
        controls = [name for name, config in self.configs.items() if config.mask.mode != "channel"]
        controls = [name for name in controls if name in chosen]
        compared = differences({name: self._hits(name) for name in chosen}, controls)
        facts = {"config": self.plan.model_dump(mode="json"), "software": software()}
        runs = {step.run for steps in self.steps.values() for step in steps if step.mark == ""}
        trained = {read_json(run / "env.json")["software"] for run in runs}
        columns = ablation_lines({"rows": rows})[0][1:]
        facts["trained by"] = sorted(trained)
        found = {"columns": columns, "rows": rows, "differences": compared}
        return {"note": self.plan.note, **found, **facts}

    def _hits(self, name: str) -> dict[int, Hits]:
        """Return the hits of a row's finished probes by seed."""
        return {
            seed: hits(step.results())
            for seed in self.plan.seeds
            for step in self.steps[name, seed]
            if step.args[0] == "probe" and step.mark == ""
        }


def ablate(
    plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None = None, workers: int = 4
) -> dict[Step, int]:
    """Run the open steps of a plan, and write OUT/results.json, OUT/table.md and OUT/report.html.

    Returns: the steps that failed, with their exit codes.
    Raises: UsageError before a command runs; KeyboardInterrupt after the running command has ended.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = "found several processes of a launcher; start the command once per GPU instead"
        raise UsageError(f"mcm-train ablate: expected one process; {found}")
    ablation = Ablation(plan, cache, data, out, weights, workers)
    try:
        ablation.run()
    finally:  # an interrupted ablation writes a table too
        results = ablation.results()
        storage.write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
        lines = [ablation_lines(results)]
        lines += [difference_lines(compared)] if (compared := results["differences"]) else []
        storage.write_atomic(out / "table.md", "\n".join(map(markdown, lines)).encode())
        report([out], out / "report.html")
    return ablation.failed


def _folder(name: str, seed: int) -> str:
    return f"{re.sub('[^a-z0-9.]+', '-', name.lower()).strip('-')}-s{seed}"


def _sets(changes: tuple[str, ...]) -> list[str]:
    return [arg for change in changes for arg in ("--set", change)]


def _mark(file: Path) -> str:
    message = read_record(ExitRecord, file).message if file.is_file() else ""
    return MARKS.get(message.partition(":")[0], "")


def _row(name: str, steps: Sequence[Step]) -> dict[str, Any]:
    values: dict[str, list[float]] = {}
    for step in steps:
        for column, value in _measurements(step).items() if step.mark == "" else ():
            values.setdefault(column, []).append(value)
    values |= {tables.GMAC: values[tables.GMAC][:1]} if tables.GMAC in values else {}
    fit = [mean(values[column]) for column in tables.FIT.values() if column in values]
    mark = next((step.mark for step in steps if step.mark), "")
    if not mark and fit and max(fit) < UNDERFITTED:
        mark = "underfitted"
    if (
        not mark
        and tables.TRAIN_R2 in values
        and mean(values[tables.TRAIN_R2]) - fit[0] > OVERFITTED
    ):
        mark = "overfitted"
    return {"name": name, "values": values, "mark": mark}


def _measurements(step: Step) -> dict[str, float]:
    """Return the measurements of a finished step by column."""
    if step.args[0] == "probe":
        results = step.results()
        found = {
            column: value for result in results for column, value in tables.probed(result).items()
        }
        trained = [x for one in results if (x := one.knn_train) is not None]
        found |= {tables.HELD_OUT_TRAIN: trained[0]} if trained else {}
        return found | {column: float(x.mean()) for column, x in hits(results).items()}
    if step.args[0] == "finetune":
        return tables.fine_tuned(step.run, with_seed=False)
    if step.args[0] == "export":
        return {}
    return tables.held_out(step.run) | tables.training_fit(step.run)
