"""`mcm-train doctor`: checks before the first step of a pre-training. It writes nothing.

A check returns "ok" or "warn" with a text, or raises the error that `pretrain` would raise.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import torch
from packaging.requirements import Requirement

from cache_tools.cache import Cache, Unit
from cache_tools.console import error_line
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import McmError, ResourceError, UsageError
from cache_tools.images import pixels_sha256
from cache_tools.schema import installed_versions
from cache_tools.storage import free_bytes
from mcm.config import PretrainConfig
from mcm.engine import engine
from mcm.pretrain import choose_units, run_record
from mcm.sampler import Order
from mcm.stream import PREFETCH, CacheSource

DISK_BATCHES = 8  # at most, and of one epoch

Finding = tuple[str, str, str]  # the check; ok, warn or fail; a text that names the remedy


def doctor(config: PretrainConfig, path: Path, processes: int = 1) -> list[Finding]:
    """Check a training on a CACHE in `processes` processes; a launcher may have started them."""
    local, train = int(os.environ.get("LOCAL_WORLD_SIZE", processes)), config.train
    findings = [
        _run("versions", _versions),
        _run("processes", _processes, processes, train.precision),
        _run("workers", _workers, train.workers, local),
    ]
    try:
        units, val = choose_units(cache := Cache(path), (), config.data.views)
        run = run_record(config, cache, [*units, *val])
        batch = train.global_batch, train.micro_batch
        order = Order(units[0].rows, CHUNK_ROWS, *batch, processes)
    except (McmError, OSError) as error:
        return [*findings, ("cache", "fail", f"{error_line(error)}; then check again for the rest")]
    text = f"{order}; the target has {run.channels} channels"
    size_HW = cache.identity.view_height, cache.identity.view_width
    source = CacheSource(units, size_HW, cache.identity.tokens, 1, 0, cls=config.loss.cls)
    return [
        *findings,
        ("cache", "ok", text),
        _run("/dev/shm", _shared_memory, source, order, local * train.workers),
        _run("disk", _disk, source, order),
        _run("pixels", _pixels, units[0]),
    ]


def _run(name: str, check: Callable[..., tuple[str, str]], *arguments: object) -> Finding:
    try:
        return name, *check(*arguments)
    except (McmError, OSError) as error:
        return name, "fail", error_line(error)


def _versions() -> tuple[str, str]:
    """Compare the packages with the bounds of this project, which leave out known faults."""
    wrong, needed = [], 0
    with suppress(PackageNotFoundError):  # a checkout that is not installed has no bounds
        for requirement in map(Requirement, requires("masked-channel-modeling") or ()):
            name = requirement.name
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                found, needed = installed_versions(name).get(name), needed + 1
                if not (found and requirement.specifier.contains(found, prereleases=True)):
                    wrong.append(f"{requirement}, found {found or 'none'}")
    if wrong:
        raise UsageError(f"expected {'; '.join(wrong)}; install these versions with pip")
    return "ok", f"{needed} packages are in the bounds of this project"


def _processes(expected: int, precision: str) -> tuple[str, str]:
    with engine(precision) as accelerator:
        world, device = accelerator.num_processes, accelerator.device
    launched = os.environ.keys() & {"WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "SLURM_PROCID"}
    if world != expected and launched:
        command = f"accelerate launch --multi_gpu --num_processes {expected}"
        found = f"the launcher started {world}; use `{command}`"
        raise UsageError(f"expected --processes {expected} in one training; {found}")
    if device.type == "cpu":
        return "warn", f"found no GPU; {expected} processes train on the CPU; check `nvidia-smi`"
    return "ok", f"{expected} on {torch.cuda.get_device_name()}, {precision}"


def _workers(workers: int, local: int) -> tuple[str, str]:
    cores = len(os.sched_getaffinity(0))
    text, most = f"{local} x {workers} on {cores} cores", max(0, cores // local - 1)
    if workers > most:
        return "warn", f"{text}, beside the training; set train.workers to at most {most}"
    return "ok", text


def _shared_memory(source: CacheSource, order: Order, workers: int) -> tuple[str, str]:
    free, batch = free_bytes(Path("/dev/shm")), source(*order.slice(0), order.batch).values()
    needed = workers * (PREFETCH + 1) * sum(x.nbytes for x in batch if isinstance(x, torch.Tensor))
    text = f"{needed / 1e6:,.0f} MB for the batches of {workers} workers, {free / 1e6:,.0f} MB free"
    if needed > free:
        remedy = "enlarge it (docker: --ipc=host), or lower train.workers or train.micro_batch"
        raise ResourceError(f"too small: {text}; {remedy}")
    return "ok", text


def _disk(source: CacheSource, order: Order) -> tuple[str, str]:
    """Read batches past the page cache; compare the time blocked with the time computing.

    The time in which the thread waits for a core is not the disk's.
    """
    slices = [order.slice(step) for step in range(min(DISK_BATCHES, order.steps_per_epoch))]
    for epoch, chunks in slices:
        for chunk in chunks.tolist():
            unit = source.view(epoch, chunk)
            shard = chunk * CHUNK_ROWS // unit.identity.rows_per_shard
            for path in filter(Path.is_file, unit.shard_files(shard).values()):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start, busy, waited = time.perf_counter(), *_thread_seconds()
    for epoch, chunks in slices:
        source(epoch, chunks, order.batch)
    wall, (cpu, queued) = time.perf_counter() - start, _thread_seconds()
    cpu, blocked = cpu - busy, wall - (cpu - busy) - (queued - waited)
    text = f"one worker reads {len(slices) * order.batch / (cpu + blocked):,.0f} samples/s past "
    text += f"the page cache, and waits {max(0.0, blocked) / (cpu + blocked):.0%} of this time"
    if blocked > cpu:
        return "warn", f"{text}; copy the cache to a faster disk, or raise train.workers"
    return "ok", text


def _thread_seconds() -> tuple[float, float]:
    """Return the seconds in which this thread ran, and in which it waited for a core."""
    ran, queued, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())
    return ran / 1e9, queued / 1e9


def _pixels(unit: Unit) -> tuple[str, str]:
    expected = unit.identity.pixels_sha256
    if expected in (None, pixels_sha256(unit.identity.view_encoding)):
        return "ok", "decoded as for the teacher" if expected else "not recorded in this cache"
    versions = unit.commit(0).fingerprint.versions
    names = ", ".join(f"{n} {versions.get(n, 'unknown')}" for n in ("pillow", "simplejpeg"))
    text = "this machine decodes pictures to other pixels than the extraction"
    return "warn", f"{text}; install {names}"
