"""What an ablation compares: rows of overrides, and where the run of each row, learning rate and seed lies."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat

from cache_tools.cache import Cache
from cache_tools.errors import UsageError
from cache_tools.records import Record, config_file, load_toml, read_record
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.pretrain import choose_units, describe
from mcm.probe import check_kind
from mcm.run_folder import is_complete, last_eval


class Row(Record):
    """A line of the table: `set` changes the base; `cache` names another cache beside CACHE.

    `init` is fine-tuned without pre-training: "random", or timm:NAME; `set` then changes its fine-tuning.
    """

    set: tuple[str, ...] = ()
    cache: str = ""
    init: Annotated[str, Field(pattern="^(random|timm:.+)?$")] = ""
    finetune: str = ""


class Plan(Record):
    """What is compared, alike for all rows; `set` changes the base of every one.

    With several `lr`, the first seed runs at each, the others at the one whose encoder has the best k-NN on training
    rows held out of the bank. With several `finetune_lr`, the first seed's top-1 on val decides, as in published
    sweeps: its figure is the best of them.
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


class Outcome(Record):
    """How a pre-training ended: outcome.json of a run that was given up, or that a learning rate is chosen by."""

    mark: Literal["", "collapsed", "diverged"] = ""
    knn_held_out: float = 0.0


class Places:
    """The configurations and run folders of a plan below `out`, and what has been chosen there so far."""

    def __init__(self, plan: Plan, cache: Path, out: Path) -> None:
        """Read every configuration and cache, before anything is trained.

        Raises: UsageError.
        """
        self.plan, self.cache, self.out = plan, cache, out
        self.rates, self.finetune_rates = plan.lr or (None,), plan.finetune_lr or (None,)
        self.first_seed, self.teacher = plan.seeds[0], out / "teacher.json"
        self.trained = [name for name, row in plan.rows.items() if not row.init]
        if not self.trained:
            raise UsageError("the plan: expected a row to pre-train; every row has an init; add one without")
        for kind in plan.inputs:
            check_kind(kind)
        precisions = {self._check(name) for name in plan.rows} | {self._check_finetuning(name) for name in plan.rows}
        if len(precisions - {None}) > 1:
            raise UsageError("the plan: expected one train.precision, as a process has but one; found bf16 and fp32")

    def _check(self, name: str) -> str | None:
        if self.plan.rows[name].init:
            return None
        config, cache = self.config(name, self.rates[0], self.first_seed), Cache(self.cache_of(name))
        describe(config, cache, choose_units(cache, (), config.data.views)[0])
        return config.train.precision

    def _check_finetuning(self, name: str) -> str | None:
        if not self.tunes(name):
            if self.plan.rows[name].init.startswith("timm:"):
                raise UsageError(f"the plan: expected a `finetune` for rows.{name}, which has an init; found none")
            return None
        config = self.finetune_config(name, self.finetune_rates[0], self.first_seed)
        return config.train.precision

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
        row = self.plan.rows[name]
        overrides = [*(row.set if row.init else ()), *_rate(lr), f"train.seed={seed}"]
        return load_toml(FinetuneConfig, config_file(row.finetune or self.plan.finetune), overrides)

    def path(self, name: str, lr: float | None, seed: int) -> Path:
        """The folder of a pre-training."""
        return self.out / "runs" / _folder(name, lr, seed)

    def finetune_path(self, name: str, lr: float | None, seed: int) -> Path:
        """The folder of a fine-tuning."""
        return self.out / "finetune" / _folder(name, lr, seed)

    def owner(self, name: str) -> str:
        """The row whose runs are probed: random weights are those that the first trained row began with."""
        return self.trained[0] if self.plan.rows[name].init else name

    def probed_run(self, name: str, seed: int) -> Path:
        """The run whose encoder is measured."""
        owner = self.owner(name)
        return self.path(owner, self.chosen_lr(owner), seed)

    def probe_files(self, name: str, seed: int) -> dict[str, Path]:
        """Where the probes of a row lie, by input; without masks there is but the full one, of a timm model none."""
        init = self.plan.rows[name].init
        if init.startswith("timm:"):
            return {}
        untrained, folder = bool(init), self.probed_run(name, seed) / "probe"
        config = self.config(self.owner(name), None, seed)
        kinds, begin = self.plan.inputs if config.mask.mode != "none" else ("full",), "untrained-" if untrained else ""
        return {kind: folder / f"{begin}{kind.replace(':', '-')}.json" for kind in kinds}

    def outcome(self, name: str, lr: float | None, seed: int) -> Outcome | None:
        """How a row's pre-training ended, where that is recorded."""
        path = self.path(name, lr, seed) / "outcome.json"
        return read_record(Outcome, path) if path.is_file() else None

    def is_decided(self, name: str) -> bool:
        """Whether it is known at which learning rate a row goes on."""
        owner = self.owner(name)
        return len(self.rates) == 1 or all(self.outcome(owner, lr, self.first_seed) for lr in self.rates)

    def chosen_lr(self, name: str) -> float | None:
        """The learning rate of a row's other seeds, once it is decided; the first wins ties."""
        found = {lr: self.outcome(name, lr, self.first_seed) or Outcome() for lr in self.rates}
        return max(found, key=lambda lr: (not found[lr].mark, found[lr].knn_held_out))

    def chosen_finetune_lr(self, name: str) -> float | None:
        """The same for fine-tuning, by top-1."""
        runs = {lr: self.finetune_path(name, lr, self.first_seed) for lr in self.finetune_rates}
        return max(runs, key=lambda lr: last_eval(runs[lr])["top1"])

    def mark(self, name: str) -> str:
        """Why a row was given up: at every learning rate, or at the chosen one with some seed."""
        outcomes = [self.outcome(name, self.chosen_lr(name), seed) for seed in self.plan.seeds]
        return next((outcome.mark for outcome in outcomes if outcome and outcome.mark), "")

    def is_tuned(self, name: str, lr: float | None, seed: int) -> bool:
        """Whether a fine-tuning is finished."""
        return is_complete(self.finetune_path(name, lr, seed), self.finetune_config(name, lr, seed))

    def measured(self, name: str, seed: int) -> bool:
        """Whether all of a row's figures are there."""
        if not self.is_decided(name) or self.mark(name):
            return False
        if not all(file.is_file() for file in self.probe_files(name, seed).values()):
            return False
        return not self.tunes(name) or (
            all(self.is_tuned(name, lr, self.first_seed) for lr in self.finetune_rates)
            and self.is_tuned(name, self.chosen_finetune_lr(name), seed)
        )


def _rate(lr: float | None) -> list[str]:
    return [] if lr is None else [f"optim.lr={lr}"]


def _folder(name: str, lr: float | None, seed: int) -> str:
    slug = re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")
    return f"{slug}{'' if lr is None else f'-lr{lr:g}'}-s{seed}"
