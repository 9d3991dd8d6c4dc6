"""The order of rows: one sequence per run, independent of the world size and the batch split."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import UsageError
from cache_tools.rng import permutation

Indices = npt.NDArray[np.int64]


@lru_cache(maxsize=2)
def _epoch_order(chunks: int, seed: int, epoch: int) -> Indices:
    return permutation(chunks, seed, "order", epoch)


@dataclass(frozen=True)
class Order:
    """The training order: each epoch permutes the whole chunks of the data.

    In step s and micro-step a, rank r of W takes b rows from position s G + (a W + r) b of the
    permutation. Each epoch leaves out other rows: the remainder after floor(rows / G) steps.

    Raises: UsageError if rows, global batch, world size and micro-batch do not fit.
    """

    rows: int
    rows_per_chunk: int  # 16 for a cache, 1 for a dataset
    global_batch: int  # G
    micro_batch: int  # the largest number of rows per device at once
    world: int = 1
    rank: int = 0
    seed: int = 0
    group: int = CHUNK_ROWS  # the rows that a micro-batch does not divide

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank: expected 0 to world - 1 = {self.world - 1}; found {self.rank}")
        if self.global_batch % (self.world * self.group) or self.micro_batch < self.group:
            groups = self.global_batch // self.group
            worlds = [w for w in range(1, groups + 1) if self.global_batch % (w * self.group) == 0]
            raise UsageError(
                f"train.global_batch: expected a multiple of {self.group} rows x {self.world}"
                f" processes, and train.micro_batch >= {self.group};"
                f" found {self.global_batch} and {self.micro_batch};"
                f" numbers of processes that fit: {', '.join(map(str, worlds)) or 'none'}"
            )
        if self.steps_per_epoch == 0:
            raise UsageError(
                "too few rows for one global batch: expected"
                f" train.global_batch = {self.global_batch} rows in whole chunks of"
                f" {self.rows_per_chunk}; found {self.rows} rows;"
                " lower train.global_batch or add rows"
            )

    def __str__(self) -> str:
        shares = f"{self.world} ranks x {self.accumulation} micro-steps x {self.batch} rows"
        return f"{self.steps_per_epoch} steps per epoch, each of {self.global_batch} rows: {shares}"

    @property
    def chunks(self) -> int:
        """The number of whole chunks; training leaves out a trailing partial chunk."""
        return self.rows // self.rows_per_chunk

    @property
    def steps_per_epoch(self) -> int:
        """The number of optimizer steps per epoch: floor(rows in whole chunks / G)."""
        return self.chunks * self.rows_per_chunk // self.global_batch

    @property
    def batch(self) -> int:
        """b: the largest multiple of `group` <= micro_batch that divides a rank's share of G."""
        share = self.global_batch // self.world
        sizes = range(self.group, min(self.micro_batch, share) + 1, self.group)
        return max(b for b in sizes if share % b == 0)

    @property
    def accumulation(self) -> int:
        """A: the number of micro-steps per step."""
        return self.global_batch // (self.world * self.batch)

    def step_chunks(self, step: int) -> tuple[int, Indices]:
        """Return (epoch, chunk numbers) of a whole global batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        count = self.global_batch // self.rows_per_chunk
        chunks = _epoch_order(self.chunks, self.seed, epoch)
        return epoch, chunks[within * count : (within + 1) * count]

    def slice(self, index: int) -> tuple[int, Indices]:
        """Return (epoch, chunk numbers) of this rank's micro-step `index` = step * A + a."""
        step, micro = divmod(index, self.accumulation)
        epoch, chunks = self.step_chunks(step)
        count = self.batch // self.rows_per_chunk
        start = (micro * self.world + self.rank) * count
        return epoch, chunks[start : start + count]


@dataclass(frozen=True)
class EvalOrder:
    """The evaluation order: every row once, in order, and equally many batches on every rank.

    The last batches are padded with rows of weight 0.
    """

    rows: int
    rows_per_chunk: int
    batch: int
    world: int = 1
    rank: int = 0

    @property
    def chunks(self) -> int:
        """The number of chunks, including a trailing partial chunk."""
        return -(-self.rows // self.rows_per_chunk)

    def __len__(self) -> int:
        return -(-self.chunks // (self.world * self.batch // self.rows_per_chunk))

    def slice(self, index: int) -> tuple[int, Indices]:
        """Return (0, chunk numbers) of this rank's batch; the last batches are short or empty."""
        count = self.batch // self.rows_per_chunk
        start = (index * self.world + self.rank) * count
        return 0, np.arange(min(start, self.chunks), min(start + count, self.chunks))
