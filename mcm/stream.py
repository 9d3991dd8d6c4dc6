"""The stream: stream[micro_step] is a finished batch, a pure function of run and step, so that resume is exact.

B rows of a batch, M chunks of a batch, N tokens, C teacher channels, H W pixels.
"""

import math
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cache_tools.cache import Chunk, Unit
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.dataset import Dataset as PictureDataset
from cache_tools.errors import McmError, ResourceError
from cache_tools.images import decode_view_into, ignore_metadata_warnings
from cache_tools.processes import end_with_parent
from cache_tools.rng import hash_u64
from mcm.masking import mask_picks
from mcm.sampler import EvalOrder, Indices, Order

PREFETCH = 2  # batches a worker makes ahead
WORKERS_FROM_ROWS = 4096  # to evaluate fewer takes less time than to start workers

# Arrays of the cache with a row a picture, and their names in a batch.
_STORED = {"patch": "codes", "scale": "scale"}
Batch = dict[str, Any]  # Tensors with B (or M) first, and ints


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; inside a worker it lies in shared memory, and no copy is needed to send it."""
    out = torch.empty(0, dtype=dtype)
    if get_worker_info() is None:  # by numpy, which asks for huge pages: 4 % faster to fill
        return torch.from_numpy(np.empty(shape, str(dtype).removeprefix("torch.")))
    size = math.prod(shape) * out.itemsize
    try:
        storage = torch.UntypedStorage._new_shared(size, device="cpu")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        remedy = "enlarge it, or lower train.workers or train.micro_batch"
        raise ResourceError(f"/dev/shm: expected room for {size} bytes more: {error}; {remedy}") from error
    return out.set_(storage).resize_(shape)


class CacheSource:
    """Batches of a cache's chunks: epoch e shows chunk c in view (e + hash(seed, c)) mod V.

    pictures uint8 [B, H, W, 3], codes as stored [B, N, C], picks int32 [B, positions], rows and labels [B]; for int8
    also scale [B, N], mean and std [M, C]; with `cls` cls [B, C]. Every picture's and chunk's crc32c is checked by
    `Unit.chunk`.
    """

    def __init__(
        self, units: Sequence[Unit], size_HW: tuple[int, int], positions: int, pool_rows: int, seed: int,
        unmasked_fraction: float = 0.0, cls: bool = False,
    ) -> None:  # fmt: skip
        self.units, self.size_HW, self.seed = list(units), size_HW, seed
        self.positions, self.pool_rows = positions, pool_rows  # positions 0: no mask
        self.unmasked_fraction = unmasked_fraction
        self.stored = _STORED | ({"cls": "cls"} if cls else {})

    def view(self, epoch: int, number: int) -> Unit:
        """The unit whose view of a chunk `epoch` shows."""
        return self.units[(int(hash_u64(self.seed, "view", number)) + epoch) % len(self.units)]

    def __call__(self, epoch: int, chunks: Indices, batch: int, used: Batch | None = None) -> Batch:
        """The batch, in the memory of a `used` one where it is given.

        Rows beyond the given chunks are zero, their weight 0 and their row number -1.
        """
        out = (used or self._allocate(batch)) | _numbers(batch)
        arrays, filled = {name: tensor.numpy() for name, tensor in out.items() if isinstance(tensor, Tensor)}, 0
        for position, number in enumerate(chunks.tolist()):
            span = slice(filled, filled + CHUNK_ROWS)
            into = {array: arrays[name][span] for array, name in self.stored.items() if name in arrays}
            chunk = self.view(epoch, number).chunk(number, into)
            _fill(arrays, chunk, filled, position)
            filled += chunk.rows
        _pad(out, filled)
        rows = out["rows"].numpy()
        picks = mask_picks(self.seed, epoch, rows, self.positions, self.pool_rows, self.unmasked_fraction)
        return out | {"picks": torch.from_numpy(picks), "epoch": epoch}

    def _allocate(self, batch: int) -> Batch:
        out = {"pictures": _empty((batch, *self.size_HW, 3), torch.uint8)}
        specs = self.units[0].specs
        for array, name in self.stored.items():
            if array in specs:
                out[name] = _empty((batch, *specs[array].shape[1:]), getattr(torch, specs[array].dtype))
        if "channel_mean" in specs:
            stats = (batch // CHUNK_ROWS, specs["channel_mean"].shape[1])
            out["mean"], out["std"] = torch.zeros(stats), torch.ones(stats)
        return out

    def rows_of(self, chunks: Indices) -> Indices:
        """Row numbers of whole chunks."""
        return (chunks[:, None] * CHUNK_ROWS + np.arange(CHUNK_ROWS)).ravel()


class DatasetSource:
    """Batches of a DATASET's pictures, one row a chunk, through transform(seed, bytes) -> [3, H, W].

    pictures [B, 3, H, W], rows and labels [B]. `rows` picks rows of the split (few-shot); the seed that a picture's
    transform gets is a hash of (seed, epoch, row).
    """

    def __init__(
        self, dataset: PictureDataset, split: str, transform: Callable[[int, bytes], Tensor], seed: int,
        rows: Indices | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.split, self.transform, self.seed = dataset, split, transform, seed
        self.rows = np.arange(dataset.rows(split)) if rows is None else rows

    def __call__(self, epoch: int, chunks: Indices, batch: int, used: Batch | None = None) -> Batch:
        """The batch, in the memory of a `used` one; missing rows are zero, their weight 0 and their row number -1."""
        out = used and used | _numbers(batch)
        for position, row in enumerate(self.rows[chunks].tolist() or [int(self.rows[0])]):
            data, label = self.dataset.picture(self.split, row)
            picture = self.transform(int(hash_u64(self.seed, "augment", epoch, row)), data)
            out = out or {"pictures": _empty((batch, *picture.shape), picture.dtype)} | _numbers(batch)
            out["pictures"][position], out["rows"][position], out["labels"][position] = picture, row, label
        assert out is not None
        _pad(out, len(chunks))
        return out | {"epoch": epoch}

    def rows_of(self, chunks: Indices) -> Indices:
        """Row numbers of a batch's chunks."""
        return self.rows[chunks]


