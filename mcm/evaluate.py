"""Evaluation of pre-training: held-out metrics, k-NN accuracy, collapse check, samples.

The ranks share the rows, and each row is evaluated once.
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
from mcm.engine import to_device
from mcm.features import Featurizer
from mcm.loop import evaluation_due
from mcm.metrics import COLLAPSED, Collapsed, HeldOut, collapse
from mcm.objective import Objective
from mcm.sampler import EvalOrder, Order
from mcm.stream import batches

SAMPLES = 8


class Evaluation:
    """The evaluation at the end of an epoch, on a unit of "val" and a DATASET if they are given."""

    def __init__(
        self, run_dir: Path, objective: Objective, units: Sequence[Unit], val: Sequence[Unit],
        order: Order, dataset: Dataset | None,
    ) -> None:  # fmt: skip
        """Evaluate "val" in batches of `order`; without "val", samples come from "train"."""
        self.run_dir, self.objective, self.dataset = run_dir, objective, dataset
        self.model, self.config = objective.model, objective.config
        self.accelerator, self.has_val = objective.accelerator, bool(val)
        held_out = val or units[:1]
        rows = held_out[0].rows
        self.order = EvalOrder(rows, CHUNK_ROWS, order.batch, order.world, order.rank)
        self.stream = objective.stream(self.order, held_out)
        self.first_rows = objective.stream(EvalOrder(rows, CHUNK_ROWS, CHUNK_ROWS), held_out)
        learned, device = self.model.target_projection, self.accelerator.device
        self.first_DC = None if learned is None else learned.weight.detach().clone().to(device)

    def __call__(self, epochs_done: int) -> dict[str, float]:
        """Return the metrics that are due after this epoch; after the last epoch, all are due."""
        settings = self.config.train
        metrics = {} if self.first_DC is None else self.check_collapse(self.first_DC)
        if self.has_val and evaluation_due(self.config, settings.eval_epochs, epochs_done):
            metrics |= self.held_out()
        knn_due = evaluation_due(self.config, settings.knn_epochs, epochs_done)
        if self.dataset is not None and knn_due:
            metrics["knn_full"] = self.knn(self.dataset)
        return metrics

    @torch.inference_mode()
    def held_out(self) -> dict[str, float]:
        """Return the metrics of the val unit on masked and on full inputs; the masks are fixed.

        "filled" is a full input whose tokens get the second fill, as the decoder is trained.
        The main rank writes the metrics per channel to RUN/channels.safetensors.
        """
        model, workers = self.model, self.config.train.workers
        has_masks = self.config.mask.mode != "none"
        kinds = ["masked", "full"] if has_masks else ["full"]
        kinds += ["filled"] if model.decoder_fill is not None else []
        channels = model.decoder.linear.out_features
        held = HeldOut(kinds, channels, self.config.student.width, self.accelerator.device)
        val_batches = batches(self.stream, 0, len(self.order), workers)
        with val_batches as items, self.accelerator.autocast():
            for batch in items:
                batch = to_device(batch, self.accelerator.device)
                target = model.project(self.objective.target(batch))
                mask = model.mask(self.objective.masks(batch))
                tokens = model.tokens(batch["pictures"])
                for kind in kinds:
                    h = model.tokens(batch["pictures"], mask) if kind == "masked" else tokens
                    y = model.decode(h, None if kind == "full" else mask)[:, -target.shape[1] :]
                    held.update(kind, h[:, 1:], y, target, batch["weight"])
        held.reduce(lambda sums: cast(Tensor, self.accelerator.reduce(sums, "sum")))
        if self.accelerator.is_main_process:
            write_atomic(self.run_dir / "channels.safetensors", safetensors_bytes(held.channels()))
        return held.metrics()

    @torch.inference_mode()
    def check_collapse(self, first_DC: Tensor) -> dict[str, float]:
        """Return the relative std and effective rank of a learned target on 16 fixed rows.

        Raises: Collapsed if one of them is below COLLAPSED.
        """
        with batches(self.first_rows, 0, 1, workers=0) as items:
            target = self.objective.target(to_device(next(items), self.accelerator.device))
        std, rank = collapse(self.model.project(target), target @ first_DC.T)
        if min(std, rank) < COLLAPSED:
            raise Collapsed(
                'target.projection = "learned" has collapsed: expected at least'
                f" {COLLAPSED} of the first std and effective rank;"
                f' found {std:.3g} and {rank:.3g}; use "prediction" or "orthogonal"'
            )
        return {"target_std": std, "target_rank": rank}

    def knn(self, dataset: Dataset) -> float:
        """Return the k-NN accuracy of the encoder's features on full pictures.

        Each rank encodes and classifies its own rows.
        """
        run, vit = self.objective.run, self.model.encoder
        backbone = Backbone(vit, "", run.size, run.mean, run.std, run.interpolation, CROP_PCT)
        featurizer = Featurizer(
            backbone, dataset, self.config.train.seed, self.config.train.workers, quiet=True,
            world=self.accelerator.num_processes, rank=self.accelerator.process_index,
        )  # fmt: skip
        splits = ("train", "val")
        (bank,), (val,) = (featurizer.features(split, [featurizer.full()]) for split in splits)
        hits = knn_hits(self.gathered(bank), val, self.accelerator.device)
        counts = torch.tensor([int(hits.sum()), len(hits)], device=self.accelerator.device)
        correct, rows = cast(Tensor, self.accelerator.reduce(counts, "sum")).tolist()
        return float(correct / rows)

    def gathered(self, features: Features) -> Features:
        """Return the features of all ranks on the device; label -1 marks a rank's padding."""
        device, pad = self.accelerator.device, self.accelerator.pad_across_processes
        padded = (pad(x.to(device), pad_index=-1) for x in (features.x, features.y))
        x, y = map(self.accelerator.gather, padded)
        return Features(x[y >= 0], y[y >= 0])

    @torch.inference_mode()
    def samples(self) -> dict[str, Tensor]:
        """Return eight fixed rows for the report.

        views uint8 [S, H, W, 3]; target and prediction (from masked inputs) float16 [S, N, C].
        """
        with batches(self.first_rows, 0, 1, workers=0) as items:
            batch = to_device(next(items), self.accelerator.device)
        self.model.eval()
        target = self.model.project(self.objective.target(batch))
        mask = self.model.mask(self.objective.masks(batch))
        with self.accelerator.autocast():
            y = self.model.decode(self.model.tokens(batch["pictures"], mask), mask)
        prediction = y[:, -target.shape[1] :].half()
        tensors = {"views": batch["pictures"], "target": target.half(), "prediction": prediction}
        count = min(SAMPLES, int(batch["weight"].sum()))
        return {name: tensor[:count].cpu().contiguous() for name, tensor in tensors.items()}
