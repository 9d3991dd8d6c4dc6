"""What masked channel modelling does with a batch: inputs, masks, target, loss, and figures of held-out rows.

B batch, N patches, D student width, C channels of the target, H W pixels, K pool rows, S samples.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from cache_tools.cache import Cache, Unit
from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.storage import write_atomic
from mcm.backbones import CROP_PCT, Backbone
from mcm.classifiers import Features, knn_hits
from mcm.config import PretrainConfig
from mcm.features import Prober
from mcm.loop import Job, evaluation_due, to_device
from mcm.masking import mask_pool
from mcm.metrics import COLLAPSED, Collapsed, HeldOut, collapse
from mcm.model import MaskedChannelModel, Masks, unfold_patches
from mcm.optim import build_adamw
from mcm.run_dir import PretrainRun
from mcm.sampler import EvalOrder, Order
from mcm.stream import Batch, CacheSource, Stream, batches
from mcm.targets import Stats, Targets, loss_fn

SAMPLES = 8


def channel_stats(units: Sequence[Unit]) -> tuple[Stats, Stats]:
    """Mean and std [C] of the features over all units, which have equally many rows."""
    means, stds = map(np.array, zip(*(unit.channel_stats() for unit in units), strict=True))
    mean = means.mean(0)
    return mean, np.sqrt((stds**2 + (means - mean) ** 2).mean(0))


class Task:
    """What masked channel modelling does with a batch: inputs, masks, targets, loss and held-out figures."""

    def __init__(
        self, config: PretrainConfig, run: PretrainRun, cache: Cache, units: Sequence[Unit], accelerator: Accelerator
    ) -> None:
        """Build the model, untrained, and the targets for the `units` of the cache."""
        self.config, self.run, self.accelerator = config, run, accelerator
        stats = channel_stats(units) if config.target.norm == "channel" else None
        joint = cache.projection() if config.target.features == "joint" else None
        targets = Targets(config.target, run.channels, config.student.width, stats, config.train.seed, joint)
        self.targets = targets.to(accelerator.device)
        self.model = model = MaskedChannelModel(config, run.grid, run.patch, run.channels, run.mean, run.std)
        device = accelerator.device
        self.mean, self.std = (torch.tensor(values, device=device) * 255 for values in (run.mean, run.std))
        tokens, width = run.grid[0] * run.grid[1], config.student.width
        self.positions, self.width = {"patch": (1, tokens), "none": (0, 0)}.get(config.mask.mode, (tokens, width))
        self.pools: dict[int, Future[Tensor]] = {}
        self.pool_thread = ThreadPoolExecutor(1)
        # Fused, the decoded target is never stored: 154 MB per 256 rows of 196 x 768 float32.
        self.compare = torch.compile(self._compare) if config.train.compile else self._compare
        learned = model.target_projection
        self.first_DC = None if learned is None else learned.weight.detach().clone().to(device)

    def job(
        self, out: Path, units: Sequence[Unit], order: Order, val: Sequence[Unit] = (), dataset: Dataset | None = None
    ) -> Job:
        """The training on `units` in `order`, evaluated on a val unit and a dataset where they are given.

        The rows that are shown in the report are of "train" where there is no val unit.
        """
        self.run_dir, self.has_val, self.dataset = out, bool(val), dataset
        held = self.source(val or units[:1])
        self.held = Stream(EvalOrder(held.units[0].rows, CHUNK_ROWS, order.batch, order.world, order.rank), held)
        self.shown = Stream(EvalOrder(held.units[0].rows, CHUNK_ROWS, CHUNK_ROWS), held)
        stream = Stream(order, self.source(units, self.config.mask.unmasked_fraction))
        optimizer = build_adamw(self.model, self.config.optim)
        return Job(out, self.model, optimizer, stream, self.loss, self.evaluate, self.config)

    def source(self, units: Sequence[Unit], unmasked_fraction: float = 0.0) -> CacheSource:
        """Batches of these units with this run's mask picks."""
        pool, seed, cls = self.config.mask.pool, self.config.train.seed, self.config.loss.cls
        return CacheSource(units, self.run.size, self.positions, pool, seed, unmasked_fraction, cls)

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

    def evaluate(self, epochs_done: int) -> dict[str, float]:
        """Held-out figures of this epoch; the last epoch has them all, whatever `train` says."""
        metrics = {} if self.first_DC is None else self.check_collapse(self.first_DC)
        if self.has_val and evaluation_due(self.config, self.config.train.eval_epochs, epochs_done):
            metrics |= self.held_out()
        if self.dataset is not None and evaluation_due(self.config, self.config.train.knn_epochs, epochs_done):
            metrics["knn_full"] = self.knn(self.dataset)
        return metrics

    @torch.inference_mode()
    def held_out(self) -> dict[str, float]:
        """Figures of the val unit at the mask ratio, with fixed masks, and unmasked; those per channel go to a file."""
        kinds = ["full"] if self.config.mask.mode == "none" else ["masked", "full"]
        channels = self.model.decoder.linear.out_features
        held = HeldOut(kinds, channels, self.config.student.width, self.accelerator.device)
        order = self.held.order
        assert isinstance(order, EvalOrder)
        with batches(self.held, 0, len(order), self.config.train.workers) as items, self.accelerator.autocast():
            for batch in items:
                batch = to_device(batch, self.accelerator.device)
                target = self.model.project(self.target(batch))
                for kind in kinds:
                    mask = self.model.mask(self.masks(batch)) if kind == "masked" else None
                    tokens = self.model.tokens(batch["pictures"], mask)
                    y = self.model.decode(tokens, mask)[:, -target.shape[1] :]
                    held.update(kind, tokens[:, 1:], y, target, mask, batch["weight"])
        held.reduce(lambda sums: cast(Tensor, self.accelerator.reduce(sums, "sum")))
        if self.accelerator.is_main_process:
            write_atomic(self.run_dir / "channels.safetensors", safetensors_bytes(held.channels()))
        return held.metrics()

    @torch.inference_mode()
    def check_collapse(self, first_DC: Tensor) -> dict[str, float]:
        """How much a learned target still varies on sixteen fixed rows.

        Raises: Collapsed once it is all but constant.
        """
        with batches(self.shown, 0, 1, workers=0) as items:
            target = self.target(to_device(next(items), self.accelerator.device))
        std, rank = collapse(self.model.project(target), target @ first_DC.T)
        if min(std, rank) < COLLAPSED:
            raise Collapsed(
                'target.projection = "learned" has collapsed:'
                f" expected channels that keep {COLLAPSED} of their first"
                f' std and effective rank; found {std:.3g} and {rank:.3g}; use "prediction" or "orthogonal"'
            )
        return {"target_std": std, "target_rank": rank}

    def knn(self, dataset: Dataset) -> float:
        """k-NN accuracy of the encoder's features of full pictures; each rank encodes and classifies its own rows."""
        run, encoder = self.run, self.model.encoder
        backbone = Backbone(encoder, "", "", run.size, run.mean, run.std, run.interpolation, CROP_PCT)
        prober = Prober(
            backbone, dataset, self.config.train.seed, self.config.train.workers, quiet=True,
            world=self.accelerator.num_processes, rank=self.accelerator.process_index,
        )  # fmt: skip
        bank, val = (prober.features(split, prober.full()) for split in ("train", "val"))
        hits = knn_hits(self.gathered(bank), val, self.accelerator.device)
        share = torch.tensor([hits, len(val.y)], device=self.accelerator.device)
        correct, rows = cast(Tensor, self.accelerator.reduce(share, "sum")).tolist()
        return float(correct / rows)

    def gathered(self, part: Features) -> Features:
        """The features of all ranks, on the device; ranks with fewer rows pad, and label -1 marks the padding."""
        device, accelerator = self.accelerator.device, self.accelerator
        padded = (accelerator.pad_across_processes(x.to(device), pad_index=-1) for x in (part.x, part.y))
        x, y = map(accelerator.gather, padded)
        return Features(x[y >= 0], y[y >= 0])

    @torch.inference_mode()
    def samples(self) -> dict[str, Tensor]:
        """Eight fixed rows for the report: views uint8 [S, H, W, 3], target and masked prediction float16 [S, N, C]."""
        with batches(self.shown, 0, 1, workers=0) as items:
            batch = to_device(next(items), self.accelerator.device)
        self.model.eval()
        target, mask = self.model.project(self.target(batch)), self.model.mask(self.masks(batch))
        with self.accelerator.autocast():
            y = self.model.decode(self.model.tokens(batch["pictures"], mask), mask)[:, -target.shape[1] :]
        shown = {"views": batch["pictures"], "target": target.half(), "prediction": y.half()}
        count = min(SAMPLES, int(batch["weight"].sum()))
        return {name: tensor[:count].cpu().contiguous() for name, tensor in shown.items()}
