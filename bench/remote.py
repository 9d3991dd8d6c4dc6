"""Batches of a CACHE in an S3 server on this machine against the same CACHE on the disk.

    python bench/remote.py --out bench/results/remote.json [--quick]

"none local" reads every chunk by byte ranges; in "all local" the background threads have fetched
every shard. The server (moto, one Python process) shares the cores and answers in about a
millisecond, so `per_s` holds neither for a real object store nor for a network. `ratio` compares
the CPU-seconds of this process. Rows are views of 224 px and 196 x 768 int8 features; batches of 64
rows are read in this process.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from record import write_results
from synthetic import Shape, make_cache, noise_views

BATCH = 64


@contextmanager
def s3_server() -> Iterator[str]:
    """Run a server in a process of its own; yield the address of an empty bucket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench"}
    os.environ |= keys | {"AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(line, **quiet)  # type: ignore[call-overload]
    try:
        import boto3

        while True:
            try:
                boto3.client("s3").create_bucket(Bucket="bench")
                break
            except Exception as error:  # not listening yet
                if server.poll() is not None:
                    raise SystemExit("the server ended; `pip install 'moto[server]'`") from error
        yield "s3://bench/cache"
    finally:
        server.kill()
        server.wait()


def rate(cache: Path, seconds: float) -> dict[str, float]:
    """Samples per second and per CPU-second of this process."""
    from mcm.stream import CacheDataset

    data, rows = CacheDataset(cache, BATCH, epochs=1 << 20), 0
    data[0]
    start, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        data.stream[rows // BATCH]
        rows += BATCH
    s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return {"per_s": round(rows / s, 1), "per_cpu_s": round(rows / cpu_s, 1)}


def main() -> None:
    """Measure the three ways to read one cache, and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small cache, for the tests")
    arguments = parser.parse_args()
    from cache_tools.local_part import attached
    from cache_tools.remote import elsewhere
    from cache_tools.transfer import push

    rows, seconds = (64, 0.2) if arguments.quick else (1024, 20.0)
    table: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, s3_server() as url:
        folder = Path(name)
        make_cache(folder / "cache", Shape(rows, rows_per_shard=256), "int8", noise_views(224))
        push(folder / "cache", url)
        table["on the disk"] = rate(folder / "cache", seconds)
        for label, limit in (("none local", 2_000_000), ("all local", 1 << 40)):
            elsewhere.cache_clear()
            with attached(url, folder / "local", limit) as local:
                while label == "all local" and len(list(local.rglob("*.tar"))) < -(-rows // 256):
                    time.sleep(0.1)
                table[label] = rate(local, seconds)
    for label, figures in table.items():
        figures["ratio"] = round(figures["per_cpu_s"] / table["on the disk"]["per_cpu_s"], 3)
        print(f"{label:<12} {figures}")
    write_results(arguments.out, table)


if __name__ == "__main__":
    main()
