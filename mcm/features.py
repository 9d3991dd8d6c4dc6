"""Extraction of the features that probes classify: from full, folded or masked inputs.

B batch, N patches, D width, H W pixels.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from mcm.corruptions import Corruption
from mcm.engine import device
from mcm.masking import mask_picks, mask_pool
from mcm.model import encode_tokens, folded_state
from mcm.sampler import EvalOrder
from mcm.stream import DatasetSource, Stream, batches

BATCH_ROWS, BATCH_PICTURES = 128, 32  # per forward; pictures of which every patch token is kept
POOL_ROWS = 4096  # the number of masks in the pool of masked:K
FOLDS = (1.0, 0.75, 0.5, 0.25)  # the values of s, equal for every mask mode

Rows = npt.NDArray[np.int64]
# Maps pictures [B, 3, H, W] and their row numbers to features [B, D].
Encode = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Featurizer:
    """A backbone, and the pictures whose features it computes.

    `tokens` is "mean" (of the patch tokens), "cls", "both", or "patch": every patch token, of
    pictures resized without a crop.
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

    def rows(self) -> Rows:
        """Return the rows of "train" whose labels are used."""
        return training_rows(self.data.labels("train"), self.data.classes, self.shots, self.seed)

    def features(
        self, split: str, encodes: Sequence[Encode], rows: Rows | None = None,
        corruptions: Sequence[Corruption | None] = (None,),
    ) -> list[Features]:  # fmt: skip
        """Return the features of a split, or of its `rows`, in order, as `encoded` yields them."""
        x, y = [list[Tensor]() for _ in corruptions for _ in encodes], []
        for _, labels_B, parts in self.encoded(split, encodes, rows, corruptions):
            for found, part in zip(x, parts, strict=True):
                found.append(part.cpu())
            # A copy, because each tensor of a worker holds a file descriptor.
            y.append(labels_B.clone())
        return [Features(torch.cat(found), torch.cat(y)) for found in x]

    @torch.no_grad()
    def encoded(
        self, split: str, encodes: Sequence[Encode], rows: Rows | None = None,
        corruptions: Sequence[Corruption | None] = (None,),
    ) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:  # fmt: skip
        """Yield the row numbers, labels and float32 features of each batch of center crops.

        The features are on the device: for each corruption in turn, one entry per encode function.
        Every picture is decoded once. A GPU encodes in bfloat16. "patch" takes whole pictures.
        """
        transform = eval_transform(self.backbone, whole=self.tokens == "patch")
        source = DatasetSource(self.data, split, transform, self.seed, rows)
        order = EvalOrder(len(source.rows), 1, self.batch, self.world, self.rank)
        stream, place = Stream(order, source), device()
        patch, on_gpu = self.backbone.model.patch_embed.patch_size[0], place.type == "cuda"
        with (
            batches(stream, 0, len(order), self.workers, pin_memory=on_gpu) as items,
            progress(order.rows, f"features of {split}", "pictures", quiet=self.quiet) as bar,
        ):
            for batch in items:
                pictures = batch["pictures"].to(place, non_blocking=True)
                numbers, kept, parts = batch["rows"].numpy(), int(batch["weight"].sum()), []
                for corruption in corruptions:
                    draws = numbers, self.seed, patch
                    x_B3HW = pictures if corruption is None else corruption(pictures, *draws)
                    x_B3HW = self.backbone.normalized(x_B3HW)
                    with torch.autocast(place.type, torch.bfloat16, enabled=on_gpu):
                        parts += [encode(x_B3HW, numbers)[:kept].float() for encode in encodes]
                yield batch["rows"][:kept], batch["labels"][:kept], parts
                bar.update(kept)

    def inputs(
        self, kinds: Sequence[str], wanted: Iterable[str], corruptions: Sequence[Corruption] = ()
    ) -> Iterator[tuple[str, str, float | None, Features, list[Features]]]:
        """Yield (tokens, kind, s, train, vals) for each pair of features and input.

        `vals` are the features of "val" as it is and with each corruption. s is None unless the
        input is "folded". All pairs share one decode of the pictures. If s is chosen by a part of
        the rows, they are decoded once more, before the others.
        """
        rows, wanted, scales = self.rows(), tuple(wanted), dict[str, float]()
        choice = choice_rows(self.data.labels("train")[rows], self.seed)
        folds = {s: self.folded(s) for s in FOLDS} if "folded" in kinds else {}
        if folds and sum(map(len, choice)) < len(rows):
            few = self.features("train", list(folds.values()), rows[np.concatenate(choice)])
            bank, held = np.split(np.arange(len(few[0].y)), [len(choice[0])])
            scales = self.scales(dict(zip(folds, few, strict=True)), bank, held, wanted)
            folds = {s: folds[s] for s in scales.values()}
        encodes: dict[str | float, Encode] = {k: self.encoder(k) for k in kinds if k != "folded"}
        encodes.update((s, folds[s]) for s in folds)
        train = dict(zip(encodes, self.features("train", [*encodes.values()], rows), strict=True))
        if folds and not scales:
            scales = self.scales({s: train[s] for s in folds}, *choice, wanted)
        for rejected in folds.keys() - scales.values():
            del encodes[rejected], train[rejected]
        found = iter(self.features("val", [*encodes.values()], None, (None, *corruptions)))
        vals = [dict(zip(encodes, found, strict=False)) for _ in (None, *corruptions)]
        for tokens in wanted:
            for kind in kinds:
                s = scales[tokens] if kind == "folded" else None
                key = kind if s is None else s
                first, *others = (columns(x[key], tokens, self.width) for x in (train, *vals))
                yield tokens, kind, s, first, others

    def scales(
        self, folded: Mapping[float, Features], bank: Rows, held: Rows, wanted: Iterable[str]
    ) -> dict[str, float]:
        """Return, for each kind of features, the s with the best k-NN accuracy on held-out rows.

        The first value wins ties, and is used if no row is held out.
        """

        def accuracy(s: float, tokens: str) -> float:
            part = columns(folded[s], tokens, self.width)
            return knn_accuracy(part.rows(bank), part.rows(held), device()) if len(held) else 0.0

        return {name: max(folded, key=lambda s: accuracy(s, name)) for name in wanted}

    @property
    def batch(self) -> int:
        """The number of pictures per forward."""
        return BATCH_PICTURES if self.tokens == "patch" else BATCH_ROWS

    @property
    def width(self) -> int:
        """The number of channels of a token."""
        return int(self.backbone.model.embed_dim)

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

        def encode(pictures: Tensor, rows: Rows) -> Tensor:
            total = torch.zeros((), device=device())
            for epoch in range(passes):
                picks = torch.from_numpy(mask_picks(self.seed, epoch, rows, positions, POOL_ROWS))
                tokens_BND = model.tokens(pictures, model.mask((pool, picks.to(device()))))
                total = total + pooled(model.encoder, tokens_BND, self.tokens)
            return total / passes

        return encode

    def encoder(self, kind: str, s: float | None = None) -> Encode:
        """Return the encode function of the input "full", "folded" by `s`, or "masked:K"."""
        if s is not None:
            return self.folded(s)
        return self.full() if kind == "full" else self.masked(int(kind.partition(":")[2]))


def columns(part: Features, tokens: str, width: int) -> Features:
    """Return the features "mean", "cls" or "both" of features [R, D] or [R, 2 D] with CLS."""
    chosen = {"mean": slice(width), "cls": slice(width, None)}.get(tokens, slice(None))
    return Features(part.x[:, chosen], part.y)
