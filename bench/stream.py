"""The stream against its limit and against other loaders on the same pictures and features.

    python bench/stream.py --out bench/results/stream.json [--photos FOLDER] [--quick]

Rows are views of 224 px (JPEG 95 4:4:4) and 196 x 768 features. The limit is plain preads and JPEG
decodes into the batch, without checks. Peers read rendered views, decoded by simplejpeg, or, for
"crop", source pictures that Pillow decodes and crops. torch's DataLoader makes their batches.

Each line of the table is one process, in three rounds; figures are medians. Ratios compare
CPU-seconds, ours with the limit and peers with ours, over alternating passes in one process.
Lines with workers have no ratio, because workers are other processes. litdata is omitted, and named
in the output, where it is not installed.
"""

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from record import peak_megabytes, write_results

BATCH, TOKENS, CHANNELS, SIZE, ROWS_PER_SHARD = 64, 196, 768, 224, 256
OURS = [
    f"ours {dtype}, {workers} workers" for dtype in ("int8", "float16") for workers in (0, 1, 2)
]
LIMITS = [f"limit {dtype}" for dtype in ("int8", "float16")]
PEERS = ["webdataset views", "webdataset crop", "litdata views"]


def make_peers(folder: Path, sources: list[bytes], views: list[bytes]) -> None:
    """The same rows for each peer, as its own writer or documentation would have it; int8 codes."""
    codes = np.random.default_rng(0).integers(-100, 100, (TOKENS, CHANNELS)).astype(np.int8)
    npy = io.BytesIO()
    np.save(npy, codes)
    for kind, encoded in (("views", views), ("crop", sources)):
        for start in range(0, len(encoded), ROWS_PER_SHARD):
            path = folder / f"webdataset {kind}" / f"{start:06d}.tar"
            path.parent.mkdir(exist_ok=True)
            with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row, jpg in enumerate(encoded[start : start + ROWS_PER_SHARD], start):
                    for name, data in ((f"{row:09d}.jpg", jpg), (f"{row:09d}.npy", npy.getvalue())):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    if importlib.util.find_spec("litdata"):
        from litdata.streaming.cache import Cache

        cache = Cache(str(folder / "litdata views"), chunk_bytes="64MB")
        for row, jpg in enumerate(views):
            cache[row] = {"jpg": jpg, "codes": codes}
        cache.done()
        cache.merge()


