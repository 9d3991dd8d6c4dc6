"""The contact sheet shows what is stored: crops where they were cut, views bit for bit, and nothing that is damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import make_cache as maker
import numpy as np
import pytest
from make_cache import add_unit, make_cache, make_identity
from make_dataset import make_dataset
from make_extract import make_extracted, make_place
from PIL import Image
from typer.testing import CliRunner

from cache_tools.cache import Cache
from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.images import RGB, decode_rgb, decode_view_into, resize_rgb
from cache_tools.preview import BACKGROUND, COLOURS, cell_at, pca_colours, preview
from cache_tools.writer import publish_identity
from pipeline.cli import app
from pipeline.views import draw_crop

ZOOM, CELL = 5, (160, 160)  # views of 32 px


def command(*arguments: object):
    return CliRunner().invoke(app, ["preview", *map(str, arguments)])


def sheet_of(path: Path) -> RGB:
    with Image.open(path, formats=("PNG",)) as picture:
        return np.asarray(picture)


def cell(sheet: RGB, line: int, column: int) -> RGB:
    x, y = cell_at(line, column, CELL)
    return sheet[y : y + CELL[0], x : x + CELL[1]]


def stored_view(cache: Cache, split: str, number: int, row: int) -> RGB:
    view = np.empty((32, 32, 3), np.uint8)
    decode_view_into(cache.units(split)[number].chunk(row // CHUNK_ROWS).pictures[row % CHUNK_ROWS], view)
    return view


def make_pair(root: Path, rows: int = 40, classes: tuple[str, ...] = ("even", "odd"), **changes: object) -> Cache:
    """ROOT/dataset and ROOT/cache of its whole pictures, two views."""
    dataset = make_dataset(root / "dataset", rows, 16)
    identity = make_identity({"train": rows}, **changes)  # type: ignore[arg-type]
    identity = identity.model_copy(update={"dataset_sha256": dataset.sha256, "classes": classes})
    publish_identity(root / "cache", identity)
    for number in range(2):
        add_unit(root / "cache", identity, "train", number)
    return Cache(root / "cache")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of odd sizes, one of them lying on its side, made into ROOT/dataset and ROOT/cache by the commands."""
    root = tmp_path_factory.mktemp("preview")
    (root / "pictures/train/even").mkdir(parents=True)
    lying = Image.fromarray(maker.view("train", 0, 1000)).resize((80, 44))
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(root / "pictures/train/even/lying.jpg", quality=95, exif=exif)
    make_place(root, rows=39)
    make_extracted(root, "cache", views=1)
    return root


