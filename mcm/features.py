"""Features of pictures to probe: of full, folded or masked inputs, from the patch tokens, the class token or both.

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
POOL_ROWS = 4096  # masks to pick from for masked:K

Encode = Callable[[Tensor, npt.NDArray[np.int64]], Tensor]  # pictures [B, 3, H, W] and their rows to features [B, D]


@dataclass(frozen=True)
class Prober:
    """A backbone, the pictures to probe it with, and where it runs.

    `tokens` is "mean" (of the patch tokens), "cls" or "both"; `shots` is labels a class, 0 for all.
    Of `world` ranks, each encodes its own batches of rows.
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
        """Rows of "train" whose labels are used."""
        return training_rows(self.data.labels("train"), self.data.classes, self.shots, self.seed)

    def features(self, split: str, encode: Encode, rows: npt.NDArray[np.int64] | None = None) -> Features:
        """Features of a split's centre crops, or of some of its rows, in order."""
        quiet = self.quiet or rows is not None  # the many short passes that choose s
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
                x.append(encode(batch["pictures"].to(device()), batch["rows"].numpy()).float().cpu()[:kept])
                y.append(batch["labels"][:kept].clone())  # each tensor of a worker holds a file descriptor
                bar.update(kept)
        return Features(torch.cat(x), torch.cat(y))

    def full(self, model: Any = None) -> Encode:
        """Features of unmasked pictures."""
        module = (model or self.backbone.model).to(device()).eval()
        return lambda pictures, rows: pooled(module, encode_tokens(module, pictures), self.tokens)

    def folded(self, s: float) -> Encode:
        """Features of the encoder with x~ = e + s (x - e)."""
        masked: Any = self.backbone.masked
        model = copy.deepcopy(masked.encoder)
        model.load_state_dict(folded_state(masked.encoder, masked.encoder_fill, s))
        return self.full(model)

    def masked(self, passes: int) -> Encode:
        """Mean over `passes` fixed random masks a row, of the features."""
        whole: Any = self.backbone.masked
        model = whole.to(device()).eval()
        patches = model.encoder.patch_embed.num_patches
        width, positions = (patches, 1) if model.mode == "patch" else (model.encoder.embed_dim, patches)
        pool = torch.from_numpy(mask_pool(self.seed, 0, POOL_ROWS, width, model.ratio)).to(device())

        def encode(pictures: Tensor, rows: npt.NDArray[np.int64]) -> Tensor:
            total = torch.zeros((), device=device())
            for epoch in range(passes):
                picks = torch.from_numpy(mask_picks(self.seed, epoch, rows, positions, POOL_ROWS)).to(device())
                tokens_BND = model.tokens(pictures, model.mask((pool, picks)))
                total = total + pooled(model.encoder, tokens_BND, self.tokens)
            return total / passes

        return encode

    def held_out_knn(self, encode: Encode) -> float:
        """k-NN accuracy on a fifth of some training rows, by which choices are made; the rest is the bank.

        It is 0 where no class has a row to hold out.
        """
        rows = self.rows()
        parts = choice_rows(self.data.labels("train")[rows], self.seed)
        if not len(parts[1]):
            return 0.0
        bank, held = (self.features("train", encode, rows[part]) for part in parts)
        return knn_accuracy(bank, held, device())

    def encoder(self, kind: str, held_out: Callable[[Encode], float] | None = None) -> tuple[Encode, float | None]:
        """(encode, s) of an input called full, folded or masked:K.

        s is the one of {1, sqrt(1 - r), 1 - r} with the best `held_out` score, k-NN by default; the first wins ties.
        """
        if kind == "folded":
            masked: Any = self.backbone.masked
            kept = 1 - float(masked.ratio)
            score = held_out or self.held_out_knn
            s = max((1.0, kept**0.5, kept), key=lambda s: score(self.folded(s)))
            return self.folded(s), s
        return (self.full() if kind == "full" else self.masked(int(kind.partition(":")[2]))), None


def device() -> torch.device:
    """The accelerator, or the CPU."""
    torch.backends.cudnn.allow_tf32 = False  # the probes are float32: convolutions have TF32 by default
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
