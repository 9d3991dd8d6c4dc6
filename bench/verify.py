"""`verify --full` against a plain sha256 of the same files, in turn, from a warm page cache: bar 0.80 of its rate.

    python bench/verify.py --out bench/results/verify.json

A synthetic CACHE by cache_tools' own writers: CLIP B/16's shapes (196 x 768), JPEG views of about 30 KB. `--quick`
makes a few MB, for the shape of the table alone.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from record import write_results

from cache_tools.cache import Unit
from cache_tools.identity import CacheIdentity, CropPolicy, Fidelity, Fingerprint, TeacherIdentity
from cache_tools.images import PICTURE_RULES, encode_view
from cache_tools.quantize import channel_stats, decode, encode
from cache_tools.verify import verify
from cache_tools.writer import UnitShardWriter, finish_unit, publish_identity

NO_SHA = "0" * 64
FINGERPRINT = Fingerprint(device="cpu", precision="fp32", batch=64, versions={})


def identity(rows: int, rows_per_shard: int, dtype: str, grid: int, channels: int, pixels: int) -> CacheIdentity:
    """The identity of a cache that no teacher made."""
    teacher = TeacherIdentity(
        name="bench:noise", architecture_sha256=NO_SHA, weights_sha256=NO_SHA, activation="none",
        height=pixels, width=pixels, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    return CacheIdentity(
        teacher=teacher, crop=CropPolicy(kind="rrc"), seed=0, view_height=pixels, view_width=pixels,
        view_encoding="jpeg:95:444", picture_rules=PICTURE_RULES, dtype=dtype, grid=(grid, grid), channels=channels,
        has_cls=True, rows_per_shard=rows_per_shard, rows={"train": rows}, classes=("none",), dataset_sha256=NO_SHA,
    )  # fmt: skip


def write_unit(unit: Unit) -> None:
    """Every shard of a unit: 32 views and 64 rows of features, over and over; its checks do not know that."""
    draw, known = np.random.default_rng(0), unit.identity
    pixels = (known.view_height, known.view_width, 3)
    smooth = draw.integers(0, 256, (32, pixels[0] // 8, pixels[1] // 8, 3)).repeat(8, 1).repeat(8, 2)
    pictures = np.clip(smooth + draw.integers(-9, 10, (32, *pixels)), 0, 255).astype(np.uint8)
    views = [encode_view(picture, known.view_encoding) for picture in pictures]
    x_BNC = draw.standard_normal((64, known.tokens, known.channels)).astype(np.float32)
    mean, std = channel_stats(x_BNC)
    arrays = encode(known.dtype, x_BNC, mean, std)
    q_BNC = decode(arrays["patch"], arrays.get("scale"), mean, std, arrays.get("low"))
    error = float((((q_BNC - x_BNC) / std) ** 2).sum() / (((x_BNC - mean) / std) ** 2).sum())
    flat = x_BNC.reshape(-1, known.channels).astype(np.float64)
    for shard in range(unit.num_shards):
        with UnitShardWriter(unit, shard) as writer:
            for row in range(unit.shard_rows(shard)):
                writer.add_view(views[row % 32], row % 10, (0, 0, *pixels[:2], 0, *pixels[:2]))
            for _ in range(0, unit.shard_rows(shard), 64):
                for name, rows in (arrays | {"cls": x_BNC[:, 0].astype(np.float16)}).items():
                    writer.add(name, rows)
            if known.dtype != "float16":
                writer.add("channel_mean", mean[None])
                writer.add("channel_std", std[None])
            fidelity = Fidelity(relative_mse=error, cosine=1.0, precision_mse=0.0)
            writer.commit(flat.mean(0), flat.var(0), fidelity, FINGERPRINT)
    finish_unit(unit)


def plain_sha256(files: list[Path]) -> None:
    """What a careful person would do without us."""
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")


def timed(work: Any, *arguments: Any, **options: Any) -> tuple[float, float]:
    """Seconds of a call by the clock and of the processor; what it finds must be nothing."""
    start, cpu = time.perf_counter(), time.process_time()
    report = work(*arguments, **options)
    assert not (report and report.problems), report.problems
    return time.perf_counter() - start, time.process_time() - cpu


def measure(cache: Path, repeats: int) -> dict[str, Any]:
    """MB/s, and its ratio to plain sha256 by the clock and by processor time: medians over pairs taken in turn.

    `best` is the fastest of each: on a machine that others use, what it does when they pause.
    """
    files = sorted(path for path in cache.rglob("*") if path.is_file())
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    plain_sha256(files)  # warms the page cache
    ways: dict[str, dict[str, Any]] = {
        "full, 1 thread": {"full": True, "threads": 1},
        "full": {"full": True},
        "default": {},
    }
    table: dict[str, Any] = {"files": len(files), "mb": round(size_mb), "threads": len(os.sched_getaffinity(0))}
    for way, options in ways.items():
        pairs = [(timed(plain_sha256, files), timed(verify, cache, quiet=True, **options)) for _ in range(repeats)]
        table[way] = {
            "mb_per_s": round(size_mb / median(own for _, (own, _) in pairs)),
            "sha256_mb_per_s": round(size_mb / median(plain for (plain, _), _ in pairs)),
            "of_sha256": round(median(plain / own for (plain, _), (own, _) in pairs), 3),
            "of_sha256_best": round(min(plain for (plain, _), _ in pairs) / min(own for _, (own, _) in pairs), 3),
            "of_sha256_by_cpu": round(median(plain / own for (_, plain), (_, own) in pairs), 3),
        }
    return table


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = {}
    for dtype in ("int8", "int4", "float16"):
        shape = (128, 64, dtype, 4, 64, 64) if options.quick else (4096, 1024, dtype, 14, 768, 224)
        with tempfile.TemporaryDirectory() as folder:
            cache, known = Path(folder) / "cache", identity(*shape)
            publish_identity(cache, known)
            write_unit(Unit(cache, known, "train", 0))
            table[dtype] = measure(cache, 1 if options.quick else options.repeats)
        for way in ("full, 1 thread", "full", "default"):
            print(f"{dtype}, {table[dtype]['mb']} MB, {way}: {table[dtype][way]}", flush=True)
    write_results(options.out, table)


if __name__ == "__main__":
    main()
