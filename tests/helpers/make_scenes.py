"""Tiny real sources with masks, in both layouts, or boxes: bright rectangles of two classes on dark noise."""

import io
import json
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
    """ADE20K's layout: 0 is unlabeled, classes count from 1."""
    _make(root, {"training": train, "validation": val}, ("images/{}", "annotations/{}"), 1)  # 255 + 1 is 0
    lines = ["Idx\tRatio\tName", *(f"{k} \t0.1\t{name}" for k, name in enumerate(CLASSES, 1))]
    _write(root / "objectInfo3.txt", "\n".join(lines).encode())
    return root


def make_masks(root: Path, train: int = 20, val: int = 6) -> Path:
    """{train,val}/{images,masks}: classes count from 0, 255 is unlabeled."""
    _make(root, {"train": train, "val": val}, ("{}/images", "{}/masks"), 0)
    _write(root / "classes.txt", "\n".join(CLASSES).encode())
    return root


def make_coco(root: Path, train: int = 20, val: int = 6) -> Path:
    """COCO's layout, with gaps in the ids: a rectangle per picture, as a polygon in even rows and as an RLE in odd."""
    for split, rows in {"train": train, "val": val}.items():
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "right"}, {"id": 3, "name": "left"}],
        }
        for row in range(rows):
            picture, labels = scene(row + 1000 * (split == "val"))
            (top, *_, bottom), (left, *_, right) = (np.unique(axis).tolist() for axis in np.nonzero(labels % 255))
            _write(root / f"{split}2017/{row:03d}.png", png(picture))
            (height, width), box = labels.shape, [left, top, right + 1 - left, bottom + 1 - top]
            content["images"].append({"id": 10 * row, "file_name": f"{row:03d}.png", "width": width, "height": height})
            ends = np.flatnonzero(np.diff(labels.T.ravel() % 255 > 0)) + 1  # column by column
            runs = np.diff([0, *ends.tolist(), labels.size]).tolist()
            polygon = [left, top, right + 1, top, right + 1, bottom + 1, left, bottom + 1]
            shape = {"size": [height, width], "counts": runs} if row % 2 else [polygon]
            known = {"id": 100 + row, "image_id": 10 * row, "category_id": 7 if row % 2 else 3, "bbox": box}
            content["annotations"].append(known | {"area": 250.5, "iscrowd": row % 2, "segmentation": shape, "by": "x"})
        _write(root / f"annotations/instances_{split}2017.json", json.dumps(content).encode())
    return root


def _make(root: Path, splits: dict[str, int], forms: tuple[str, str], first: int) -> None:
    for split, rows in splits.items():
        for row in range(rows):
            picture, labels = scene(row + 1000 * split.startswith("val"))
            for form, array in zip(forms, (picture, labels + np.uint8(first)), strict=True):
                _write(root / form.format(split) / f"{row:03d}.png", png(array))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
