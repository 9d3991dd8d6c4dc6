"""`verify` against a plain sha256 of the same files, in turn, from a warm page cache: bar 0.80 of its rate.

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

from record import write_results
from synthetic import Shape, make_cache

from cache_tools.verify import verify


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
    ways: dict[str, dict[str, Any]] = {"1 thread": {"threads": 1}, "all threads": {}}
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
    for dtype in ("int8", "float16"):
        shape = Shape(rows=128, rows_per_shard=64, grid=4, channels=64, pixels=64) if options.quick else Shape(4096)
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            make_cache(cache, shape, dtype)
            table[dtype] = measure(cache, 1 if options.quick else options.repeats)
        for way in ("1 thread", "all threads"):
            print(f"{dtype}, {table[dtype]['mb']} MB, {way}: {table[dtype][way]}", flush=True)
    write_results(options.out, table)


if __name__ == "__main__":
    main()
