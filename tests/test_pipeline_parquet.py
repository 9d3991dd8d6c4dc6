"""Parquet as a source: the layouts and columns that are read, and every other one refused in one line by name."""

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import run, tree_digest
from make_extract import make_extracted, make_place
from make_parquet import IMAGE, from_folder, write_parquet
from test_pipeline_shard import make_source, picture

from cache_tools.cache import Cache
from cache_tools.console import StopFlag
from cache_tools.dataset import Dataset
from cache_tools.errors import IdentityError, Interrupted, UsageError
from pipeline.listing import list_sources
from pipeline.parquet_listing import unpacked
from pipeline.shard import shard

PICTURES = [picture(i) for i in range(6)]
NAMES = ["cat", "dog"]


def listed(source: Any, **options: Any) -> dict[str, list[tuple[str, int]]]:
    sources = list_sources(source, **options)
    return {split: [(c[i].name, c[i].label) for i in range(len(c))] for split, c in sources.splits.items()}


def samples(dataset: Dataset, split: str) -> list[tuple[bytes, int]]:
    return [dataset.picture(split, row) for row in range(dataset.rows(split))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parquet")
    from_folder(make_source(root / "pictures", train=40, val=10, bad=2), root / "hub", per_file=17)
    return root


def assert_same_dataset(folder: Path, parquet: Path, out: Path, **options: Any) -> None:
    """The pictures, labels, order, classes and refusals are equal; only the names of the sources differ."""
    first, second = shard(folder, out / "folder", **options), shard(parquet, out / "parquet", **options)
    datasets = [Dataset(out / "folder"), Dataset(out / "parquet")]
    assert first.classes == second.classes and first.splits.keys() == second.splits.keys()
    for split in first.splits:
        assert samples(datasets[0], split) == samples(datasets[1], split)
        assert first.splits[split].refused == second.splits[split].refused


@pytest.mark.slow
def test_parquet_gives_the_rows_of_the_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_same_dataset(place / "pictures", place / "hub", tmp_path, rows_per_shard=16, seed=3, max_refused=0.1)
    assert "parquet: pictures from image.bytes, labels from label" in capsys.readouterr().out
    lines = (tmp_path / "parquet/train/quarantine.jsonl").read_text().splitlines()
    refused = {line["source"]: line["reason"] for line in map(json.loads, lines)}
    assert refused == {f"train-00000-of-00003.parquet/{row}": "format" for row in (0, 14)}
    assert not (tmp_path / "parquet/.run/shard").exists()  # the unpacked files are gone
    before = tree_digest(tmp_path / "parquet")
    (tmp_path / "parquet/train/000001.tar").unlink()
    shard(place / "hub", tmp_path / "parquet", rows_per_shard=16, seed=3, max_refused=0.1)
    assert tree_digest(tmp_path / "parquet") == before
    with pytest.raises(IdentityError, match="listing_sha256"):  # pictures of another resolution: other sizes
        from_folder(make_source(tmp_path / "larger", size=40, bad=2), tmp_path / "other", per_file=17)
        shard(tmp_path / "other", tmp_path / "parquet", rows_per_shard=16, seed=3)


@pytest.mark.slow
def test_photographs_give_the_rows_of_the_folder(shared_data: Path, tmp_path: Path) -> None:
    for name in ("photos", "odd-images"):
        hub = from_folder(shared_data / name, tmp_path / "hubs" / name, per_file=100)
        assert_same_dataset(shared_data / name, hub, tmp_path / name, max_refused=0.5)


@pytest.mark.slow
def test_a_stop_while_unpacking_resumes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("cache_tools.storage.settle", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match=r"train-00000-of-00003.parquet: stopped; the same command resumes"):
            shard(place / "hub", out, max_refused=0.1)
    assert not list(out.rglob("*.tar"))
    shard(place / "hub", out, max_refused=0.1)
    shard(place / "hub", tmp_path / "straight", max_refused=0.1)
    assert tree_digest(out) == tree_digest(tmp_path / "straight")


@pytest.mark.slow
def test_extract_takes_parquet_files(tmp_path: Path) -> None:
    place = make_place(tmp_path, rows=20, val_rows=4)
    hub = from_folder(place / "pictures", place / "hub")
    caches = make_extracted(place, "cache"), make_extracted(place, "cache_of_hub", source=str(hub))
    chunks = [Cache(cache).unit("train", 1).chunk(0) for cache in caches]
    assert [bytes(data) for data in chunks[0].pictures] == [bytes(data) for data in chunks[1].pictures]
    assert chunks[0].labels.tolist() == chunks[1].labels.tolist()


LAYOUTS = {  # files -> rows of each split
    "a snapshot": (["data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-0-of-1"], [2, 1]),
    "a converted branch": (["default/train/0000", "default/train/0001", "default/test/0000"], [2, 1]),
    "one folder": (["train-0", "test-0"], [1, 1]),
    "folders of splits": (["train/0", "validation/0", "test/0"], [1, 1, 1]),
    "no split": (["x/0000", "x/0001"], [2]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_hub(tmp_path: Path, name: str) -> None:
    files, rows = LAYOUTS[name]
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(files):  # links to blobs, as a snapshot has
        blob = write_parquet(tmp_path / "blobs" / f"{number}", PICTURES[:1], [0])
        (tmp_path / "s" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / f"{file}.parquet").symlink_to(blob)
    (tmp_path / "s" / "README.md").write_text("---\n")
    (tmp_path / "s" / ".cache").mkdir()
    assert [len(part) for part in listed(tmp_path / "s").values()] == rows
    folder = tmp_path / "s" / Path(files[0]).parent
    for source in (folder, f"{folder}/*.parquet", folder / f"{Path(files[0]).name}.parquet"):
        assert list(listed(source))[0] == "train"
    assert list(listed({"val": folder / f"{Path(files[0]).name}.parquet"})) == ["val"]


def test_a_share_is_held_out_and_unpacked_once(tmp_path: Path) -> None:
    write_parquet(tmp_path / "s/x.parquet", [picture(i) for i in range(60)], [i % 2 for i in range(60)], NAMES)
    shard(tmp_path / "s", tmp_path / "out", val=0.3)
    dataset = Dataset(tmp_path / "out")
    found = samples(dataset, "train") + samples(dataset, "val")
    assert sorted(found) == sorted((picture(i), i % 2) for i in range(60)) and 5 < dataset.rows("val") < 30


COLUMNS = {  # columns of three rows -> labels and classes, or the error
    "class labels": ({"labels": [0, 1, 0], "names": NAMES}, [0, 1, 0], ("cat", "dog")),
    "a table of names": ({"labels": [0, 1, 0], "names": {"1": "dog", "0": "cat"}}, [0, 1, 0], ("cat", "dog")),
    "numbers": ({"labels": [0, 2, 0]}, [0, 2, 0], ("0", "1", "2")),
    "strings": ({"labels": ["dog", "cat", "dog"]}, [1, 0, 1], ("cat", "dog")),
    "a dictionary": ({"labels": pa.array(["b", "a", "b"]).dictionary_encode()}, [1, 0, 1], ("a", "b")),
    "numbers in a dictionary": ({"labels": pa.array([1, 0, 1]).dictionary_encode()}, [1, 0, 1], ("0", "1")),
    "large strings": ({"labels": pa.array(["b", "a", "b"], pa.large_string())}, [1, 0, 1], ("a", "b")),
    "bytes": ({"image": pa.array(PICTURES[:3], pa.large_binary()), "labels": [0, 0, 0]}, [0, 0, 0], ("0",)),
    "another name": ({"image": None, "img": pa.array([{"bytes": b""}] * 3), "cls": [0, 0, 1]}, [0, 0, 1], ("0", "1")),
    "no label": ({}, [-1, -1, -1], ()),
    "null labels": ({"labels": [None, None, None]}, [-1, -1, -1], ()),
    "hidden test labels": ({"labels": [-1, -1, -1], "names": NAMES}, [-1, -1, -1], ("cat", "dog")),
    "one null label": ({"labels": [None, 0, 0]}, "has 1 of 3 pictures without one, the first x.parquet/0", ()),
    "more labels than names": ({"labels": [0, 1, 2], "names": NAMES}, "label below 2 in .* found 2 in row 2", ()),
    "a label of 2^40": ({"labels": [0, 1 << 40, 2]}, "in column label; found 1099511627776 in row 1", ()),
    "floats": ({"labels": [0.5, 1.0, 2.0]}, r"integer or string labels; found image .*, label .double", ()),
    "several labels": ({"labels": [[0], [1], [0]]}, "integer or string labels; .* label .list<", ()),
    "two labels": ({"labels": [0, 1, 0], "fine_label": [0, 1, 0]}, "label .int64., fine_label .int64.; name", ()),
    "no picture": ({"image": None, "url": ["a", "b", "c"]}, "one column of pictures .*; found url .string", ()),
    "two pictures": ({"mask": pa.array([{"bytes": b""}] * 3)}, "one column of pictures .* mask .struct<bytes", ()),
    "lists of pictures": ({"image": pa.array([[{"bytes": b""}]] * 3)}, "pictures .* found image .list<", ()),
    "paths alone": ({"image": pa.array([{"path": "a"}] * 3)}, "pictures .* found image .struct<path: string>", ()),
    "bad metadata": ({"labels": [0, 1, 0], "names": 7}, "cannot read: .'int' object", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_are_found_by_type_or_refused_by_name(tmp_path: Path, name: str) -> None:
    columns, expected, classes = COLUMNS[name]
    path = write_parquet(tmp_path / "x.parquet", PICTURES[:3], **columns)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected) as error:
            list_sources(path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 900
    else:
        sources = list_sources(path)
        assert (sources.splits["train"].labels.tolist(), sources.classes) == (expected, classes)


@pytest.mark.slow
def test_columns_can_be_named(tmp_path: Path) -> None:
    mask = pa.array([{"bytes": b"GIF", "path": ""}] * 6, IMAGE)
    write_parquet(tmp_path / "s/x.parquet", PICTURES, [0] * 6, mask=mask, fine_label=[0, 1] * 3)
    out = tmp_path / "out"
    run("mcm-cache", "shard", tmp_path / "s", out, "--column", "image", "--column", "fine_label")
    assert sorted(samples(Dataset(out), "train")) == sorted((data, i % 2) for i, data in enumerate(PICTURES))
    assert listed(tmp_path / "s", columns=["image"])["train"][0] == ("x.parquet/0", -1)
    with pytest.raises(UsageError, match=r"expected the column nope; found image .struct"):
        list_sources(tmp_path / "s", columns=["nope"])
    with pytest.raises(UsageError, match="--column: expected parquet files; found others"):
        list_sources(make_source(tmp_path / "pictures", 2, 2), columns=["image"])


def test_splits_must_agree(tmp_path: Path) -> None:
    def write(split: str, *arguments: Any, **columns: Any) -> None:
        write_parquet(tmp_path / f"{split}-0.parquet", PICTURES[:2], *arguments, **columns)

    write("train", [0, 1], NAMES)
    write("test", [-1, -1], NAMES)
    assert list(listed(tmp_path)) == ["train"] and "test left out: it has no labels" in list_sources(tmp_path).notes
    for arguments in ([[0, 1], ["dog", "cat"]], [["cat", "dog"]], [[0, 1]], []):
        write("test", *arguments)
        with pytest.raises(UsageError, match="expected columns and classes as in .*train-0"):
            list_sources(tmp_path)
    write("train", ["cat", "cat"])
    write("test", ["cat", "dog"])
    with pytest.raises(UsageError, match="expected every class in train; found no class 'dog'"):
        list_sources(tmp_path)


def test_rows_without_a_picture_are_quarantined(tmp_path: Path) -> None:
    pictures = [None, b"", b"GIF89a", PICTURES[0][:60], *PICTURES]
    image = pa.array([None, *({"bytes": data, "path": "a.jpg"} for data in pictures)], IMAGE)
    write_parquet(tmp_path / "x.parquet", pictures, [0] * 11, image=image)
    shard(tmp_path / "x.parquet", tmp_path / "out", max_refused=1)
    lines = (tmp_path / "out/train/quarantine.jsonl").read_text().splitlines()
    reasons = {line["source"]: line["reason"] for line in map(json.loads, lines)}
    expected = ["empty", "empty", "empty", "format", "damaged"]
    assert reasons == {f"x.parquet/{row}": reason for row, reason in enumerate(expected)}
    assert sorted(samples(Dataset(tmp_path / "out"), "train")) == sorted((data, 0) for data in PICTURES)


@pytest.mark.slow
def test_damaged_files_are_named(
    tmp_path: Path,
    how_many: Callable[[int, int], int],
    tally: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_parquet(tmp_path / "train-0.parquet", [picture(i, 4) for i in range(40)], [0] * 40, NAMES)
    whole, draw, damaged = path.read_bytes(), random.Random(3), 0
    for cut in (0, 3, 4, 12, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"train-0\.parquet: expected a whole parquet file; cannot read: "):
            list_sources(path)
    for trial in range(how_many(100, 5000)):  # damage in a picture is for the decoder
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            found = unpacked(list_sources(path).splits["train"], tmp_path / f"{trial}", StopFlag())
            assert len(found) == 40 and all(found[i].size is not None for i in range(40))
        except UsageError as error:
            assert "train-0.parquet: " in str(error)
            damaged += 1
    assert damaged > 3
    tally("parquet files with a random byte", files=trial + 1, named=damaged, failures=0)
    path.write_bytes(whole)
    (tmp_path / "train-1.parquet").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"train-1.parquet: expected a parquet file; found no regular file"):
        list_sources(f"{tmp_path}/*.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"run `pip install 'masked-channel-modeling\[parquet\]'`"):
        list_sources(path)
