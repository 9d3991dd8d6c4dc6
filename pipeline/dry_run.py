"""`mcm-cache extract --dry-run`: estimate the cost of a request from two measured batches."""

import time
from pathlib import Path

import numpy as np
import torch

from cache_tools.cache import Unit
from cache_tools.dataset import Dataset
from cache_tools.storage import free_bytes

from .extractor import render_views
from .teachers import Teacher
from .views import TRAIN

SAMPLE_ROWS = 32


def unit_bytes(unit: Unit) -> int:
    """Return the bytes of a unit's arrays, exact except for metadata."""
    specs = unit.specs.values()
    return sum(-(-spec.shape[0] // spec.chunk_rows) * (spec.chunk_bytes + 4) for spec in specs)


def print_plan(
    units: dict[str, list[Unit]], dataset: Dataset, teacher: Teacher, batch: int, cache: Path
) -> None:
    """Print what the request needs: bytes, shards, free space, and hours on this device.

    Also print the read bandwidth that training needs, and the epoch from which the cache is cheaper
    than an online teacher.
    """
    split = TRAIN if TRAIN in units else next(iter(units))
    unit = units[split][0]
    rows = range(min(SAMPLE_ROWS, unit.rows))
    start = time.perf_counter()
    sample = [render_views(dataset, unit.identity, split, row, [0])[0] for row in rows]
    render_s = (time.perf_counter() - start) / len(rows)
    forward_s = _forward_seconds(teacher, batch)
    view_bytes = sum(len(view.data) for view in sample) / len(rows)
    every = [u for group in units.values() for u in group]
    views, shards = sum(u.rows for u in every), sum(u.num_shards for u in every)
    features, pictures = sum(map(unit_bytes, every)), int(views * (view_bytes + 1536))
    row_bytes = unit_bytes(unit) / unit.rows + view_bytes
    left = sum(u.rows - sum(u.shard_rows(k) for k in u.committed()) for u in every)
    gpu_h, cpu_h, kilobytes = left * forward_s / 3600, left * render_s / 3600, row_bytes / 1e3
    for line in (
        f"cache       {cache}: {len(every)} units, {shards} shards, {views} views ({left} missing)",
        f"bytes       {features / 1e9:.2f} GB of features, about {pictures / 1e9:.2f} GB of views; "
        f"{free_bytes(cache) / 1e9:.1f} GB are free",
        f"time        {gpu_h:.2f} h of forward on {teacher.device} ({1 / forward_s:.1f} views/s), "
        f"{cpu_h:.2f} core-hours of rendering ({1 / render_s:.1f} views/s per core)",
        f"training    reads {kilobytes:.1f} KB per sample: {kilobytes:.1f} MB/s at 1,000 samples/s",
        f"break-even  after {len(units[split])} epochs, an online teacher has cost as much",
    ):
        print(line, flush=True)


def _forward_seconds(teacher: Teacher, batch: int) -> float:
    """Return the seconds per picture of the second of two batches; the first is a warm-up."""
    shape = (batch, teacher.identity.height, teacher.identity.width, 3)
    pictures = torch.from_numpy(np.zeros(shape, np.uint8))
    for _ in range(2):
        start = time.perf_counter()
        teacher.features(pictures)[0].sum().item()
    return (time.perf_counter() - start) / batch
