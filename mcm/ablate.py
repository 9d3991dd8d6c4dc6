"""Ablations: a plan of overrides x seeds on one cache, each an ordinary run folder, and one table of them all.

Processes share a plan by locks, one a GPU: start the same command as often as there are GPUs.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import Record, config_file, encode_record, load_toml, read_record
from cache_tools.storage import try_lock, write_atomic
from mcm.backbones import load_encoder
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.finetune import finetune
from mcm.pretrain import pretrain
from mcm.probe import ProbeResult, check_kind, labelled, probe
from mcm.prober import Prober
from mcm.report import FIT, ablation_markdown, report
from mcm.run_folder import is_complete, last_eval, read_metrics

UNDERFITTED = 0.2  # held-out R^2 at the run's ratio; below it a table says little about what a target teaches
WAIT_S = 5.0  # between two looks at what other processes have finished


class Row(Record):
    """A line of the table: `set` changes the base; `cache` names another cache beside CACHE.

    `init` is fine-tuned without pre-training: "random", or timm:NAME with a `finetune` configuration of its own.
    """

    set: tuple[str, ...] = ()
    cache: str = ""
    init: str = ""
    finetune: str = ""


class Plan(Record):
    """What is compared, alike for all rows; `set` changes the base of every one.

    With several `lr`, the first seed runs at each, the others at the one whose encoder has the best k-NN on training
    rows held out of the bank. With several `finetune_lr`, the best top-1 of the first seed decides.
    """

    note: str = ""
    base: str
    set: tuple[str, ...] = ()
    finetune: str = ""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    lr: tuple[PositiveFloat, ...] = ()
    finetune_lr: tuple[PositiveFloat, ...] = ()
    inputs: tuple[str, ...] = ("full", "folded", "masked:8")
    rows: dict[str, Row]


class Choice(Record):
    """What a learning rate is chosen by."""

    knn_held_out: float


def ablate(plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None = None, workers: int = 4) -> Path:
    """Run what is left of a plan and write OUT/results.json, table.md and report.html; returns the table's file.

    Raises: UsageError before any training; what `pretrain`, `finetune` and `probe` raise.
    """
    ablation = Ablation(plan, cache, data, out, weights, workers)
    ablation.run()
    results = ablation.results()
    write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
    write_atomic(out / "table.md", ablation_markdown(results).encode())
    report([out], out / "report.html")
    return out / "table.md"


class Ablation:
    """A plan under way in the folder `out`: runs/ and finetune/ hold ordinary run folders, locks/ who works on what."""

    def __init__(
        self, plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None = None, workers: int = 4
    ) -> None:
        """Read every configuration and cache, before anything is trained.

        Raises: UsageError.
        """
        self.plan, self.cache, self.data, self.out = plan, cache, data, out
        self.weights, self.workers = weights, workers
        self.dataset, self.first_seed = labelled(Dataset(data)), plan.seeds[0]
        self.trained = [name for name, row in plan.rows.items() if not row.init]
        if not self.trained:
            raise UsageError("the plan: expected a row to pre-train; every row has an init")
        for kind in plan.inputs:
            check_kind(kind)
        for name, row in plan.rows.items():
            Cache(self._cache_of(row))
            for lr in plan.lr or (None,):
                self.config(name, lr, self.first_seed)
            if self._tunes(name):
                self.finetune_config(name, None, self.first_seed)

    def run(self) -> None:
        """Every row with the first seed, then with the next; what another process works on is waited for at the end."""
        parts = [self.plan.seeds[: count + 1] for count in range(len(self.plan.seeds))]
        while not all([self._row(name, seeds) for seeds in parts for name in self.plan.rows]):
            time.sleep(WAIT_S)

    def _row(self, name: str, seeds: Sequence[int]) -> bool:
        """Do what can be done of a row now; tells whether all of it is done."""
        init = self.plan.rows[name].init
        if not init:
            first = [self._pretrained(name, lr, self.first_seed) for lr in self.plan.lr or (None,)]
            if not all(first):
                return False
            lr = self.chosen_lr(name)
            if not all([self._pretrained(name, lr, seed) and self._probed(name, seed) for seed in seeds]):
                return False
        elif init == "random" and not all([self._probed(name, seed) for seed in seeds]):
            return False
        if not self._tunes(name):
            return True
        first = [self._finetuned(name, lr, self.first_seed) for lr in self.plan.finetune_lr or (None,)]
        return all(first) and all([self._finetuned(name, self.chosen_finetune_lr(name), seed) for seed in seeds])

    def _done(self, folder: Path, finished: Callable[[], bool], work: Callable[[], object]) -> bool:
        """Have a folder's work done, here or by another process; False while another one is at it."""
        if finished():
            return True
        with try_lock(self.out / "locks" / f"{folder.parent.name}-{folder.name}") as ours:
            if ours and not finished():
                work()
        return ours

    def _pretrained(self, name: str, lr: float | None, seed: int) -> bool:
        run, config = self.path(name, lr, seed), self.config(name, lr, seed)
        cache = self._cache_of(self.plan.rows[name])
        if not self._done(run, lambda: is_complete(run, config), lambda: pretrain(config, cache, run)):
            return False
        needed, choice = len(self.plan.lr) > 1 and seed == self.first_seed, run / "choice.json"

        def choose() -> None:
            prober = Prober(load_encoder(str(run)), self.dataset, 0, self.workers, quiet=True)
            write_atomic(choice, encode_record(Choice(knn_held_out=prober.held_out_knn(prober.full()))))

        return not needed or self._done(run, choice.is_file, choose)

    def _probed(self, name: str, seed: int) -> bool:
        """k-NN and linear on every input; random weights are those that the first row's runs began with."""
        run, files = self.probed_run(name, seed), self.probe_files(name, seed)
        untrained = bool(self.plan.rows[name].init)

        def work() -> None:
            print(f"{run}: probes", flush=True)
            probe(str(run), self.data, inputs=list(files), untrained=untrained, workers=self.workers, quiet=True)

        return run.is_dir() and self._done(run, lambda: all(file.is_file() for file in files.values()), work)

    def _finetuned(self, name: str, lr: float | None, seed: int) -> bool:
        run, config = self.finetune_path(name, lr, seed), self.finetune_config(name, lr, seed)
        init = self.plan.rows[name].init or str(self.probed_run(name, seed))
        weights = self.weights if init.startswith("timm:") else None
        return self._done(
            run, lambda: is_complete(run, config), lambda: finetune(config, self.data, init, weights, run)
        )

    def _tunes(self, name: str) -> bool:
        return bool(self.plan.rows[name].finetune or self.plan.finetune)

    def _cache_of(self, row: Row) -> Path:
        return self.cache.parent / row.cache if row.cache else self.cache

    def config(self, name: str, lr: float | None, seed: int) -> PretrainConfig:
        """The base with the row's overrides, a learning rate and a seed."""
        overrides = [*self.plan.set, *self.plan.rows[name].set, *_rate(lr), f"train.seed={seed}"]
        return load_toml(PretrainConfig, config_file(self.plan.base), overrides)

    def finetune_config(self, name: str, lr: float | None, seed: int) -> FinetuneConfig:
        """The row's own fine-tuning configuration, or the plan's."""
        file = config_file(self.plan.rows[name].finetune or self.plan.finetune)
        return load_toml(FinetuneConfig, file, [*_rate(lr), f"train.seed={seed}"])

    def path(self, name: str, lr: float | None, seed: int) -> Path:
        """The run folder of a row."""
        slug = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
        return self.out / "runs" / f"{slug}{'' if lr is None else f'-lr{lr:g}'}-s{seed}"

    def finetune_path(self, name: str, lr: float | None, seed: int) -> Path:
        """The folder of a row's fine-tuning."""
        return self.out / "finetune" / self.path(name, lr, seed).name

    def probed_run(self, name: str, seed: int) -> Path:
        """The run whose encoder is measured; for random weights the first row's."""
        name = self.trained[0] if self.plan.rows[name].init else name
        return self.path(name, self.chosen_lr(name), seed)

    def probe_files(self, name: str, seed: int) -> dict[str, Path]:
        """Where the probes of a row lie, by input."""
        row, folder = self.plan.rows[name], self.probed_run(name, seed) / "probe"
        masks = self.config(self.trained[0] if row.init else name, None, seed).mask.mode != "none"
        begin = "untrained-" if row.init else ""
        return {
            kind: folder / f"{begin}{kind.replace(':', '-')}.json"
            for kind in (self.plan.inputs if masks else ("full",))
        }

    def chosen_lr(self, name: str) -> float | None:
        """The learning rate of a row's other seeds; the first wins ties."""
        if len(self.plan.lr) < 2:
            return next(iter(self.plan.lr), None)
        runs = {lr: self.path(name, lr, self.first_seed) for lr in self.plan.lr}
        return max(runs, key=lambda lr: read_record(Choice, runs[lr] / "choice.json").knn_held_out)

    def chosen_finetune_lr(self, name: str) -> float | None:
        """The same for fine-tuning, by top-1."""
        runs = {lr: self.finetune_path(name, lr, self.first_seed) for lr in self.plan.finetune_lr}
        return max(runs, key=lambda lr: last_eval(runs[lr])["top1"]) if runs else None

    def results(self) -> dict[str, Any]:
        """The table: every row's values over the seeds, fractions of 1, and minutes of training."""
        rows = [self._teacher()]
        for name, row in self.plan.rows.items():
            values: dict[str, list[float]] = {}
            for seed in self.plan.seeds:
                for column, value in self._values(name, seed).items():
                    values.setdefault(column, []).append(value)
            fit = values.get("R^2 masked", values.get("R^2 full"))
            rows.append({
                "name": name, "lr": None if row.init else self.chosen_lr(name), "seeds": list(self.plan.seeds),
                "values": values, "underfitted": fit is not None and sum(fit) / len(fit) < UNDERFITTED,
            })  # fmt: skip
        known = dict.fromkeys(column for row in rows for column in row["values"])
        return {"note": self.plan.note, "columns": list(known), "rows": rows, "cache_sha256": Cache(self.cache).sha256,
                "data_sha256": self.dataset.sha256}  # fmt: skip

    def _teacher(self) -> dict[str, Any]:
        result = probe(str(self.cache), None, quiet=True, features=["mean"])[0]
        values = {column: [value] for column, value in _columns(result).items()}
        return {"name": "teacher's features", "lr": None, "seeds": [], "values": values, "underfitted": False}

    def _values(self, name: str, seed: int) -> dict[str, float]:
        row, found = self.plan.rows[name], dict[str, float]()
        if row.init in ("", "random"):
            for file in self.probe_files(name, seed).values():
                found |= _columns(read_record(ProbeResult, file))
        if self._tunes(name):
            found["fine-tuned"] = last_eval(self.finetune_path(name, self.chosen_finetune_lr(name), seed))["top1"]
        if not row.init:
            run = self.path(name, self.chosen_lr(name), seed)
            newest = last_eval(run)
            found |= {column: newest[key] for key, column in FIT.items() if key in newest}
            found["minutes"] = _minutes(run, self.config(name, None, seed).train.global_batch)
        return found


def _rate(lr: float | None) -> list[str]:
    return [] if lr is None else [f"optim.lr={lr}"]


def _columns(result: ProbeResult) -> dict[str, float]:
    values = {f"k-NN {result.input}": result.knn, f"linear {result.input}": result.linear}
    return {column: value for column, value in values.items() if value is not None}


def _minutes(run: Path, global_batch: int) -> float:
    """Minutes of training, without what was evaluated and saved."""
    lines, before, seconds = read_metrics(run), 0, 0.0
    for line in lines:
        if "images_per_s" in line:
            seconds += (line["step"] - before) * global_batch / line["images_per_s"]
            before = line["step"]
    return seconds / 60
