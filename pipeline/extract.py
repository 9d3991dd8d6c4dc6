"""`mcm-cache extract`: write the views and teacher features of a DATASET into a CACHE.

Any number of workers share the shards, and each can stop and resume.
"""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from cache_tools import storage
from cache_tools.cache import Unit, read_probe
from cache_tools.console import StopFlag
from cache_tools.dataset import ROWS_PER_SHARD, Dataset
from cache_tools.errors import IdentityError, Interrupted, UsageError, check_output
from cache_tools.images import PICTURE_RULES, pixels_sha256
from cache_tools.records import encode_record, write_toml
from cache_tools.schema import CacheIdentity, Fingerprint, ProbeRecord, installed_versions
from cache_tools.tars import encode_npy
from cache_tools.writer import finish_unit, publish_identity, shard_lock

from .config import ExtractConfig
from .extractor import Extractor
from .shard import shard
from .teachers import Teacher, load_teacher, probe_pictures
from .timm_teachers import check_multiple
from .views import TRAIN
from .worker import WorkerInfo
from .worker_pool import Report, reporting, run_workers

# Largest allowed relative MSE between the float32 probe features of two machines. GELU instead of
# QuickGELU changes the features of the demo's CLIP by 4.2e-5 and those of DeiT-tiny by 7.0e-2.
PROBE_TOLERANCE = 1e-6
STOPPED = "stopped; the same command resumes"
RETRY_S = 1.0  # between two attempts at the shards that other workers hold


@dataclass(frozen=True)
class Request:
    """One extraction, from a DATASET or pictures into a CACHE, as one worker runs it."""

    source: str
    cache: Path
    config: ExtractConfig
    worker: WorkerInfo = WorkerInfo()


def extract(request: Request) -> None:
    """Make every missing shard of the request's units; committed shards are kept.

    With several processes, each is a worker of its own, and they share the device.

    Raises: UsageError or IdentityError, before any shard; CorruptionError; Interrupted when the
    user stops the run, which then ends after the current shard.
    """
    check_output(request.cache, "a CACHE", own=("dataset",))
    label, stopped = f"extract {request.cache}", f"{request.cache}: {STOPPED}"
    if request.worker.processes > 1:
        source = str(open_source(request).path)
        tasks = [replace(request, source=source, worker=one) for one in request.worker.split()]
        complete, count = max(run_workers(_make_units, tasks, label, stopped))
    else:
        complete, count = _make_units(request)
    left = "" if complete == count else "; other workers hold the remaining shards"
    print(f"{request.cache}: {complete} of {count} units complete{left}", flush=True)


def _make_units(request: Request) -> tuple[int, int]:
    """Make the missing shards as one worker; return (complete units, units)."""
    session = Session(request)
    session.publish()
    total = sum(unit.rows for unit in session.every_unit)
    done = sum(unit.shard_rows(k) for unit in session.every_unit for k in unit.committed())
    label, then = f"extract {request.cache}", "the current shard is finished and committed"
    with reporting(total, label, done, then) as (stop, report):
        _make_shards(request, session.units, session.extractor(), stop, report)
    return session.finish()


class Session:
    """The teacher, the DATASET and the units of a request, in one process.

    `dataset` is an open DATASET, or the number of rows per split (`mcm-cache plan --rows`). If it
    is None, the source of the request is opened.

    Raises: UsageError or IdentityError, before anything is written.
    """

    def __init__(self, request: Request, dataset: Dataset | dict[str, int] | None = None) -> None:
        self.request, config, worker = request, request.config, request.worker
        size, precision = config.teacher_size, config.precision
        self.teacher = load_teacher(
            config.teacher, config.weights, size, worker.device, precision, config.normalization
        )
        if worker.worker % worker.processes == 0:
            print("\n".join(self.teacher.notes), flush=True)
        check_grid(config, self.teacher)
        found = dataset or open_source(request)
        if isinstance(found, Dataset):
            self.dataset = found
        self.identity = cache_identity(request, found, self.teacher)
        self.units: dict[str, list[Unit]] = {}
        for split in config.splits or self.identity.rows:
            views = range(config.views if split == TRAIN else 1)
            self.units[split] = [Unit(request.cache, self.identity, split, v) for v in views]
        self.every_unit = [unit for group in self.units.values() for unit in group]

    def publish(self) -> None:
        """Write the files that all shards share; an existing identity or teacher must agree."""
        cache, identity = self.request.cache, self.teacher.identity
        storage.settle(cache)
        publish_identity(cache, self.identity)
        resolved = {"teacher_mean": identity.mean, "teacher_std": identity.std}
        toml = write_toml(self.request.config.model_copy(update=resolved))
        storage.publish(cache / "extract.toml", toml.encode(), compare=False)
        self.precision_mse = publish_teacher(cache, self.teacher)

    def extractor(self) -> Extractor:
        """Return the maker of shards, with its own threads; call `publish` first."""
        config, teacher = self.request.config, self.teacher
        fingerprint = Fingerprint(
            device=teacher.device.type,
            precision=teacher.precision,
            batch=config.batch,
            versions=versions(teacher),
        )
        return Extractor(
            dataset=self.dataset,
            identity=self.identity,
            teacher=teacher,
            fingerprint=fingerprint,
            precision_mse=self.precision_mse,
            max_error=config.max_error or math.inf,
            render_pool=ThreadPoolExecutor(self.request.worker.threads),
            write_pool=ThreadPoolExecutor(1),
        )

    def finish(self) -> tuple[int, int]:
        """Write the manifest of each complete unit; return (complete units, units)."""
        return sum(map(finish_unit, self.every_unit)), len(self.every_unit)