def read_limit(folder: Path, dtype: str) -> Callable[[], Iterator[int]]:
    """Bare preads and decodes of the same files, into the same memory each time."""
    import simplejpeg

    from cache_tools.cache import Cache

    (unit,) = Cache(folder / dtype).complete_units("train")
    tars = [os.open(unit.tar(k), os.O_RDONLY) for k in range(unit.num_shards)]
    indexes = [np.load(unit.index_file(k)) for k in range(unit.num_shards)]
    names = [name for name in ("patch", "scale") if name in unit.specs]
    files = {
        n: [
            os.open(unit.group / unit.specs[n].shard_file(k), os.O_RDONLY) for k in range(len(tars))
        ]
        for n in names
    }
    out = {
        name: np.empty((BATCH, *unit.specs[name].shape[1:]), unit.specs[name].dtype)
        for name in names
    }
    rgb = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)

    def epoch() -> Iterator[int]:
        order = np.random.default_rng(0).permutation(unit.num_chunks)
        for first in range(0, len(order), BATCH // 16):
            for place, chunk in enumerate(order[first : first + BATCH // 16]):
                shard, position = divmod(int(chunk), unit.chunks_per_shard)
                rows = indexes[shard][position * 16 : position * 16 + 16]
                start = int(rows["offset"][0])
                data = os.pread(
                    tars[shard], int(rows["offset"][-1]) + int(rows["size"][-1]) - start, start
                )
                for i, (offset, size) in enumerate(
                    zip(rows["offset"].tolist(), rows["size"].tolist(), strict=True)
                ):
                    jpg = data[offset - start : offset - start + size]
                    simplejpeg.decode_jpeg(jpg, colorspace="RGB", buffer=rgb[place * 16 + i])
                for name in names:
                    target = out[name][place * 16 : place * 16 + 16].data.cast("B")
                    os.preadv(
                        files[name][shard], [target], position * (unit.specs[name].chunk_bytes + 4)
                    )
            yield BATCH

    return epoch


def read_ours(folder: Path, dtype: str, workers: int) -> Callable[[], Iterator[int]]:
    """mcm's stream as pre-training runs it: every crc32c checked, masks picked."""
    from cache_tools.cache import Cache
    from mcm.sampler import Order
    from mcm.stream import CacheSource, Stream, batches

    units = Cache(folder / dtype).complete_units("train")
    order = Order(units[0].rows, 16, BATCH, BATCH)
    stream = Stream(order, CacheSource(units, (SIZE, SIZE), TOKENS, 4096, 0))

    def run() -> Iterator[int]:
        with batches(stream, 0, 1000 * order.steps_per_epoch, workers) as items:
            for batch in items:
                yield len(batch["rows"])

    items = run()  # one loader for all passes, as one run has one for all epochs
    return lambda: islice(items, order.steps_per_epoch)


def loaded(
    samples: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]],
) -> Callable[[], Iterator[int]]:
    """Samples in batches by torch's DataLoader, as the peers' documentation has it."""
    from torch.utils.data import DataLoader, IterableDataset

    class Samples(IterableDataset):
        def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            return samples()

    return lambda: (len(pictures) for pictures, _ in DataLoader(Samples(), batch_size=BATCH))


def read_peer(folder: Path, name: str) -> Callable[[], Iterator[int]]:
    """A peer's reader in one process, without its shuffle pool."""
    import simplejpeg

    def decode(jpg: bytes) -> np.ndarray:
        return np.asarray(simplejpeg.decode_jpeg(jpg, colorspace="RGB"))

    def crop(jpg: bytes) -> np.ndarray:
        from PIL import Image

        with Image.open(io.BytesIO(jpg)) as picture:
            side = min(picture.size)
            return np.asarray(
                picture.convert("RGB").resize(
                    (SIZE, SIZE), Image.Resampling.BICUBIC, (0, 0, side, side)
                )
            )

    where = folder / name
    if name.startswith("webdataset"):
        import webdataset

        read = decode if name.endswith("views") else crop
        tars = [str(path) for path in sorted(where.glob("*.tar"))]

        def samples() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for sample in webdataset.WebDataset(tars, shardshuffle=False):
                yield read(sample["jpg"]), np.load(io.BytesIO(sample["npy"]))

        return loaded(samples)
    from litdata import StreamingDataset

    dataset = StreamingDataset(str(where), shuffle=False)
    return loaded(lambda: ((decode(item["jpg"]), item["codes"]) for item in iter(dataset)))


def open_reader(folder: Path, name: str) -> Callable[[], Iterator[int]]:
    """The reader of a line of the table."""
    kind, _, rest = name.partition(" ")
    if kind == "limit":
        return read_limit(folder, rest)
    if kind == "ours":
        dtype, _, workers = rest.partition(", ")
        return read_ours(folder, dtype, int(workers.split()[0]))
    return read_peer(folder, name)


def drop_from_memory(folder: Path) -> None:
    """Ask the system to forget the files, for a cold pass."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def reference(name: str) -> str | None:
    """Return the line to compare with: the limit for ours, ours for a peer, none with workers."""
    if name in LIMITS or name.endswith((" 1 workers", " 2 workers")):
        return None
    return f"limit {name.split()[1].rstrip(',')}" if name in OURS else OURS[0]


def timed(epoch: Callable[[], Iterator[int]]) -> tuple[float, float]:
    """(rows a second, rows a CPU-second) of a pass."""
    wall, spent = time.perf_counter(), time.process_time()
    rows = sum(epoch())
    return rows / (time.perf_counter() - wall), rows / (time.process_time() - spent)


def measure(folder: Path, name: str, seconds: float) -> dict[str, Any]:
    """A cold pass, then warm ones, in turns with those of the line's reference."""
    epoch, other = open_reader(folder, name), reference(name)
    data = folder / (name.split()[1].rstrip(",") if name in LIMITS + OURS else name)
    drop_from_memory(data)
    found: dict[str, Any] = {"cold_per_s": timed(epoch)[0], "rss_mb": peak_megabytes()}
    beside = open_reader(folder, other) if other else None
    passes, pairs, end = [], [], time.perf_counter() + seconds
    for work in filter(None, (beside, epoch)):
        timed(work)
    while not passes or time.perf_counter() < end:
        passes.append(timed(epoch))
        if beside:
            pairs.append(passes[-1][1] / timed(beside)[1])
    found["per_s"], found["per_cpu_s"] = map(statistics.median, zip(*passes, strict=True))
    found["ratio"] = statistics.median(pairs) if pairs else None
    found["bytes"] = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    return found


def main() -> None:
    """Make the data, let every line run in turns, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--photos", type=Path, help="folder of source pictures; synthetic ones where left out"
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each line in a round, warm")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="three lines of 256 rows, one pass, one round: for the tests",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, arguments.measure, arguments.seconds)))
        return
    # Imported here, because a line that measures a peer imports only that peer.
    from synthetic import Shape, make_cache, pictures, rendered_view

    if arguments.quick:
        arguments.rows, arguments.rounds, arguments.seconds = 256, 1, 0.0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sources = list(pictures(arguments.photos, arguments.rows))
        views = [rendered_view(source, row, SIZE) for row, source in enumerate(sources)]
        for dtype in ("int8", "float16"):
            make_cache(
                folder / dtype,
                Shape(arguments.rows, ROWS_PER_SHARD, 14, CHANNELS, SIZE),
                dtype,
                views,
            )
        make_peers(folder, sources, views)
        write_results(arguments.out, run_table(arguments, folder))


def run_table(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Every line, in turns; figures are medians of the rounds."""
    peers = [name for name in PEERS if (folder / name).is_dir()]
    print(
        "left out, not installed:",
        ", ".join(name for name in PEERS if name not in peers) or "nothing",
    )
    lines = [LIMITS[0], OURS[0], peers[0]] if arguments.quick else [*LIMITS, *OURS, *peers]
    rounds: list[dict[str, dict[str, Any]]] = []
    for _ in range(arguments.rounds):
        rounds.append({})
        for name in lines:
            line = [
                sys.executable,
                __file__,
                "--measure",
                name,
                "--folder",
                folder,
                "--seconds",
                arguments.seconds,
            ]
            done = subprocess.run([str(word) for word in line], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            rounds[-1][name] = json.loads(done.stdout.splitlines()[-1])
    return {name: show(name, [one[name] for one in rounds], arguments.rows) for name in lines}


def show(name: str, rounds: list[dict[str, Any]], rows: int) -> dict[str, Any]:
    """Print a line of the table, and return it."""
    numbers = ("per_s", "per_cpu_s", "cold_per_s", "rss_mb")
    row: dict[str, Any] = {
        key: round(statistics.median(one[key] for one in rounds)) for key in numbers
    }
    row["bytes_a_sample"] = round(rounds[0]["bytes"] / rows)
    text = (
        f"{name:<26} {row['per_s']:>6}/s warm {row['cold_per_s']:>6}/s cold {row['rss_mb']:>5} MB"
    )
    text += f" {row['bytes_a_sample']:>7} B a sample"
    if reference(name):
        ratio = statistics.median(one["ratio"] for one in rounds)
        row |= (
            {"of_limit": round(ratio, 3)} if name in OURS else {"ours_over_it": round(1 / ratio, 2)}
        )
        text += f" {row['per_cpu_s']:>6} a CPU-second, " + str(row).rpartition(", ")[2].strip("}")
    elif name in OURS:
        del row["per_cpu_s"]  # of this process, which only waits for others
    print(text, flush=True)
    return row


if __name__ == "__main__":
    main()
