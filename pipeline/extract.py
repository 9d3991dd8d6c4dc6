"""`mcm-cache extract`: a DATASET and a teacher in, views and features out; any number of workers, resumed at will."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from cache_tools.cache import Unit, read_probe
from cache_tools.console import Progress, StopFlag, progress
from cache_tools.dataset import Dataset
from cache_tools.errors import IdentityError, Interrupted, UsageError, check_output
from cache_tools.images import PICTURE_RULES
from cache_tools.records import encode_record, write_toml
from cache_tools.schema import CacheIdentity, Fingerprint, ProbeRecord
from cache_tools.storage import file_sha256, locks_work, publish, settle, shard_lock, try_lock, work_dir
from cache_tools.tars import encode_npy
from cache_tools.writer import finish_unit, publish_identity

from .config import ExtractConfig
from .dry_run import print_plan
from .extractor import Extractor
from .shard import shard
from .teachers import Teacher, check_multiple, load_teacher, probe_pictures
from .views import TRAIN, pixels_sha256
from .worker import Place

# Largest relative MSE between the float32 probe features of two machines. GELU in the place of QuickGELU moves those of
# the demo's CLIP by 4.2e-5 and of DeiT-tiny by 7.0e-2.
PROBE_TOLERANCE = 1e-6
RETRY_S = 1.0  # between two looks at the shards that other workers hold


@dataclass(frozen=True)
class Request:
    """What to extract, from a DATASET or pictures into a CACHE, and the place of this worker."""

    source: str
    cache: Path
    config: ExtractConfig
    place: Place = Place()
    dry_run: bool = False


def extract(request: Request) -> None:
    """Make every missing shard of the request's units; whatever is committed stays.

    Raises: UsageError, IdentityError before any work; CorruptionError; Interrupted when stopped at a shard.
    """
    config, place = request.config, request.place
    check_output(request.cache, "a CACHE")
    teacher = load_teacher(
        config.teacher, config.weights, config.teacher_size, place.device, config.precision, config.normalisation
    )
    print("\n".join(teacher.notes), flush=True)
    check_grid(config, teacher)
    dataset = open_source(request)
    identity = cache_identity(request, dataset, teacher)
    units = {
        split: [Unit(request.cache, identity, split, view) for view in range(config.views if split == TRAIN else 1)]
        for split in (config.splits or dataset.record.splits)
    }
    if request.dry_run:
        return print_plan(units, dataset, teacher, config.batch, request.cache)
    settle(request.cache)
    publish_identity(request.cache, identity)
    resolved = {"teacher_mean": teacher.identity.mean, "teacher_std": teacher.identity.std}
    publish(request.cache / "extract.toml", write_toml(config.model_copy(update=resolved)).encode(), compare=False)
    precision_mse = publish_teacher(request.cache, teacher)
    every_unit = [unit for group in units.values() for unit in group]
    total = sum(unit.rows for unit in every_unit)
    done = sum(unit.shard_rows(k) for unit in every_unit for k in unit.committed())
    with (
        StopFlag("the shard in work is finished and committed") as stop,
        ThreadPoolExecutor(place.threads) as ahead,
        ThreadPoolExecutor(1) as behind,
        progress(total, f"extract {request.cache}", "views", done) as bar,
    ):
        fingerprint = Fingerprint(
            device=teacher.device.type, precision=teacher.precision, batch=config.batch, versions=versions(teacher)
        )
        max_error = config.max_error or math.inf
        extractor = Extractor(dataset, identity, teacher, fingerprint, precision_mse, max_error, ahead, behind)
        _make_shards(request, units, extractor, stop, bar)
    complete = [finish_unit(unit) for unit in every_unit]
    left = "" if all(complete) else "; others are at work on the rest"
    print(f"{request.cache}: {sum(complete)} of {len(complete)} units complete{left}", flush=True)


def _make_shards(
    request: Request, units: dict[str, list[Unit]], extractor: Extractor, stop: StopFlag, bar: Progress
) -> None:
    """Make every missing shard; end when each is committed, or held by another worker in two looks.

    One look is not enough: a lock may be held for an instant, or by a worker that dies.
    """
    waited = False
    while True:
        made = left = False
        for split, k in walk(units, request.cache, request.place):
            with try_lock(shard_lock(request.cache, split, k)) as held:
                missing = [unit for unit in units[split] if not unit.commit_file(k).is_file()]
                if held and missing:
                    extractor.shard(missing, k, bar)
                    made = True
                left |= not held and bool(missing)
            if stop.requested:
                raise Interrupted(f"{request.cache}: stopped at a shard; the same command goes on from there")
        if not left or (waited and not made):
            return
        waited = not made
        if waited:
            time.sleep(RETRY_S)


def open_source(request: Request) -> Dataset:
    """The DATASET of the request; pictures that are not sharded yet are, into CACHE/dataset."""
    if (Path(request.source) / "dataset.json").is_file():
        return Dataset(Path(request.source))
    if request.place.workers > 1 or request.dry_run:
        raise UsageError(
            f"{request.source}: expected a DATASET for several workers or --dry-run; run `mcm-cache shard` first"
        )
    shard(request.source, request.cache / "dataset")
    return Dataset(request.cache / "dataset")


def check_grid(config: ExtractConfig, teacher: Teacher) -> None:
    """Raises: UsageError when the teacher's grid and the student's cannot be the same."""
    rows, columns = teacher.grid
    if config.patch:
        check_multiple("--size", config.size, config.patch)
    patch = config.patch or config.size // rows
    if config.patch is None and (config.size % rows or rows != columns):
        raise UsageError(f"--size {config.size}: expected a --size that {rows} divides, the teacher's tokens a side")
    if (config.size / patch, config.size / patch) != (rows, columns):
        fitting = teacher.identity.height // rows * (config.size // patch)
        raise UsageError(
            f"grids differ: views of {config.size} px in patches of {patch} against the teacher's {rows}x{columns} "
            f"tokens; use --teacher-size {fitting}, or another size or patch"
        )


def cache_identity(request: Request, dataset: Dataset, teacher: Teacher) -> CacheIdentity:
    """The identity of the cache that the request asks for; UsageError for a split that the DATASET has not."""
    config = request.config
    for split in config.splits:
        dataset.split(split)
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
            rows_per_shard=dataset.record.rows_per_shard,
            rows={split: entry.rows for split, entry in dataset.record.splits.items()},
            classes=dataset.classes,
            dataset_sha256=dataset.sha256,
        )
    except ValidationError as error:
        said = error.errors()[0]["msg"]
        raise UsageError(f"{request.cache}: expected a request that a cache can hold: {said}") from error


def publish_teacher(cache: Path, teacher: Teacher) -> float:
    """Store the projection matrix and the float32 features of the probe pictures once, or compare with those stored.

    Returns the relative MSE of this precision to float32 on the probe pictures.
    Raises: IdentityError when this teacher computes other features than the one that began the cache.
    """
    if teacher.projection is not None:
        publish(cache / "projection.npy", encode_npy(teacher.projection))
    pictures = torch.from_numpy(probe_pictures(teacher.identity.height, teacher.identity.width))
    exact, found = (teacher.features(pictures, p)[0].cpu().numpy() for p in ("fp32", teacher.precision))
    publish(cache / "probe.npy", encode_npy(exact), compare=False)
    record = ProbeRecord(features_sha256=file_sha256(cache / "probe.npy"))
    publish(cache / "probe.json", encode_record(record), compare=False)
    compare_probe(cache, exact)
    precision_mse = relative_mse(found, exact)
    if not math.isfinite(precision_mse):
        raise UsageError(
            f"precision {teacher.precision}: expected finite features of the probe pictures; found others; use fp32"
        )
    return precision_mse


def compare_probe(cache: Path, exact: np.ndarray) -> None:
    """Compare float32 features of the probe pictures with those that began the cache.

    Raises: IdentityError when they differ; CorruptionError when the stored ones are damaged.
    """
    difference = relative_mse(exact, read_probe(cache))
    if not difference <= PROBE_TOLERANCE:
        raise IdentityError(
            f"{cache}/probe.npy: this teacher's features of the probe pictures differ by {difference:.1e} "
            f"(relative MSE, at most {PROBE_TOLERANCE:.0e}); "
            "expected the weights, activation and layer that began this cache"
        )


def relative_mse(x: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared difference over the variance of the reference; infinite where shapes differ."""
    if x.shape != reference.shape:
        return math.inf
    return float(((x - reference).astype(np.float64) ** 2).mean() / reference.astype(np.float64).var())


