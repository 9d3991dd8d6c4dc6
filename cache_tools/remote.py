"""Remotes: a folder, an object store or the Hub, read and written by the same few operations.

obstore (extra `s3`) and huggingface_hub (extra `hf`) find credentials in their own places. A CACHE
with files on a remote names it in CACHE/.run/remote: `read_at`, `read_into` and `file_size`
then take a missing file from there.
"""

import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from .errors import CorruptionError, IdentityError, ResourceError, UsageError, missing_package
from .records import FileEntry
from .storage import Buffer, atomic_file, file_sha256, naming, publish, work_dir

HUB_COMMIT = 16  # shards per commit on the Hub, which limits the commits per hour
_HUB = re.compile(r"hf://(datasets|buckets)/([\w.-]+/[\w.-]+)(?:/(.+))?")
# An endpoint without TLS is used only if the environment names it.
_CLIENT = {"timeout": "1h", "read_timeout": "60s", "connect_timeout": "10s", "allow_http": True}


class Parcel(NamedTuple):
    """Files, by name, with their digests, and then the records that vouch for them."""

    files: dict[str, FileEntry]
    records: dict[str, bytes]


class Remote:
    """A folder on this machine, and the base class of the other remotes.

    Names are relative to the remote and use "/". `batch` is the number of parcels per call of
    `add`, and `threads` is the number of calls at once.
    """

    batch, threads = 1, 8

    def __init__(self, url: str) -> None:
        self.url, self.root = url.rstrip("/"), Path(url)

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file, by name."""
        files = (path for path in self.root.rglob("*") if path.is_file())
        found = {path.relative_to(self.root).as_posix(): path.stat().st_size for path in files}
        return {name: size for name, size in found.items() if not name.startswith(".run/")}

    def read(self, name: str, out: Any) -> None:
        """Write the bytes of a file to `out`, which has a method `write`."""
        with naming(self.root / name), open(self.root / name, "rb") as file:
            shutil.copyfileobj(file, out, 1 << 20)

    def range(self, name: str, offset: int, size: int) -> Buffer:
        """Return `size` bytes at `offset`, or fewer at the end of the file."""
        with naming(self.root / name), open(self.root / name, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def content(self, name: str) -> bytes:
        """Return the bytes of a small file."""
        self.read(name, out := io.BytesIO())
        return out.getvalue()

    def compare(self, name: str, data: bytes) -> None:
        """Raise IdentityError if the file `name` holds other bytes than `data`."""
        if self.content(name) != data:
            expected = "expected the bytes that are copied; found others"
            raise IdentityError(f"{self.url}/{name}: {expected}; use a new folder or address")

    def add(self, source: "Remote", parcels: Sequence[Parcel]) -> None:
        """Copy the files of each parcel from `source`, check them, and then write its records.

        Raises: CorruptionError for a file with another digest, which is not written; IdentityError
        if a record exists with other bytes.
        """
        for parcel in parcels:
            for name, entry in parcel.files.items():
                self._copy(source, name, entry)
            for name, data in parcel.records.items():
                self._create(name, data)

    def _copy(self, source: "Remote", name: str, entry: FileEntry) -> None:
        with atomic_file(self.root / name) as file:
            source.read(name, file)
            check_digest(f"{source.url}/{name}", entry, file.bytes, file.sha256)

    def _create(self, name: str, data: bytes) -> None:
        publish(self.root / name, data, compare=False)
        self.compare(name, data)


class Objects(Remote):
    """An object store, by obstore, which repeats failed requests and resumes a broken download."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.obstore = _library(self.url, "obstore", "s3")
        self.asking = partial(_asking, self.url, self.obstore.exceptions.BaseError)
        with self.asking():
            from_url = import_module("obstore.store").from_url
            self.store = from_url(self.url, client_options=_CLIENT)

    def sizes(self) -> dict[str, int]:
        with self.asking():
            pages = self.obstore.list(self.store)
            return {one["path"]: one["size"] for page in pages for one in page}

    def read(self, name: str, out: Any) -> None:
        with self.asking(name):
            for block in self.obstore.get(self.store, name).stream(min_chunk_size=1 << 20):
                out.write(memoryview(block))

    def range(self, name: str, offset: int, size: int) -> Buffer:
        with self.asking(name):
            return memoryview(self.obstore.get_range(self.store, name, start=offset, length=size))

    def _copy(self, source: Remote, name: str, entry: FileEntry) -> None:
        path = checked_path(source, name, entry)
        with self.asking(name):
            self.obstore.put(self.store, name, path, max_concurrency=4)

    def _create(self, name: str, data: bytes) -> None:
        with self.asking(name):
            try:
                self.obstore.put(self.store, name, data, mode="create")
            except self.obstore.exceptions.AlreadyExistsError:
                self.compare(name, data)


