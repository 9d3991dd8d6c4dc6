"""The speed of extraction against its limit on the same machine, and the memory it takes.

    python bench/extract.py --out bench/results/extract.json [--photos FOLDER]
        [--weights DEIT_TINY] [--quick]

Teachers are DeiT-tiny (--weights FILE, or random) and a random CLIP ViT-B/16 (quickgelu).
Each source picture of about 500 x 375 gives 1 or 4 views, stored as int8.
Rates are in views per second. `host` is the rate of one core for what the host does per view:
rendering and writing. On a GPU the limit is min(forward, cores x host). On a CPU, where all share
the cores, it is 1 / (1 / forward + 1 / (cores x host)). Compared rates alternate.

`parts` is the cost per view: CPU-milliseconds of one thread for the decode of the source (shared by
its views), crop and resize, encode, decode of the stored view, and write (tar, index, Zarr, crc32c
and sha256); milliseconds of the device for preprocess, forward, and quantize with its checks.

`main_ms` is the CPU-milliseconds per view of the main thread outside the teacher's forward and
encoding. The bar is 0.2, because threads and device must not wait for this thread.

`memory` is the peak memory of a whole extraction on the CPU, without the imports. It compares a
dataset with one of four times its size; each runs in its own process. The bar for the ratio is 1.1.
"""

import argparse
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from clock import describe, in_turns, peak, peak_megabytes, reset_peak, seconds
from record import resident_megabytes, write_results
from synthetic import make_dataset, pictures, tiny_clip
from torch import Tensor

from cache_tools.cache import Unit
from cache_tools.console import progress
from cache_tools.dataset import Dataset
from cache_tools.images import decode_rgb, decode_view_into, encode_view
from cache_tools.quantize import channel_stats, decode, encode
from cache_tools.schema import CacheIdentity, Fingerprint
from cache_tools.writer import publish_identity, unit_writer
from pipeline import extract
from pipeline.config import ExtractConfig
from pipeline.extractor import Extractor, Timers, render_views
from pipeline.teachers import Teacher, load_teacher
from pipeline.views import draw_crop, render
from pipeline.worker import WorkerInfo

BATCH = 64  # `mcm-cache extract`'s own
CORES = len(os.sched_getaffinity(0))
HOST = ("decode", "crop, resize", "encode", "decode of the view", "write")  # parts on the CPU
Row = dict[str, Any]


class CpuTimers(Timers):
    """Also the CPU-seconds of this thread in "teacher"."""

    teacher_cpu = 0.0

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """As `Timers.measure`."""
        start = time.thread_time()
        with super().measure(what):
            yield
        self.teacher_cpu += (time.thread_time() - start) * (what == "teacher")


