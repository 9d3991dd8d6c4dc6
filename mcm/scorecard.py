"""What a CACHE tells of its teacher: features to probe, odd channels, effective rank, loss by quantisation.

C channels, N patch tokens, R rows.
"""

import numpy as np
import numpy.typing as npt
import torch

from cache_tools.cache import Unit
from cache_tools.console import progress
from cache_tools.records import Record
from mcm.classify import Features
from mcm.diagnostics import Gram

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
        lines = [
            f"  {name:<9} {len(found)} of {self.channels} channels"
            + (f": {', '.join(map(str, found))}" if found else "")
            for name, found in (("dead", self.dead), ("outliers", self.outliers))
        ]
        lines.append(f"  rank      {self.effective_rank:.1f} of {self.channels}, effective, patch tokens of 'val'")
        return "\n".join([*lines, f"  stored    relative MSE {self.relative_mse:.1e}, cosine {self.cosine:.6f}"])


def odd_channels(
    mean_C: npt.NDArray[np.float64], std_C: npt.NDArray[np.float64]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(dead, outliers): channels that hardly vary; and that vary, or lie off zero, far more than the median varies."""
    median = np.median(std_C)
    far = np.maximum(std_C, np.abs(mean_C)) > OUTLIER * median
    dead, outliers = (tuple(np.flatnonzero(mask).tolist()) for mask in (std_C < DEAD * median, far))
    return dead, outliers


def fidelity(unit: Unit) -> tuple[float, float]:
    """(relative MSE, cosine) of the stored features to the teacher's own, means over the commits."""
    found = [unit.commit(shard).fidelity for shard in range(unit.num_shards)]
    return float(np.mean([one.relative_mse for one in found])), float(np.mean([one.cosine for one in found]))


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
                tokens, weight = torch.from_numpy(patch_BNC), torch.ones(chunk.rows)
                gram.update(tokens.to(gram.sums.device), weight.to(gram.sums.device))
            cls = [] if chunk.cls is None else [chunk.cls.astype(np.float32)]
            x.append(torch.from_numpy(np.concatenate([patch_BNC.mean(1), *cls], axis=1)))
            y.append(torch.from_numpy(chunk.labels.astype(np.int64)))
            bar.update(1)
    return Features(torch.cat(x), torch.cat(y))


def teacher_facts(unit: Unit, gram: Gram) -> Teacher:
    """Channels and quantisation of a unit, the rank of what was added to `gram`."""
    mean_C, std_C = unit.channel_stats()
    dead, outliers = odd_channels(mean_C, std_C)
    relative_mse, cosine = fidelity(unit)
    return Teacher(
        channels=len(mean_C), dead=dead, outliers=outliers, effective_rank=gram.rank(),
        relative_mse=relative_mse, cosine=cosine,
    )  # fmt: skip
