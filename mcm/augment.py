"""Augmentation for fine-tuning and probing: timm's transforms and mixup with hashed seeds.

Each result is a pure function of its seed. B batch, K classes, H W pixels.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.nn import functional

from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import CorruptionError
from cache_tools.images import RGB, PictureRefused, decode_rgb
from cache_tools.rng import hash_u64
from mcm.backbones import Backbone
from mcm.config import Augment


class SeededTransform:
    """A timm transform that takes a seed: (seed, bytes) -> picture [3, H, W]."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, seed: int, data: bytes) -> Tensor:
        """Return the picture, decoded and transformed."""
        with seeded(seed):
            pixels: Tensor = self.transform(Image.fromarray(decoded(data)))
        return pixels


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the three global generators that timm uses, and restore their states afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed % 2**63)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def decoded(data: bytes) -> RGB:
    """Return the pixels uint8 [H, W, 3] of a picture that decoded when it was sharded."""
    try:
        return decode_rgb(data)
    except PictureRefused as error:
        raise CorruptionError(
            f"expected a picture that decoded when it was sharded; found {error}"
        ) from error


def train_transform(augment: Augment, backbone: Backbone) -> SeededTransform:
    """Return the training transform: random resized crop, flip, RandAugment and erasing."""
    transform = create_transform(
        (3, *backbone.size),
        is_training=True,
        scale=(augment.scale_min, 1.0),
        hflip=augment.flip,
        color_jitter=None,
        auto_augment=augment.recipe or None,
        interpolation=backbone.interpolation,
        mean=backbone.mean,
        std=backbone.std,
        re_prob=augment.erasing,
        re_mode="pixel",
    )
    for part in transform.transforms:
        for op in getattr(part, "ops", None) or sum(getattr(part, "policy", []), []):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return SeededTransform(transform)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel, as timm does; the result of 0 bits is black.

    RandAugment at magnitude 9 asks for 0 bits in 1 of 631 pictures. Pillow 13 then raises
    ValueError; Pillow 12 and earlier return a black picture.
    """
    if bits < 1:
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def eval_transform(
    backbone: Backbone, whole: bool = False, normalize: bool = True
) -> SeededTransform:
    """Return the evaluation transform, resize and center crop, which ignores the seed.

    With `whole`, it resizes the whole picture instead, without its aspect ratio. Without
    `normalize`, its pictures are uint8, for `normalized` on the device.
    """
    transform = create_transform(
        (3, *backbone.size),
        interpolation=backbone.interpolation,
        mean=backbone.mean,
        std=backbone.std,
        normalize=normalize,
        crop_pct=1.0 if whole else backbone.crop_pct,
        crop_mode="squash" if whole else "center",
    )
    return SeededTransform(transform)


def normalized(pictures_B3HW: Tensor, backbone: Backbone) -> Tensor:
    """Return uint8 pictures as normalized float32, without a copy of mean and std to the device."""
    x_B3HW = pictures_B3HW.float() / 255
    for color, (mean, std) in enumerate(zip(backbone.mean, backbone.std, strict=True)):
        x_B3HW[:, color].sub_(mean).div_(std)
    return x_B3HW


class Mixer:
    """timm's Mixup and CutMix in groups of 16 rows, independent of batch split and world size.

    The seed of a group is a hash of (seed, epoch, first row of the group). Label smoothing follows
    timm.
    """

    def __init__(self, augment: Augment, num_classes: int, seed: int) -> None:
        self.seed, self.num_classes, self.smoothing = seed, num_classes, augment.smoothing
        alphas = augment.mixup, augment.cutmix
        kwargs = {"label_smoothing": augment.smoothing, "num_classes": num_classes}
        self.mixup = Mixup(*alphas, **kwargs) if any(alphas) else None

    def __call__(
        self, pictures_B3HW: Tensor, labels_B: Tensor, rows_B: Tensor, epoch: int
    ) -> tuple[Tensor, Tensor]:
        """Mix the pictures in place; return them and the soft targets [B, K]."""
        if self.mixup is None:
            one_hot_BK = functional.one_hot(labels_B.long(), self.num_classes)
            hard_BK = one_hot_BK.to(pictures_B3HW.dtype) * (1 - self.smoothing)
            return pictures_B3HW, hard_BK + self.smoothing / self.num_classes
        targets = []
        seeds = hash_u64(self.seed, "mixup", epoch, rows_B[::CHUNK_ROWS].numpy())
        for start, seed in zip(range(0, len(rows_B), CHUNK_ROWS), seeds, strict=True):
            group = slice(start, start + CHUNK_ROWS)
            with seeded(int(seed)):
                targets.append(self.mixup(pictures_B3HW[group], labels_B[group])[1])
        return pictures_B3HW, torch.cat(targets)