class Place:
    """A dataset and a teacher, and the three rates that are compared."""

    def __init__(
        self, folder: Path, dataset: Dataset, teacher: Teacher, views: int, size: int
    ) -> None:
        self.folder, self.dataset, self.teacher, self.runs = folder, dataset, teacher, 0
        config = ExtractConfig(teacher=teacher.identity.name, weights="", views=views, size=size)
        request = extract.Request(str(dataset.path), folder, config)
        self.identity: CacheIdentity = extract.cache_identity(request, dataset, teacher)
        self.views, device, versions = range(views), teacher.device.type, extract.versions(teacher)
        self.fingerprint = Fingerprint(
            device=device, precision=teacher.precision, batch=BATCH, versions=versions
        )

    def units(self) -> list[Unit]:
        """Units of a new cache."""
        self.runs += 1
        cache = self.folder / f"cache {self.runs}"
        publish_identity(cache, self.identity)
        return [Unit(cache, self.identity, "train", view) for view in self.views]

    def whole(self, rows: int) -> tuple[float, Timers, float]:
        """Return (views per second, split of the time, `main_ms`) from the sources to the commits.

        The shards are the first ones.
        """
        units = self.units()
        shards = range(-(-rows // self.identity.rows_per_shard))
        with (
            ThreadPoolExecutor(CORES) as ahead,
            ThreadPoolExecutor(1) as behind,
            progress(rows, "bench", "views", quiet=True) as bar,
        ):
            facts = (self.dataset, self.identity, self.teacher, self.fingerprint)
            own = Extractor(*facts, 0.0, math.inf, ahead, behind, timers := CpuTimers())
            start = time.thread_time()
            took = seconds(
                lambda: [own.shard(units, k, bar.update) for k in shards], self.teacher.device
            )
            main = time.thread_time() - start - timers.teacher_cpu
        views = sum(units[0].shard_rows(k) for k in shards) * len(units)
        return views / took, timers, 1e3 * main / views

    def forward(self, batches: int) -> float:
        """Return the views per second of the teacher alone, from pictures in memory."""
        batch = self.pictures()
        return BATCH / seconds(lambda: self.teacher.features(batch), self.teacher.device, batches)

    def parts(self, rows: int) -> dict[str, float]:
        """Return the milliseconds per view of each part."""
        spent, stored = Counter[str](), []
        size, encoding = self.identity.view_height, self.identity.view_encoding
        out = np.empty((size, size, 3), np.uint8)

        def timed(name: str, work: Callable[..., Any], *given: Any) -> Any:
            start = time.thread_time()
            found = work(*given)
            spent[name] += time.thread_time() - start  # type: ignore[assignment]
            return found

        for row in range(rows):
            data, label = self.dataset.picture("train", row)
            rgb = timed("decode", decode_rgb, data)
            for view in self.views:
                crop = draw_crop(self.identity.crop, 0, "train", row, view, *rgb.shape[:2])
                pixels = timed("crop, resize", render, rgb, crop, size, size)
                coded = timed("encode", encode_view, pixels, encoding)
                timed("decode of the view", decode_view_into, coded, out)
                stored.append((coded, label, crop))
        found = {name: 1e3 * value / len(stored) for name, value in spent.items()}
        patch, _ = self.teacher.features(batch := self.pictures())
        mean, std = channel_stats(patch, torch)

        def quantize() -> dict[str, Tensor]:
            arrays: dict[str, Tensor] = encode(self.identity.dtype, patch, mean, std, torch)
            decode(arrays["patch"], arrays.get("scale"), mean, std, torch)
            return arrays

        with unit_writer(self.units()[0], 0) as writer:  # without a commit
            views = stored[: min(BATCH, self.identity.rows_per_shard)]
            arrays = {
                name: tensor[: len(views)].cpu().numpy() for name, tensor in quantize().items()
            }
            for view in views:
                timed("write", writer.add_view, *view)
            for name, array in arrays.items():
                timed("write", writer.add, name, array)
        found["write"] = 1e3 * spent["write"] / len(views)
        device, known = self.teacher.device, self.teacher.identity
        scale = [torch.tensor(value, device=device) * 255 for value in (known.mean, known.std)]
        works = {
            "preprocess": lambda: (batch.to(device) - scale[0]) / scale[1],
            "forward": lambda: self.teacher.features(batch),
            "quantize": quantize,
        }
        on_device = {name: 1e3 * s / BATCH for name, s in in_turns(works, device).items()}
        on_device["forward"] -= on_device["preprocess"]
        return {name: round(value, 4) for name, value in (found | on_device).items()}

    def pictures(self) -> Tensor:
        """A batch of the teacher's inputs, uint8."""
        rows = range(min(BATCH, self.identity.rows["train"]))
        inputs = [
            render_views(self.dataset, self.identity, "train", row, [0])[0].teacher_input
            for row in rows
        ]
        return torch.from_numpy(np.stack([inputs[row % len(inputs)] for row in range(BATCH)]))


def measure(place: Place, rows: int, rounds: int) -> Row:
    """The rates in turn, medians of the rounds, and what extraction is of the limit."""
    found: list[dict[str, float]] = []
    place.forward(1)
    for device in (torch.device("cpu"), place.teacher.device):
        reset_peak(device)
    for _ in range(rounds):
        parts = place.parts(min(rows, 64))
        rates = {
            "forward": place.forward(min(8, max(1, rows * len(place.views) // BATCH))),
            "host": 1e3 / sum(parts[name] for name in HOST),
        }
        rates["extract"], spent, rates["main_ms"] = place.whole(rows)
        cores = CORES * rates["host"]
        both = 1 / (1 / rates["forward"] + 1 / cores)
        limit = min(rates["forward"], cores) if place.teacher.device.type == "cuda" else both
        found.append(rates | {"limit": limit, "of_limit": rates["extract"] / limit})
    row: Row = {name: round(median(one[name] for one in found), 3) for name in found[0]}
    total = sum(spent.seconds.values())
    row["parts"] = parts
    row["split"] = {what: round(share / total, 3) for what, share in spent.seconds.items()}
    gpu_mb = peak(place.teacher.device) if place.teacher.device.type == "cuda" else None
    return row | {"peak_mb": round(peak_megabytes()), "gpu_mb": gpu_mb}


def extraction_mb(dataset: Path, teacher: str) -> float:
    """Return the peak megabytes of a whole extraction of one view, without the imports."""
    reset_peak(torch.device("cpu"))
    imports_mb = resident_megabytes()
    cache = dataset.with_name("cache")
    config = ExtractConfig(teacher=teacher, weights="random", size=32, views=1)
    extract.extract(
        extract.Request(str(dataset), cache, config, WorkerInfo(device="cpu", threads=CORES))
    )
    return peak_megabytes() - imports_mb


def memory(folder: Path, rows: int) -> Row:
    """Memory of extraction against the dataset's size."""
    sizes, teacher, sources = (
        (rows, 4 * rows),
        tiny_clip(folder / "memory"),
        list(pictures(None, 16, 48, 64)),
    )
    datasets = [make_dataset(folder / f"{size} rows", sources, size, 64).path for size in sizes]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as alone:
        found = list(alone.map(extraction_mb, datasets, [teacher] * 2))
    return {
        "rows": sizes,
        "own_mb": [round(own) for own in found],
        "ratio": round(found[1] / found[0], 3),
    }


def teachers(options: argparse.Namespace, folder: Path) -> dict[str, tuple[Teacher, int]]:
    """Teachers by name, each with its pictures' share of --rows."""
    if options.quick:
        return {"tiny CLIP": (load_teacher(tiny_clip(folder / "clip"), "random"), 1)}
    clip_rows = 1 if torch.cuda.is_available() else 8  # on a CPU it takes fifteen times as long
    return {
        "DeiT-tiny": (load_teacher("timm:deit_tiny_patch16_224", options.weights), 1),
        "CLIP B/16": (load_teacher("open_clip:ViT-B-16-quickgelu", "random"), clip_rows),
    }


def main() -> None:
    """Make the datasets, measure each teacher with 1 and 4 views, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--photos", type=Path, help="folder of source pictures; synthetic ones where left out"
    )
    parser.add_argument("--weights", default="random", help="DeiT-tiny's, a file of timm")
    parser.add_argument("--rows", type=int, default=4096 if torch.cuda.is_available() else 512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="32 px, 128 rows, one round, a tiny teacher: for the tests",
    )
    options = parser.parse_args()
    size, per_shard = 32 if options.quick else 224, 256 if torch.cuda.is_available() else 64
    rows, options.rounds = (128, 1) if options.quick else (options.rows, options.rounds)
    table: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table["memory"] = memory(folder, rows)
        print(f"memory: {table['memory']}", flush=True)
        dataset = make_dataset(
            folder, list(pictures(options.photos, min(rows, 64))), rows, per_shard
        )
        for teacher_name, (teacher, part) in teachers(options, folder).items():
            table["where"] = describe(teacher.device) | {
                "cores": CORES,
                "rows": rows,
                "batch": BATCH,
            }
            for views in (1, 4):
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    place = Place(Path(cache), dataset, teacher, views, size)
                    key = f"{teacher_name}, {views} views"
                    table[key] = measure(
                        place, max(rows // part // views, per_shard), options.rounds
                    )
                print(f"{key}: {table[key]}", flush=True)
                write_results(options.out, table)


if __name__ == "__main__":
    main()
