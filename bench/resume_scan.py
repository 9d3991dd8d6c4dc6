"""The time of `extract`, `info` and `verify --quick` on a CACHE of 100,000 committed shards.

    python bench/resume_scan.py --out bench/results/resume_scan.json

`extract` scans the commits until it finds the missing shard. The bar for the scan is 5 s and 1 GiB;
the memory of the imports (numpy, torch) is printed beside it.
Each shard has a tar, an index, features, CLS and a commit of tiny size: 64 rows of 4 tokens of 4
channels, as links to a few files. A commit has 2 KB instead of 20 KB. The scan reads no commit.
`info` and `verify --quick` read all commits, so their times are lower than with real commits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import write_results
from synthetic import Shape, make_identity, noise_views, write_unit

from cache_tools.cache import Unit
from cache_tools.records import encode_record
from cache_tools.writer import publish_identity

ROWS = 64  # a shard
LINKS = 50_000  # to one file; a file system may allow 65,000
SCAN = """
import json, resource, sys, time
from pathlib import Path
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
from pipeline.extract import missing_shards
from pipeline.worker import WorkerInfo
from cache_tools.cache import Cache
from cache_tools.info import info
from cache_tools.storage import settle
from cache_tools.verify import verify
path, what = Path(sys.argv[1]), sys.argv[2]
floor_mib, start = peak(), time.perf_counter()
if what == "scan":
    settle(path)
    units = {"train": Cache(path).units("train")}
    done = sum(unit.shard_rows(k) for unit in units["train"] for k in unit.committed())
    found = next(missing_shards(units, path, WorkerInfo()))
    assert found == ("train", units["train"][0].num_shards - 1), found
elif what == "info":
    assert info(path)["units"]["train/v0"]["shards"]
else:
    assert not verify(path, quick=True, quiet=True).problems
seconds = round(time.perf_counter() - start, 2)
print(json.dumps({"s": seconds, "peak_mib": round(peak()), "floor_mib": round(floor_mib)}))
"""


def make(path: Path, shards: int) -> None:
    """Make a CACHE without its last shard; all others are links to the files of one real shard."""
    known = make_identity(Shape(ROWS * shards, ROWS, grid=2, channels=4, pixels=16), "float16")
    one = known.model_copy(update={"rows": {"train": ROWS}})
    publish_identity(path, known)
    real, unit = Unit(path, one, "train", 0), Unit(path, known, "train", 0)
    write_unit(real, noise_views(16))
    commit = real.commit(0)
    real.manifest_file.unlink()
    for file, data in unit.zarr_files().items():
        file.write_bytes(data)
    sources: dict[str, str] = {}
    for shard in range(shards - 1):
        renamed = {
            name: name.replace("000000", f"{shard:06d}").replace("/c.0", f"/c.{shard}")
            for name in commit.files
        }
        for name, other in renamed.items() if shard else ():
            if shard % LINKS:
                os.link(unit.path / sources[name], unit.path / other)
            else:
                (unit.path / other).write_bytes((unit.path / name).read_bytes())
        if shard % LINKS == 0:
            sources = renamed
        files = {renamed[name]: entry for name, entry in commit.files.items()}
        update = {"shard": shard, "files": files, "identity_sha256": unit.identity_sha256}
        unit.commit_file(shard).write_bytes(encode_record(commit.model_copy(update=update)))


def measure(cache: Path, what: str) -> dict[str, Any]:
    """Seconds and peak of memory in a process of its own; the floor is that of the imports."""
    done = subprocess.run(
        [sys.executable, "-c", SCAN, str(cache), what], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shards = 50 if options.quick else options.shards
    table: dict[str, Any] = {"shards": shards}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "cache", shards)
        for what in ("scan", "info", "verify --quick"):
            table[what] = measure(Path(folder) / "cache", what)
            print(f"{shards} shards, {what}: {table[what]}", flush=True)
    write_results(options.out, table)


if __name__ == "__main__":
    main()
