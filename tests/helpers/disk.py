"""A disk of our own under cache_tools.storage: it records every operation, fails at one, or dies before one.

An operation is called by a name that a later run meets again, whatever its threads do in between: its kind, its path
below the root, and how many of that name came before: "rename cache/train/v0/commits/000000.json #0".
"""

import builtins
import errno
import io
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from cache_tools import storage

DIE = -1
MAKES_BIGGER = ("create", "mkdir", "write")


class Op(NamedTuple):
    """create, truncate, write, sync, syncdir, rename, link, unlink, mkdir or rmdir of `path`, below the disk's root."""

    kind: str
    path: str
    name: str
    data: bytes = b""
    source: str = ""  # of a rename or link


class Disk:
    """Stands for `os` and `open` in storage.py; `ops` is what was done.

    `at` names the operation that does not happen: `fault` is its errno, or DIE for SIGKILL. A disk that is full stays
    full. `log` is a file that gets each name before its operation, and so outlives the process.
    """

    def __init__(self, root: Path, at: str = "", fault: int = DIE, log: Path | None = None) -> None:
        self.root, self.at, self.fault = root, at, fault
        self.ops: list[Op] = []
        self.hit = False
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self._names: Counter[str] = Counter()
        self._paths: dict[int, str] = {}  # by descriptor
        self._lock = threading.RLock()  # an operation and its record are one, whatever the thread

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # all that changes nothing

    @contextmanager
    def installed(self) -> Iterator["Disk"]:
        """Put it under storage.py while inside."""
        with patch.object(storage, "os", self), patch.object(storage, "open", self._open, create=True):
            yield self

    @contextmanager
    def _op(self, kind: str, path: Any, data: bytes = b"", source: Any = "") -> Iterator[None]:
        """Around an operation: it is recorded when it went well."""
        where = self._relative(path)
        with self._lock:
            name = f"{kind} {where} #{self._names[f'{kind} {where}']}"
            self._names[f"{kind} {where}"] += 1
            if self._log is not None:
                os.write(self._log, f"{name}\n".encode())
            if name == self.at or (self.hit and self.fault == errno.ENOSPC and kind in MAKES_BIGGER):
                self.hit = True
                self._fail(kind, path)
            yield
            self.ops.append(Op(kind, where, name, data, self._relative(source) if source else ""))

    def _relative(self, path: Any) -> str:
        """The path below the root, without the random part of a temporary name."""
        return re.sub(r"\.[0-9a-f]{16}\.partial\b", ".partial", os.path.relpath(path, self.root))

    def _fail(self, kind: str, path: Any) -> None:
        if self.fault == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        named = kind not in ("write", "sync", "syncdir", "truncate")  # the system names no file for a descriptor
        raise OSError(self.fault, os.strerror(self.fault), *([str(path)] if named else []))

    def mkdir(self, path: Any) -> None:
        with self._op("mkdir", path):
            os.mkdir(path)

    def rmdir(self, path: Any) -> None:
        with self._op("rmdir", path):
            os.rmdir(path)

    def unlink(self, path: Any) -> None:
        with self._op("unlink", path):
            os.unlink(path)

    def replace(self, source: Any, path: Any) -> None:
        with self._op("rename", path, source=source):
            os.replace(source, path)

    rename = replace  # as files do on POSIX; folders are published by `rename` and never in the place of another

    def link(self, source: Any, path: Any) -> None:
        with self._op("link", path, source=source):
            os.link(source, path)

    def fsync(self, descriptor: int) -> None:
        path = self._paths[descriptor]
        with self._op("syncdir" if os.path.isdir(path) else "sync", path):
            os.fsync(descriptor)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT and not os.path.lexists(path):
            with self._op("create", path):
                descriptor = os.open(path, flags, mode)
        else:
            descriptor = os.open(path, flags, mode)
        self._paths[descriptor] = str(path)
        return descriptor

    def _open(self, file: Any, mode: str = "r", **text: Any) -> Any:
        if mode in ("r", "rb"):
            return builtins.open(file, mode, **text)
        if isinstance(file, int):
            raw = _File(file, mode.replace("b", ""), closefd=text.pop("closefd", True))
            raw.path = self._paths[file]
        else:
            with self._op("truncate" if mode[0] == "w" and os.path.exists(file) else "create", file):
                raw = _File(file, mode.replace("b", ""))
            raw.path = self._paths[raw.fileno()] = str(file)
        raw.disk = self
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, **text)


class _File(io.FileIO):
    """What lies below the buffer of an open file: the writes that the system sees."""

    disk: Disk
    path: str

    def write(self, data: Any) -> int:
        with self.disk._op("write", self.path, bytes(data)):
            return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        with self.disk._op("truncate", self.path):
            return super().truncate(size)
