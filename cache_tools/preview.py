"""`mcm-cache preview`: a contact sheet of a CACHE: crops on the originals, views as stored, features in PCA colours.

S shown rows, V views, N tokens, C channels, H W pixels. A picture is a line: its original, then each view and, beside
it, that view's features. Everything is read by the readers of training, so that damage stops by name here too.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .cache import Cache, Unit
from .console import one_line
from .dataset import CHUNK_ROWS, Dataset
from .errors import IdentityError, UsageError, found_at
from .images import RGB, decode_rgb, decode_view_into
from .storage import write_atomic

CELL = 1.6  # inches, of 100 px
ORIGINAL = 320  # px: larger originals are drawn smaller


def preview(path: Path, out: Path, data: Path | None = None, rows: int = 8, split: str = "train") -> str:
    """Write the sheet of `rows` rows spread evenly over a split, as PNG; returns what it shows, in words.

    Raises: UsageError, IdentityError when `data` is not the DATASET of the cache, CorruptionError.
    """
    if out.suffix != ".png" or out.is_dir():
        raise UsageError(f"--out {out}: expected the name of a file that ends in .png; found {found_at(out)}")
    cache = Cache(path)
    units = [unit for unit in cache.all_units() if unit.split == split and unit.complete]
    if not units:
        raise UsageError(f"{path}: expected a complete view of {split!r}; there is none; go on with the extraction")
    for unit in units:
        unit.check_arrays()
    dataset, total = _dataset(cache, data), units[0].rows
    picked = np.linspace(0, total - 1, min(rows, total), dtype=int).tolist()
    write_atomic(out, png(_draw(cache, units, dataset, picked)))
    views = ", ".join(f"v{unit.view}" for unit in units)
    missing = "" if dataset else f"; no originals: no DATASET in {path}/dataset; give it by --data DATASET"
    return f"{out}: {len(picked)} of {total} rows of {split}, views {views}{missing}"


def _draw(cache: Cache, units: Sequence[Unit], dataset: Dataset | None, rows: Sequence[int]) -> Figure:
    shown = [[_read(unit, row) for unit in units] for row in rows]
    features_SVNC = np.array([[features_NC for _, features_NC, _ in line] for line in shown])
    colours = pca_colours(features_SVNC, features_SVNC).reshape(*features_SVNC.shape[:2], *cache.identity.grid, 3)
    pictures: list[list[Any]] = []
    for row, line, painted in zip(rows, shown, colours, strict=True):
        pictures.append([_original(dataset, units[0].split, row) if dataset else None])
        for (view_HW3, _, _), colours_HW3 in zip(line, painted, strict=True):
            pictures[-1] += [view_HW3, colours_HW3]
    figure, axes = sheet(pictures)
    for row, line, (original, *cells) in zip(rows, shown, axes, strict=True):
        label = int(line[0][2]["label"])
        name = one_line(cache.identity.classes[label])[:16] if label >= 0 else "no label"
        original.set_title(f"row {row}: {name}", fontsize=8, parse_math=False)
        for unit, (_, _, record), cell in zip(units, line, cells[::2], strict=True):
            colour, flipped = f"C{unit.view % 10}", ", flipped" if record["flip"] else ""
            cell.set_title(f"v{unit.view}{flipped}", fontsize=8, color=colour)
            if dataset:
                left, top, width, height = (int(record[side]) for side in ("left", "top", "width", "height"))
                original.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=2))
                original.images[0].set_extent((0, int(record["source_width"]), int(record["source_height"]), 0))
    return figure


def sheet(pictures: Sequence[Any]) -> tuple[Figure, npt.NDArray[Any]]:
    """A figure of lines of pictures [H, W, 3] or [H, W], in units of their pixels; None leaves a cell empty."""
    lines, columns = len(pictures), len(pictures[0])
    figure = Figure(figsize=(CELL * columns, CELL * lines), layout="tight")
    axes: npt.NDArray[Any] = figure.subplots(lines, columns, squeeze=False)
    for axis, picture in zip(axes.ravel(), (picture for line in pictures for picture in line), strict=True):
        axis.set(xticks=[], yticks=[])
        if picture is None:
            axis.set_frame_on(False)
        else:
            axis.imshow(picture, vmin=0, vmax=1, extent=(0, picture.shape[1], picture.shape[0], 0))
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes every time."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class may have a name in a script that the font has not
        figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


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


def _original(dataset: Dataset, split: str, row: int) -> RGB:
    """The upright original, no larger than ORIGINAL."""
    picture = Image.fromarray(decode_rgb(dataset.picture(split, row)[0]))
    picture.thumbnail((ORIGINAL, ORIGINAL))
    return np.asarray(picture)


def _read(unit: Unit, row: int) -> tuple[RGB, npt.NDArray[np.float32], Any]:
    """A row's view uint8 [H, W, 3], features float32 [N, C] and record in the index, all bytes checked."""
    number, i = divmod(row, CHUNK_ROWS)
    chunk = unit.chunk(number)
    view_HW3 = np.empty((unit.identity.view_height, unit.identity.view_width, 3), np.uint8)
    decode_view_into(chunk.pictures[i], view_HW3)
    shard, position = divmod(row, unit.identity.rows_per_shard)
    return view_HW3, chunk.features()[i], unit.index(shard)[position]