def _make_shards(
    request: Request,
    units: dict[str, list[Unit]],
    extractor: Extractor,
    stop: StopFlag,
    report: Report,
) -> None:
    """Make every missing shard; return when each is committed or locked by another worker.

    A shard is left to another worker if its lock is taken in two attempts, RETRY_S seconds apart.
    Another worker may hold a lock briefly, or die.
    """
    retried = False
    while True:
        made = busy = False
        for split, k in missing_shards(units, request.cache, request.worker):
            if stop.requested:
                raise Interrupted(f"{request.cache}: {STOPPED}")
            with storage.try_lock(shard_lock(request.cache, split, k)) as locked:
                missing = [unit for unit in units[split] if not unit.commit_file(k).is_file()]
                if locked and missing:
                    extractor.shard(missing, k, report)
                    made = True
                busy |= not locked and bool(missing)
        if not busy or (retried and not made):
            return
        retried = not made
        if retried:
            time.sleep(RETRY_S)


def open_source(request: Request) -> Dataset:
    """Return the DATASET of the request, after sharding pictures into CACHE/dataset if necessary.

    Raises: UsageError when pictures would be sharded by one of several workers.
    """
    if (Path(request.source) / "dataset.json").is_file():
        return Dataset(Path(request.source))
    if request.worker.workers > 1:
        expected = "expected a DATASET for several workers"
        raise UsageError(f"{request.source}: {expected}; run `mcm-cache shard` first")
    shard(request.source, request.cache / "dataset")
    return Dataset(request.cache / "dataset")


def check_grid(config: ExtractConfig, teacher: Teacher) -> None:
    """Raise UsageError when the grids of the teacher and the student differ."""
    rows, columns = teacher.grid
    if config.patch:
        check_multiple("--size", config.size, config.patch)
    if rows != columns:
        found = f"found {rows}x{columns} tokens"
        raise UsageError(f"{config.teacher}: expected a teacher with a square grid; {found}")
    patch = config.patch or config.size // rows
    if config.patch is None and config.size % rows:
        found = f"the teacher has {rows}x{columns} tokens"
        raise UsageError(f"--size {config.size}: expected a multiple of {rows}: {found}")
    if (config.size / patch, config.size / patch) != (rows, columns):
        fitting = teacher.identity.height // rows * (config.size // patch)
        raise UsageError(
            f"grids differ: views of {config.size} px in patches of {patch} against the teacher's "
            f"{rows}x{columns} tokens; use --teacher-size {fitting}, or another size or patch"
        )


def cache_identity(
    request: Request, dataset: Dataset | dict[str, int], teacher: Teacher
) -> CacheIdentity:
    """Return the identity of the cache that the request asks for.

    Raises: UsageError when the DATASET lacks a split, or when a cache cannot hold the request.
    """
    config = request.config
    pictures: dict[str, Any] = {"rows_per_shard": ROWS_PER_SHARD, "classes": ()}
    pictures |= {"dataset_sha256": "", "rows": dataset}
    if isinstance(dataset, Dataset):
        pictures = {"rows_per_shard": dataset.record.rows_per_shard, "classes": dataset.classes}
        rows = {split: entry.rows for split, entry in dataset.record.splits.items()}
        pictures |= {"dataset_sha256": dataset.sha256, "rows": rows}
    if missing := set(config.splits) - pictures["rows"].keys():
        found = ", ".join(pictures["rows"])
        raise UsageError(f"{request.source}: expected a split {min(missing)!r}; found {found}")
    try:
        return CacheIdentity(
            teacher=teacher.identity,
            crop=config.crop,
            seed=config.seed,
            view_height=config.size,
            view_width=config.size,
            view_encoding=config.encoding,
            picture_rules=PICTURE_RULES,
            dtype=config.dtype,
            compress=config.compress,
            pixels_sha256=pixels_sha256(config.encoding),
            grid=teacher.grid,
            channels=teacher.channels,
            has_cls=teacher.has_cls,
            **pictures,
        )
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise UsageError(
            f"{request.cache}: expected a request that a cache can hold: {said}"
        ) from error


