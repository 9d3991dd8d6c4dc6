"""The contact sheet shows what is stored: crops where they were cut, views bit for bit, and nothing that is damaged."""

from pathlib import Path

import make_cache as maker
import numpy as np
import pytest
from make_cache import add_unit, make_cache, make_identity
from make_dataset import make_dataset
from make_extract import make_extracted, make_place
from PIL import Image
from typer.testing import CliRunner

from cache_tools import preview as module
from cache_tools.cache import Cache
from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.images import RGB, decode_rgb, decode_view_into
from cache_tools.preview import ORIGINAL, pca_colors, preview
from cache_tools.writer import publish_identity
from pipeline.cli import app
from pipeline.views import draw_crop


def command(*arguments: object):
    return CliRunner().invoke(app, ["preview", *map(str, arguments)])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch):
    """The figures themselves, as they are drawn."""
    found: list = []
    monkeypatch.setattr(module, "png", lambda figure: found.append(figure) or b"")
    return found


def cells(figure, columns: int) -> np.ndarray:
    return np.array(figure.axes).reshape(-1, columns)


def shown(axis) -> np.ndarray:
    return axis.images[0].get_array()


def stored_view(cache: Cache, split: str, number: int, row: int) -> RGB:
    view = np.empty((32, 32, 3), np.uint8)
    decode_view_into(cache.units(split)[number].chunk(row // CHUNK_ROWS).pictures[row % CHUNK_ROWS], view)
    return view


def make_pair(root: Path, rows: int = 40, classes: tuple[str, ...] = ("even", "odd")) -> Cache:
    """ROOT/dataset and ROOT/cache of its whole pictures, two views."""
    dataset = make_dataset(root / "dataset", rows, 16)
    identity = make_identity({"train": rows})
    identity = identity.model_copy(update={"dataset_sha256": dataset.sha256, "classes": classes})
    publish_identity(root / "cache", identity)
    for number in range(2):
        add_unit(root / "cache", identity, "train", number)
    return Cache(root / "cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of odd sizes, one lying on its side and large, made into ROOT/dataset and ROOT/cache by the commands."""
    root = tmp_path_factory.mktemp("preview")
    (root / "pictures/train/even").mkdir(parents=True)
    lying = Image.fromarray(maker.view("train", 0, 1000)).resize((800, 440))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(root / "pictures/train/even/lying.jpg", quality=95, exif=exif)
    make_place(root, rows=39)
    make_extracted(root, "cache", views=1)
    return root


def test_a_rectangle_lies_where_its_view_was_cut(place: Path, tmp_path: Path, drawn: list) -> None:
    preview(place / "cache", tmp_path / "p.png", place / "dataset", rows=40)
    dataset, cache, sizes = Dataset(place / "dataset"), Cache(place / "cache"), []
    for row, (original, view, _) in enumerate(cells(drawn[0], 3)):
        height, width = decode_rgb(dataset.picture("train", row)[0]).shape[:2]
        crop = draw_crop(cache.identity.crop, 0, "train", row, 0, height, width)
        (box,) = original.patches
        assert box.get_bbox().bounds == (crop.left, crop.top, crop.width, crop.height)
        assert (original.get_xlim(), original.get_ylim()) == ((0, width), (height, 0))
        assert max(shown(original).shape) <= ORIGINAL and original.get_title().startswith(f"row {row}: ")
        assert view.get_title() == "v0" + ", flipped" * crop.flip
        sizes.append((height, width))
    assert len(sizes) == 40 and (800, 440) in sizes


def test_views_are_shown_as_stored_and_features_in_one_basis(tmp_path: Path, drawn: list) -> None:
    cache = make_pair(tmp_path)
    words = preview(tmp_path / "cache", tmp_path / "p.png", tmp_path / "dataset", rows=3)
    assert words.endswith("p.png: 3 of 40 rows of train, views v0, v1")
    units, rows = cache.units("train"), (0, 19, 39)
    features = np.array([[u.chunk(row // 16).features()[row % 16] for u in units] for row in rows])
    colors = pca_colors(features, features).reshape(3, 2, 4, 4, 3)
    for i, row in enumerate(rows):
        line = cells(drawn[0], 5)[i]
        assert line[0].get_title() == f"row {row}: {('even', 'odd')[row % 2]}" and len(line[0].patches) == 2
        for number in range(2):
            assert (shown(line[1 + 2 * number]) == stored_view(cache, "train", number, row)).all()
            assert (shown(line[2 + 2 * number]) == colors[i, number]).all()


def test_float16_and_more_rows_than_there_are(tmp_path: Path, drawn: list) -> None:
    make_cache(tmp_path / "cache", rows=20, val_rows=0, views=1, dtype="float16")
    assert "20 of 20 rows" in preview(tmp_path / "cache", tmp_path / "p.png", rows=30)
    titles = [line[0].get_title() for line in cells(drawn[0], 3)]
    assert all(title.startswith(f"row {row}: ") for row, title in enumerate(titles)) and len(titles) == 20


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 8), (1, 3, 2), (3, 16, 8)])
def test_colors_lie_in_the_unit_cube_whatever_the_shape(shape: tuple[int, ...]) -> None:
    for features in (np.random.default_rng(0).standard_normal(shape), np.ones(shape), np.zeros(shape)):
        colors = pca_colors(features.astype(np.float32), features.astype(np.float32))
        assert colors.shape == (*shape[:-1], 3) and np.isfinite(colors).all()
        assert colors.min() >= 0 and colors.max() <= 1


def test_the_first_color_is_the_widest_direction() -> None:
    draw = np.random.default_rng(1)
    along = draw.standard_normal((4, 50))
    features = along[..., None] * draw.standard_normal(12) * 9 + 100 + draw.standard_normal((4, 50, 12)) * 0.01
    colors = pca_colors(features.astype(np.float32), features.astype(np.float32))
    assert abs(np.corrcoef(colors[..., 0].ravel(), along.ravel())[0, 1]) > 0.99
    assert np.unique(colors[..., 0]).size > 150, "percentiles 1 to 99 fill the range"


def test_the_originals_are_found_or_said_to_be_left_out(tmp_path: Path) -> None:
    make_pair(tmp_path, classes=("two\nlines \x1b[31m, $\\frac$ and " + "long" * 200, "\u96ea \u00e9"))
    cache, out = tmp_path / "cache", tmp_path / "p.png"
    answer = command(cache, "--out", out)
    assert answer.exit_code == 0 and "no originals" in answer.stdout and "--data" in answer.stdout, answer.exception
    (tmp_path / "dataset").rename(cache / "dataset")  # where `extract` puts what it shards itself
    files = []
    for _ in range(2):
        answer = command(cache, "--out", out)
        assert answer.exit_code == 0 and "no originals" not in answer.stdout
        files.append(out.read_bytes())
    with Image.open(out, formats=("PNG",)) as picture:
        assert picture.size == (800, 1280) and files[0] == files[1]


def test_a_foreign_dataset_is_refused(tmp_path: Path) -> None:
    make_pair(tmp_path)
    other = make_dataset(tmp_path / "other", 41, 16)
    answer = command(tmp_path / "cache", "--data", other.path, "--out", tmp_path / "p.png")
    assert answer.exit_code == 5 and "expected the DATASET of" in answer.stderr and other.sha256[:12] in answer.stderr
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("cache/train/v1/views/000000.tar", "000000.tar"),
        ("cache/train/v1/views/000000.index.npy", "000000.index.npy"),
        ("cache/train/v0/features.zarr/patch/c.0.0.0", "features.zarr"),
        ("cache/train/v0/features.zarr/patch/zarr.json", "zarr.json"),
        ("dataset/train/000000.tar", "000000.tar"),
    ],
)
def test_damage_stops_by_name_and_nothing_is_written(tmp_path: Path, file: str, name: str) -> None:
    make_pair(tmp_path)
    damaged = bytearray((tmp_path / file).read_bytes())
    for i in range(len(damaged) // 3, len(damaged), 100):
        damaged[i] ^= 0x55
    (tmp_path / file).write_bytes(damaged)
    answer = command(tmp_path / "cache", "--data", tmp_path / "dataset", "--out", tmp_path / "p.png", "--rows", 40)
    assert answer.exit_code == 4 and name in answer.stderr and len(answer.stderr.splitlines()) == 1, answer.stderr
    assert not list(tmp_path.glob("*.png*"))


def test_a_request_that_cannot_be_met_says_so(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", rows=20, val_rows=20, views=1)
    (tmp_path / "cache/val/v0/manifest.json").unlink()
    for arguments, words in (
        (("--out", "p.jpg"), "ends in .png"),
        (("--split", "vall"), "expected a complete view of 'vall'"),
        (("--split", "val", "--out", tmp_path / "p.png"), "expected a complete view of 'val'"),
        (("--data", tmp_path / "nowhere"), "expected a finished DATASET"),
        (("--rows", 51), "--rows"),
        (("--rows", 0), "--rows"),
    ):
        answer = command(tmp_path / "cache", *arguments)
        assert answer.exit_code == 2 and words in answer.stderr, answer.stderr
    assert not (tmp_path / "p.png").exists() and not Path("p.jpg").exists()
    assert command(tmp_path, "--out", tmp_path / "p.png").exit_code == 2
