"""Synthetic data for the benches, by the project's writers: pictures, DATASET, CACHE, a tiny CLIP.

Letters: B rows, N tokens, C channels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

import numpy as np

from cache_tools.cache import Unit
from cache_tools.dataset import Dataset
from cache_tools.images import PICTURE_RULES, decode_rgb, encode_view, resize_rgb
from cache_tools.quantize import channel_stats, decode, encode
from cache_tools.rng import uniform
from cache_tools.schema import CacheIdentity, CropPolicy, Fidelity, Fingerprint, TeacherIdentity
from cache_tools.writer import finish_unit, publish_identity, unit_writer
from pipeline.views import draw_crop, render

NO_SHA = "0" * 64
FINGERPRINT = Fingerprint(device="cpu", precision="fp32", batch=64, versions={})
FEATURE_ROWS = 64  # rows of features that a cache repeats


@dataclass(frozen=True)
class Shape:
    """The shape of a cache: square views of `pixels`, `grid` x `grid` tokens of `channels`."""

    rows: int
    rows_per_shard: int = 1024
    grid: int = 14
    channels: int = 768
    pixels: int = 224


def noise_views(pixels: int, count: int = 32) -> list[bytes]:
    """Views, JPEG 95 4:4:4: squares of 8 pixels in random colors, with grain."""
    draw, shape = np.random.default_rng(0), (pixels, pixels, 3)
    smooth = draw.integers(0, 256, (count, pixels // 8, pixels // 8, 3)).repeat(8, 1).repeat(8, 2)
    pictures = np.clip(smooth + draw.integers(-9, 10, (count, *shape)), 0, 255).astype(np.uint8)
    return [encode_view(picture, "jpeg:95:444") for picture in pictures]


def pictures(
    photos: Path | None, rows: int, height: int = 375, width: int = 500
) -> Iterator[bytes]:
    """Source JPEGs: photographs over and over, or smooth noise with grain."""
    files = [path for path in sorted(photos.rglob("*")) if path.is_file()] if photos else []
    for row in range(rows):
        if files:
            yield files[row % len(files)].read_bytes()
            continue
        noise = uniform(row, "bench", np.arange(40 * 54 * 3)).reshape(40, 54, 3)
        grain = uniform(row, "grain", np.arange(height * width * 3)).reshape(height, width, 3) - 0.5
        smooth = resize_rgb((noise * 255).astype(np.uint8), height, width)
        yield encode_view(np.clip(smooth + 30 * grain, 0, 255).astype(np.uint8), "jpeg:92:420")


def rendered_view(source: bytes, row: int, pixels: int) -> bytes:
    """A random resized crop of a source JPEG, as extraction stores it."""
    rgb = decode_rgb(source)
    geometry = draw_crop(CropPolicy(kind="rrc"), 0, "train", row, 0, *rgb.shape[:2])
    return encode_view(render(rgb, geometry, pixels, pixels), "jpeg:95:444")


def make_identity(shape: Shape, dtype: Literal["int8", "float16"]) -> CacheIdentity:
    """The identity of a cache that no teacher made."""
    teacher = TeacherIdentity(
        name="bench:noise", architecture_sha256=NO_SHA, weights_sha256=NO_SHA, activation="none",
        height=shape.pixels, width=shape.pixels, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    return CacheIdentity(
        teacher=teacher,
        crop=CropPolicy(kind="rrc"),
        seed=0,
        view_height=shape.pixels,
        view_width=shape.pixels,
        view_encoding="jpeg:95:444",
        picture_rules=PICTURE_RULES,
        dtype=dtype,
        grid=(shape.grid, shape.grid),
        channels=shape.channels,
        has_cls=True,
        rows_per_shard=shape.rows_per_shard,
        rows={"train": shape.rows},
        classes=("none",),
        dataset_sha256=NO_SHA,
    )


def make_cache(
    folder: Path, shape: Shape, dtype: Literal["int8", "float16"], views: Sequence[bytes] = ()
) -> Unit:
    """A CACHE of one complete unit: `views` (or noise) and noise features, over and over."""
    identity = make_identity(shape, dtype)
    publish_identity(folder, identity)
    unit = Unit(folder, identity, "train", 0)
    write_unit(unit, views or noise_views(shape.pixels))
    return unit


def write_unit(unit: Unit, views: Sequence[bytes]) -> None:
    """Every shard of a unit; the codes are those of the features, and so pass every check."""
    draw, known = np.random.default_rng(0), unit.identity
    x_BNC = draw.standard_normal((FEATURE_ROWS, known.tokens, known.channels)).astype(np.float32)
    mean, std = channel_stats(x_BNC)
    arrays = encode(known.dtype, x_BNC, mean, std)
    q_BNC = decode(arrays["patch"], arrays.get("scale"), mean, std)
    error = float((((q_BNC - x_BNC) / std) ** 2).sum() / (((x_BNC - mean) / std) ** 2).sum())
    arrays["cls"] = x_BNC[:, 0].astype(np.float16)
    flat, endless = x_BNC.reshape(-1, known.channels).astype(np.float64), cycle(views)
    for shard in range(unit.num_shards):
        rows = unit.shard_rows(shard)
        with unit_writer(unit, shard) as writer:
            for row, view in enumerate(islice(endless, rows)):
                writer.add_view(
                    view, row % 10, (0, 0, known.view_height, known.view_width, 0, 1, 1)
                )
            for start in range(0, rows, FEATURE_ROWS):
                for name, values in arrays.items():
                    writer.add(name, values[: rows - start])
            if known.dtype != "float16":
                writer.add("channel_mean", mean[None])
                writer.add("channel_std", std[None])
            fidelity = Fidelity(relative_mse=error, cosine=1.0, precision_mse=0.0)
            writer.commit(flat.mean(0), flat.var(0), fidelity, FINGERPRINT)
    finish_unit(unit)


def make_dataset(folder: Path, sources: Sequence[bytes], rows: int, rows_per_shard: int) -> Dataset:
    """FOLDER/dataset by `mcm-cache shard`, of `rows` files that repeat the sources."""
    from pipeline.shard import shard

    place = folder / "pictures" / "train" / "none"
    place.mkdir(parents=True)
    for row, source in enumerate(islice(cycle(sources), rows)):
        (place / f"{row:06d}.jpg").write_bytes(source)
    shard(folder / "pictures", folder / "dataset", rows_per_shard)
    return Dataset(folder / "dataset")


def tiny_clip(folder: Path, pixels: int = 32, patch: int = 8) -> str:
    """Write a CLIP tower of two blocks and 64 channels; return its name for --teacher.

    Its weights are "random".
    """
    folder.mkdir(parents=True)
    vision = {"image_size": pixels, "layers": 2, "width": 64, "head_width": 32, "patch_size": patch}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": {}})
    )
    return f"open_clip:{folder}"
