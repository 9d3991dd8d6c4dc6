"""Statistics of the teacher in a CACHE: odd channels, effective rank and quantization error.

B batch, N patches, C channels, R rows.
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

DEAD, OUTLIER = 1e-3, 10.0  # multiples of the median channel's std


class TeacherScores(Record):
    """Statistics of a teacher's patch features.

    `dead` and `outliers` are channel indices. `relative_mse` and `cosine` measure the quantization
    error, as means over the commits.
    """

    channels: int
    dead: tuple[int, ...]
    outliers: tuple[int, ...]
    effective_rank: float
    relative_mse: float
    cosine: float

    def text(self) -> str:
        """Return the statistics as lines for a terminal."""
        rank = f"{self.effective_rank:.1f} of {self.channels}"
        return (
            f"  dead      {len(self.dead)} of {self.channels} channels: {list(self.dead)}\n"
            f"  outliers  {len(self.outliers)} of {self.channels} channels: {list(self.outliers)}\n"
            f"  rank      {rank}, effective, patch tokens of 'val'\n"
            f"  stored    relative MSE {self.relative_mse:.1e}, cosine {self.cosine:.6f}"
        )


def odd_channels(mean_C: Stats, std_C: Stats) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (dead, outliers) as channel indices.

    A dead channel has a std below DEAD times the median std.
    An outlier has a std or an absolute mean above OUTLIER times the median std.
    """
    median = np.median(std_C)
    far = np.maximum(std_C, np.abs(mean_C)) > OUTLIER * median
    dead, outliers = (tuple(np.flatnonzero(mask).tolist()) for mask in (std_C < DEAD * median, far))
    return dead, outliers


def stored_features(unit: Unit, quiet: bool, gram: Gram | None = None) -> Features:
    """Return the mean patch token of every row of a unit, [R, C], or [R, 2 C] with CLS appended.

    CLS is appended where the cache has it. `gram` is updated with all the patch tokens.
    """
    x, y = [], []
    title = f"teacher's features of {unit.split}"
    with progress(unit.num_chunks, title, "chunks", quiet=quiet) as bar:
        for chunk in unit:
            patch_BNC = chunk.features()
            if gram is not None:
                gram.update(torch.from_numpy(patch_BNC))
            cls = [] if chunk.cls is None else [chunk.cls.astype(np.float32)]
            x.append(torch.from_numpy(np.concatenate([patch_BNC.mean(1), *cls], axis=1)))
            y.append(torch.from_numpy(chunk.labels.astype(np.int64)))
            bar.update(1)
    return Features(torch.cat(x), torch.cat(y))


def teacher_facts(unit: Unit, gram: Gram) -> TeacherScores:
    """Return the channel and quantization statistics of a unit and the effective rank of `gram`."""
    mean_C, std_C = unit.channel_stats()
    dead, outliers = odd_channels(mean_C, std_C)
    stored = [unit.commit(shard).fidelity for shard in range(unit.num_shards)]
    return TeacherScores(
        channels=len(mean_C),
        dead=dead,
        outliers=outliers,
        effective_rank=gram.rank(),
        relative_mse=mean(one.relative_mse for one in stored),
        cosine=mean(one.cosine for one in stored),
    )
