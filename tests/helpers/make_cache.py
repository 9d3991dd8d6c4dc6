"""A tiny real CACHE written by cache_tools' own writers: 32 px views, 4x4 tokens of 16 channels, 2 classes."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cache_tools.cache import Cache, Unit
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.images import PICTURE_RULES, decode_view_into, encode_view
from cache_tools.quantize import channel_stats, encode
from cache_tools.records import _sealed
from cache_tools.schema import CacheIdentity, CropPolicy, Fidelity, Fingerprint, TeacherIdentity
from cache_tools.storage import publish
from cache_tools.tars import encode_npy
from cache_tools.writer import finish_unit, publish_identity, unit_writer

SIZE, GRID, CHANNELS = 32, 4, 16
FINGERPRINT = Fingerprint(device="cpu", precision="fp32", batch=16, versions={})
LOSSLESS = Fidelity(relative_mse=0.0, cosine=1.0, precision_mse=0.0)
GEOMETRY = (0, 0, SIZE, SIZE, 0, SIZE, SIZE)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a record and give it its right sha256: any process that writes the file can do that."""
    payload = json.loads(path.read_bytes())
    del payload["sha256"]
    change(payload)
    path.write_bytes(_sealed(payload))


def make_identity(
    rows: dict[str, int], dtype: str = "int8", seed: int = 0, rows_per_shard: int = 64, compress: str | None = None,
    projection: np.ndarray | None = None,
) -> CacheIdentity:  # fmt: skip
    teacher = TeacherIdentity(
        name="test:linear",
        architecture_sha256=digest("linear"),
        weights_sha256=digest("weights"),
        activation="none",
        height=SIZE,
        width=SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        projection_sha256=None if projection is None else hashlib.sha256(projection.tobytes()).hexdigest(),
    )
    return CacheIdentity(
        teacher=teacher,
        crop=CropPolicy(kind="rrc"),
        seed=seed,
        view_height=SIZE,
        view_width=SIZE,
        view_encoding="jpeg:95:444",
        picture_rules=PICTURE_RULES,
        dtype=dtype,
        compress=compress,
        grid=(GRID, GRID),
        channels=CHANNELS,
        has_cls=True,
        rows_per_shard=rows_per_shard,
        rows=rows,
        classes=("even", "odd"),
        dataset_sha256=digest(f"dataset {seed}"),
    )


def view(split: str, view_number: int, row: int) -> np.ndarray:
    """uint8 [32, 32, 3]: a coarse random picture, different for every split, view and row; the class tints it."""
    draw = np.random.default_rng([len(split), view_number, row])
    picture = draw.integers(0, 200, (GRID, GRID, 3)).repeat(SIZE // GRID, 0).repeat(SIZE // GRID, 1)
    return (picture + draw.integers(0, 20, picture.shape) + 30 * (row % 2)).astype(np.uint8)


def features(pictures: np.ndarray, channels: int = CHANNELS) -> np.ndarray:
    """The "teacher": float32 [B, 16, C], a fixed linear map of each 8 px patch."""
    patches = pictures.reshape(-1, GRID, 8, GRID, 8, 3).swapaxes(2, 3).reshape(-1, GRID * GRID, 192)
    matrix = np.random.default_rng(7).standard_normal((192, channels))
    return ((patches / 255.0 - 0.5) @ matrix).astype(np.float32)


def write_shard(unit: Unit, shard: int) -> None:
    """Render, "extract" and commit one shard."""
    identity = unit.identity
    first = shard * identity.rows_per_shard
    rows = range(first, first + unit.shard_rows(shard))
    encoded = [encode_view(view(unit.split, unit.view, row), identity.view_encoding) for row in rows]
    pictures = np.zeros((len(encoded), SIZE, SIZE, 3), np.uint8)
    for data, picture in zip(encoded, pictures, strict=True):
        decode_view_into(data, picture)
    patch = features(pictures, identity.channels)
    mean, std = channel_stats(patch)
    with unit_writer(unit, shard) as writer:
        for row, data in zip(rows, encoded, strict=True):
            writer.add_view(data, row % 2, GEOMETRY)
        for name, array in encode(identity.dtype, patch, mean, std).items():
            writer.add(name, array.astype(unit.specs[name].dtype))
        if identity.dtype != "float16":
            writer.add("channel_mean", mean[None])
            writer.add("channel_std", std[None])
        writer.add("cls", patch.mean(1).astype(np.float16))
        flat = patch.reshape(-1, identity.channels).astype(np.float64)
        writer.commit(flat.mean(0), flat.var(0), LOSSLESS, FINGERPRINT)


def make_cache(
    path: Path, rows: int = 100, val_rows: int = 40, views: int = 2, dtype: str = "int8", seed: int = 0,
    compress: str | None = None, projection: np.ndarray | None = None,
) -> Cache:  # fmt: skip
    """Write CACHE with `views` complete units of train and one of val (val_rows 0: no val split).

    `projection` float32 [C, E] is the teacher's matrix to its joint space.
    """
    assert rows > CHUNK_ROWS
    splits = {"train": rows} | ({"val": val_rows} if val_rows else {})
    identity = make_identity(splits, dtype, seed, compress=compress, projection=projection)
    publish_identity(path, identity)
    if projection is not None:
        publish(path / "projection.npy", encode_npy(projection))
    for split in identity.rows:
        for number in range(views if split == "train" else 1):
            add_unit(path, identity, split, number)
    return Cache(path)


def add_unit(path: Path, identity: CacheIdentity, split: str, number: int) -> Unit:
    """Write one complete unit."""
    unit = Unit(path, identity, split, number)
    for shard in range(unit.num_shards):
        write_shard(unit, shard)
    assert finish_unit(unit)
    return unit
