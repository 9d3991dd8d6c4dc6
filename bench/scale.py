"""The stream from 1,024 to 102,400 rows, and the time to start and to resume with 10,000 shards.

    python bench/scale.py --out bench/results/scale.json

Bars: samples per CPU-second and memory within 10 % of those of the smallest size, for every size.
The first batch after 2 s at most, from the end of the imports, for a start and for a resume inside
an epoch.

Each line of the table is one process without workers. Lines alternate; figures are medians.
Every size streams the same number of rows, so the smallest size runs a hundred epochs. A row is a
view of 112 px and 196 x 192 int8 features: real features would take 18 GB, and smaller ones would
fit in the cache of the processor.
Memory is the resident memory at the end; `own_mb` is without the imports. Checksums are in bytes
per chunk. The 10,000 shards have 16 rows of one token and commits of the real size. `real rows` has
the shapes of CLIP B/16; in the first epoch of a shard, reading its commit takes `commit_share`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import median

from one_step import load_config
from record import resident_megabytes, write_results
from synthetic import Shape, make_cache

from cache_tools.cache import Cache
from cache_tools.dataset import CHUNK_ROWS
from mcm.pretrain import choose_units, run_record
from mcm.sampler import Order
from mcm.stream import CacheSource, Stream, batches

BATCH = 256
RATIOS = {"per_cpu_s", "per_s", "rss_mb", "own_mb", "s"}
Row = dict[str, float]


def open_stream(folder: Path) -> Stream:
    """Return the stream of a run on this cache, opened as in `mcm.pretrain`."""
    config, cache = load_config("pretrain/imagenet_vits16_clipb16", BATCH), Cache(folder)
    units, _ = choose_units(cache, ())
    run = run_record(config, cache, units)
    source = CacheSource(
        units, run.size, cache.identity.tokens, config.mask.pool, config.train.seed
    )
    return Stream(Order(units[0].rows, CHUNK_ROWS, BATCH, BATCH, seed=config.train.seed), source)


def stream(folder: Path, rows: float) -> Row:
    """Measure rates over `rows` rows, with their commits, and the memory that remains in use."""
    imports_mb, opened = resident_megabytes(), open_stream(folder)
    unit = opened.source.units[0]
    with batches(opened, 0, int(rows) // BATCH, workers=0) as items:
        wall, cpu = time.perf_counter(), time.process_time()
        deque(items, maxlen=0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        row = {"per_cpu_s": rows / cpu, "per_s": rows / wall, "rss_mb": resident_megabytes()}
    known = map(unit._checksums, range(unit.num_shards))
    held = [entry for arrays in known for entry in (arrays, *arrays.values())]
    row |= {
        "own_mb": row["rss_mb"] - imports_mb,
        "checksum_bytes": sum(map(sys.getsizeof, held)) / unit.num_chunks,
    }
    cpu, commits = time.process_time(), [unit.commit(0) for _ in range(20)]
    commit_s = (time.process_time() - cpu) / len(commits)
    return row | {
        "commit_ms": 1000 * commit_s,
        "commit_share": commit_s * row["per_cpu_s"] / unit.shard_rows(0),
    }


def start(folder: Path, epochs: float) -> Row:
    """Seconds to open the cache and to the first batch, which lies `epochs` into the run."""
    begin, opened = time.perf_counter(), open_stream(folder)
    first = int(epochs * opened.order.steps_per_epoch)
    with batches(opened, first, first + 1, workers=0) as items:
        next(items)
        return {"s": time.perf_counter() - begin}


def measure(lines: dict[str, tuple[str, str, Path, float]], rounds: int) -> dict[str, Row]:
    """Return the medians of each line (reference, work, folder, number), in separate processes."""
    found: list[dict[str, Row]] = [{} for _ in range(rounds)]
    for one in found:
        for name, (_, *words) in lines.items():
            line = [sys.executable, __file__, "--measure", *map(str, words)]
            one[name] = json.loads(subprocess.check_output(line))
    table = {}
    for name, (base, *_) in lines.items():
        figures = {key: median(one[name][key] for one in found) for key in found[0][name]}
        both = [(one[name], one[base]) for one in found]
        ratios = {
            f"{key}_ratio": median(a[key] / b[key] for a, b in both)
            for key in figures
            if key in RATIOS
        }
        table[name] = {key: round(value, 4) for key, value in (figures | ratios).items()}
        print(f"{name}: {table[name]}", flush=True)
    return table


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="1,024 rows at most, 32 shards, one round: for the tests",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        work, path, number = options.measure
        return print(
            json.dumps({"stream": stream, "start": start}[work](Path(path), float(number)))
        )
    sizes, shards = ([256, 1024], 32) if options.quick else ([1024, 10_240, 102_400], 10_000)
    shapes = {f"{rows} rows": Shape(rows, sizes[0], 14, 192, 112) for rows in sizes}
    # Writing the 10,000 shards takes minutes, because each file is fsynced.
    with tempfile.TemporaryDirectory() as name:
        lines = {
            line: (f"{sizes[0]} rows", "stream", Path(name) / line, sizes[-1]) for line in shapes
        }
        lines["real rows"] = ("real rows", "stream", Path(name) / "real rows", 4 * sizes[0])
        lines |= {
            line: ("start", "start", Path(name) / "start", at)
            for line, at in (("start", 0), ("resume", 90.5))
        }
        if options.quick:
            del lines["real rows"], lines["resume"]
        shapes |= {
            "real rows": Shape(sizes[0], sizes[0]),
            "start": Shape(16 * shards, 16, 1, 768, 16),
        }
        for line, shape in shapes.items():
            make_cache(Path(name) / line, shape, "int8")
        write_results(options.out, measure(lines, 1 if options.quick else options.rounds))


if __name__ == "__main__":
    main()