class Hub(Remote):
    """A dataset repository or a bucket of the Hugging Face Hub; a new one is private.

    The files of a commit of a repository appear at once. A commit names its parent, so two pushes
    at once do not mix. A bucket has no commits: its records are written after its files.
    """

    batch, threads = HUB_COMMIT, 1

    def __init__(self, url: str) -> None:
        super().__init__(url)
        if not (parts := _HUB.fullmatch(self.url)):
            expected = "expected hf://datasets/OWNER/NAME or hf://buckets/OWNER/NAME"
            raise UsageError(f"{url}: {expected}, with or without a folder in it")
        self.kind, self.id, self.folder = parts[1], parts[2], f"{parts[3]}/" if parts[3] else ""
        self.hub, self.head = _library(self.url, "huggingface_hub", "hf"), ""
        self.hub.utils.disable_progress_bars()
        self.api = self.hub.HfApi()
        self.files = self.hub.HfFileSystem(skip_instance_cache=True)
        self.asking = partial(_asking, self.url, import_module("httpx2").HTTPError)

    def sizes(self) -> dict[str, int]:
        found: dict[str, Any] = {}
        with self.asking(), suppress(FileNotFoundError, self.hub.errors.RepositoryNotFoundError):
            if self.kind == "datasets":
                self.head = self.api.dataset_info(self.id).sha
            found = self.files.find(self.url, detail=True, refresh=True)
        root = len(f"{self.kind}/{self.id}/{self.folder}")
        return {name[root:]: one["size"] for name, one in found.items()}

    def read(self, name: str, out: Any) -> None:
        with self.asking(name), self.files.open(f"{self.url}/{name}", block_size=0) as file:
            shutil.copyfileobj(file, out, 1 << 20)

    def range(self, name: str, offset: int, size: int) -> Buffer:
        with self.asking(name):
            return bytes(self.files.cat_file(f"{self.url}/{name}", offset, offset + size))

    def add(self, source: Remote, parcels: Sequence[Parcel]) -> None:
        """Copy the files and the records of all parcels, in one commit of a repository."""
        entries = {name: entry for parcel in parcels for name, entry in parcel.files.items()}
        files = {name: checked_path(source, name, entry) for name, entry in entries.items()}
        records = {name: data for parcel in parcels for name, data in parcel.records.items()}
        with self.asking():
            if self.kind == "buckets":
                self.api.create_bucket(self.id, private=True, exist_ok=True)
                for part in (files, records):
                    adds = [(content, self.folder + name) for name, content in part.items()]
                    self.api.batch_bucket_files(self.id, add=adds)
                return
            if not self.head:
                self.api.create_repo(self.id, repo_type="dataset", private=True, exist_ok=True)
                self.head = self.api.dataset_info(self.id).sha
            add = self.hub.CommitOperationAdd
            self.head = self.api.create_commit(
                self.id,
                [add(self.folder + name, content) for name, content in (files | records).items()],
                repo_type="dataset",
                commit_message=f"mcm-cache push: {len(files)} files",
                parent_commit=self.head,
            ).oid


def check_digest(where: str, entry: FileEntry, size: int, sha256: str) -> None:
    """Raise CorruptionError unless a file has the size and the sha256 of `entry`."""
    if (entry.bytes, entry.sha256) != (size, sha256):
        expected = f"expected {entry.bytes} bytes with the recorded sha256"
        raise CorruptionError(f"{where}: {expected}; found {size} other bytes")