def versions(teacher: Teacher) -> dict[str, str]:
    """What can change a byte of a view or a bit of a feature."""
    found = {}
    for name in ("torch", "timm", "open_clip_torch", "numpy", "pillow", "simplejpeg", "numcodecs"):
        if name != "open_clip_torch" or teacher.identity.name.startswith("open_clip:"):
            with suppress(PackageNotFoundError):  # a GPU machine may offer fewer packages
                found[name] = version(name)
    on_cpu = teacher.device.type == "cpu"
    return found | (
        {"threads": str(torch.get_num_threads())} if on_cpu else {"gpu": torch.cuda.get_device_name(teacher.device)}
    )


def walk(units: dict[str, list[Unit]], cache: Path, place: Place) -> Iterator[tuple[str, int]]:
    """Every shard that a unit misses, from this worker's own offset; those that others hold are skipped by their lock.

    What is committed costs no lock and no look at each file: one reading of the folder of commits a unit.
    """
    done = {split: set.intersection(*(set(unit.committed()) for unit in group)) for split, group in units.items()}
    shards = [(split, k) for split, group in units.items() for k in range(group[0].num_shards)]
    if place.workers > 1 and not locks_work(work_dir(cache)):
        shards = shards[place.worker :: place.workers]
    else:
        start = len(shards) * place.worker // place.workers
        shards = shards[start:] + shards[:start]
    return ((split, k) for split, k in shards if k not in done[split])
