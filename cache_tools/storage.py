"""The only file that writes: atomic, durable, never in the place of another's file unless asked to.

A temporary file has a unique name, `.NAME.RANDOM.partial`, and a lock that its writer holds. The
next run removes those without a living writer; where a file system has no locks, they stay.

Every change goes through `os.*` or `open` as this module knows them: tests put a disk of their own in their place,
which records, fails or dies at any operation (tests/disk.py).
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

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


def run_folder(path: Path) -> Path:
    """PATH/.run: locks and progress of a DATASET, CACHE or RUN, which are no part of its bytes.

    The folder lies inside: a path beside PATH is another one for each link, mount or relative name.
    """
    return path / ".run"


def shard_lock(cache: Path, split: str, shard: int) -> Path:
    """The lock of a shard in all its views: whoever makes it, or moves it away, holds that."""
    return run_folder(cache) / "locks" / f"{split}-{shard:06d}"


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


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the system name `path`: those of write and fsync come without a name."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _sync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _new_temporary(path: Path, folder: bool = False) -> tuple[Path, int]:
    """A new file or folder beside `path` under a unique name, and a descriptor that holds its lock."""
    make_dir(path.parent)
    while True:
        temp = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        if folder:
            os.mkdir(temp)
            descriptor = os.open(temp, os.O_RDONLY | os.O_DIRECTORY)
        else:
            descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False and temp.exists():
            return temp, descriptor
        os.close(descriptor)  # `_remove_abandoned` came between the two calls


def _remove_abandoned(temp: Path) -> None:
    """Remove a temporary file or folder, unless a living process holds its lock or none can be held."""
    kind = os.O_RDONLY | os.O_DIRECTORY if temp.is_dir() else os.O_WRONLY
    with contextlib.suppress(FileNotFoundError):  # it has just got its name
        descriptor = os.open(temp, kind | os.O_NOFOLLOW)
        try:
            if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                remove_tree(temp) if temp.is_dir() else os.unlink(temp)
        finally:
            os.close(descriptor)


class AtomicFile:
    """A file that appears under its name whole, hashed and fsynced, or not at all.

    `with AtomicFile(path) as file: file.write(buffer)`; afterwards `file.sha256` and `file.bytes` hold.
    Without `replace`, FileExistsError is raised at the end when the name is taken.
    """

    def __init__(self, path: Path, replace: bool = True) -> None:
        self.path = path
        self.bytes = 0
        self._hash = hashlib.sha256()
        self._replace = replace

    def __enter__(self) -> "AtomicFile":
        self._temp, descriptor = _new_temporary(self.path)
        self._file = open(descriptor, "wb")
        return self

    def write(self, buffer: Buffer) -> int:
        """Append `buffer`; returns its bytes."""
        view = memoryview(buffer).cast("B")
        with _naming(self.path):
            self._file.write(view)
        self._hash.update(view)
        self.bytes += view.nbytes
        return view.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with _naming(self.path), self._file:  # open, and so locked, until the file has its name
                if kind is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._take_name()
        except BaseException:  # a full disk fails again here
            _unlink(self._temp)
            raise
        if kind is None:
            _sync_dir(self.path.parent)
        else:
            _unlink(self._temp)

    def _take_name(self) -> None:
        if self._replace:
            return os.replace(self._temp, self.path)
        try:
            os.link(self._temp, self.path)
            os.unlink(self._temp)
        except OSError as error:
            if error.errno not in _NO_LINKS or self.path.exists():
                raise
            os.rename(self._temp, self.path)

    @property
    def sha256(self) -> str:
        """Hex sha256 of all that was written."""
        return self._hash.hexdigest()


def write_atomic(path: Path, data: Buffer) -> None:
    """Replace `path` by `data`, atomically and durably."""
    with AtomicFile(path) as file:
        file.write(data)


def publish(path: Path, data: bytes, compare: bool = True) -> None:
    """Write `data` to `path` unless it exists; with `compare`, it must then hold the same bytes.

    Raises: IdentityError when the file there holds other bytes.
    """
    if not path.exists():
        with contextlib.suppress(FileExistsError), AtomicFile(path, replace=False) as file:
            file.write(data)
    if compare and path.read_bytes() != data:
        raise IdentityError(f"{path}: expected the bytes of this request; found those of another; use a new folder")


def append_line(path: Path, text: str) -> None:
    """Append one line to a log; not fsynced, a log may lose its tail."""
    make_dir(path.parent)
    with _naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(text + "\n")


def keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Rewrite a log with the lines that `keep` wants; a torn last line is dropped. Missing is fine."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if line.endswith("\n") and keep(line)).encode())


def remove(path: Path) -> None:
    """Remove a file durably; missing is fine."""
    if path.parent.is_dir():
        _unlink(path)
        _sync_dir(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a folder of ours; missing is fine. A link in it goes, what it points to stays."""
    if path.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder of ours; found a link to one", str(path))
    if path.is_dir():
        for child in sorted(path.iterdir()):  # sorted: harnesses meet the same order on every file system
            if child.is_dir() and not child.is_symlink():
                remove_tree(child)
            else:
                os.unlink(child)
        os.rmdir(path)