def checked_path(source: Remote, name: str, entry: FileEntry) -> Path:
    """Return the path of a file in a folder; the error is that of `check_digest`."""
    path = source.root / name
    found = (path.stat().st_size, file_sha256(path)) if path.is_file() else (0, "")
    check_digest(str(path), entry, *found)
    return path


@contextmanager
def _asking(url: str, kind: type[Exception], name: str = "") -> Iterator[None]:
    """Raise ResourceError for an error of a library.

    Its text has no query and no body of an answer, which may hold a signature or a key.
    """
    try:
        yield
    except (kind, FileNotFoundError) as error:
        if isinstance(error, OSError) and error.errno:  # of this machine's disk
            raise
        text = re.split(r"[<\n]", re.sub(r"\?\S*", "", str(error)))[0].strip(" :")
        remedy = "check the address, the network and the credentials, and run the command again"
        raise ResourceError(f"{url}/{name}: {text}; {remedy}") from error


def _library(url: str, module: str, extra: str) -> Any:
    """Return a library of an extra. Raises: UsageError if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise missing_package(url, module, extra) from error


def open_remote(url: str) -> Remote:
    """Return the remote at a folder, s3://, gs://, az:// or hf://.

    Raises: UsageError for another address, or one that holds credentials, which is not printed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return Remote(url)
    kind = {"s3": Objects, "gs": Objects, "az": Objects, "hf": Hub}.get(scheme)
    if kind is None or not rest:
        raise UsageError(
            f"{scheme}://: expected a folder, or s3://, gs://, az:// or hf:// and more"
        )
    if "@" in rest.partition("/")[0] or "?" in rest:
        expected = "expected an address without credentials; set them in the environment"
        raise UsageError(f"{scheme}://...: {expected}, as docs/share.md says")
    return kind(url)


@lru_cache(None)
def elsewhere(folder: Path) -> tuple[Remote, Path] | None:
    """Return the remote of the CACHE that `folder` lies in, and this CACHE, or None."""
    for root in (folder, *folder.parents)[:5]:
        if (note := work_dir(root) / "remote").is_file():
            return open_remote(note.read_text().splitlines()[0]), root
    return None


@contextmanager
def _opened(path: Path, offset: int, size: int) -> Iterator[BinaryIO]:
    """Yield a file at `offset`; a missing file is read from the remote of its CACHE.

    The size of the file is checked first, so a wrong size allocates no memory.
    """
    if not path.is_file() and (found := elsewhere(path.parent)):
        data = found[0].range(path.relative_to(found[1]).as_posix(), offset, size)
        file, start, available = cast(BinaryIO, io.BytesIO(data)), 0, len(data)
    else:
        try:
            file, start = open(path, "rb"), offset
        except FileNotFoundError as error:
            message = f"{path}: expected a committed file; found nothing; run `mcm-cache verify`"
            raise CorruptionError(message) from error
        available = max(0, os.fstat(file.fileno()).st_size - offset)
    with file, naming(path):
        if min(offset, size) < 0 or available < size:
            expected = f"expected {size} bytes at offset {offset}; found {available}"
            raise CorruptionError(f"{path}: {expected}; run `mcm-cache verify`")
        file.seek(start)
        yield file


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Return exactly `size` bytes at `offset`.

    Raises: CorruptionError if the file is missing or too short; ResourceError if its remote fails.
    """
    with _opened(path, offset, size) as file:
        return file.read(size)


def read_into(path: Path, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes at `offset`; the errors are those of `read_at`."""
    with _opened(path, offset, out.nbytes) as file:
        cast(io.BufferedReader, file).readinto(out)


@lru_cache(None)
def _sizes(remote: Remote) -> dict[str, int]:
    return remote.sizes()


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, or 0 if it is missing."""
    if path.is_file():
        return path.stat().st_size
    if (found := elsewhere(path.parent)) is None:
        return 0
    return _sizes(found[0]).get(path.relative_to(found[1]).as_posix(), 0)
