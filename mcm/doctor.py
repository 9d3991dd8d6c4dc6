"""`mcm-train doctor`: checks before the first step of a pre-training. It writes nothing.

A check returns "ok" or "warn" with a text, or raises the error that `pretrain` would raise.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from cache_tools.cache import Cache, Unit
from cache_tools.console import error_line
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import McmError, ResourceError, UsageError
from cache_tools.images import pixels_sha256
from cache_tools.storage import free_bytes
from mcm.config import PretrainConfig
from mcm.engine import engine
from mcm.pretrain import choose_units, run_record
from mcm.sampler import Order
from mcm.stream import PREFETCH, CacheSource

Finding = tuple[str, str, str]  # the check; ok, warn or fail; a text that names the remedy


def doctor(config: PretrainConfig, path: Path, processes: int = 1) -> list[Finding]:
    """Check a training on a CACHE in `processes` processes; a launcher may have started them."""
    local, train = int(os.environ.get("LOCAL_WORLD_SIZE", processes)), config.train
    findings = [
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
    memory = _run("/dev/shm", _shared_memory, units, order, local * train.workers, config.loss.cls)
    return [*findings, ("cache", "ok", text), memory, _run("pixels", _pixels, units[0])]


def _run(name: str, check: Callable[..., tuple[str, str]], *arguments: object) -> Finding:
    try:
        return name, *check(*arguments)
    except (McmError, OSError) as error:
        return name, "fail", error_line(error)


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


def _shared_memory(units: list[Unit], order: Order, workers: int, cls: bool) -> tuple[str, str]:
    identity, free = units[0].identity, free_bytes(Path("/dev/shm"))
    size_HW = identity.view_height, identity.view_width
    source = CacheSource(units, size_HW, identity.tokens, 1, 0, cls=cls)
    batch = source(*order.slice(0), order.batch).values()
    needed = workers * (PREFETCH + 1) * sum(x.nbytes for x in batch if isinstance(x, torch.Tensor))
    text = f"{needed / 1e6:,.0f} MB for the batches of {workers} workers, {free / 1e6:,.0f} MB free"
    if needed > free:
        remedy = "enlarge it (docker: --ipc=host), or lower train.workers or train.micro_batch"
        raise ResourceError(f"too small: {text}; {remedy}")
    return "ok", text


def _pixels(unit: Unit) -> tuple[str, str]:
    expected = unit.identity.pixels_sha256
    if expected in (None, pixels_sha256(unit.identity.view_encoding)):
        return "ok", "decoded as for the teacher" if expected else "not recorded in this cache"
    versions = unit.commit(0).fingerprint.versions
    names = ", ".join(f"{n} {versions.get(n, 'unknown')}" for n in ("pillow", "simplejpeg"))
    text = "this machine decodes pictures to other pixels than the extraction"
    return "warn", f"{text}; install {names}"
