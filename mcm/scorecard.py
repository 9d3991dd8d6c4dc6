"""What a CACHE tells of its teacher: features to probe, odd channels, effective rank, loss by quantisation.

C channels, N patch tokens, R rows.
"""

from statistics import mean

import numpy as np
import torch

from cache_tools.cache import Unit
from cache_tools.console import progress
from cache_tools.records import Record
from mcm.classifiers import Features
from mcm.metrics import Gram
from mcm.targets import Stats

DEAD, OUTLIER = 1e-3, 10.0  # of the median channel's std


class Teacher(Record):
    """Facts about a teacher's patch features; channels by number, loss by quantisation as means over the commits."""

    channels: int
    dead: tuple[int, ...]
    outliers: tuple[int, ...]
    effective_rank: float
    relative_mse: float
    cosine: float

    def text(self) -> str:
        """Lines for a terminal."""
        return (
            f"  dead      {len(self.dead)} of {self.channels} channels: {list(self.dead)}\n"
            f"  outliers  {len(self.outliers)} of {self.channels} channels: {list(self.outliers)}\n"
            f"  rank      {self.effective_rank:.1f} of {self.channels}, effective, patch tokens of 'val'\n"
            f"  stored    relative MSE {self.relative_mse:.1e}, cosine {self.cosine:.6f}"
        )


def odd_channels(mean_C: Stats, std_C: Stats) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(dead, outliers): channels that hardly vary; and that vary, or lie off zero, far more than the median varies."""
    median = np.median(std_C)
    far = np.maximum(std_C, np.abs(mean_C)) > OUTLIER * median
    dead, outliers = (tuple(np.flatnonzero(mask).tolist()) for mask in (std_C < DEAD * median, far))
    return dead, outliers


def stored_features(unit: Unit, quiet: bool, gram: Gram | None = None) -> Features:
    """The mean patch token of every row of a unit and, where there is one, CLS behind it: [R, C] or [R, 2 C].

    `gram` is updated with all the patch tokens.
    """
    x, y = [], []
    with progress(unit.num_chunks, f"teacher's features of {unit.split}", "chunks", quiet=quiet) as bar:
        for number in range(unit.num_chunks):
            chunk = unit.chunk(number)
            patch_BNC = chunk.features()
            if gram is not None:
                gram.update(torch.from_numpy(patch_BNC))
            cls = [] if chunk.cls is None else [chunk.cls.astype(np.float32)]
            x.append(torch.from_numpy(np.concatenate([patch_BNC.mean(1), *cls], axis=1)))
            y.append(torch.from_numpy(chunk.labels.astype(np.int64)))
            bar.update(1)
    return Features(torch.cat(x), torch.cat(y))


def teacher_facts(unit: Unit, gram: Gram) -> Teacher:
    """Channels and quantisation of a unit, the rank of what was added to `gram`."""
    mean_C, std_C = unit.channel_stats()
    dead, outliers = odd_channels(mean_C, std_C)
    stored = [unit.commit(shard).fidelity for shard in range(unit.num_shards)]
    return Teacher(
        channels=len(mean_C), dead=dead, outliers=outliers, effective_rank=gram.rank(),
        relative_mse=mean(one.relative_mse for one in stored), cosine=mean(one.cosine for one in stored),
    )  # fmt: skip
