"""`mcm-cache plan`: what a cache needs on this machine, from a request and measured rates."""

import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastcrc.crc32 import iscsi as crc32c

from cache_tools.cache import Unit
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.images import PictureRefused, decode_rgb, decode_view_into, encode_view
from cache_tools.storage import existing, free_bytes, naming
from cache_tools.tars import VIEW_INDEX_DTYPE

from .candidates import read_source
from .coco_listing import list_coco
from .extract import Request, Session
from .extractor import View, render_view
from .listing import list_sources
from .mask_listing import list_scenes
from .parquet_listing import first_pictures
from .teachers import Teacher, probe_pictures
from .views import TRAIN

SAMPLE = 32  # pictures
FORWARD_S, DISK_S = 10.0, 4.0  # the forwards, the renderings and the writes end about then
DISK_BLOCKS, BLOCK = 64, 4 << 20
# Bytes beside the views and arrays. Per row: the headers and the label of a view. Per shard, about:
# the end of a tar, the header of an index, a commit. In a commit, about: a value, a checksum.
_TAR, _SHARD, _VALUE, _CRC = 1536, 6144 + 128 + 1500, 12.5, 11.5


def plan(
    request: Request, rows: int | None = None, rate: float = 1000.0, price: float = 0.0
) -> dict[str, Any]:
    """Return what the request needs, in the words and units of `mcm-cache plan`.

    With `rows`, there is no source: synthetic pictures stand for that many. `rate` is the speed of
    the training step, in samples per second, and `price` that of an hour of this machine. The
    measurements take about 30 s at most.
    """
    source, pictures = _sample(request, rows)
    session = Session(request, source)
    teacher, every, identity = session.teacher, session.every_unit, session.identity
    first = session.units.get(TRAIN, every)[0]
    cores = request.worker.threads * request.worker.processes
    views, render_s = _render(pictures, first)
    sizes = [len(view.data) for view in views]
    forward_s, host_s = _forward_seconds(teacher, request.config.batch), render_s / cores
    on_cpu = teacher.device.type == "cpu"  # there, the forward and the rendering share the cores
    online_s = forward_s + host_s if on_cpu else max(forward_s, host_s)
    missing = sum(unit.rows - sum(map(unit.shard_rows, unit.committed())) for unit in every)
    row_bytes = _array_bytes(first) / first.rows + float(np.mean(sizes))
    decode_s, disk = _decode_seconds(views, first, row_bytes) / cores, _disk_rate(request.cache)
    limits = {"step": rate, "disk": disk / row_bytes, "decoding": 1 / decode_s}
    saved_s = (online_s - max(row_bytes / disk, decode_s)) * first.rows  # per epoch
    total = sum(unit.rows for unit in every)
    found: dict[str, Any] = {"pictures": "sampled" if rows is None else "synthetic"}
    for dtype in ("int8", "float16"):
        other = identity.model_copy(update={"dtype": dtype})
        same = [Unit(request.cache, other, unit.split, unit.view) for unit in every]
        found[f"{dtype}_gigabytes"] = cache_bytes(same, sizes, teacher) / 1e9
    found |= {
        "free_gigabytes": free_bytes(request.cache) / 1e9,
        "dtype": identity.dtype,
        "units": len(every),
        "shards": sum(unit.num_shards for unit in every),
        "inodes": inodes(every, teacher),
        "views": total,
        "views_missing": missing,
        "device": f"{teacher.device} and {cores} cores",
        "forward_views_per_s": 1 / forward_s,
        "rendering_views_per_s": 1 / host_s,
        "hours": missing * online_s / 3600,
        "extraction_bottleneck": "forward" if forward_s > host_s else "rendering",
        "kilobytes_per_sample": row_bytes / 1e3,
        "training_megabytes_per_s": row_bytes * rate / 1e6,
        "disk_megabytes_per_s": disk / 1e6,
        **{f"{name}_samples_per_s": limit for name, limit in limits.items()},
        "training_bottleneck": min(limits, key=limits.__getitem__),
        # After so many epochs, a teacher in the training loop has cost as much as the cache.
        "break_even_epochs": total * online_s / saved_s if saved_s > 0 else "never",
    }
    if price:
        epoch_hours = first.rows / min(limits.values()) / 3600
        prices = {"extraction_price": found["hours"] * price, "epoch_price": epoch_hours * price}
        found |= prices
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}


def _sample(request: Request, rows: int | None) -> tuple[Dataset | dict[str, int], list[bytes]]:
    """Return the DATASET or the rows of each split, and a few source pictures."""
    source, pictures = Path(request.source), list[bytes]()
    if rows is not None:
        return {TRAIN: rows}, [encode_view(rgb, "jpeg:95:444") for rgb in probe_pictures(375, 500)]
    if (source / "dataset.json").is_file():
        dataset = Dataset(source)
        split = min(dataset.record.splits, key=lambda name: name != TRAIN)
        return dataset, [dataset.picture(split, row)[0] for row in _spread(dataset.rows(split))]
    sources = list_coco(source) or list_scenes(source) or list_sources(request.source)
    candidates = next(iter(sources.splits.values()))
    if candidates.column:
        pictures = first_pictures(candidates, SAMPLE)
    for i in _spread(0 if candidates.column else len(candidates)):
        with suppress(PictureRefused):
            pictures.append(read_source(candidates[i]))
    return {split: len(part) for split, part in sources.splits.items()}, pictures


