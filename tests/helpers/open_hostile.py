"""A process that opens hostile files through our entry points under an audit hook: `main()` of TODO.json and OUT.

Prints a JSON line for each: how it ended, and what it did that no reader may do.
"""

import json
import os
import re
import resource
import socket
import sys
import sysconfig
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
import open_clip.factory  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401
import webdataset  # noqa: F401

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset
from cache_tools.errors import McmError
from cache_tools.images import PictureRefused, decode_rgb
from cache_tools.info import info, summary
from cache_tools.records import load_toml
from cache_tools.tars import read_npy
from cache_tools.verify import verify
from cache_tools.weights import read_weights
from mcm import checkpoint
from mcm.backbones import load_encoder
from mcm.config import PretrainConfig
from pipeline.shard import shard
from pipeline.teachers import load_teacher

FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
FORBIDDEN += ("socket.__new__", "socket.connect", "ctypes.dlopen", "pickle.find_class")
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
LIBRARIES = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")})
# What the decode pool does to start its processes and to read their results.
POOL = ("concurrent.futures.process", "cache_tools.images", socket.AF_UNIX)
ROOT = str(Path(__file__).parents[2])


def read_dataset(path: Path) -> None:
    dataset = Dataset(path)
    for split in dataset.record.splits:
        dataset.labels(split)
        for row in range(min(dataset.rows(split), 20)):
            dataset.picture(split, row)


def read_cache(path: Path) -> None:
    cache = Cache(path)
    summary(info(path))
    for unit in cache.all_units():
        unit.check_arrays()
        unit.channel_stats()
        for chunk in range(min(unit.num_chunks, 4)):
            unit.chunk(chunk).features()


ENTRIES = {
    "shard": lambda path, out: shard(path, out, max_refused=1),
    "dataset": lambda path, out: read_dataset(path),
    "cache": lambda path, out: read_cache(path),
    "verify": lambda path, out: verify(path, quiet=True),
    "npy": lambda path, out: read_npy(path),
    "config": lambda path, out: load_toml(PretrainConfig, path),
    "weights": lambda path, out: read_weights(path),
    "teacher": lambda path, out: load_teacher(f"open_clip:{path}", "random"),
    "encoder": lambda path, out: load_encoder(str(path)),
    "checkpoint": lambda path, out: checkpoint.latest(path),
    "picture": lambda path, out: decode_rgb(path.read_bytes()),
}


class Hook:
    """Notes what must not happen while `out` is set."""

    def __init__(self) -> None:
        self.out, self.seen = "", []

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.out:
            return
        if event in ("pickle.find_class", "socket.__new__") and {*arguments[:2]} & {*POOL}:
            return
        if event == "socket.connect" and isinstance(arguments[1], str):  # of the forkserver
            return
        path = str(arguments[0]) if arguments else ""
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # relative to an open folder
            path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
        if event in FORBIDDEN or event in WRITES and not path.startswith(self.out):
            self.seen.append(f"{event} {arguments}"[:200])
        elif event == "exec" and not arguments[0].co_filename.startswith((*LIBRARIES, ROOT, "<frozen")):
            self.seen.append(f"exec {arguments[0].co_filename}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            writes = (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not os.fsdecode(arguments[0]).startswith((self.out, "/dev/null")):
                self.seen.append(f"open {arguments}")


def memory_mib() -> int:
    """The peak of this process."""
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) >> 10


def main() -> None:
    todo, out = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    for name, kind, path in todo["sound"]:  # whatever a library imports late is imported before we look
        ENTRIES[kind](Path(path), Path(out) / f"sound-{name}")
    hook = Hook()
    sys.addaudithook(hook)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + (2 << 30),) * 2)
    for number, (name, kind, path) in enumerate(todo["hostile"]):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = memory_mib()
        hook.out, hook.seen, end = out, [], "nothing"
        try:
            ENTRIES[kind](Path(path), Path(out) / f"{number}")
        except (McmError, OSError, PictureRefused) as error:
            end = f"{type(error).__name__}: {error}"
        except BaseException as error:
            end = f"UNDECLARED {error!r}"
        hook.out = ""
        line = {"name": name, "end": end[:400], "seen": hook.seen, "grown_mib": memory_mib() - before}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