def drawn_box(original: RGB, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of what is drawn in `colour`; its whole outline must be."""
    lines, columns = np.nonzero((original == colour).all(-1))
    top, left, bottom, right = lines.min(), columns.min(), lines.max() + 1, columns.max() + 1
    box = (original[top:bottom, left:right] == colour).all(-1)
    assert box[:2].all() and box[-2:].all() and box[:, :2].all() and box[:, -2:].all()
    return top, left, bottom, right


def test_a_rectangle_lies_where_its_view_was_cut(place: Path, tmp_path: Path) -> None:
    known = preview(place / "cache", tmp_path / "p.png", place / "dataset", rows=40)
    sheet, dataset, cache = sheet_of(tmp_path / "p.png"), Dataset(place / "dataset"), Cache(place / "cache")
    assert known["rows"] == list(range(40)) and sheet.shape == (known["height"], known["width"], 3)
    flips, lying = [], 0
    for row in range(40):
        rgb = decode_rgb(dataset.picture("train", row)[0])
        height, width = rgb.shape[:2]
        lying += (height, width) == (80, 44)
        scale = min(CELL[0] / height, CELL[1] / width)
        around = ((CELL[0] - round(height * scale)) // 2, (CELL[1] - round(width * scale)) // 2) * 2
        box = [(a - b) / scale for a, b in zip(drawn_box(cell(sheet, row, 0), COLOURS[0]), around, strict=True)]
        crop = draw_crop(cache.identity.crop, 0, "train", row, 0, height, width)
        assert np.allclose(box, (crop.top, crop.left, crop.top + crop.height, crop.left + crop.width), atol=0.6)
        # What the box holds is the view, mirrored where the view is, and only there.
        top, left, bottom, right = (round(edge) for edge in box)
        seen = resize_rgb(rgb[top:bottom, left:right], 32, 32).astype(int)
        view = cell(sheet, row, 1)[::ZOOM, ::ZOOM]
        errors = [np.abs(picture - view).mean() for picture in (seen, seen[:, ::-1])]
        assert errors[crop.flip] < 7 and errors[1 - crop.flip] > 2 * errors[crop.flip], (row, errors)
        flips.append(crop.flip)
    assert lying == 1 and 10 < sum(flips) < 30


def test_views_are_shown_as_stored_and_features_in_one_basis(tmp_path: Path) -> None:
    cache = make_pair(tmp_path)
    known = preview(tmp_path / "cache", tmp_path / "p.png", tmp_path / "dataset", rows=3)
    assert known["rows"] == [6, 20, 33] and known["views"] == [0, 1]
    sheet = sheet_of(tmp_path / "p.png")
    assert (known["width"], known["height"]) == (sheet.shape[1], sheet.shape[0]) == cell_at(3, 5, CELL)
    assert sheet[0, 0].tolist() == list(BACKGROUND)
    units = cache.units("train")
    features = np.array([[u.chunk(row // 16).features()[row % 16] for u in units] for row in known["rows"]])
    colours = (pca_colours(features, features) * 255).round().reshape(3, 2, 4, 4, 3)
    for i, row in enumerate(known["rows"]):
        for number in range(2):
            shown = cell(sheet, i, 1 + 2 * number)
            assert (shown == stored_view(cache, "train", number, row).repeat(ZOOM, 0).repeat(ZOOM, 1)).all()
            assert (cell(sheet, i, 2 + 2 * number) == colours[i, number].repeat(40, 0).repeat(40, 1)).all()
    assert len(np.unique(colours)) > 50
    before = (tmp_path / "p.png").read_bytes()
    preview(tmp_path / "cache", tmp_path / "again.png", tmp_path / "dataset", rows=3)
    assert (tmp_path / "again.png").read_bytes() == before


@pytest.mark.parametrize("dtype", ["int4", "float16"])
def test_any_dtype_and_more_rows_than_there_are(tmp_path: Path, dtype: str) -> None:
    make_cache(tmp_path / "cache", rows=20, val_rows=0, views=1, dtype=dtype)
    assert preview(tmp_path / "cache", tmp_path / "p.png", rows=30)["rows"] == list(range(20))
    assert sheet_of(tmp_path / "p.png").shape == (*cell_at(20, 2, CELL)[::-1], 3)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 8), (1, 3, 2), (3, 16, 8)])
def test_colours_lie_in_the_unit_cube_whatever_the_shape(shape: tuple[int, ...]) -> None:
    for features in (np.random.default_rng(0).standard_normal(shape), np.ones(shape), np.zeros(shape)):
        colours = pca_colours(features.astype(np.float32), features.astype(np.float32))
        assert colours.shape == (*shape[:-1], 3) and np.isfinite(colours).all()
        assert colours.min() >= 0 and colours.max() <= 1


def test_the_first_colour_is_the_widest_direction() -> None:
    draw = np.random.default_rng(1)
    along = draw.standard_normal((4, 50))
    features = along[..., None] * draw.standard_normal(12) * 9 + 100 + draw.standard_normal((4, 50, 12)) * 0.01
    colours = pca_colours(features.astype(np.float32), features.astype(np.float32))
    assert abs(np.corrcoef(colours[..., 0].ravel(), along.ravel())[0, 1]) > 0.99
    assert np.unique(colours[..., 0]).size > 150, "percentiles 1 to 99 fill the range"


def test_the_originals_are_found_or_said_to_be_left_out(tmp_path: Path) -> None:
    make_pair(tmp_path)
    cache, out = tmp_path / "cache", tmp_path / "p.png"
    answer = command(cache, "--out", out)
    assert answer.exit_code == 0 and "the originals are left out" in answer.stdout and "--data" in answer.stdout
    assert sheet_of(out).shape == (*cell_at(8, 4, CELL)[::-1], 3)
    (tmp_path / "dataset").rename(cache / "dataset")  # where `extract` puts what it shards itself
    answer = command(cache, "--out", out, "--json")
    known = json.loads(answer.stdout)
    assert answer.exit_code == 0 and known["dataset"] == str(cache / "dataset")
    assert (known["width"], known["height"]) == cell_at(8, 5, CELL)
    answer = command(cache, "--out", out)
    assert len(answer.stdout.splitlines()) == 1 and "8 of 40 rows of train, views v0, v1" in answer.stdout


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


def lies() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    def crop(*geometry: int) -> Callable[[pytest.MonkeyPatch], None]:
        return lambda patch: patch.setattr(maker, "GEOMETRY", geometry)

    return {
        "outside": crop(0, 1, 32, 32, 0, 32, 32),
        "negative": crop(5, 5, -4, 8, 0, 32, 32),
        "of another picture": crop(0, 0, 32, 32, 0, 64, 32),
        "not finite": lambda patch: patch.setattr(maker, "encode", lambda *_: {"patch": np.full((40, 16, 16), np.nan)}),
        "no view": lambda patch: patch.setattr(maker, "encode_view", lambda *_: b"\xff\xd8\xff" + bytes(20)),
    }


@pytest.mark.parametrize("lie", lies())
def test_what_a_commit_vouches_for_wrongly_stops_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    lies()[lie](monkeypatch)
    if lie == "no view":
        monkeypatch.setattr(maker, "decode_view_into", lambda *_: None)
    make_pair(tmp_path, dtype="float16")
    answer = command(tmp_path / "cache", "--data", tmp_path / "dataset", "--out", tmp_path / "p.png")
    assert answer.exit_code == 4 and "row 2: expected" in answer.stderr, (answer.stderr, answer.exception)
    assert str(tmp_path / "cache/train/v0") in answer.stderr and not (tmp_path / "p.png").exists()


def test_class_names_may_hold_anything(tmp_path: Path) -> None:
    make_pair(tmp_path, classes=("two\nlines \x1b[31m and " + "long" * 200, "\u96ea \u00e9"))
    answer = command(tmp_path / "cache", "--data", tmp_path / "dataset", "--out", tmp_path / "p.png")
    assert answer.exit_code == 0, answer.exception


def test_a_request_that_cannot_be_met_says_so(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", rows=2000, val_rows=20, views=1)
    for arguments, words in (
        (("--out", "p.jpg"), "ends in .png"),
        (("--split", "vall"), "did you mean 'val'"),
        (("--data", tmp_path / "nowhere"), "expected a finished DATASET"),
        (("--rows", 2000), "ask for fewer rows"),
        (("--rows", 0), "--rows"),
    ):
        answer = command(tmp_path / "cache", *arguments)
        assert answer.exit_code == 2 and words in answer.stderr, answer.stderr
    (tmp_path / "cache/val/v0/manifest.json").unlink()
    answer = command(tmp_path / "cache", "--split", "val", "--out", tmp_path / "p.png")
    assert answer.exit_code == 2 and "expected a complete view of val" in answer.stderr
    assert not (tmp_path / "p.png").exists() and not Path("p.jpg").exists()
    assert command(tmp_path, "--out", tmp_path / "p.png").exit_code == 2