def _spread(rows: int) -> list[int]:
    return [i * rows // SAMPLE for i in range(SAMPLE)] if rows > SAMPLE else [*range(rows)]


def _render(pictures: list[bytes], unit: Unit) -> tuple[list[View], float]:
    """Return a view of each picture that decodes, and the seconds per view of one core."""
    views, start = list[View](), time.perf_counter()
    for row, data in enumerate(pictures):
        with suppress(PictureRefused):
            views.append(render_view(decode_rgb(data), unit.identity, unit.split, row, 0))
        if time.perf_counter() - start > DISK_S:
            break
    if not views:
        raise UsageError(f"expected a picture that decodes among {len(pictures)}; found none")
    return views, (time.perf_counter() - start) / len(views)


def _forward_seconds(teacher: Teacher, batch: int) -> float:
    """Return the seconds per picture, from batches that double in size up to `batch`."""
    start, seconds = time.perf_counter(), 0.0
    sizes = [size for power in range(20) if (size := 1 << power) < batch] + [batch, batch]
    for size in sizes:
        shape = (size, teacher.identity.height, teacher.identity.width, 3)
        begin = time.perf_counter()
        teacher.features(torch.zeros(shape, dtype=torch.uint8))[0].sum().item()
        seconds = (time.perf_counter() - begin) / size
        if time.perf_counter() - start + 2 * size * seconds > FORWARD_S:
            break
    return seconds


def _decode_seconds(views: Sequence[View], unit: Unit, row_bytes: float) -> float:
    """Return the seconds per sample of one core for a copy, a checksum and a decoded view."""
    stored = np.zeros(int(row_bytes), np.uint8)
    pixels = np.empty((unit.identity.view_height, unit.identity.view_width, 3), np.uint8)
    start = time.perf_counter()
    for view in views:
        crc32c(stored.copy().data)
        decode_view_into(view.data, pixels)
    return (time.perf_counter() - start) / len(views)


def _disk_rate(path: Path) -> float:
    """Return the bytes per second that 4 threads read from a new file, past the page cache.

    The file has no name and vanishes with its descriptor. If the file system has no O_DIRECT, the
    kernel is asked to drop the file from the page cache.
    """
    folder = existing(path)
    with naming(folder), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start, data, blocks = time.perf_counter(), os.urandom(BLOCK), 0
        wanted = max(1, min(DISK_BLOCKS, free_bytes(folder) // BLOCK // 4))
        while blocks < wanted and time.perf_counter() - start < DISK_S:
            blocks += file.write(data) == BLOCK
            os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with suppress(OSError):
            fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        places, start = range(0, blocks * BLOCK, BLOCK), time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            read = pool.map(lambda at: os.preadv(file.fileno(), [mmap.mmap(-1, BLOCK)], at), places)
        return sum(read) / (time.perf_counter() - start)


def _array_bytes(unit: Unit) -> int:
    """Return the bytes of the chunks of a unit and of their checksums, before compression."""
    specs = unit.specs.values()
    return sum(-(-spec.shape[0] // spec.chunk_rows) * (spec.chunk_bytes + 4) for spec in specs)


def cache_bytes(every: Sequence[Unit], sizes: Sequence[int], teacher: Teacher) -> int:
    """Return the bytes of a complete cache with views of the mean of `sizes`."""
    row = float(np.mean([-(-size // 512) * 512 for size in sizes])) + _TAR
    row += VIEW_INDEX_DTYPE.itemsize
    total = 16.0 * teacher.channels * teacher.grid[0] * teacher.grid[1]  # probe.npy
    total += 0 if teacher.projection is None else teacher.projection.nbytes
    for unit in every:
        specs = unit.specs.values()
        shard = _SHARD + 2 * teacher.channels * _VALUE
        shard += sum(16 * spec.chunks_per_shard + 4 for spec in specs)
        chunk = _CRC * (1 + sum(spec.chunk_rows > 1 for spec in specs))
        total += unit.rows * row + unit.num_chunks * chunk + unit.num_shards * shard
        total += _array_bytes(unit) + sum(map(len, unit.zarr_files().values()))
    return int(total)


def inodes(every: Sequence[Unit], teacher: Teacher) -> int:
    """Return the number of files and folders of a complete cache, with the locks in .run."""
    count = 7 + (teacher.projection is not None)  # CACHE and its files, .run and its locks
    for unit in every:
        arrays = len(unit.specs)
        count += 6 + 2 * arrays  # folders, each zarr.json, the manifest
        count += unit.num_shards * (3 + arrays)  # tar, index, commit, a shard per array
        if unit.view == 0:  # the folder of the split, and a lock per shard
            count += 1 + unit.num_shards
    return count
