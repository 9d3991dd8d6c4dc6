"""`mcm-cache preview`: a contact sheet of a CACHE: crops on the originals, views as stored, features in PCA colours.

S shown rows, V views, N tokens, C channels, H W pixels. A picture is a line: its original, then each view and, beside
it, that view's features. Everything is read by the readers of training, so that damage stops by name here too.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from .cache import Cache, Unit
from .console import one_line
from .dataset import CHUNK_ROWS, Dataset
from .errors import CorruptionError, IdentityError, UsageError
from .images import MAX_PIXELS, RGB, PictureRefused, decode_rgb, decode_view_into, encode_view, resize_rgb
from .records import nearest
from .storage import write_atomic

SMALLEST = 160  # px: smaller views are magnified by a whole number
GAP, CAPTION, MARGIN = 6, 18, 96  # px: between cells; text above them; text left of them
Colour = tuple[int, int, int]
BACKGROUND, TEXT = (22, 22, 24), (225, 225, 225)
COLOURS = ((255, 149, 0), (0, 190, 255), (80, 220, 100), (255, 80, 190), (255, 225, 50), (170, 130, 255))  # of views


class Shown(NamedTuple):
    """One row in one view, all bytes checked: uint8 [H, W, 3], float32 [N, C], and its record in the index."""

    view_HW3: RGB
    features_NC: npt.NDArray[np.float32]
    record: Any


class Cell(NamedTuple):
    """A picture of the sheet, uint8 [H, W, 3] of any size in the shape of a view, and the words above it."""

    picture_HW3: RGB
    words: str = ""


def preview(path: Path, out: Path, data: Path | None = None, rows: int = 8, split: str = "train") -> dict[str, Any]:
    """Write the sheet of `rows` rows spread evenly over a split, as PNG; returns what it shows, as JSON.

    Raises: UsageError, IdentityError when `data` is not the DATASET of the cache, CorruptionError.
    """
    if out.suffix != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    cache = Cache(path)
    units, dataset = _complete_units(cache, split), _dataset(cache, data)
    total, identity = cache.identity.rows[split], cache.identity
    count = min(rows, total)
    picked = [(2 * i + 1) * total // (2 * count) for i in range(count)]
    zoom = -(-SMALLEST // min(identity.view_height, identity.view_width))
    size = (zoom * identity.view_height, zoom * identity.view_width)
    heads = [("original, with the crops", TEXT)] if dataset else []
    for unit in units:
        heads += [(name, COLOURS[unit.view % len(COLOURS)]) for name in (f"v{unit.view}", "its features (PCA)")]
    width, height = cell_at(count, len(heads), size)
    if width * height > MAX_PIXELS:
        raise UsageError(f"--rows {rows}: the sheet would have {width}x{height} pixels; ask for fewer rows")
    shown = [[_read(unit, row) for unit in units] for row in picked]
    features_SVNC = np.array([[one.features_NC for one in line] for line in shown])
    colours = pca_colours(features_SVNC, features_SVNC).reshape(count, len(units), *identity.grid, 3)
    lines = {}
    for row, line, painted in zip(picked, shown, (colours * 255).round().astype(np.uint8), strict=True):
        original = [Cell(_original(dataset, units, row, line, size))] if dataset else []
        lines[_row_name(identity.classes, row, line)] = original + _view_cells(line, painted)
    write_atomic(out, encode_view(_sheet(heads, lines, size), "png"))
    known = {"path": str(path), "out": str(out), "split": split, "rows": picked, "views": [u.view for u in units]}
    return known | {"of": total, "dataset": str(dataset.path) if dataset else None, "width": width, "height": height}


def cell_at(line: int, column: int, size: tuple[int, int]) -> tuple[int, int]:
    """(x, y) of a cell's upper left corner, for cells of `size` (height, width); past the last: the sheet's size."""
    return MARGIN + column * (size[1] + GAP), 2 * CAPTION + line * (size[0] + CAPTION + GAP)


def describe(known: dict[str, Any]) -> str:
    """What the sheet shows as lines for a person."""
    views = ", ".join(f"v{view}" for view in known["views"])
    size = f"{known['width']}x{known['height']} px"
    line = f"{known['out']}: {len(known['rows'])} of {known['of']} rows of {known['split']}, views {views}, {size}"
    missing = f"the originals are left out: no DATASET in {known['path']}/dataset; give it by --data DATASET"
    return line if known["dataset"] else f"{line}\n{missing}"


def pca_colours(features: npt.NDArray[np.float32], basis: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Three principal components of `features` [..., C], found on `basis` [..., C], as colours in [0, 1].

    Percentiles 1 and 99 of the basis are 0 and 1. With fewer than three channels the other colours are 0.
    """
    flat = basis.reshape(-1, basis.shape[-1])
    mean = flat.mean(0)
    flat = flat - mean
    axes = np.linalg.eigh(flat.T @ flat)[1][:, ::-1][:, :3]  # 7 times faster than an SVD of 6,000 tokens
    axes = axes * np.where(axes.sum(0) < 0, -1, 1).astype(np.float32)  # LAPACK is free to choose the sign
    axes = np.pad(axes, ((0, 0), (0, 3 - axes.shape[1])))
    low, high = np.percentile(flat @ axes, [1, 99], axis=0).astype(np.float32)
    colours: npt.NDArray[np.float32] = np.clip(((features - mean) @ axes - low) / np.maximum(high - low, 1e-6), 0, 1)
    return colours


