"""The only file that writes: atomic, durable, and never over another's file unless asked to.

A temporary file has a unique name, `.NAME.RANDOM.partial`, and a lock that its writer holds. The
next run removes those without a living writer; where a file system has no locks, they stay.

Every change goes through `os.*` or `open` as this module knows them: tests put a disk of their own in their place,
which records, fails or dies at any operation (tests/disk.py).
"""

import errno
import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from .errors import CorruptionError, IdentityError

Buffer = bytes | bytearray | memoryview
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system without hard links


def make_dir(path: Path) -> None:
    """Create a folder and its parents, each durable in the one above."""
    if not path.is_dir():
        make_dir(path.parent)
        try:
            os.mkdir(path)
        except FileExistsError:  # another process was faster
            if not path.is_dir():
                raise
        _sync_dir(path.parent)


def work_dir(path: Path) -> Path:
    """PATH/.run: locks and progress of a DATASET, CACHE or RUN, which are no part of its bytes.

    The folder lies inside: a path beside PATH is another one for each link, mount or relative name.
    """
    return path / ".run"


def shard_lock(cache: Path, split: str, shard: int) -> Path:
    """The lock of a shard in all its views; a process that writes or moves the shard holds it."""
    return work_dir(cache) / "locks" / f"{split}-{shard:06d}"


def settle(path: Path) -> None:
    """Make every name below `path` durable and remove the temporary files of killed processes.

    A killed process may have left names without an fsync, and the next run builds on them. Its
    files are durable: they get their names after that.
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
    """Add `path` to errors of the system that name no file, as those of write and fsync."""
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
    """A new file or folder beside `path` under a unique name, and a descriptor that holds its lock.

    It is removed when the block raises; the block gives it its name.
    """
    make_dir(path.parent)
    while True:
        temp = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")
        if folder:
            os.mkdir(temp)
            descriptor = os.open(temp, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if _flock(descriptor) is not False and temp.exists():
            break
        os.close(descriptor)  # `_remove_abandoned` came between the two calls
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
    """Remove a temporary file or folder, unless a living process holds its lock or none can be held."""
    kind = os.O_RDONLY | os.O_DIRECTORY if temp.is_dir() else os.O_WRONLY
    with suppress(FileNotFoundError):  # it has just got its name
        descriptor = os.open(temp, kind | os.O_NOFOLLOW)
        try:
            if _flock(descriptor):
                _remove(temp)
        finally:
            os.close(descriptor)


class AtomicFile:
    """What `atomic_file` yields: `bytes` and `sha256` are those of all that was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, buffer: Buffer) -> int:
        """Append `buffer`; returns its bytes."""
        view = memoryview(buffer).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """The position, as tarfile asks for it."""
        return self.bytes

    @property
    def sha256(self) -> str:
        """Hex sha256 of all that was written."""
        return self._hash.hexdigest()


@contextmanager
def atomic_file(path: Path, replace: bool = True) -> Iterator[AtomicFile]:
    """A file that appears under its name whole, hashed and fsynced, or not at all.

    Without `replace`, FileExistsError is raised at the end when the name is taken.
    """
    with _temporary(path) as (temp, descriptor), open(descriptor, "wb", closefd=False) as file:
        yield AtomicFile(file)
        file.flush()
        os.fsync(descriptor)
        if replace:
            os.replace(temp, path)
            return
        try:
            os.link(temp, path)
            os.unlink(temp)
        except OSError as error:
            if error.errno not in _NO_LINKS or path.exists():
                raise
            os.rename(temp, path)


def write_atomic(path: Path, data: Buffer) -> None:
    """Replace `path` by `data`, atomically and durably."""
    with atomic_file(path) as file:
        file.write(data)


def publish(path: Path, data: bytes, compare: bool = True) -> None:
    """Write `data` to `path` unless it exists; with `compare`, it must then hold the same bytes.

    Raises: IdentityError when the file there holds other bytes.
    """
    if not path.exists():
        with suppress(FileExistsError), atomic_file(path, replace=False) as file:
            file.write(data)
    if compare and path.read_bytes() != data:
        raise IdentityError(f"{path}: expected the bytes of this request; found those of another; use a new folder")


def append_line(path: Path, text: str) -> None:
    """Append one line to a log; not fsynced, a log may lose its tail."""
    make_dir(path.parent)
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Rewrite a log with the lines that `keep` accepts. A torn last line is dropped; a missing log is fine."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if line.endswith("\n") and keep(line)).encode())


def remove(path: Path) -> None:
    """Remove a file durably; a missing one is fine."""
    if path.parent.is_dir():
        with suppress(FileNotFoundError):
            os.unlink(path)
        _sync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder of ours; a missing one is fine. A link inside is removed, its target stays.

    Raises: OSError for a link to a folder.
    """
    with suppress(FileNotFoundError):
        shutil.rmtree(path)


def move_durably(path: Path, target: Path) -> bool:
    """Move a file to a name that is free; returns False if it is missing."""
    if not os.path.lexists(path):
        return False
    make_dir(target.parent)
    os.rename(path, target)
    _sync_dir(target.parent)
    _sync_dir(path.parent)
    return True


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill with `atomic_file`; it is renamed to `final` at the end, or removed.

    Raises: IdentityError when `final` exists.
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
            message = f"{final}: expected no such folder; it exists; choose another name"
            raise IdentityError(message) from error


@contextmanager
def _opened(path: Path, offset: int, size: int) -> Iterator[BufferedReader]:
    """A committed file, opened at `offset`; the size is compared before memory is taken for it.

    Raises: CorruptionError when the file is missing or shorter.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError as error:
        raise CorruptionError(f"{path}: expected a committed file; it is missing; run `mcm-cache verify`") from error
    with file, naming(path):
        there = max(0, os.fstat(file.fileno()).st_size - offset)
        if min(offset, size) < 0 or there < size:
            found = f"expected {size} bytes at {offset}; found {there}"
            raise CorruptionError(f"{path}: {found}; run `mcm-cache verify`")
        file.seek(offset)
        yield file


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Exactly `size` bytes at `offset`.

    Raises: CorruptionError when the file is missing or shorter.
    """
    with _opened(path, offset, size) as file:
        return file.read(size)


def read_into(path: Path, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes at `offset`.

    Raises: CorruptionError when the file is missing or shorter.
    """
    with _opened(path, offset, out.nbytes) as file:
        file.readinto(out)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with naming(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` while inside; yields False when another process holds it.

    The kernel frees a flock when its holder dies, so that no lock is ever stale.
    """
    make_dir(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        yield _flock(descriptor) is not False
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int = fcntl.LOCK_EX) -> bool | None:
    """True: locked; False: another process holds it; None: this file system has no such locks."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # EBADF: NFS locks a folder only where it could be written as a file.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise
        return None
    return True


def free_bytes(path: Path) -> int:
    """Free space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def locks_work(folder: Path) -> bool:
    """Whether the file system of `folder` has flock; some network file systems do not."""
    make_dir(folder)
    with open(os.open(folder / "probe", os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
        return _flock(file.fileno(), fcntl.LOCK_SH) is not None
