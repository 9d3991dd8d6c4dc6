"""Tiny real sources with masks, in both layouts: bright rectangles of two classes on dark noise."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ground", "left", "right")


def scene(row: int, size=(40, 32)) -> tuple[np.ndarray, np.ndarray]:
    """(picture [H, W, 3], labels [H, W]): a red or green rectangle, and a border of ignored pixels (255)."""
    draw = np.random.default_rng(row)
    picture, labels = draw.integers(0, 60, (*size, 3), np.uint8), np.zeros(size, np.uint8)
    kind, top, left = 1 + row % 2, *draw.integers(2, 14, 2).tolist()
    picture[top : top + 16, left : left + 16, kind - 1] += 160
    labels[top : top + 16, left : left + 16] = kind
    labels[0] = 255
    return picture, labels


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def make_ade(root: Path, train: int = 20, val: int = 6) -> Path:
    """ADE20K's layout: 0 is unlabelled, classes count from 1."""
    for split, rows in (("training", train), ("validation", val)):
        for row in range(rows):
            picture, labels = scene(row + 1000 * (split == "validation"))
            _write(root / "images" / split / f"{row:03d}.png", png(picture))
            _write(root / "annotations" / split / f"{row:03d}.png", png(labels + 1))  # 255 + 1 is 0
    lines = ["Idx\tRatio\tName", *(f"{k} \t0.1\t{name}" for k, name in enumerate(CLASSES, 1))]
    _write(root / "objectInfo3.txt", "\n".join(lines).encode())
    return root


def make_masks(root: Path, train: int = 20, val: int = 6) -> Path:
    """{train,val}/{images,masks}: classes count from 0, 255 is unlabelled."""
    for split, rows in (("train", train), ("val", val)):
        for row in range(rows):
            picture, labels = scene(row + 1000 * (split == "val"))
            _write(root / split / "images" / f"{row:03d}.png", png(picture))
            _write(root / split / "masks" / f"{row:03d}.png", png(labels))
    _write(root / "classes.txt", "\n".join(CLASSES).encode())
    return root


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
