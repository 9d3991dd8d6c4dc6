"""Batches of pictures with masks: random crops for training, and whole pictures for evaluation.

A crop is a pure function of (seed, epoch, row). B batch, S pixels of the crop, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from cache_tools.dataset import Dataset
from cache_tools.images import RGB
from cache_tools.labels import IGNORED, Mask
from cache_tools.rng import hash_u64
from mcm.augment import decoded, seeded
from mcm.config import Segment
from mcm.sampler import Indices
from mcm.stream import Batch, RowSource

LONGEST = 4  # the longer side of an evaluated picture, in crops
CROPS = 10  # tries for a crop in which no class covers more than `segment.max_share`


class SceneSource(RowSource):
    """Batches of the pictures of a DATASET with masks; one row is one chunk.

    A training batch has pictures uint8 [B, S, S, 3], masks uint8 [B, S, S] and rows [B]. An
    evaluation batch has lists: pictures uint8 [H, W, 3] with the crop as shorter side, their
    extents (without the border that fills the crop), and the masks of the source pictures.
    """

    def __init__(
        self, dataset: Dataset, split: str, segment: Segment, mean: Sequence[float], seed: int,
        training: bool,
    ) -> None:  # fmt: skip
        super().__init__(dataset, split, seed)
        self.segment, self.training = segment, training
        self.color = [255 * value for value in mean]
        low, high = (round(segment.crop * scale) for scale in segment.scale)
        fill = {tv_tensors.Image: self.color, tv_tensors.Mask: IGNORED}
        distort = [v2.RandomPhotometricDistort()] if segment.photometric else []
        self.resize = v2.RandomResize(low, high + 1)  # of the shorter side
        self.crop = v2.RandomCrop(segment.crop, pad_if_needed=True, fill=fill)
        self.finish = v2.Compose([v2.RandomHorizontalFlip(segment.flip), *distort])

    def __call__(self, epoch: int, chunks: Indices, batch: int, used: Batch | None = None) -> Batch:
        """Return the batch of the rows; `used` is ignored."""
        rows, scenes = self.rows[chunks], list[tuple[Any, ...]]()
        for row in rows.tolist():
            rgb_HW3 = decoded(self.dataset.picture(self.split, row)[0])
            mask_HW = self.dataset.mask(self.split, row)
            if self.training:
                seed = int(hash_u64(self.seed, "augment", epoch, row))
                scenes.append(self.augmented(rgb_HW3, mask_HW, seed))
            else:
                picture_HW3, extent = for_windows(rgb_HW3, self.segment.crop, self.color)
                scenes.append((picture_HW3, torch.tensor(mask_HW), extent))
        names = ("pictures", "masks") if self.training else ("pictures", "masks", "extents")
        columns = zip(*scenes, strict=True) if scenes else [()] * len(names)
        gather: Any = torch.stack if self.training else list
        out: Batch = dict(zip(names, map(gather, columns), strict=True))
        return out | {"rows": torch.from_numpy(rows), "epoch": epoch}

    def augmented(self, rgb_HW3: RGB, mask_HW: Mask, seed: int) -> tuple[Tensor, Tensor]:
        """Return a random crop [S, S, 3] and its mask [S, S]; padding has the label IGNORED."""
        picture = tv_tensors.Image(torch.tensor(rgb_HW3).permute(2, 0, 1))
        with seeded(seed):
            scene = self.resize(picture, tv_tensors.Mask(torch.tensor(mask_HW)))
            for _ in range(CROPS):
                picture, mask = self.crop(*scene)
                counts = mask.flatten().bincount(minlength=IGNORED)[:IGNORED]
                if counts.max() <= self.segment.max_share * counts.sum():
                    break
            picture, mask = self.finish(picture, mask)
        return picture.permute(1, 2, 0).as_subclass(Tensor), mask.as_subclass(Tensor)


def for_windows(rgb_HW3: RGB, crop: int, color: Sequence[float]) -> tuple[Tensor, tuple[int, int]]:
    """Return the picture with the shorter side `crop`, and its height and width.

    If the longer side would exceed LONGEST crops, it is limited, and a border of `color` fills the
    crop.
    """
    picture = torch.tensor(rgb_HW3).permute(2, 0, 1)
    picture = functional.resize(picture, [crop], max_size=LONGEST * crop)
    height, width = picture.shape[1:]
    missing = [0, 0, max(0, crop - width), max(0, crop - height)]
    picture = functional.pad(picture, missing, fill=list(color))
    return picture.permute(1, 2, 0), (height, width)
