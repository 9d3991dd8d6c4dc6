"""The objective of masked channel modeling: masks, target and loss of a batch (the paper's section 3).

B batch, N patches, D student width, C channels of the target, H W pixels, K pool rows.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cache_tools.cache import Cache, Unit
from mcm.config import PretrainConfig
from mcm.masking import mask_pool
from mcm.model import MaskedChannelModel, Masks, unfold_patches
from mcm.run_dir import PretrainRun
from mcm.sampler import EvalOrder, Order
from mcm.stream import Batch, CacheSource, Stream
from mcm.targets import Stats, Targets


def loss_fn(prediction_BNC: Tensor, target_BNC: Tensor) -> Tensor:
    """Return the mean squared error over all channels and patches, hidden and visible alike, in float32."""
    return F.mse_loss(prediction_BNC.float(), target_BNC)


def channel_stats(units: Sequence[Unit]) -> tuple[Stats, Stats]:
    """Mean and std [C] of the features over all units, which have equally many rows."""
    means, stds = map(np.array, zip(*(unit.channel_stats() for unit in units), strict=True))
    mean = means.mean(0)
    return mean, np.sqrt((stds**2 + (means - mean) ** 2).mean(0))


class Objective:
    """The student, its targets and its masks; `loss` is what a step of pre-training minimizes."""

    def __init__(
        self, config: PretrainConfig, run: PretrainRun, cache: Cache, units: Sequence[Unit], accelerator: Accelerator
    ) -> None:
        """Build the model, untrained, and the targets for the `units` of the cache."""
        self.config, self.run, self.accelerator = config, run, accelerator
        stats = channel_stats(units) if config.target.norm == "channel" else None
        joint = cache.projection() if config.target.features == "joint" else None
        targets = Targets(config.target, run.channels, config.student.width, stats, config.train.seed, joint)
        self.targets = targets.to(accelerator.device)
        self.model = MaskedChannelModel(config, run.grid, run.patch, run.channels, run.mean, run.std)
        device = accelerator.device
        self.mean, self.std = (torch.tensor(values, device=device) * 255 for values in (run.mean, run.std))
        tokens, width = run.grid[0] * run.grid[1], config.student.width
        self.positions, self.width = {"patch": (1, tokens), "none": (0, 0)}.get(config.mask.mode, (tokens, width))
        self.pools: dict[int, Future[Tensor]] = {}
        self.pool_thread = ThreadPoolExecutor(1)
        # Fused, the decoded target is never stored: 154 MB per 256 rows of 196 x 768 float32.
        self.compare = torch.compile(self._compare) if config.train.compile else self._compare

    def stream(self, order: Order | EvalOrder, units: Sequence[Unit], unmasked_fraction: float = 0.0) -> Stream:
        """Batches of the rows of `units` in `order`, with the mask picks of this run."""
        pool, seed, cls = self.config.mask.pool, self.config.train.seed, self.config.loss.cls
        return Stream(order, CacheSource(units, self.run.size, self.positions, pool, seed, unmasked_fraction, cls))

    def masks(self, batch: Batch) -> Masks | None:
        """The epoch's pool and the batch's picks."""
        if self.config.mask.mode == "none":
            return None
        epoch = batch["epoch"]
        # Held-out rows use the pool of epoch 0. A pool takes 0.2 s, so that the next one is made ahead.
        self.pools = {e: pool for e, pool in self.pools.items() if e in (0, epoch, epoch + 1)}
        for e in {epoch, epoch + 1} - self.pools.keys():
            self.pools[e] = self.pool_thread.submit(self._pool, e)
        return self.pools[epoch].result(), batch["picks"]

    def _pool(self, epoch: int) -> Tensor:
        pool = mask_pool(self.config.train.seed, epoch, self.config.mask.pool, self.width, self.ratio(epoch))
        pool = np.concatenate([pool, np.zeros_like(pool[:1])])  # the last one is for unmasked rows
        return torch.from_numpy(pool).to(self.accelerator.device)

    def ratio(self, epoch: int) -> float:
        """The share of an epoch's masks that is hidden; held-out rows have epoch 0's."""
        mask, last = self.config.mask, max(1, self.config.schedule.epochs - 1)
        return mask.ratio if mask.final_ratio is None else mask.ratio + (mask.final_ratio - mask.ratio) * epoch / last

    def target(self, batch: Batch) -> Tensor:
        """The normalised target of a batch, float32; a learned projection is the model's."""
        if self.config.target.features == "pixels":
            pictures_BHW3 = (batch["pictures"].float() - self.mean) / self.std
            return self.targets.normalise(unfold_patches(pictures_BHW3, self.run.patch))
        return cast(Tensor, self.targets(*(batch.get(name) for name in ("codes", "scale", "mean", "std"))))

    def loss(self, wrapped: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error over all channels, outside the wrapped module and in float32; with loss.cls CLS's too."""
        if self.model.target_projection is not None:
            return loss_fn(*wrapped(batch["pictures"], self.masks(batch), self.target(batch)))
        y = wrapped(batch["pictures"], self.masks(batch))
        # The epoch stays out: a compiled function would be compiled again for every value of a number.
        return self.compare(y, {name: x for name, x in batch.items() if isinstance(x, Tensor) and name != "rows"})

    def _compare(self, y: Tensor, batch: Batch) -> Tensor:
        target = self.target(batch)
        loss = loss_fn(y[:, -target.shape[1] :], target)
        return loss + loss_fn(y[:, 0], self.targets.normalise(batch["cls"])) if self.config.loss.cls else loss
