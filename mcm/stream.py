"""The stream: stream[micro_step] is a finished batch, a pure function of run and step.

A resumed run therefore reads exactly the batches of an uninterrupted run.
B rows of a batch, M chunks of a batch, N tokens, C teacher channels, H W pixels.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cache_tools.cache import Cache, Unit
from cache_tools.chunk import Chunk
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.dataset import Dataset as PictureDataset
from cache_tools.errors import McmError, ResourceError
from cache_tools.images import decode_view_into
from cache_tools.processes import init_worker, start_forkserver
from cache_tools.remote import elsewhere
from cache_tools.rng import hash_u64
from mcm.config import Target
from mcm.masking import mask_picks
from mcm.sampler import EvalOrder, Indices, Order
from mcm.targets import Targets

REMOTE_READS = 32  # chunks that a process reads from a remote at once
PREFETCH = 2  # batches that each worker prepares in advance
WORKERS_FROM_ROWS = 4096  # to evaluate fewer rows is faster than to start workers

# Arrays of the cache with one row per picture, and their names in a batch.
_STORED = {"patch": "codes", "scale": "scale"}
Batch = dict[str, Any]  # Tensors with B (or M) first, and ints


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor; in a worker, it lies in shared memory and is not copied."""
    out = torch.empty(0, dtype=dtype)
    if get_worker_info() is None:  # numpy asks for huge pages, which are 4 % faster to fill
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))
    size = math.prod(shape) * out.itemsize
    try:
        new_shared = torch.UntypedStorage._new_shared
        storage = new_shared(size, device="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ResourceError(
            f"/dev/shm: expected room for {size} bytes more; found: {error};"
            " enlarge it, or lower train.workers or train.micro_batch"
        ) from error
    return out.set_(storage).resize_(shape)


class Source(Protocol):
    """A source of batches: the rows of `chunks` in an epoch, padded to `batch` rows."""

    def __call__(self, epoch: int, chunks: Indices, batch: int, used: Batch | None = None) -> Batch:
        """Return the batch, in the memory of the `used` batch if it is given."""

    def rows_of(self, chunks: Indices) -> Indices:
        """Return the row numbers of chunks."""


