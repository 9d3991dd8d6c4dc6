"""A remote CACHE, of which a part lies on this machine; training reads the rest from the remote."""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .cache import Cache
from .console import error_line
from .errors import McmError, UsageError
from .program import LAUNCHER
from .records import FileEntry
from .remote import Parcel, Remote, open_remote
from .storage import remove, try_lock, work_dir, write_atomic
from .transfer import LARGE, Part, pull

FETCH_THREADS = 4


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as 200GB.

    Raises: UsageError for another text.
    """
    if not (size := re.fullmatch(r"(\d+)([KMGT]?)B", text)):
        raise UsageError(f"--local-bytes: expected a size such as 200GB; found {text!r}")
    return int(size[1]) * int(1000 ** " KMGT".index(size[2] or " "))


@contextmanager
def attached(url: str, folder: Path, limit: int) -> Iterator[Path]:
    """Yield a CACHE in `folder`; at most `limit` bytes of the remote CACHE lie there.

    Its records come first. Threads then fetch whole shards, in order, while they fit; `read_at`
    takes every other chunk from the remote. One rank per machine fetches, and the others wait.

    Raises: UsageError if `limit` is too small for the records; the errors of `pull`.
    """
    note, text = work_dir(folder) / "remote", f"{url}\n{LAUNCHER}"
    if os.environ.get("LOCAL_RANK", "0") != "0":
        while not note.is_file() or note.read_text() != text:
            time.sleep(0.1)
        yield folder
        return
    pull(url, folder, Part(small=True))
    remote, stop = open_remote(url), threading.Event()
    with try_lock(note.with_name("fetch")) as alone, ThreadPoolExecutor(FETCH_THREADS) as pool:
        missing = _choose(folder, limit) if alone else []
        write_atomic(note, text.encode())
        for name, entry in missing:
            pool.submit(_fetch, remote, Remote(str(folder)), stop, name, entry)
        try:
            yield folder
        finally:
            stop.set()  # a file in work is finished


def _choose(folder: Path, limit: int) -> list[tuple[str, FileEntry]]:
    """Return the missing files of the shards that fit into `limit`; remove those of the others."""
    known, missing = Remote(str(folder)).sizes(), list[tuple[str, FileEntry]]()
    left = limit - sum(size for name, size in known.items() if not LARGE.search(name))
    if left < 0:
        raise UsageError(f"--local-bytes: expected {limit - left} for the records; found {limit}")
    for unit, shard in [(u, shard) for u in Cache(folder).all_units() for shard in u.committed()]:
        files = unit.commit(shard).files.items()
        large = {f"{unit}/{name}": entry for name, entry in files if LARGE.search(name)}
        if (size := sum(entry.bytes for entry in large.values())) <= left:
            left -= size
            missing += [(name, one) for name, one in large.items() if name not in known]
        else:
            for name in large.keys() & known.keys():
                remove(folder / name)
    return missing


def _fetch(
    remote: Remote, target: Remote, stop: threading.Event, name: str, entry: FileEntry
) -> None:
    if not stop.is_set():
        try:
            target.add(remote, [Parcel({name: entry}, {})])
        except (McmError, OSError) as error:
            print(f"warning: {error_line(error)}; it is read from the remote", file=sys.stderr)
