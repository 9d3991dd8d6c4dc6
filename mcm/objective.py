"""The objective of masked channel modeling (Entropy 2025, 27(8):794): masks, target and loss.

`Objective.loss` computes a batch's loss: masks -> prediction of the model -> target -> loss_fn.
B batch, N patches, D student width, C channels of the target, H W pixels, K pool rows.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cache_tools.cache import Cache, Unit
from mcm.config import PretrainConfig
from mcm.masking import mask_pool, noise_pool
from mcm.model import MaskedChannelModel, Masks, unfold_patches
from mcm.run_dir import PretrainRun
from mcm.sampler import EvalOrder, Order
from mcm.stream import Batch, CacheSource, Stream
from mcm.targets import Stats, Targets


def loss_fn(prediction_BNC: Tensor, target_BNC: Tensor) -> Tensor:
    """Return the float32 mean squared error over all channels and patches, hidden and visible."""
    return F.mse_loss(prediction_BNC.float(), target_BNC)


def channel_stats(units: Sequence[Unit]) -> tuple[Stats, Stats]:
    """Return the mean and std [C] of the features over all units, which have equally many rows."""
    means, stds = map(np.array, zip(*(unit.channel_stats() for unit in units), strict=True))
    mean = means.mean(0)
    return mean, np.sqrt((stds**2 + (means - mean) ** 2).mean(0))


class Objective:
    """The student, its targets and its masks; pre-training minimizes `loss`."""

    def __init__(
        self, config: PretrainConfig, run: PretrainRun, cache: Cache, units: Sequence[Unit],
        accelerator: Accelerator,
    ) -> None:  # fmt: skip
        """Build the untrained model, and the targets for the `units` of the cache."""
        self.config, self.run, self.accelerator = config, run, accelerator
        width, seed, device = config.student.width, config.train.seed, accelerator.device
        stats = channel_stats(units) if config.target.norm == "channel" else None
        joint = cache.projection() if config.target.features == "joint" else None
        targets = Targets(config.target, run.channels, width, stats, seed, joint)
        self.targets = targets.to(device)
        self.model = MaskedChannelModel(
            config, run.grid, run.patch, run.channels, run.mean, run.std
        )
        scaled = (torch.tensor(x, device=device) * 255 for x in (run.mean, run.std))
        self.mean_255, self.std_255 = scaled  # of uint8 pictures
        tokens = run.grid[0] * run.grid[1]
        # (picks per picture, values per mask). A mask hides channels of one patch, or patches of
        # one picture; the noise of "pixels" is for the pixels of one patch.
        shapes = {"patch": (1, tokens), "none": (0, 0), "pixels": (tokens, 3 * run.patch**2)}
        self.mask_positions, self.mask_width = shapes.get(config.mask.mode, (tokens, width))
        self.epoch = 0  # the newest epoch of training in a batch
        self.pools: dict[int, Future[Tensor]] = {}
        self.pool_thread = ThreadPoolExecutor(1)
        # The fused loss never stores the decoded target: 154 MB per 256 rows of 196 x 768 float32.
        loss = self._prediction_loss
        self.prediction_loss = torch.compile(loss) if config.train.compile else loss

    def stream(
        self, order: Order | EvalOrder, units: Sequence[Unit], unmasked_fraction: float = 0.0
    ) -> Stream:
        """Return the batches of `units` in `order`, with the mask picks of this run."""
        pool, seed, cls = self.config.mask.pool, self.config.train.seed, self.config.loss.cls
        source = CacheSource(
            units, self.run.size, self.mask_positions, pool, seed, unmasked_fraction, cls
        )
        return Stream(order, source)

    def masks(self, batch: Batch) -> Masks | None:
        """Return the mask pool of the batch's epoch and the batch's picks; None without masks."""
        if self.config.mask.mode == "none":
            return None
        # Held-out rows use the pool of epoch 0. A thread draws the next pool, which takes 0.2 s.
        self.epoch = max(self.epoch, batch["epoch"])
        needed = batch["epoch"], self.epoch, self.epoch + 1
        self.pools = {e: pool for e, pool in self.pools.items() if e == 0 or e in needed}
        for e in needed:
            if e not in self.pools:
                self.pools[e] = self.pool_thread.submit(self._pool, e)
        return self.pools[batch["epoch"]].result(), batch["picks"]

    def _pool(self, epoch: int) -> Tensor:
        """Return the mask pool of an epoch; its last mask hides nothing, for unmasked rows."""
        mask, seed = self.config.mask, self.config.train.seed
        shape, ratio = (mask.pool, self.mask_width), self.ratio(epoch)
        if mask.hides:
            pool: npt.NDArray[Any] = mask_pool(seed, epoch, *shape, ratio)
        else:
            # The noise of "gaussian" has the variance of dropout at this ratio.
            std = ratio if mask.mode == "pixels" else (ratio / (1 - ratio)) ** 0.5
            pool = noise_pool(seed, epoch, *shape, std)
        pool = np.concatenate([pool, np.zeros_like(pool[:1])])
        return torch.from_numpy(pool).to(self.accelerator.device)

    def ratio(self, epoch: int) -> float:
        """Return the mask ratio of an epoch; held-out rows use the ratio of epoch 0."""
        mask, last = self.config.mask, max(1, self.config.schedule.epochs - 1)
        if mask.final_ratio is None:
            return mask.ratio
        return mask.ratio + (mask.final_ratio - mask.ratio) * epoch / last

    def target(self, batch: Batch) -> Tensor:
        """Return the normalized float32 target of a batch, before any learned projection."""
        if self.config.target.features == "pixels":
            pictures_BHW3 = (batch["pictures"].float() - self.mean_255) / self.std_255
            return self.targets.normalize(unfold_patches(pictures_BHW3, self.run.patch))
        return cast(Tensor, self.targets(*map(batch.get, ("codes", "scale", "mean", "std"))))

    def loss(self, wrapped: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch in float32; with loss.cls, plus the mean squared error of CLS.

        The loss is computed outside the wrapped module, so autocast does not apply to it.
        """
        if self.model.target_projection is not None:
            return loss_fn(*wrapped(batch["pictures"], self.masks(batch), self.target(batch)))
        y_BNC = wrapped(batch["pictures"], self.masks(batch))
        # Without numbers, such as the epoch: torch.compile would recompile for each value. The rows
        # are not used.
        tensors = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k != "rows"}
        return self.prediction_loss(y_BNC, tensors)

    def _prediction_loss(self, y_BNC: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the patches' predictions [B, N, C]; with loss.cls, CLS comes first."""
        target_BNC = self.target(batch)
        loss = loss_fn(y_BNC[:, -target_BNC.shape[1] :], target_BNC)
        if not self.config.loss.cls:
            return loss
        return loss + loss_fn(y_BNC[:, 0], self.targets.normalize(batch["cls"]))
