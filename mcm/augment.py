"""Augmentation for fine-tuning and probing: timm's transforms, erasing and mixup, seeded by hash.

The loading processes transform uint8 pictures. The device normalizes, erases and mixes them.
Each result is a pure function of its seed. B batch, K classes, H W pixels.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import posterize
from torch import Tensor
from torch.nn import functional

from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import CorruptionError
from cache_tools.images import RGB, PictureRefused, decode_rgb
from cache_tools.rng import hash_u64, uniform
from mcm.backbones import Backbone
from mcm.config import Augment

ERASED, ASPECT = (0.02, 1 / 3), 0.3  # share of the area, and least aspect ratio, of an erased box


class SeededTransform:
    """A timm transform that takes a seed: (seed, bytes) -> picture uint8 [3, H, W]."""

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
    """Return the training transform: random resized crop, flip and RandAugment."""
    transform = create_transform(
        (3, *backbone.size),
        is_training=True,
        scale=(augment.scale_min, 1.0),
        hflip=augment.flip,
        color_jitter=None,
        auto_augment=augment.recipe or None,
        interpolation=backbone.interpolation,
        mean=backbone.mean,  # the color that RandAugment fills with
        normalize=False,
    )
    for part in transform.transforms:
        for op in getattr(part, "ops", None) or sum(getattr(part, "policy", []), []):
            if op.name.startswith("Posterize"):
                op.aug_fn = _posterize
    return SeededTransform(transform)


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel by timm's operation; the result of 0 bits is black.

    RandAugment at magnitude 9 asks for 0 bits in 1 of 631 pictures, which Pillow 13 refuses.
    """
    black = Image.new(image.mode, image.size)
    return black if bits < 1 else posterize(image, bits)


def eval_transform(backbone: Backbone, whole: bool = False) -> SeededTransform:
    """Return the evaluation transform, resize and center crop, which ignores the seed.

    With `whole`, it resizes the whole picture instead, without its aspect ratio.
    """
    transform = create_transform(
        (3, *backbone.size),
        interpolation=backbone.interpolation,
        normalize=False,
        crop_pct=1.0 if whole else backbone.crop_pct,
        crop_mode="squash" if whole else "center",
    )
    return SeededTransform(transform)


def erase(pictures_B3HW: Tensor, rows_B: Tensor, epoch: int, probability: float, seed: int) -> None:
    """Fill a random box of some normalized pictures with normal noise, in place.

    The distribution is that of timm's RandomErasing, but a side that would not fit is shortened.
    The draws depend on (seed, epoch, row), and the noise also on the kind of device.
    """
    (height, width), device, rows = pictures_B3HW.shape[2:], pictures_B3HW.device, rows_B.numpy()
    draws_B5 = uniform(seed, "erasing", epoch, rows[:, None], np.arange(5))
    seeds_B, noise = hash_u64(seed, "erasing_noise", epoch, rows), torch.Generator(device)
    for i in np.flatnonzero(draws_B5[:, 0] < probability).tolist():
        _, share, shape, down, across = draws_B5[i].tolist()
        area = height * width * (ERASED[0] + share * (ERASED[1] - ERASED[0]))
        aspect = ASPECT ** (1 - 2 * shape)
        h = min(round(math.sqrt(area * aspect)), height - 1)
        w = min(round(math.sqrt(area / aspect)), width - 1)
        top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
        noise.manual_seed(int(seeds_B[i]))
        box_3hw = torch.randn(3, h, w, generator=noise, device=device)
        pictures_B3HW[i, :, top : top + h, left : left + w] = box_3hw


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
