"""`mcm-train ablate`: each row of a plan pre-trained, probed and fine-tuned in ordinary run folders; one table.

Processes share a plan by locks: start the same command once a GPU.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset
from cache_tools.errors import Diverged, IdentityError
from cache_tools.records import Record, differences, encode_record, read_record
from cache_tools.storage import file_sha256, try_lock, write_atomic
from mcm.backbones import load_encoder
from mcm.diagnostics import Collapsed
from mcm.finetune import finetune
from mcm.plan import Outcome, Places, Plan
from mcm.pretrain import pretrain
from mcm.probe import ProbeResult, labelled, probe, warn_of_copies
from mcm.prober import Prober
from mcm.report import FIT, ablation_markdown, report
from mcm.run_folder import is_complete, last_eval, read_metrics, software

UNDERFITTED = 0.2  # held-out R^2 at the run's ratio; below it a table says little about what a target teaches
WAIT_S = 5.0  # between two looks at what other processes have finished


class Compared(Record):
    """What the runs of a folder have in common: compared.json, sha256s by name."""

    data: str
    caches: dict[str, str]
    weights: str | None


def ablate(plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None = None, workers: int = 4) -> Path:
    """Run what is left of a plan and write OUT/results.json, table.md and report.html; returns the table's file.

    Raises: UsageError or IdentityError before any training; what `pretrain`, `finetune` and `probe` raise.
    """
    ablation = Ablation(plan, cache, data, out, weights, workers)
    try:
        ablation.run()
    finally:  # whoever stops it has the table of what is done
        if (out / "runs").is_dir():
            results = ablation.results()
            write_atomic(out / "results.json", json.dumps(results, indent=1).encode())
            write_atomic(out / "table.md", ablation_markdown(results).encode())
            report([out], out / "report.html")
    return out / "table.md"


class Ablation:
    """A plan under way in the folder `out`: runs/ and finetune/ hold run folders, locks/ who works on what."""

    def __init__(
        self, plan: Plan, cache: Path, data: Path, out: Path, weights: Path | None = None, workers: int = 4
    ) -> None:
        """Raises: UsageError for what could stop a later row; IdentityError for a folder with other data's runs."""
        self.plan, self.at, self.dataset = plan, Places(plan, cache, out), labelled(Dataset(data))
        self.weights, self.workers = weights, workers
        caches = {row.cache or "CACHE": Cache(self.at.cache_of(name)).sha256 for name, row in plan.rows.items()}
        digest = None if weights is None else file_sha256(weights)
        self.compared = Compared(data=self.dataset.sha256, caches=caches, weights=digest)
        path = out / "compared.json"
        there = read_record(Compared, path) if path.is_file() else self.compared
        grown = there.model_copy(update={"caches": caches | there.caches})  # a plan may have got rows
        if found := differences(self.compared.model_copy(update={"caches": there.caches | caches}), grown):
            raise IdentityError(
                f"{out} compares something else (asked != found): {'; '.join(found)}; use another --out"
            )

    def run(self) -> None:
        """Every row with the first seed, then with the next; what another process works on is waited for at the end."""
        write_atomic(self.at.out / "compared.json", encode_record(self.compared))
        warn_of_copies(self.dataset, quiet=False)
        parts = [self.plan.seeds[: count + 1] for count in range(len(self.plan.seeds))]
        while not all(
            [self._teacher_probed(), *(self._row(name, seeds) for seeds in parts for name in self.plan.rows)]
        ):
            time.sleep(WAIT_S)

    def _row(self, name: str, seeds: Sequence[int]) -> bool:
        """Do what can be done of a row now; tells whether all of it is done."""
        init, first = self.plan.rows[name].init, seeds[0]
        if not init and not all([self._pretrained(name, lr, first) for lr in self.at.rates]):
            return False
        if not self.at.is_decided(name):  # another row's runs, which another process works on
            return False
        if not init and not all([self._pretrained(name, self.at.chosen_lr(name), seed) for seed in seeds]):
            return False
        if self.at.mark(name):
            return True
        if not all([self._probed(name, seed) for seed in seeds]):
            return False
        if not self.at.tunes(name):
            return True
        if not all([self._finetuned(name, lr, first) for lr in self.at.finetune_rates]):
            return False
        return all([self._finetuned(name, self.at.chosen_finetune_lr(name), seed) for seed in seeds])

    def _done(self, folder: Path, finished: Callable[[], bool], work: Callable[[], object]) -> bool:
        """Have a folder's work done, here or by another process; False while another one is at it."""
        if finished():
            return True
        with try_lock(self.at.out / "locks" / f"{folder.parent.name}-{folder.name}") as ours:
            if ours and not finished():
                work()
        return ours

    def _teacher_probed(self) -> bool:
        def work() -> None:
            found = probe(str(self.at.cache), None, quiet=True, features=["mean"])[0]
            write_atomic(self.at.teacher, encode_record(found))

        return self._done(self.at.teacher, self.at.teacher.is_file, work)

    def _pretrained(self, name: str, lr: float | None, seed: int) -> bool:
        """Trained to its end, or given up; where a learning rate is to be chosen also measured for that."""
        run, config = self.at.path(name, lr, seed), self.at.config(name, lr, seed)
        chooses = len(self.at.rates) > 1 and seed == self.at.first_seed

        def finished() -> bool:
            outcome = self.at.outcome(name, lr, seed)
            return bool(outcome and outcome.mark) or (is_complete(run, config) and (not chooses or bool(outcome)))

        def work() -> None:
            try:
                pretrain(config, self.at.cache_of(name), run)
            except Diverged as error:
                outcome = Outcome(mark="collapsed" if isinstance(error, Collapsed) else "diverged")
                print(f"{run}: given up: {error}", flush=True)
                write_atomic(run / "outcome.json", encode_record(outcome))
                return
            if chooses:
                prober = Prober(load_encoder(str(run)), self.dataset, 0, self.workers, quiet=True)
                outcome = Outcome(knn_held_out=prober.held_out_knn(prober.full()))
                write_atomic(run / "outcome.json", encode_record(outcome))

        return self._done(run, finished, work)

    def _probed(self, name: str, seed: int) -> bool:
        """k-NN and linear on every input."""
        if not (run := self.at.probed_run(name, seed)).is_dir():
            return False
        files, untrained = self.at.probe_files(name, seed), bool(self.plan.rows[name].init)

        def work() -> None:
            print(f"{run}: probes", flush=True)
            probe(str(run), self.dataset.path, (), list(files), None, untrained, workers=self.workers, quiet=True)

        return self._done(run, lambda: all(file.is_file() for file in files.values()), work)

    def _finetuned(self, name: str, lr: float | None, seed: int) -> bool:
        run, config = self.at.finetune_path(name, lr, seed), self.at.finetune_config(name, lr, seed)
        init = self.plan.rows[name].init or str(self.at.probed_run(name, seed))
        weights = self.weights if init.startswith("timm:") else None
        return self._done(
            run,
            lambda: self.at.is_tuned(name, lr, seed),
            lambda: finetune(config, self.dataset.path, init, weights, run),
        )

    def results(self) -> dict[str, Any]:
        """The table: every row's values over the seeds that are done, fractions of 1, and minutes of training."""
        rows = [self._teacher(), *(self._results_of(name) for name in self.plan.rows)]
        columns = list(dict.fromkeys(column for row in rows for column in row["values"]))
        found = {"note": self.plan.note, "columns": columns, "rows": rows}
        return found | {"config": self.plan.model_dump(mode="json"), "software": software(), **dict(self.compared)}

    def _teacher(self) -> dict[str, Any]:
        found = _columns(read_record(ProbeResult, self.at.teacher)) if self.at.teacher.is_file() else {}
        values = {column: [value] for column, value in found.items()}
        return {"name": "teacher's features", "lr": None, "seeds": [], "values": values, "mark": ""}

    def _results_of(self, name: str) -> dict[str, Any]:
        seeds = [seed for seed in self.plan.seeds if self.at.measured(name, seed)]
        found = [self._values(name, seed) for seed in seeds]
        values = {column: [one[column] for one in found] for column in (found[0] if found else ())}
        mark, lr = self.at.mark(name), None
        if not self.plan.rows[name].init:
            lr = self.at.chosen_lr(name) if found else None
            moves = self.at.config(name, lr, self.at.first_seed).mask.final_ratio is not None  # masks are the first's
            fit = values.get("R^2 full" if moves or "R^2 masked" not in values else "R^2 masked")
            mark = mark or ("underfitted" if fit and mean(fit) < UNDERFITTED else "")
        return {"name": name, "lr": lr, "seeds": seeds, "values": values, "mark": mark}

    def _values(self, name: str, seed: int) -> dict[str, float]:
        init, found = self.plan.rows[name].init, dict[str, float]()
        if init in ("", "random"):
            for file in self.at.probe_files(name, seed).values():
                found |= _columns(read_record(ProbeResult, file))
        if self.at.tunes(name):
            lr = self.at.chosen_finetune_lr(name)
            column = "linear (LARS)" if self.at.finetune_config(name, lr, seed).frozen else "fine-tuned"
            found[column] = last_eval(self.at.finetune_path(name, lr, seed))["top1"]
        if not init:
            run = self.at.probed_run(name, seed)
            newest = last_eval(run)
            found |= {column: newest[key] for key, column in FIT.items() if key in newest}
            found["minutes"] = _minutes(run, self.at.config(name, None, seed).train.global_batch)
        return found


def _columns(result: ProbeResult) -> dict[str, float]:
    values = {f"k-NN {result.input}": result.knn, f"linear {result.input}": result.linear}
    return {column: value for column, value in values.items() if value is not None}


def _minutes(run: Path, global_batch: int) -> float:
    """Minutes of training and saving, without evaluation."""
    seconds, before = 0.0, 0
    for line in read_metrics(run):
        if "images_per_s" in line:
            seconds += (line["step"] - before) * global_batch / line["images_per_s"]
            before = line["step"]
    return seconds / 60