class CacheSource:
    """Batches of the chunks of a cache. Epoch e shows chunk c in view (e + hash(seed, c)) mod V.

    A batch has pictures uint8 [B, H, W, 3], codes as stored [B, N, C], picks int32 [B, positions],
    rows and labels [B]. int8 codes add scale [B, N], mean and std [M, C]; `cls` adds cls [B, C].
    `Unit.chunk` checks the crc32c of every picture and chunk.
    """

    def __init__(
        self, units: Sequence[Unit], size_HW: tuple[int, int], positions: int, pool_rows: int,
        seed: int, unmasked_fraction: float = 0.0, cls: bool = False,
    ) -> None:  # fmt: skip
        self.units, self.size_HW, self.seed = list(units), size_HW, seed
        self.positions, self.pool_rows = positions, pool_rows  # positions 0: no mask
        self.unmasked_fraction = unmasked_fraction
        self.stored = _STORED | ({"cls": "cls"} if cls else {})

    def view(self, epoch: int, number: int) -> Unit:
        """Return the unit that gives the view of a chunk in an epoch."""
        return self.units[(int(hash_u64(self.seed, "view", number)) + epoch) % len(self.units)]

    def __call__(self, epoch: int, chunks: Indices, batch: int, used: Batch | None = None) -> Batch:
        """Return the batch of the chunks, in the memory of the `used` batch if it is given.

        Rows beyond the chunks are zero, with weight 0 and row number -1.
        """
        out = (used or self._allocate(batch)) | _row_tensors(batch)
        arrays = {name: x.numpy() for name, x in out.items() if isinstance(x, Tensor)}
        names = {array: name for array, name in self.stored.items() if name in arrays}

        def read(place: tuple[int, int]) -> Chunk:
            position, number = place
            span = slice(position * CHUNK_ROWS, (position + 1) * CHUNK_ROWS)
            into = {array: arrays[name][span] for array, name in names.items()}
            return self.view(epoch, number).chunk(number, into)

        filled, numbers = 0, enumerate(chunks.tolist())
        many = elsewhere(self.units[0].path)  # reads from a remote take long: many at once
        for position, chunk in enumerate((_readers().map if many else map)(read, numbers)):
            _copy(arrays, chunk, filled, position)
            filled += chunk.rows
        _pad(out, filled)
        rows, unmasked = out["rows"].numpy(), self.unmasked_fraction
        picks = mask_picks(self.seed, epoch, rows, self.positions, self.pool_rows, unmasked)
        return out | {"picks": torch.from_numpy(picks), "epoch": epoch}

    def _allocate(self, batch: int) -> Batch:
        out = {"pictures": _empty((batch, *self.size_HW, 3), torch.uint8)}
        specs = self.units[0].specs
        for array, name in self.stored.items():
            if array in specs:
                shape, dtype = specs[array].shape[1:], getattr(torch, specs[array].dtype)
                out[name] = _empty((batch, *shape), dtype)
        if "channel_mean" in specs:
            stats = (batch // CHUNK_ROWS, specs["channel_mean"].shape[1])
            out["mean"], out["std"] = torch.zeros(stats), torch.ones(stats)
        return out

    def rows_of(self, chunks: Indices) -> Indices:
        """Return the row numbers of whole chunks."""
        return (chunks[:, None] * CHUNK_ROWS + np.arange(CHUNK_ROWS)).ravel()


@lru_cache(None)
def _readers() -> ThreadPoolExecutor:
    """Return the threads of this process that read chunks from a remote."""
    return ThreadPoolExecutor(REMOTE_READS)


class RowSource(Source):
    """A source whose chunks are single rows of a split of a DATASET: all, or the given `rows`."""

    def __init__(
        self, dataset: PictureDataset, split: str, seed: int, rows: Indices | None = None
    ) -> None:
        self.dataset, self.split, self.seed = dataset, split, seed
        self.rows = np.arange(dataset.rows(split)) if rows is None else rows

    def rows_of(self, chunks: Indices) -> Indices:
        """Return the row numbers of a batch's chunks."""
        return self.rows[chunks]


class DatasetSource(RowSource):
    """Batches of the pictures of a DATASET; one row is one chunk.

    A batch has pictures [B, 3, H, W], rows and labels [B]. `transform(seed, bytes)` returns a
    picture [3, H, W]; its seed is a hash of (seed, epoch, row). `rows` selects rows of the split.
    """

    def __init__(
        self, dataset: PictureDataset, split: str, transform: Callable[[int, bytes], Tensor],
        seed: int, rows: Indices | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dataset, split, seed, rows)
        self.transform = transform

    def __call__(self, epoch: int, chunks: Indices, batch: int, used: Batch | None = None) -> Batch:
        """Return the batch of the rows, with memory and padding as in `CacheSource`."""
        out = used and used | _row_tensors(batch)
        rows = self.rows[chunks] if len(chunks) else self.rows[:1]  # for the shape of a picture
        for position, row in enumerate(rows.tolist()):
            data, label = self.dataset.picture(self.split, row)
            picture = self.transform(int(hash_u64(self.seed, "augment", epoch, row)), data)
            if not out:
                out = {"pictures": _empty((batch, *picture.shape), picture.dtype)}
                out |= _row_tensors(batch)
            out["pictures"][position], out["rows"][position] = picture, row
            out["labels"][position] = label
        assert out is not None
        _pad(out, len(chunks))
        return out | {"epoch": epoch}


def _copy(arrays: dict[str, npt.NDArray[Any]], chunk: Chunk, start: int, position: int) -> None:
    """Copy a chunk to the batch; the codes of a whole chunk have been read into it already."""
    span = slice(start, start + chunk.rows)
    if chunk.rows < CHUNK_ROWS:
        stored = {"codes": chunk.codes, "scale": chunk.scale, "cls": chunk.cls}
        for name, array in stored.items():
            if array is not None and name in arrays:
                arrays[name][span] = array
    for data, picture in zip(chunk.pictures, arrays["pictures"][span], strict=True):
        decode_view_into(data, picture)
    arrays["labels"][span] = chunk.labels
    arrays["rows"][span] = np.arange(chunk.row0, chunk.row0 + chunk.rows)
    if chunk.mean is not None:
        arrays["mean"][position], arrays["std"][position] = chunk.mean, chunk.std


def _row_tensors(batch: int) -> Batch:
    """Return new tensors for rows and labels: their memory is not reused by the next batch."""
    return {name: _empty((batch,), torch.int64) for name in ("rows", "labels")}


def _pad(out: Batch, filled: int) -> None:
    """Zero the rows beyond `filled` and set the weight of every row."""
    out["weight"] = torch.ones(len(out["rows"]))
    if filled < len(out["rows"]):
        for name in out.keys() & {"pictures", "rows", "labels", "weight", "cls", *_STORED.values()}:
            out[name][filled:] = -1 if name == "rows" else 0


class Stream(Dataset[Batch | McmError | OSError]):
    """A map-style dataset: stream[micro_step] is a finished batch of `source` in `order`.

    An error is returned, and `batches` raises it. A worker would wrap a raised error in a
    traceback.
    """

    def __init__(self, order: Order | EvalOrder, source: Source, reuse: int = 0) -> None:
        """Reuse the memory of the batch `reuse` batches ago: new pages take time (LOG.md)."""
        self.order, self.source = order, source
        self.used: deque[Batch] = deque(maxlen=reuse)

    def __getitem__(self, index: int) -> Batch | McmError | OSError:
        epoch, chunks = self.order.slice(index)
        used = self.used.popleft() if self.used and len(self.used) == self.used.maxlen else None
        try:
            batch = self.source(epoch, chunks, self.order.batch, used)
        except (McmError, OSError) as error:
            return error
        self.used.append(batch)
        return batch


class CacheDataset(Dataset[Batch]):
    """The steps of a training on a cache as a map-style dataset, for your own training loop.

    Item s is this rank's share of the `batch` rows of step s: pictures uint8 [B, H, W, 3], features
    float32 [B, N, C], rows and labels int64 [B], and cls float16 [B, C] if the teacher has CLS.
    Each epoch permutes the chunks and shows their next view. Use it as
    `DataLoader(dataset, batch_size=None)` without `shuffle`; `sampler=range(step, len(dataset))`
    resumes.

    Raises: UsageError if no unit is complete, or `batch`, rows, `world` and `rank` do not fit.
    """

    def __init__(
        self, cache: Path | str, batch: int, epochs: int = 1, split: str = "train", seed: int = 0,
        world: int = 1, rank: int = 0,
    ) -> None:  # fmt: skip
        opened = Cache(cache)
        opened.check_pictures()
        identity, units = opened.identity, opened.complete_units(split) or [opened.unit(split)]
        for unit in units:
            unit.check_arrays()
        share = batch // max(world, 1)
        self.order = Order(units[0].rows, CHUNK_ROWS, batch, share, world, rank, seed)
        size_HW = identity.view_height, identity.view_width
        source = CacheSource(units, size_HW, 0, 1, seed, cls=identity.has_cls)
        self.epochs, self.stream = epochs, Stream(self.order, source)
        self.decode = Targets(Target(norm="none"), identity.channels, identity.channels)

    def __len__(self) -> int:
        return self.epochs * self.order.steps_per_epoch

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < len(self):
            raise IndexError(step)
        batch = self.stream[step]
        if not isinstance(batch, dict):
            raise batch
        features = self.decode(*map(batch.get, ("codes", "scale", "mean", "std")))
        kept = {k: batch[k] for k in ("pictures", "rows", "labels", "cls") if k in batch}
        return kept | {"features": features}


@contextmanager
def batches(
    stream: Stream, start: int, end: int, workers: int, pin_memory: bool = False
) -> Iterator[Iterator[Batch]]:
    """Yield an iterator over stream[start] ... stream[end - 1] in order, from `workers` processes.

    The next batch may reuse the memory of pictures and features.

    Raises: the McmError or OSError of a batch; ResourceError if a worker was killed.
    """
    if isinstance(stream.order, EvalOrder) and stream.order.rows < WORKERS_FROM_ROWS:
        workers = 0
    if workers:
        start_forkserver(workers, 48 + 16 * workers, "torch", "mcm.stream")
    loader = DataLoader(
        # Each worker prepares PREFETCH batches, and the caller uses one more.
        Stream(stream.order, stream.source, reuse=PREFETCH + 1 if workers else 1),
        batch_size=None,
        sampler=range(start, end),
        num_workers=workers,
        pin_memory=pin_memory,
        # /dev/shm per rank: workers x 3 batches, such as 8 x 3 x 256 rows x 0.3 MB = 1.8 GB.
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=init_worker,
    )
    iterator = iter(loader)
    try:
        yield _raising(iterator)
    finally:
        if workers:  # at exit, the process would wait for workers that are alive
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _raising(items: Iterable[Batch | McmError | OSError]) -> Iterator[Batch]:
    try:
        for item in items:
            if isinstance(item, McmError | OSError):
                raise item
            yield item
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ResourceError(
            f"{error}: expected a live worker; the system may have killed it;"
            " check free memory and /dev/shm, or lower train.workers or train.micro_batch"
        ) from error
