"""Extraction of the features that probes classify: from full, folded or masked inputs.

Letters: B batch, N patches, D width, H W pixels.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_tools.console import progress
from cache_tools.dataset import Dataset
from mcm.augment import eval_transform
from mcm.backbones import Backbone, pooled
from mcm.classifiers import Features, choice_rows, knn_accuracy, training_rows
from mcm.masking import mask_picks, mask_pool
from mcm.model import encode_tokens, folded_state
from mcm.sampler import EvalOrder
from mcm.stream import DatasetSource, Stream, batches

BATCH_ROWS = 128
POOL_ROWS = 4096  # the number of masks in the pool of masked:K
FOLDS = (1.0, 0.75, 0.5, 0.25)  # the values of s, equal for every mask mode

# Maps pictures [B, 3, H, W] and their row numbers to features [B, D].
Encode = Callable[[Tensor, npt.NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Featurizer:
    """A backbone, and the pictures whose features it computes.

    `tokens` is "mean" (of the patch tokens), "cls", "both" or "patch".
    `shots` is the number of labels per class, 0 for all.
    Each of `world` ranks encodes its own batches of rows.
    """

    backbone: Backbone
    data: Dataset
    seed: int
    workers: int
    quiet: bool
    tokens: str = "mean"
    shots: int = 0
    world: int = 1
    rank: int = 0

    def rows(self) -> npt.NDArray[np.int64]:
        """Return the rows of "train" whose labels are used."""
        return training_rows(self.data.labels("train"), self.data.classes, self.shots, self.seed)

    def features(
        self, split: str, encode: Encode, rows: npt.NDArray[np.int64] | None = None
    ) -> Features:
        """Return the features of a split's centre crops, or of the crops of `rows`, in order."""
        quiet = self.quiet or rows is not None  # choosing s takes many short passes
        source = DatasetSource(self.data, split, eval_transform(self.backbone), self.seed, rows)
        order = EvalOrder(len(source.rows), 1, BATCH_ROWS, self.world, self.rank)
        x, y = [], []
        with (
            torch.inference_mode(),
            batches(Stream(order, source), 0, len(order), self.workers) as items,
            progress(order.rows, f"features of {split}", "pictures", quiet=quiet) as bar,
        ):
            for batch in items:
                kept = int(batch["weight"].sum())
                found = encode(batch["pictures"].to(device()), batch["rows"].numpy())
                x.append(found.float().cpu()[:kept])
                # A copy, because each tensor of a worker holds a file descriptor.
                y.append(batch["labels"][:kept].clone())
                bar.update(kept)
        return Features(torch.cat(x), torch.cat(y))

    def full(self, model: Any = None) -> Encode:
        """Return the encode function of unmasked pictures."""
        module = (model or self.backbone.model).to(device()).eval()
        return lambda pictures, rows: pooled(module, encode_tokens(module, pictures), self.tokens)

    def folded(self, s: float) -> Encode:
        """Return the encode function with x~ = e + s (x - e) folded into the patch embedding."""
        masked: Any = self.backbone.masked
        model = copy.deepcopy(masked.encoder)
        model.load_state_dict(folded_state(masked.encoder, masked.encoder_fill, s))
        return self.full(model)

    def masked(self, passes: int) -> Encode:
        """Return the encode function that averages over `passes` fixed random masks per row."""
        whole: Any = self.backbone.masked
        model = whole.to(device()).eval()
        patches = model.encoder.patch_embed.num_patches
        by_patch = model.mode == "patch"
        width, positions = (patches, 1) if by_patch else (model.encoder.embed_dim, patches)
        pool = torch.from_numpy(mask_pool(self.seed, 0, POOL_ROWS, width, model.ratio)).to(device())

        def encode(pictures: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
            total = torch.zeros((), device=device())
            for epoch in range(passes):
                picks = torch.from_numpy(mask_picks(self.seed, epoch, rows, positions, POOL_ROWS))
                tokens_BND = model.tokens(pictures, model.mask((pool, picks.to(device()))))
                total = total + pooled(model.encoder, tokens_BND, self.tokens)
            return total / passes

        return encode

    def held_out_knn(self, encode: Encode) -> float:
        """Return the k-NN accuracy on held-out training rows, which chooses s.

        A fifth of the rows of `choice_rows` is held out; the rest is the bank.
        Return 0 where no class has a row to hold out.
        """
        rows = self.rows()
        parts = choice_rows(self.data.labels("train")[rows], self.seed)
        if not len(parts[1]):
            return 0.0
        bank, held = (self.features("train", encode, rows[part]) for part in parts)
        return knn_accuracy(bank, held, device())

    def encoder(
        self, kind: str, held_out: Callable[[Encode], float] | None = None
    ) -> tuple[Encode, float | None]:
        """Return (encode, s) of the input "full", "folded" or "masked:K"; s is None unless folded.

        s is the value of FOLDS with the best `held_out` score, by default `held_out_knn`. The first
        value wins ties.
        """
        if kind == "folded":
            score = held_out or self.held_out_knn
            s = max(FOLDS, key=lambda s: score(self.folded(s)))
            return self.folded(s), s
        return self.full() if kind == "full" else self.masked(int(kind.partition(":")[2])), None


def device() -> torch.device:
    """Return the GPU, or the CPU where there is none; turn TF32 convolutions off."""
    torch.backends.cudnn.allow_tf32 = False  # probes compute in float32; cuDNN's default is TF32
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