def _complete_units(cache: Cache, split: str) -> list[Unit]:
    if split not in cache.identity.rows:
        names = ", ".join(sorted(cache.identity.rows))
        raise UsageError(f"{cache.path}: no split {split!r}; it has {names}{nearest(split, cache.identity.rows)}")
    units = cache.complete_units(split)
    if not units:
        raise UsageError(f"{cache.path}: expected a complete view of {split}; there is none; go on with the extraction")
    for unit in units:
        unit.check_arrays()
    return units


def _dataset(cache: Cache, data: Path | None) -> Dataset | None:
    """The DATASET that the cache was made of: the one given, or the one that `extract` sharded into the cache."""
    inside = cache.path / "dataset"
    if data is None and not (inside / "dataset.json").is_file():
        return None
    dataset = Dataset(data or inside)
    if dataset.sha256 != cache.identity.dataset_sha256:
        expected, found = cache.identity.dataset_sha256[:12], dataset.sha256[:12]
        raise IdentityError(f"{dataset.path}: expected the DATASET of {cache.path}, {expected}; found {found}")
    return dataset


def _read(unit: Unit, row: int) -> Shown:
    """A row of a unit, by its chunk.

    Raises: CorruptionError, also for what a commit vouches for and is no view or no number.
    """
    number, i = divmod(row, CHUNK_ROWS)
    chunk = unit.chunk(number)
    shard, position = divmod(number, unit.chunks_per_shard)
    view_HW3 = np.empty((unit.identity.view_height, unit.identity.view_width, 3), np.uint8)
    try:
        decode_view_into(chunk.pictures[i], view_HW3)
    except CorruptionError as error:
        raise CorruptionError(f"{unit.tar(shard)}: row {row}: {error}") from error
    features_NC = chunk.features()[i]
    if not np.isfinite(features_NC).all():
        raise CorruptionError(f"{unit.group}: row {row}: expected finite features; run `mcm-cache verify --full`")
    return Shown(view_HW3, features_NC, unit.index_rows(shard, position, chunk.rows)[i])


