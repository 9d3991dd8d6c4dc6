"""What an ablation compares: rows of overrides, and where the run of each row, learning rate and seed lies."""

import re
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat

from cache_tools.cache import Cache
from cache_tools.errors import UsageError
from cache_tools.records import Record, config_file, load_toml, read_record
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.diagnostics import COLLAPSE
from mcm.probe import check_kind
from mcm.run_folder import ExitRecord, last_eval


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
    """What a learning rate is chosen by: choice.json of a run."""

    knn_held_out: float


class Places:
    """The configurations and run folders of a plan below `out`, and what has been chosen there so far."""

    def __init__(self, plan: Plan, cache: Path, out: Path) -> None:
        """Read every configuration and cache, before anything is trained.

        Raises: UsageError.
        """
        self.plan, self.cache, self.out = plan, cache, out
        self.rates, self.finetune_rates = plan.lr or (None,), plan.finetune_lr or (None,)
        self.first_seed = plan.seeds[0]
        self.trained = [name for name, row in plan.rows.items() if not row.init]
        if not self.trained:
            raise UsageError("the plan: expected a row to pre-train; every row has an init")
        for kind in plan.inputs:
            check_kind(kind)
        for name in plan.rows:
            Cache(self.cache_of(name))
            self.config(name, self.rates[0], self.first_seed)
            if self.tunes(name):
                self.finetune_config(name, self.finetune_rates[0], self.first_seed)

    def cache_of(self, name: str) -> Path:
        """The cache that a row trains on."""
        other = self.plan.rows[name].cache
        return self.cache.parent / other if other else self.cache

    def tunes(self, name: str) -> bool:
        """Whether a row is fine-tuned."""
        return bool(self.plan.rows[name].finetune or self.plan.finetune)

    def config(self, name: str, lr: float | None, seed: int) -> PretrainConfig:
        """The base with the row's overrides, a learning rate and a seed."""
        overrides = [*self.plan.set, *self.plan.rows[name].set, *_rate(lr), f"train.seed={seed}"]
        return load_toml(PretrainConfig, config_file(self.plan.base), overrides)

    def finetune_config(self, name: str, lr: float | None, seed: int) -> FinetuneConfig:
        """The row's own fine-tuning configuration, or the plan's."""
        file = config_file(self.plan.rows[name].finetune or self.plan.finetune)
        return load_toml(FinetuneConfig, file, [*_rate(lr), f"train.seed={seed}"])

    def path(self, name: str, lr: float | None, seed: int) -> Path:
        """The folder of a pre-training."""
        return self.out / "runs" / _folder(name, lr, seed)

    def finetune_path(self, name: str, lr: float | None, seed: int) -> Path:
        """The folder of a fine-tuning."""
        return self.out / "finetune" / _folder(name, lr, seed)

    def probed_run(self, name: str, seed: int) -> Path:
        """The run whose encoder is measured; random weights are those that the first row's runs began with."""
        name = self.trained[0] if self.plan.rows[name].init else name
        return self.path(name, self.chosen_lr(name), seed)

    def probe_files(self, name: str, seed: int) -> dict[str, Path]:
        """Where the probes of a row lie, by input; without masks there is but the full one."""
        untrained, folder = bool(self.plan.rows[name].init), self.probed_run(name, seed) / "probe"
        config = self.config(self.trained[0] if untrained else name, None, seed)
        kinds, begin = self.plan.inputs if config.mask.mode != "none" else ("full",), "untrained-" if untrained else ""
        return {kind: folder / f"{begin}{kind.replace(':', '-')}.json" for kind in kinds}

    def chosen_lr(self, name: str) -> float | None:
        """The learning rate of a row's other seeds; the first wins ties."""
        if len(self.rates) == 1:
            return self.rates[0]
        files = {lr: self.path(name, lr, self.first_seed) / "choice.json" for lr in self.plan.lr}
        return max(files, key=lambda lr: read_record(Choice, files[lr]).knn_held_out)

    def chosen_finetune_lr(self, name: str) -> float | None:
        """The same for fine-tuning, by top-1."""
        runs = {lr: self.finetune_path(name, lr, self.first_seed) for lr in self.finetune_rates}
        return max(runs, key=lambda lr: last_eval(runs[lr])["top1"])

    def collapsed(self, name: str) -> bool:
        """Whether a learned target became constant with the first seed, at some learning rate."""
        exits = [self.path(name, lr, self.first_seed) / "exit.json" for lr in self.rates]
        return any(path.is_file() and COLLAPSE in read_record(ExitRecord, path).message for path in exits)

    def measured(self, name: str, seed: int) -> bool:
        """Whether all of a row's figures are there."""
        owner = self.trained[0] if self.plan.rows[name].init == "random" else name
        runs = [] if self.plan.rows[owner].init else [self.path(owner, lr, self.first_seed) for lr in self.rates]
        if not all((run / "choice.json").is_file() or len(runs) == 1 for run in runs) or self.collapsed(name):
            return False
        files = self.probe_files(name, seed).values() if runs else ()
        if not all(file.is_file() for file in files):
            return False
        tuned = [self.finetune_path(name, lr, self.first_seed) for lr in self.finetune_rates]
        return not self.tunes(name) or (
            all(last_eval(run) for run in tuned)
            and bool(last_eval(self.finetune_path(name, self.chosen_finetune_lr(name), seed)))
        )


def _rate(lr: float | None) -> list[str]:
    return [] if lr is None else [f"optim.lr={lr}"]


def _folder(name: str, lr: float | None, seed: int) -> str:
    slug = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
    return f"{slug}{'' if lr is None else f'-lr{lr:g}'}-s{seed}"
