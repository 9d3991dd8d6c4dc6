"""Atomic and durable files, folders and locks: `write_atomic` replaces, `publish` never does.

A temporary file has a unique name, `.NAME.HOST+RANDOM.partial`, and its writer holds a lock on it.
The next run removes each temporary file without a live writer. If the file system has no locks, the
temporary files stay. Some file systems hide the locks of other hosts, so their files stay for an
hour.

Every write calls `os.*` or `open` through the globals of this module. tests/helpers/disk.py
replaces them to record any operation, to make it fail or to kill the process before it.
"""

import errno
import fcntl
import filecmp
import glob
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Literal

from .errors import IdentityError

Buffer = bytes | bytearray | memoryview
HOST = hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]
FOREIGN_S = 3600  # a writer on another host has ended if its file is this old and without a lock
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without hard links


def make_dir(path: Path) -> None:
    """Create a folder and its parents, and fsync each parent."""
    if not path.is_dir():
        make_dir(path.parent)
        try:
            os.mkdir(path)
        except FileExistsError:  # another process created it first
            if not path.is_dir():
                raise
        _sync_dir(path.parent)


def work_dir(path: Path) -> Path:
    """Return PATH/.run, which holds the locks and the progress of a DATASET, CACHE or RUN.

    Its files are not part of the content. It lies inside PATH, because a path beside PATH would
    differ for each link, mount or relative name.
    """
    return path / ".run"