def publish_teacher(cache: Path, teacher: Teacher) -> float:
    """Store the teacher's projection and its float32 features of the probe pictures, or compare.

    Return the relative MSE of the features in the teacher's precision against those in float32.

    Raises: IdentityError when the teacher's features differ from the stored ones;
    UsageError when its precision gives infinite features.
    """
    if teacher.projection is not None:
        storage.publish(cache / "projection.npy", encode_npy(teacher.projection))
    pictures = torch.from_numpy(probe_pictures(teacher.identity.height, teacher.identity.width))
    exact, found = (
        teacher.features(pictures, p)[0].cpu().numpy() for p in ("fp32", teacher.precision)
    )
    storage.publish(cache / "probe.npy", encode_npy(exact), compare=False)
    record = ProbeRecord(features_sha256=storage.file_sha256(cache / "probe.npy"))
    storage.publish(cache / "probe.json", encode_record(record), compare=False)
    compare_probe(cache, exact)
    precision_mse = probe_mse(found, exact)
    if not math.isfinite(precision_mse):
        expected = "expected finite features of the probe pictures; found infinity or NaN"
        raise UsageError(f"precision {teacher.precision}: {expected}; use --set precision=fp32")
    return precision_mse


def compare_probe(cache: Path, exact: np.ndarray) -> None:
    """Compare float32 features of the probe pictures with the stored ones.

    Raises: IdentityError when they differ; CorruptionError when the stored ones are damaged.
    """
    difference = probe_mse(exact, read_probe(cache))
    if not difference <= PROBE_TOLERANCE:
        raise IdentityError(
            f"{cache}/probe.npy: expected the teacher of this cache; this teacher's features of "
            f"the probe pictures differ by {difference:.1e} (relative MSE, at most "
            f"{PROBE_TOLERANCE:.0e}); use the weights, activation and layer of the first extraction"
        )


def probe_mse(x: np.ndarray, reference: np.ndarray) -> float:
    """Return the MSE over the variance of the whole reference; infinity when the shapes differ.

    Unlike `Fidelity.relative_mse`, the channels are not standardized.
    """
    if x.shape != reference.shape:
        return math.inf
    error = ((x - reference).astype(np.float64) ** 2).mean()
    return float(error / reference.astype(np.float64).var())


def versions(teacher: Teacher) -> dict[str, str]:
    """Return the library versions, and the name of the GPU or the number of CPU threads.

    Another version, GPU or thread count can change a byte of a view or a bit of a feature. The CPU
    model is not recorded.
    """
    packages = ["torch", "timm", "numpy", "pillow", "simplejpeg", "numcodecs"]
    if teacher.identity.name.startswith("open_clip:"):
        packages.append("open_clip_torch")
    found = installed_versions(*packages)
    if teacher.device.type == "cpu":
        return found | {"threads": str(torch.get_num_threads())}
    return found | {"gpu": torch.cuda.get_device_name(teacher.device)}


def missing_shards(
    units: dict[str, list[Unit]], cache: Path, worker: WorkerInfo
) -> Iterator[tuple[str, int]]:
    """Return (split, shard) of every shard that a unit lacks: this worker's own, then the others.

    The caller skips shards that another worker has locked. The commits of a unit are listed once,
    so a committed shard needs no lock and no access to its file. Without working locks, a worker
    makes only its own shards.
    """
    done = {}
    for split, group in units.items():
        done[split] = set.intersection(*(set(unit.committed()) for unit in group))
    shards = [(split, k) for split, group in units.items() for k in range(group[0].num_shards)]
    mine = shards[worker.worker :: worker.workers]
    if worker.workers > 1 and storage.locks_work(storage.work_dir(cache)):
        # In reverse order: workers that do not see each other's locks meet at most once.
        theirs = [one for n, one in enumerate(shards) if n % worker.workers != worker.worker]
        mine += theirs[::-1]
    return ((split, k) for split, k in mine if k not in done[split])