def _fill(arrays: dict[str, npt.NDArray[Any]], chunk: Chunk, start: int, position: int) -> None:
    """Put a chunk into its place in the batch; the codes of a whole one were read into theirs."""
    span = slice(start, start + chunk.rows)
    if chunk.rows < CHUNK_ROWS:
        stored = {"codes": chunk.codes, "scale": chunk.scale, "cls": chunk.cls}
        for name, found in stored.items():
            if found is not None and name in arrays:
                arrays[name][span] = found
    for data, picture in zip(chunk.pictures, arrays["pictures"][span], strict=True):
        decode_view_into(data, picture)
    arrays["labels"][span] = chunk.labels
    arrays["rows"][span] = np.arange(chunk.row0, chunk.row0 + chunk.rows)
    if chunk.mean is not None:
        arrays["mean"][position], arrays["std"][position] = chunk.mean, chunk.std


def _numbers(batch: int) -> Batch:
    """Rows and labels, new in every batch: an evaluation keeps them."""
    return {name: _empty((batch,), torch.int64) for name in ("rows", "labels")}


def _pad(out: Batch, filled: int) -> None:
    """Zero what lies beyond `filled` rows and give every row its weight."""
    out["weight"] = torch.ones(len(out["rows"]))
    if filled < len(out["rows"]):
        for name in out.keys() & {"pictures", "rows", "labels", "weight", "cls", *_STORED.values()}:
            out[name][filled:] = -1 if name == "rows" else 0


class Stream(Dataset[Batch | McmError | OSError]):
    """stream[micro_step]: one finished batch of `source` in `order`.

    An error is returned, not raised: a worker would wrap it in a traceback. `batches` raises it.
    """

    def __init__(self, order: Order | EvalOrder, source: CacheSource | DatasetSource, reuse: int = 0) -> None:
        """With `reuse` n, a batch is made in the memory of that n before it: fresh pages take time (LOG.md)."""
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


def _start_forkserver(workers: int) -> None:
    """Start the process that forks the workers. They block SIGTERM and Ctrl-C, and end with this process.

    A launcher signals whole process groups; the stop at the next step still needs the workers' batches.
    Raises: ResourceError where this process may not open enough files.
    """
    limit, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 48 + 16 * workers
    if limit < needed:
        advice = f"raise it by `ulimit -n {needed}`, or lower the number of workers"
        raise ResourceError(f"open files: expected a limit of {needed} for {workers} workers; found {limit}; {advice}")
    multiprocessing.forkserver.set_forkserver_preload(["torch", "mcm.stream"])
    multiprocessing.resource_tracker.ensure_running()  # before the block, which its start would lift
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def batches(stream: Stream, start: int, end: int, workers: int, pin_memory: bool = False) -> Iterator[Iterator[Batch]]:
    """`with batches(stream, start, end, workers) as items:` yields stream[start] ... stream[end - 1] in order.

    Pictures and features are the caller's until the next batch is asked for; then their memory is used again.

    Raises: the McmError or OSError that a batch met, in this process; ResourceError when a worker was killed.
    """
    if isinstance(stream.order, EvalOrder) and stream.order.rows < WORKERS_FROM_ROWS:
        workers = 0
    if workers:
        _start_forkserver(workers)
    loader = DataLoader(
        # In a worker, PREFETCH batches are under way and one is the caller's.
        Stream(stream.order, stream.source, reuse=PREFETCH + 1 if workers else 1),
        batch_size=None,
        sampler=range(start, end),
        num_workers=workers,
        pin_memory=pin_memory,
        # In /dev/shm, a process: workers x 3 batches, such as 8 x 3 x 256 rows x 0.3 MB = 1.8 GB.
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_begin_worker,
    )
    iterator = iter(loader)
    try:
        yield _raising(iterator)
    finally:
        if workers:  # at once, not when the garbage collector comes: an exit waits for live workers
            iterator._shutdown_workers()  # type: ignore[attr-defined]


def _begin_worker(number: int) -> None:
    ignore_metadata_warnings()
    end_with_parent()


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
            f"{error}: expected it to live; the system may have killed it: look at free memory and /dev/shm, then"
            " lower train.workers or train.micro_batch"
        ) from error