def settle(path: Path) -> None:
    """Fsync every folder below `path` and remove the temporary files of killed processes.

    A killed process may leave directory entries that were not fsynced, and the next run relies on
    them. The content needs no fsync here: `atomic_file` fsyncs a file before it renames it.
    """
    for folder, _, files in os.walk(path):
        for name in files:
            if name.startswith(".") and name.endswith(".partial"):
                _remove_abandoned(Path(folder, name))
        _sync_dir(Path(folder))
    if path.is_dir() and os.access(path.parent, os.R_OK):
        _sync_dir(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to every OSError that names no file, such as those of write and fsync."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _temporary(path: Path, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """Create a file or folder beside `path`; yield its unique path and a descriptor with its lock.

    The caller must rename it to `path`. If the block raises, it is removed.
    """
    make_dir(path.parent)
    while True:
        # A name has up to 255 bytes. `atomic_folder` finds abandoned folders by their whole name.
        name = path.name if folder else path.name[:48]
        temp = path.with_name(f".{name}.{HOST}{os.urandom(4).hex()}.partial")
        if folder:
            os.mkdir(temp)
            descriptor = os.open(temp, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if _flock(descriptor) is not False and temp.exists():
            break
        os.close(descriptor)  # `_remove_abandoned` ran between open and flock
    try:
        with naming(path):
            yield temp, descriptor
    except BaseException:
        _remove(temp)
        raise
    finally:
        os.close(descriptor)
    _sync_dir(path.parent)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        remove_tree(path) if path.is_dir() else os.unlink(path)


def _remove_abandoned(temp: Path) -> None:
    """Remove a temporary file or folder if this process can lock it: its writer has ended."""
    kind = os.O_RDONLY | os.O_DIRECTORY if temp.is_dir() else os.O_WRONLY
    with suppress(FileNotFoundError), ExitStack() as stack:  # its writer has just renamed it
        foreign = f".{HOST}" not in temp.name
        if foreign and time.time() - temp.stat().st_mtime < FOREIGN_S:
            return
        locked = []
        for _ in range(2):  # if both get the lock, flock excludes no one
            descriptor = os.open(temp, kind | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            locked.append(_flock(descriptor))
        if locked == [True, False]:
            _remove(temp)


class AtomicFile:
    """An open file that `atomic_file` yields; it counts and hashes the bytes that it writes."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._hash, self.bytes = file, path, hashlib.sha256(), 0

    def write(self, buffer: Buffer) -> int:
        """Append `buffer` and return its size in bytes."""
        view = memoryview(buffer).cast("B")
        with naming(self._path):  # here: the error passes through the blocks of other open files
            self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Return the position in bytes; tarfile calls this."""
        return self.bytes

    @property
    def sha256(self) -> str:
        """The hex sha256 of the bytes written so far."""
        return self._hash.hexdigest()


@contextmanager
def atomic_file(
    path: Path, replace: Literal["any", "older", "none"] = "any"
) -> Iterator[AtomicFile]:
    """Yield a file that appears at `path` complete, hashed and fsynced, or not at all.

    `replace` says which existing file is replaced: any, none, or only one that is older than this
    block, because another process may write the same file at the same time.

    Raises: IdentityError at the end if the existing file stays and holds other bytes.
    """
    older = _version(path) if replace == "older" else None
    with _temporary(path) as (temp, descriptor), open(descriptor, "wb", closefd=False) as file:
        yield AtomicFile(file, path)
        file.flush()
        os.fsync(descriptor)
        if replace == "any" or (older and older == _version(path)):
            os.replace(temp, path)
        elif not _link(temp, path):
            if not filecmp.cmp(temp, path, shallow=False):
                found = "another process wrote others, which stay; run workers of one kind"
                raise IdentityError(f"{path}: expected the bytes of this process; {found}")
            os.unlink(temp)


def _version(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced, or None if there is no file."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _link(temp: Path, path: Path) -> bool:
    """Rename `temp` to `path`; return False if the name is taken."""
    try:
        os.link(temp, path)
        os.unlink(temp)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        os.rename(temp, path)
    return True


def write_atomic(path: Path, data: Buffer) -> None:
    """Write `data` to `path` atomically and durably; an existing file is replaced."""
    with atomic_file(path) as file:
        file.write(data)


def publish(path: Path, data: bytes, compare: bool = True) -> None:
    """Write `data` to `path` unless it exists; with `compare`, check that it holds the same bytes.

    Raises: IdentityError if the file holds other bytes.
    """
    if not path.exists():
        with suppress(IdentityError), atomic_file(path, replace="none") as file:
            file.write(data)
    if compare and path.read_bytes() != data:
        message = f"{path}: expected the bytes of this request; found other bytes; use a new folder"
        raise IdentityError(message)


def append_line(path: Path, text: str) -> None:
    """Append one line to a log without an fsync; a crash may lose the last lines."""
    make_dir(path.parent)
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def remove(path: Path) -> None:
    """Remove a file durably; a missing file is not an error."""
    if path.parent.is_dir():
        with suppress(FileNotFoundError):
            os.unlink(path)
        _sync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder; a missing folder is not an error. The target of a link inside it stays.

    Raises: OSError if `path` is a link to a folder.
    """
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def move_durably(path: Path, target: Path) -> bool:
    """Move a file to the free name `target`; return False if the file is missing."""
    if not os.path.lexists(path):
        return False
    make_dir(target.parent)
    os.rename(path, target)
    _sync_dir(target.parent)
    _sync_dir(path.parent)
    return True


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder; it is renamed to `final` at the end, or removed if the block raises.

    The caller must fsync the files in it, as `atomic_file` does.
    Raises: IdentityError if `final` exists.
    """
    for abandoned in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
        _remove_abandoned(abandoned)
    with _temporary(final, folder=True) as (temp, _):
        yield temp
        _sync_dir(temp)
        try:
            os.rename(temp, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            message = f"{final}: expected a free name; found an existing one; choose another name"
            raise IdentityError(message) from error


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, which is read in pieces."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold a lock on the file `path` in the block; yield False if another process holds it.

    On a file system without flock, it yields True and holds no lock: see `locks_work`.
    The kernel releases a flock when its process ends, so a lock is never stale.
    """
    make_dir(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        yield _flock(descriptor) is not False
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int = fcntl.LOCK_EX) -> bool | None:
    """Return True if locked, False if another process holds it, None if flock is not supported."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # EBADF: NFS locks a descriptor only if it is open for writing, which a folder never is.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise
        return None
    return True


def is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock `path`, or None without flock; write nothing."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        free = _flock(file.fileno(), fcntl.LOCK_SH)
    return None if free is None else not free


def existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Return the free bytes of the file system that holds `path`, which need not exist yet."""
    return shutil.disk_usage(existing(path)).free


def locks_work(folder: Path) -> bool:
    """Return whether flock excludes others in `folder`; some network file systems have no flock."""
    with try_lock(folder / "probe") as first, try_lock(folder / "probe") as second:
        return not (first and second)
