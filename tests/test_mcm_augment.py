"""Augmentation is a pure function of seed and bytes, and mixing does not depend on how a batch is split."""

import io
import pickle
import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch.nn import functional

from cache_tools.errors import CorruptionError
from mcm import augment
from mcm.augment import Mixer, erase, eval_transform, seeded, train_transform
from mcm.backbones import Backbone
from mcm.config import Augment

SPEC = SimpleNamespace(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), interpolation="bicubic", crop_pct=1.0)
STRONG = Augment(recipe="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.5)


@pytest.fixture
def png():
    pixels = np.random.default_rng(0).integers(0, 255, (48, 48, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def restored_generators():
    """Assert that the global generators of the process are afterwards as they were."""
    before = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    yield
    assert before == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_train_transform_draws_only_from_its_seed(png):
    transform = pickle.loads(pickle.dumps(train_transform(STRONG, SPEC)))  # as a loader's worker gets it
    with restored_generators():
        first = [transform(seed, png) for seed in range(8)]
    again = [transform(seed, png) for seed in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (3, 32, 32) and not torch.equal(first[0], first[1])


@pytest.mark.parametrize("recipe", ["rand-m10-n12-inc1", "rand-m15-mmax20-n12-inc1", "v0-mstd9", "augmix-m10-w9"])
def test_strong_recipes_also_posterize_to_no_bits(png, recipe, monkeypatch):
    asked, real = set(), augment._posterize
    monkeypatch.setattr(augment, "_posterize", lambda image, bits, **_: asked.add(bits) or real(image, bits))
    transform = train_transform(Augment(recipe=recipe), SPEC)
    assert all(transform(seed, png).dtype == torch.uint8 for seed in range(60))
    assert min(asked) < 2  # AugMix draws its strength


def test_posterize_keeps_the_highest_bits():
    white = Image.new("RGB", (2, 2), (255, 255, 255))
    values = [augment._posterize(white, bits).getpixel((0, 0))[0] for bits in (-1, 0, 1, 4, 8)]
    assert values == [0, 0, 0x80, 0xF0, 0xFF]


def test_eval_transform_is_the_whole_center_square_for_our_students(png):
    square = Image.open(io.BytesIO(png)).resize((32, 32), Image.Resampling.BICUBIC)
    assert all(np.array_equal(eval_transform(SPEC)(seed, png).permute(1, 2, 0), square) for seed in (0, 9))


@pytest.mark.parametrize("training", [True, False])
def test_pictures_normalized_on_the_device_equal_those_that_timm_normalizes(png, training):
    spec = SimpleNamespace(**vars(SPEC) | {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)})
    same = {"mean": spec.mean, "std": spec.std, "interpolation": "bicubic", "crop_pct": 1.0, "scale": (0.08, 1.0)}
    augment = {"is_training": True, "auto_augment": "rand-m9-inc1", "color_jitter": None} if training else {}
    theirs = create_transform((3, 32, 32), **same, **augment)
    ours = train_transform(Augment(recipe="rand-m9-inc1"), spec) if training else eval_transform(spec)
    for seed in range(8):
        with seeded(seed):
            expected = theirs(Image.open(io.BytesIO(png)))
        assert torch.equal(Backbone.normalized(spec, ours(seed, png)[None])[0], expected)


def test_erasing_depends_on_the_row_and_epoch_and_not_on_the_batch():
    rows, blank = torch.arange(100, 1100), torch.full((1000, 3, 40, 32), 9.0)
    with restored_generators():
        erase(whole := blank.clone(), rows, 3, 0.25, seed=0)
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for part in shuffled.split(300):
        erase(pictures := blank[part], rows[part], 3, 0.25, seed=0)
        assert torch.equal(pictures, whole[part])
    erase(other := blank.clone(), rows, 4, 0.25, seed=0)
    assert not torch.equal(other, whole)


def test_erased_boxes_have_the_distribution_of_timm():
    ours, theirs = (torch.full((2000, 3, 40, 40), 9.0) for _ in range(2))
    erase(ours, torch.arange(2000), 0, 0.25, seed=0)
    with seeded(0):
        RandomErasing(0.25, mode="pixel", device="cpu")(theirs)
    facts = []
    for pictures in (ours, theirs):
        erased = (pictures != 9).all(1)  # [B, H, W]
        boxes = erased[erased.any((1, 2))]
        heights, widths = boxes.any(2).sum(1), boxes.any(1).sum(1)
        assert (boxes.sum((1, 2)) == heights * widths).all()  # rectangles
        noise = pictures[(pictures != 9)]
        shares, places = boxes.sum((1, 2)) / 1600, boxes.nonzero()[:, 1:].double().mean(0)
        values = [len(boxes) / 2000, shares.mean(), shares.std(), shares.min(), shares.max()]
        values += [(heights / widths).log().std() / 5, *(places / 40), noise.mean(), noise.std()]
        facts.append(torch.tensor([float(value) for value in values]))
    assert torch.allclose(*facts, atol=0.03)


def test_a_picture_that_no_longer_decodes_is_corruption(png):
    with pytest.raises(CorruptionError, match="expected a picture that decoded when it was sharded"):
        eval_transform(SPEC)(0, png[:60])


def batch(rows):
    pictures = torch.randn(len(rows), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return pictures, torch.arange(len(rows)) % 4, torch.tensor(rows)


def test_mixing_is_the_same_however_the_batch_is_split():
    pictures, labels, rows = batch(list(range(100, 132)))
    mixer = Mixer(STRONG, num_classes=4, seed=0)
    with restored_generators():
        whole, targets = mixer(pictures.clone(), labels, rows, 3)
    halves = [mixer(pictures[s].clone(), labels[s], rows[s], 3) for s in (slice(16), slice(16, 32))]
    assert torch.equal(whole, torch.cat([half[0] for half in halves]))
    assert torch.equal(targets, torch.cat([half[1] for half in halves]))
    assert not torch.equal(whole, mixer(pictures.clone(), labels, rows, 4)[0])
    assert torch.allclose(targets.sum(1), torch.ones(32))


def test_without_mixing_targets_are_smoothed_as_torch_smooths_them():
    pictures, labels, rows = batch(list(range(16)))
    same, targets = Mixer(Augment(smoothing=0.1), num_classes=4, seed=0)(pictures, labels, rows, 0)
    logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    assert same is pictures
    ours, theirs = (
        functional.cross_entropy(logits, targets),
        functional.cross_entropy(logits, labels, label_smoothing=0.1),
    )
    assert torch.allclose(ours, theirs)