def _original(dataset: Dataset, units: Sequence[Unit], row: int, line: Sequence[Shown], size: tuple[int, int]) -> RGB:
    """The upright original, centred in a cell of `size`, with the crop of each view in its colour.

    Raises: CorruptionError where the picture does not decode, or a crop is not one of it.
    """
    split = units[0].split
    try:
        rgb_HW3 = decode_rgb(dataset.picture(split, row)[0])
    except PictureRefused as error:
        raise CorruptionError(f"{dataset.path}: {split} row {row}: decoded once, now refused: {error}") from error
    height, width = rgb_HW3.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    small = Image.fromarray(resize_rgb(rgb_HW3, max(1, round(height * scale)), max(1, round(width * scale))))
    draw, y, x = ImageDraw.Draw(small), small.height / height, small.width / width
    for unit, one in zip(units, line, strict=True):
        top, left, bottom, right = _crop(unit, row, one, height, width)
        x0, y0 = round(left * x), round(top * y)
        x1, y1 = max(x0, round(right * x) - 1), max(y0, round(bottom * y) - 1)  # drawn too, as the last of the crop
        draw.rectangle((x0, y0, x1, y1), outline=COLOURS[unit.view % len(COLOURS)], width=2)
    cell = Image.new("RGB", size[::-1], BACKGROUND)
    cell.paste(small, ((size[1] - small.width) // 2, (size[0] - small.height) // 2))
    return np.asarray(cell)


def _crop(unit: Unit, row: int, one: Shown, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of the crop that a view shows, inside its upright original of height x width."""
    top, left, crop_height, crop_width, _, *source = _geometry(one)
    bottom, right = top + crop_height, left + crop_width
    if source != [height, width] or not (0 <= top < bottom <= height and 0 <= left < right <= width):
        found = f"{crop_width}x{crop_height} at {left},{top} of {source[1]}x{source[0]}"
        raise CorruptionError(f"{unit.path}: row {row}: expected a crop of {width}x{height} pixels; found {found}")
    return top, left, bottom, right


def _geometry(one: Shown) -> list[int]:
    """top, left, height, width, flip, source height and width: in pixels of the upright original."""
    names = ("top", "left", "height", "width", "flip", "source_height", "source_width")
    return [int(one.record[name]) for name in names]


def _view_cells(line: Sequence[Shown], painted: npt.NDArray[np.uint8]) -> list[Cell]:
    """Each view as stored, and after it the colours of its features, one of uint8 [V, rows, columns, 3]."""
    cells = []
    for one, colours_HW3 in zip(line, painted, strict=True):
        top, left, height, width, flip, *_ = _geometry(one)
        cells.append(Cell(one.view_HW3, f"{width}x{height} at {left},{top}{', flipped' if flip else ''}"))
        cells.append(Cell(colours_HW3))
    return cells


def _row_name(classes: Sequence[str], row: int, line: Sequence[Shown]) -> str:
    """The row's number and, below it, its class in lines that fit the margin."""
    label = int(line[0].record["label"])
    name = one_line(classes[label]) if 0 <= label < len(classes) else ""
    return "\n".join([f"row {row}", *textwrap.wrap(name, 14)[:6]])


def _sheet(heads: Sequence[tuple[str, Colour]], lines: dict[str, list[Cell]], size: tuple[int, int]) -> RGB:
    """Names of columns above, of lines at the left, and the cells magnified to `size` without smoothing."""
    sheet = Image.new("RGB", cell_at(len(lines), len(heads), size), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for k, (name, colour) in enumerate(heads):
        draw.text((cell_at(0, k, size)[0], 2), name, fill=colour, font=font)
    for i, (name, cells) in enumerate(lines.items()):
        draw.text((GAP, cell_at(i, 0, size)[1]), name, fill=TEXT, font=font)
        for k, cell in enumerate(cells):
            x, y = cell_at(i, k, size)
            draw.text((x, y - CAPTION + 2), cell.words, fill=TEXT, font=font)
            sheet.paste(Image.fromarray(cell.picture_HW3).resize(size[::-1], Image.Resampling.NEAREST), (x, y))
    return np.asarray(sheet)
