"""Pictures for fine-tuning and probing: timm's transforms and mixup, each a pure function of a hashed seed.

Letters: B batch, K classes, H W pixels.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
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
    """(seed, picture bytes) -> float32 [3, H, W], normalised: a timm transform that draws only what `seed` gives."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, seed: int, data: bytes) -> Tensor:
        """One decoded, transformed, normalised picture."""
        with _seeded(seed):
            pixels: Tensor = self.transform(Image.fromarray(_decoded(data)))
        return pixels


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the three global generators that timm draws from, and restore their states afterwards."""
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


def _decoded(data: bytes) -> RGB:
    try:
        return decode_rgb(data)
    except PictureRefused as error:
        raise CorruptionError(f"expected a picture that was good when it was sharded; found {error}") from error


def train_transform(augment: Augment, spec: Backbone) -> SeededTransform:
    """Random resized crop, flip, RandAugment and erasing, as `augment` says."""
    return SeededTransform(
        create_transform(
            (3, *spec.size),
            is_training=True,
            scale=(augment.scale_min, 1.0),
            hflip=augment.flip,
            color_jitter=None,
            auto_augment=augment.recipe or None,
            interpolation=spec.interpolation,
            mean=spec.mean,
            std=spec.std,
            re_prob=augment.erasing,
            re_mode="pixel",
        )
    )


def eval_transform(spec: Backbone, whole: bool = False) -> SeededTransform:
    """Resize and centre crop, or squash the `whole` picture to the size; the seed changes nothing."""
    return SeededTransform(
        create_transform(
            (3, *spec.size),
            interpolation=spec.interpolation,
            mean=spec.mean,
            std=spec.std,
            crop_pct=1.0 if whole else spec.crop_pct,
            crop_mode="squash" if whole else "center",
        )
    )


class Mixer:
    """timm's Mixup and CutMix in groups of 16 rows, so that neither batch split nor world size changes a picture.

    Groups are drawn by (seed, epoch, first row of the group); targets are smoothed as timm smooths them.
    """

    def __init__(self, augment: Augment, num_classes: int, seed: int) -> None:
        self.seed, self.num_classes, self.smoothing = seed, num_classes, augment.smoothing
        smoothed: dict[str, Any] = {"label_smoothing": augment.smoothing, "num_classes": num_classes}
        self.mixup = Mixup(augment.mixup, augment.cutmix, **smoothed) if augment.mixup or augment.cutmix else None

    def __call__(self, pictures_B3HW: Tensor, labels_B: Tensor, rows_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        """Mixed pictures (in place) and soft targets [B, K]."""
        if self.mixup is None:
            one_hot_BK = functional.one_hot(labels_B.long(), self.num_classes).to(pictures_B3HW.dtype)
            return pictures_B3HW, one_hot_BK * (1 - self.smoothing) + self.smoothing / self.num_classes
        targets = []
        seeds = hash_u64(self.seed, "mixup", epoch, rows_B[::CHUNK_ROWS].numpy())
        for start, seed in zip(range(0, len(rows_B), CHUNK_ROWS), seeds, strict=True):
            group = slice(start, start + CHUNK_ROWS)
            with _seeded(int(seed)):
                targets.append(self.mixup(pictures_B3HW[group], labels_B[group])[1])
        return pictures_B3HW, torch.cat(targets)