def new_folder(parent: Path) -> Path:
    """A folder that nobody else has: `parent`/000000, or the next number that is free."""
    make_dir(parent)
    for number in itertools.count():
        folder = parent / f"{number:06d}"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
            _sync_dir(parent)
            return folder
    raise AssertionError


def move_durably(path: Path, target: Path) -> bool:
    """Move a file to a name that is free; False where it is missing."""
    if not os.path.lexists(path):
        return False
    make_dir(target.parent)
    os.rename(path, target)
    _sync_dir(target.parent)
    _sync_dir(path.parent)
    return True


@contextlib.contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill with AtomicFile; it is renamed to `final` at the end, or removed.

    Raises: IdentityError when `final` exists.
    """
    for abandoned in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
        _remove_abandoned(abandoned)
    temp, descriptor = _new_temporary(final, folder=True)
    try:
        yield temp
        _sync_dir(temp)
        try:
            os.rename(temp, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            message = f"{final}: expected no such folder; it exists; choose another name"
            raise IdentityError(message) from error
    except BaseException:
        remove_tree(temp)
        raise
    finally:
        os.close(descriptor)
    _sync_dir(final.parent)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise CorruptionError(f"{path}: expected a committed file; it is missing; run `mcm-cache verify`") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Exactly `size` bytes at `offset`.

    Raises: CorruptionError when the file is missing or shorter.
    """
    with _opened(path) as descriptor:
        there = max(0, min(size, os.fstat(descriptor).st_size - offset)) if offset >= 0 else 0
        if there == size and (data := os.pread(descriptor, size, offset)) and len(data) == size:
            return data  # in one call and without a copy: all but the largest files of checkpoints
    if there != size:  # before memory is taken for what a lie says
        raise CorruptionError(f"{path}: expected {size} bytes at {offset}; found {there}; run `mcm-cache verify`")
    whole = bytearray(size)
    read_into(path, offset, memoryview(whole))
    return bytes(whole)


def read_into(path: Path, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes at `offset`.

    Raises: CorruptionError when the file is missing or shorter.
    """
    found = 0
    with _opened(path) as descriptor:  # one call reads 2 GiB at most
        while found < out.nbytes and (read := os.preadv(descriptor, [out[found:]], offset + found)):
            found += read
    if found != out.nbytes:
        raise CorruptionError(f"{path}: expected {out.nbytes} bytes at {offset}; found {found}; run `mcm-cache verify`")


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Hold the lock file `path` while inside; yields False when another process holds it.

    The kernel frees a flock when its holder dies, so that no lock is ever stale.
    """
    make_dir(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        yield _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB) is not False
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int) -> bool | None:
    """True: locked; False: another holds it; None: this file system has no such locks."""
    try:
        fcntl.flock(descriptor, how)
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
    """Whether the file system of `folder` has flock; some network ones do not."""
    make_dir(folder)
    with open(os.open(folder / "probe", os.O_RDWR | os.O_CREAT, 0o666), "rb") as file:
        return _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB) is not None
