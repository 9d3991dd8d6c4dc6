"""`mcm-cache preview`: draw a contact sheet of a CACHE.

Each line shows one row: the original with its crops, then each view and its features as PCA colors.
The preview uses the readers of training, so it raises the same errors for damaged files.
S shown rows, V views, N tokens, C channels, H W pixels.
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
from .images import RGB, decode_rgb
from .storage import write_atomic

CELL = 1.6  # size of a cell in inches, at 100 px per inch
ORIGINAL = 320  # maximum side of an original in px


def preview(
    path: Path, out: Path, data: Path | None = None, rows: int = 8, split: str = "train"
) -> str:
    """Write a PNG sheet of `rows` rows, evenly spaced over a split, and return its description.

    Raises: UsageError; IdentityError if `data` is not the DATASET of the cache; CorruptionError.
    """
    if out.suffix != ".png" or out.is_dir():
        found = found_at(out) if out.is_dir() else repr(out.suffix)
        raise UsageError(f"--out {out}: expected a file name that ends in .png; found {found}")
    cache = Cache(path)
    cache.check_pictures()
    units = [unit for unit in cache.all_units() if unit.split == split and unit.complete]
    if not units:
        advice = "run the same `mcm-cache extract` again"
        raise UsageError(f"{path}: expected a complete view of {split!r}; found none; {advice}")
    for unit in units:
        unit.check_arrays()
    dataset, total = _dataset(cache, data), units[0].rows
    shown = np.linspace(0, total - 1, min(rows, total), dtype=int).tolist()
    write_atomic(out, png(_draw(cache, units, dataset, shown)))
    views = ", ".join(f"v{unit.view}" for unit in units)
    missing = f"; no originals: found no DATASET in {path}/dataset; use --data DATASET"
    text = f"{len(shown)} of {total} rows of {split}, views {views}"
    return f"{out}: {text}{'' if dataset else missing}"


def _draw(
    cache: Cache, units: Sequence[Unit], dataset: Dataset | None, rows: Sequence[int]
) -> Figure:
    lines = [[_read(unit, row) for unit in units] for row in rows]
    features_SVNC = np.array([[features_NC for _, features_NC, _ in line] for line in lines])
    grid = (*features_SVNC.shape[:2], *cache.identity.grid, 3)
    colors = pca_colors(features_SVNC, features_SVNC).reshape(grid)
    pictures: list[list[Any]] = []
    for row, line, colors_VHW3 in zip(rows, lines, colors, strict=True):
        pictures.append([_original(dataset, units[0].split, row) if dataset else None])
        for (view_HW3, _, _), colors_HW3 in zip(line, colors_VHW3, strict=True):
            pictures[-1] += [view_HW3, colors_HW3]
    figure, axes = sheet(pictures)
    for row, line, (original, *cells) in zip(rows, lines, axes, strict=True):
        label = int(line[0][2]["label"])
        name = one_line(cache.identity.classes[label])[:16] if label >= 0 else "no label"
        original.set_title(f"row {row}: {name}", fontsize=8, parse_math=False)
        for unit, (_, _, record), cell in zip(units, line, cells[::2], strict=True):
            color, flipped = f"C{unit.view % 10}", ", flipped" if record["flip"] else ""
            cell.set_title(f"v{unit.view}{flipped}", fontsize=8, color=color)
            if dataset:
                sides = ("left", "top", "width", "height", "source_width", "source_height")
                x, y, width, height, right, bottom = (int(record[side]) for side in sides)
                box = Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=2)
                original.add_patch(box)
                original.images[0].set_extent((0, right, bottom, 0))
    return figure


def sheet(pictures: Sequence[Any]) -> tuple[Figure, npt.NDArray[Any]]:
    """Return a figure with one cell per picture, and its axes.

    `pictures` holds lines of pictures [H, W, 3] or [H, W]. The axes are in pixels. None leaves a
    cell empty.
    """
    lines, columns = len(pictures), len(pictures[0])
    figure = Figure(figsize=(CELL * columns, CELL * lines), layout="tight")
    axes: npt.NDArray[Any] = figure.subplots(lines, columns, squeeze=False)
    cells = [picture for line in pictures for picture in line]
    for axis, picture in zip(axes.ravel(), cells, strict=True):
        axis.set(xticks=[], yticks=[])
        if picture is None:
            axis.set_frame_on(False)
        else:
            axis.imshow(picture, vmin=0, vmax=1, extent=(0, picture.shape[1], picture.shape[0], 0))
    return figure, axes


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG file. The bytes are deterministic."""
    return saved(figure, format="png", dpi=100, metadata={"Software": None})


def saved(figure: Figure, **options: Any) -> bytes:
    """Return the figure as a file; `options` are those of `savefig`."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font lacks characters of a class name
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def pca_colors(
    features: npt.NDArray[np.float32], basis: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Return three principal components of `features` [..., C] as colors [..., 3] in [0, 1].

    The components are fitted to `basis` [..., C]; its percentiles 1 and 99 become 0 and 1. If
    C < 3, the other colors are 0.
    """
    flat = basis.reshape(-1, basis.shape[-1])
    mean = flat.mean(0)
    flat = flat - mean
    _, vectors = np.linalg.eigh(flat.T @ flat)  # 7 times faster than an SVD of 6,000 tokens
    components = vectors[:, ::-1][:, :3]
    # LAPACK may return either sign.
    components = components * np.where(components.sum(0) < 0, -1, 1).astype(np.float32)
    components = np.pad(components, ((0, 0), (0, 3 - components.shape[1])))
    low, high = np.percentile(flat @ components, [1, 99], axis=0).astype(np.float32)
    scaled = ((features - mean) @ components - low) / np.maximum(high - low, 1e-6)
    colors: npt.NDArray[np.float32] = np.clip(scaled, 0, 1)
    return colors


def _dataset(cache: Cache, data: Path | None) -> Dataset | None:
    """Return the DATASET of the cache: `data`, or else CACHE/dataset, which `extract` may write."""
    inside = cache.path / "dataset"
    if data is None and not (inside / "dataset.json").is_file():
        return None
    dataset = Dataset(data or inside)
    if dataset.sha256 != cache.identity.dataset_sha256:
        expected, found = cache.identity.dataset_sha256[:12], dataset.sha256[:12]
        expected = f"expected the DATASET of {cache.path}, {expected}"
        raise IdentityError(f"{dataset.path}: {expected}; found {found}")
    return dataset


def _original(dataset: Dataset, split: str, row: int) -> RGB:
    """Return the upright original, with sides of at most ORIGINAL."""
    picture = Image.fromarray(decode_rgb(dataset.picture(split, row)[0]))
    picture.thumbnail((ORIGINAL, ORIGINAL))
    return np.asarray(picture)


def _read(unit: Unit, row: int) -> tuple[RGB, npt.NDArray[np.float32], Any]:
    """Return the view uint8 [H, W, 3], features float32 [N, C] and index record of a row."""
    chunk = unit.chunk(row // CHUNK_ROWS)
    i = row % CHUNK_ROWS
    shard, position = divmod(row, unit.identity.rows_per_shard)
    return chunk.images()[i], chunk.features()[i], unit.index(shard)[position]
