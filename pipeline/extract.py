"""`mcm-cache extract`: a DATASET and a teacher in, views and features out; any number of workers, resumed at will."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from pydantic import ValidationError

from cache_tools.cache import Unit
from cache_tools.console import StopFlag, progress
from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.errors import IdentityError, Interrupted, UsageError
from cache_tools.identity import CacheIdentity, CropPolicy, Fingerprint
from cache_tools.images import PICTURE_RULES, check_encoding
from cache_tools.records import read_record
from cache_tools.storage import locks_work, publish, run_folder, settle, shard_lock, try_lock
from cache_tools.tars import encode_npy, read_sealed_npy, seal
from cache_tools.writer import finish_unit, publish_identity

from .dry_run import print_plan
from .shard import shard
from .shard_features import Extractor
from .teachers import Teacher, load_teacher, probe_pictures
from .views import TRAIN, pixels_sha256

# Largest relative MSE between the float32 probe features of two machines. GELU in the place of QuickGELU moves those of
# the demo's CLIP by 4.2e-5 and of DeiT-tiny by 7.0e-2.
PROBE_TOLERANCE = 1e-6
MAX_SIZE = 4096  # pixels a side


@dataclass(frozen=True)
class Request:
    """What the user asked for; sizes in pixels, `batch` in pictures (a multiple of 16)."""

    source: str
    cache: Path
    teacher: str
    weights: str
    splits: tuple[str, ...] = ()
    views: int = 4
    crop: CropPolicy = CropPolicy(kind="rrc")
    size: int = 224
    patch: int | None = None
    encoding: str = "jpeg:95:444"  # token cosine to the unrecompressed view 0.983; 0.949 at 92:420
    dtype: str = "int8"
    compress: str | None = None
    max_error: float = math.inf
    teacher_size: int | None = None
    precision: str | None = None
    batch: int = 64
    threads: int = 0
    seed: int = 0
    worker: int = 0
    workers: int = 1
    device: str | None = None
    dry_run: bool = False


def extract(request: Request) -> None:
    """Make every missing shard of the request's units; whatever is committed stays.

    Raises: UsageError, IdentityError before any work; CorruptionError; Interrupted when stopped at a shard.
    """
    _check(request)
    teacher = load_teacher(request.teacher, request.weights, request.teacher_size, request.device, request.precision)
    check_grid(request, teacher)
    dataset = open_source(request)
    identity = describe(request, dataset, teacher)
    units = {
        split: [Unit(request.cache, identity, split, view) for view in range(request.views if split == TRAIN else 1)]
        for split in (request.splits or dataset.record.splits)
    }
    if request.dry_run:
        return print_plan(units, dataset, teacher, request.batch, request.cache)
    settle(request.cache)
    publish_identity(request.cache, identity)
    precision_mse = publish_teacher(request.cache, teacher)
    every_unit = [unit for group in units.values() for unit in group]
    total = sum(unit.rows for unit in every_unit)
    done = sum(unit.shard_rows(k) for unit in every_unit for k in unit.committed())
    threads = request.threads or len(os.sched_getaffinity(0))
    with (
        StopFlag("the shard in work is finished and committed") as stop,
        ThreadPoolExecutor(threads) as ahead,
        ThreadPoolExecutor(1) as behind,
        progress(total, f"extract {request.cache}", "views", done) as bar,
    ):
        fingerprint = Fingerprint(
            device=teacher.device.type, precision=teacher.precision, batch=request.batch, versions=versions(teacher)
        )
        extractor = Extractor(dataset, identity, teacher, fingerprint, precision_mse, request.max_error, ahead, behind)
        made = True
        while made:  # once more, for what others held and left
            made = False
            for split, k in walk(units, request):
                with try_lock(shard_lock(request.cache, split, k)) as held:
                    missing = [unit for unit in units[split] if not unit.commit_file(k).is_file()]
                    if held and missing:
                        extractor.shard(missing, k, bar)
                        made = True
                if stop.requested:
                    raise Interrupted(f"{request.cache}: stopped at a shard; the same command goes on from there")
    complete = [finish_unit(unit) for unit in every_unit]
    left = "" if all(complete) else "; others are at work on the rest"
    print(f"{request.cache}: {sum(complete)} of {len(complete)} units complete{left}", flush=True)


def _check(request: Request) -> None:
    check_encoding(request.encoding)
    if request.dtype not in ("int8", "float16"):
        raise UsageError(f"--dtype {request.dtype!r}: expected int8 or float16")
    if request.compress not in (None, "zstd"):
        raise UsageError(f"--compress {request.compress!r}: expected zstd")
    if not request.max_error > 0:
        raise UsageError(f"--max-error {request.max_error}: expected a relative MSE above 0, such as 1e-3")
    if request.batch < CHUNK_ROWS or request.batch % CHUNK_ROWS:
        raise UsageError(f"--batch {request.batch}: expected a multiple of {CHUNK_ROWS}")
    if request.views < 1 or not 0 <= request.worker < request.workers:
        raise UsageError("expected --views of at least 1, and a worker below --workers")
    sizes = (request.size, request.teacher_size or 1, request.patch or 1, request.threads + 1)
    if min(sizes) < 1 or max(sizes) > MAX_SIZE:
        raise UsageError(f"expected --size, --teacher-size, --patch from 1 to {MAX_SIZE} px and --threads from 0")
    (low, high), (narrow, wide) = request.crop.scale, request.crop.ratio
    if not 0 < low <= high <= 1 or not 0 < narrow <= wide or not 0 <= request.crop.flip <= 1:
        raise UsageError("expected --scale and --ratio as LOW HIGH above 0 (scale at most 1), --flip from 0 to 1")


def open_source(request: Request) -> Dataset:
    """The DATASET of the request; pictures that are not sharded yet are, into CACHE/dataset."""
    if (Path(request.source) / "dataset.json").is_file():
        return Dataset(Path(request.source))
    if request.workers > 1 or request.dry_run:
        raise UsageError(
            f"{request.source}: expected a DATASET for several workers or --dry-run; run `mcm-cache shard` first"
        )
    shard(request.source, request.cache / "dataset")
    return Dataset(request.cache / "dataset")


def check_grid(request: Request, teacher: Teacher) -> None:
    """Raises: UsageError when the teacher's grid and the student's cannot be the same."""
    rows, columns = teacher.grid
    patch = request.patch or request.size // rows
    if request.patch is None and (request.size % rows or rows != columns):
        raise UsageError(f"--size {request.size}: expected a --size that {rows} divides, the teacher's tokens a side")
    if (request.size / patch, request.size / patch) != (rows, columns):
        fitting = teacher.identity.height // rows * (request.size // patch)
        raise UsageError(
            f"grids differ: views of {request.size} px in patches of {patch} against the teacher's {rows}x{columns} "
            f"tokens; use --teacher-size {fitting}, or another --size or --patch"
        )


def describe(request: Request, dataset: Dataset, teacher: Teacher) -> CacheIdentity:
    """The identity of the cache that the request asks for; UsageError for a split that the DATASET has not."""
    unknown = [split for split in request.splits if split not in dataset.record.splits]
    if unknown:
        dataset.split(unknown[0])
    try:
        return CacheIdentity(
            teacher=teacher.identity,
            crop=request.crop,
            seed=request.seed,
            view_height=request.size,
            view_width=request.size,
            view_encoding=request.encoding,
            picture_rules=PICTURE_RULES,
            dtype=cast(Literal["int8", "float16"], request.dtype),
            compress=cast(Literal["zstd"] | None, request.compress),
            pixels_sha256=pixels_sha256(request.encoding) if _tells_pixels(request.cache / "cache.json") else None,
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


def _tells_pixels(path: Path) -> bool:
    """Whether a cache that is to be continued holds a digest of pixels; the first ones did not."""
    return not path.is_file() or read_record(CacheIdentity, path).pixels_sha256 is not None


def publish_teacher(cache: Path, teacher: Teacher) -> float:
    """Store the projection matrix and the float32 features of the probe pictures once, or compare with those stored.

    Returns the relative MSE of this precision to float32 on the probe pictures.
    Raises: IdentityError when this teacher computes other features than the one that began the cache.
    """
    if teacher.projection is not None:
        publish(cache / "projection.npy", encode_npy(teacher.projection))
    pictures = torch.from_numpy(probe_pictures(teacher.identity.height, teacher.identity.width))
    exact, found = (teacher.features(pictures, p)[0].cpu().numpy() for p in ("fp32", teacher.precision))
    publish(cache / "probe.npy", seal(encode_npy(exact)), compare=False)
    compare_probe(cache, exact)
    precision_mse = relative_mse(found, exact)
    if not math.isfinite(precision_mse):
        raise UsageError(
            f"--precision {teacher.precision}: expected finite features of the probe pictures; found others; use fp32"
        )
    return precision_mse


def compare_probe(cache: Path, exact: np.ndarray) -> None:
    """Compare float32 features of the probe pictures with those that began the cache.

    Raises: IdentityError when they differ; CorruptionError when the stored ones are damaged.
    """
    path = cache / "probe.npy"
    difference = relative_mse(exact, read_sealed_npy(path))
    if not difference <= PROBE_TOLERANCE:
        raise IdentityError(
            f"{path}: this teacher's features of the probe pictures differ by {difference:.1e} (relative MSE, at most "
            f"{PROBE_TOLERANCE:.0e}); expected the weights, activation and layer that began this cache"
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


def walk(units: dict[str, list[Unit]], request: Request) -> Iterator[tuple[str, int]]:
    """Every shard that a unit misses, from this worker's own offset; those that others hold are skipped by their lock.

    What is committed costs no lock and no look at each file: one reading of the folder of commits a unit.
    """
    done = {split: set.intersection(*(set(unit.committed()) for unit in group)) for split, group in units.items()}
    shards = [(split, k) for split, group in units.items() for k in range(group[0].num_shards)]
    if request.workers > 1 and not locks_work(run_folder(request.cache)):
        shards = shards[request.worker :: request.workers]
    else:
        start = len(shards) * request.worker // request.workers
        shards = shards[start:] + shards[:start]
    return ((split, k) for split, k in shards if k not in done[split])
