"""Evaluation during pre-training: held-out figures, k-NN accuracy, collapse of a learned target, samples.

Every rank evaluates its share, each row once.
B batch, N patches, D student width, C channels of the target, H W pixels, S samples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from cache_tools.cache import Unit
from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.storage import write_atomic
from mcm.backbones import CROP_PCT, Backbone
from mcm.classifiers import Features, knn_hits
from mcm.features import Prober
from mcm.loop import evaluation_due, to_device
from mcm.metrics import COLLAPSED, Collapsed, HeldOut, collapse
from mcm.objective import Objective
from mcm.sampler import EvalOrder, Order
from mcm.stream import batches

SAMPLES = 8


class Evaluation:
    """What a run evaluates at the end of an epoch: a unit of "val" and a DATASET, where they are given."""

    def __init__(
        self, run_dir: Path, objective: Objective, units: Sequence[Unit], val: Sequence[Unit], order: Order,
        dataset: Dataset | None,
    ) -> None:  # fmt: skip
        """Use the batch and the ranks of `order`. Samples are rows of "train" where there is no unit of "val"."""
        self.run_dir, self.objective, self.dataset, self.has_val = run_dir, objective, dataset, bool(val)
        self.model, self.config, self.accelerator = objective.model, objective.config, objective.accelerator
        held = val or units[:1]
        self.order = EvalOrder(held[0].rows, CHUNK_ROWS, order.batch, order.world, order.rank)
        self.held = objective.stream(self.order, held)
        self.shown = objective.stream(EvalOrder(held[0].rows, CHUNK_ROWS, CHUNK_ROWS), held)
        learned = self.model.target_projection
        self.first_DC = None if learned is None else learned.weight.detach().clone().to(self.accelerator.device)

    def __call__(self, epochs_done: int) -> dict[str, float]:
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
        with batches(self.held, 0, len(self.order), self.config.train.workers) as items, self.accelerator.autocast():
            for batch in items:
                batch = to_device(batch, self.accelerator.device)
                target = self.model.project(self.objective.target(batch))
                for kind in kinds:
                    mask = self.model.mask(self.objective.masks(batch)) if kind == "masked" else None
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
            target = self.objective.target(to_device(next(items), self.accelerator.device))
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
        run, encoder = self.objective.run, self.model.encoder
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
        target, mask = self.model.project(self.objective.target(batch)), self.model.mask(self.objective.masks(batch))
        with self.accelerator.autocast():
            y = self.model.decode(self.model.tokens(batch["pictures"], mask), mask)[:, -target.shape[1] :]
        shown = {"views": batch["pictures"], "target": target.half(), "prediction": y.half()}
        count = min(SAMPLES, int(batch["weight"].sum()))
        return {name: tensor[:count].cpu().contiguous() for name, tensor in shown.items()}
