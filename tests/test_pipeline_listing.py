"""Sources: every layout that is read, and every ambiguous or contradictory one that is refused before any decoding."""

import io
import json
import os
import re
import tarfile
import unicodedata
from pathlib import Path

import pytest

from cache_tools.errors import UsageError
from cache_tools.images import PictureRefused
from cache_tools.records import printable
from pipeline.candidates import read_source
from pipeline.listing import Source, list_sources

CLASSES = ["a/1.png", "b/2.png"]


def fill(root: Path, *names: str) -> Path:
    """Files, each holding its own name; a name that ends in .tar becomes a tar of one labeled picture."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".tar"):
            tar(root / name, k__jpg=name.encode(), k__cls=b"0")
        else:
            (root / name).write_bytes(name.encode())
    return root


def tar(path: Path, **members: bytes) -> Path:
    """A tar of `members`, their names with __ for a dot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name.replace("__", "."))
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def listed(source: Source, **options: float) -> dict[str, list[tuple[str, int]]]:
    sources = list_sources(source, **options)
    return {split: [(c[i].name, c[i].label) for i in range(len(c))] for split, c in sources.splits.items()}


def two(*folders: str) -> list[str]:
    """A picture of each of two classes in each folder."""
    return [f"{folder}/{name}" for folder in folders for name in CLASSES]


def test_labels_are_positions_of_sorted_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/b/2.png", "train/b/1.png", "train/a/x/deep.jpg", "val/b/3.png")
    assert list_sources(tmp_path).classes == ("a", "b")
    assert listed(tmp_path) == {
        "train": [("train/a/x/deep.jpg", 0), ("train/b/1.png", 1), ("train/b/2.png", 1)],
        "val": [("val/b/3.png", 1)],
    }
    assert read_source(list_sources(tmp_path).splits["val"][0]) == b"val/b/3.png"
    fill(tmp_path / "flat", "b/1.png", "a/2.png", "README")
    assert listed(tmp_path / "flat") == {"train": [("a/2.png", 0), ("b/1.png", 1)]}
    assert listed(fill(tmp_path / "alone", "2.png", "1.png")) == {"train": [("1.png", -1), ("2.png", -1)]}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("training", "validation", "testing"),
        ("Train", "Valid", "TEST"),
        ("train2017", "val2017", "test2017"),
        ("train_images", "dev-images", "test.images"),
        ("Training Set", "Validation Set", "Test Set"),
        ("trainset", "evalset", "testset"),
        ("TRAIN_1", "eval_01", "Testing-"),
    ],
)
def test_one_table_names_the_splits_of_folders_and_tars(tmp_path: Path, train: str, val: str, test: str) -> None:
    names = {"train": train, "val": val, "test": test}
    found = {split: [f"{name}/a/1.png", f"{name}/b/2.png"] for split, name in names.items()}
    fill(tmp_path / "folders", *sum(found.values(), []))
    fill(tmp_path / "tars", *(f"x-{name}-000.tar" for name in names.values()))
    fill(tmp_path / "folders of tars", *(f"{name}/000.tar" for name in names.values()))
    for name in ("folders", "tars", "folders of tars"):
        splits = listed(tmp_path / name)
        assert list(splits) == ["train", "val", "test"]
        for split, rows in splits.items():
            assert all(names[split] in row[0] or name == "folders of tars" for row in rows)
    assert {split: [row[0] for row in rows] for split, rows in listed(tmp_path / "folders").items()} == found
    assert list(listed(tmp_path / "folders" / val)) == ["val"]  # alone, it is no split train either
    assert list(listed(tmp_path / "folders of tars" / val)) == ["val"]
    assert list(listed({"train": tmp_path / "folders" / val})) == ["train"]  # unless the user says so


LAYOUTS = {  # files -> the rows of each split and a note, or what the error says
    "other folders": ([*two("train", "val", "extra"), "x.zip"], {"train": 2, "val": 2}, "extra/, x.zip"),
    "test without classes": (["train/a/1.png", "val/a/2.png", "test/3.png"], {"train": 1, "val": 1}, "test left out"),
    "a class called train": ([*two("train"), "train/train/3.png", "val/a/4.png"], {"train": 3, "val": 1}, ""),
    "a class called test_tube": ([*CLASSES, "test_tube/3.png"], {"train": 3}, ""),
    "litter": ([*CLASSES, "a/Thumbs.db", "a/x.xml", "b/boxes.txt", "b/y.json"], {"train": 2}, "4 files of other kinds"),
    "hidden": ([*CLASSES, "a/._1.png", "a/.DS_Store", "__MACOSX/a/._1.png"], {"train": 2}, "3 hidden files left out"),
    "hidden beside splits": ([*two("train", "val"), "__MACOSX/train/a/._1.png"], {"train": 2, "val": 2}, "__MACOSX"),
    "one folder too high, flat": (two("objects"), {"train": 2}, "one class alone, objects: give that folder"),
    "flat with litter": (["1.jpg", "2.jpg", "metadata.csv"], {"train": 2}, "no labels"),
    "two of one split": (two("val", "valid"), "one folder of split val; found val/ and valid/"),
    "a class beside a split": ([*two("test"), "cat/1.png"], "found test beside cat/; name the splits"),
    "train alone beside others": ([*two("train"), "x/1.png"], "found train beside x/; name the splits"),
    "prefixed splits": (two("my_train", "my_val"), "found my_train/, my_val/; name the splits"),
    "a prefix in capitals": (two("COCOTrain2017", "COCOVal2017"), "COCOTrain2017/, COCOVal2017/; name the splits"),
    "tars with a prefix in capitals": (
        ["COCOTrain2017.tar", "ILSVRCTrain.tar", "COCOVal2017.tar", "MSCOCOval.tar", "PASCALEvalSet.tar", "XTest.tar"],
        {"train": 2, "val": 3, "test": 1},
        "",
    ),
    "tars whose words end like splits": (["cocotrain.tar", "cocoval1.tar"], "found cocotrain.tar, cocoval1.tar; name"),
    "kaggle imagenet100": (two("train.X1", "val.X"), "found train.X1/, val.X/"),
    "kaggle intel": (two("seg_train/seg_train", "seg_test/seg_test"), "found seg_test/"),
    "kaggle cats": (two("training_set/training_set", "test_set/test_set"), "found training_set/"),
    "kaggle imagenet": (["ILSVRC/Data/CLS/train/a/1.JPEG", "ILSVRC/Data/CLS/val/2.JPEG"], "CLS: .* found train/, val/"),
    "one folder too high": (two("set1/train", "set1/val"), "set1: expected classes or pictures; found train/"),
    "yolo": (["images/train/1.jpg", "images/val/2.jpg", "labels/train/1.txt"], "images: .* found train/, val/"),
    "yolo of roboflow": (["train/images/1.jpg", "train/labels/1.txt", "valid/images/2.jpg"], "labels: .* found none"),
    "flat val": (["train/a/1.png", "val/1.png"], "found no folder: this split is not sorted into classes; sort it"),
    "tiny imagenet": (["train/a/images/1.png", "val/images/2.png"], "found images: this split is not sorted"),
    "a class that val lacks": (["train/a/1.png", *two("val")], "train: expected every class; found no class 'b'"),
    "an empty class": (["train/a/1.png", "train/b/.keep"], "train/b: expected pictures of a class; found none"),
    "a tar beside splits": ([*two("train"), *two("val"), "ILSVRC2012_img_val.tar"], "found both"),
    "img2dataset": (["00000.tar", "00000.parquet", "00000_stats.json", "00001.tar"], {"train": 2}, ""),
    "a tar and a tar.gz": (["train.tar", "val.tar.gz"], "found both, train.tar and val.tar.gz"),
    "pictures beside tars": (["0.tar", "1.png"], "expected files of one kind; found both, 0.tar and 1.png"),
    "folders and tars": ([*two("train"), "val/0.tar"], "found tars .val. and folders of pictures .train."),
    "tars two folders down": (["data/train/0.tar", "data/val/0.tar"], "data: .* found train/, val/; give this folder"),
    "tars one folder down": (["data/0.tar"], "data/0.tar: expected a picture; found an archive"),
    "parquet of three subsets": (["160px/train-0.parquet", "320px/train-0.parquet"], "parquet: .* found an archive"),
    "pictures beside parquet": (["train-0.parquet", "1.png"], "one kind; found both, train-0.parquet and 1.png"),
    "tars and parquet": (["train/0.tar", "val/0.parquet"], "0.parquet: expected a whole, uncompressed tar"),
    "tar.gz": (["train.tar.gz", "val.tar.gz"], "train.tar.gz: expected a picture; found an archive"),
    "zips of kaggle": (["train.zip", "test.zip", "sample.csv"], "test.zip: .* found an archive"),
    "some tars without a split": (["val-0.tar", "more-0.tar"], "more-0.tar: .* like the files of val"),
    "a tar of two splits": (["train-val-0.tar"], "expected the name of one split; found train and val"),
    "nothing": ([], "no picture"),
    "a dataset": (["dataset.json"], "found a DATASET"),
    "a cache": (["cache.json", "train/v0/views/000000.tar"], "found a CACHE"),
    "bad _info.json": (["_info.json", "a.png"], "splits.<name>.filenames"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_people_have(tmp_path: Path, name: str) -> None:
    files, expected, *note = LAYOUTS[name]
    root = fill(tmp_path / "source", *files)
    root.mkdir(exist_ok=True)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            list_sources(root)
    else:
        assert {split: len(rows) for split, rows in listed(root).items()} == expected
        assert note[0] in "; ".join(list_sources(root).notes)


def test_sources_can_be_named_by_split(tmp_path: Path) -> None:
    fill(tmp_path, *two("my_train"), *two("x/holdout"), "t/0.tar", "v/9.tar")
    named = {"train": tmp_path / "my_train", "val": tmp_path / "x" / "holdout"}
    assert listed(named) == dict.fromkeys(("train", "val"), [("a/1.png", 0), ("b/2.png", 1)])
    tars = {"val": f"{tmp_path}/v/*.tar", "train": tmp_path / "t"}
    assert listed(tars) == {"train": [("0.tar/k.jpg", 0)], "val": [("9.tar/k.jpg", 0)]}
    with pytest.raises(
        UsageError, match="^--train .*my_train, --val .*v: .* tars .val. and folders of pictures .train."
    ):
        list_sources(named | {"val": tmp_path / "v"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="^--train .*empty: expected an ImageFolder .* no picture in split 'train'"):
        list_sources({"train": tmp_path / "empty"})
    for val in (tmp_path / "my_train", tmp_path / "my_train" / "a"):
        with pytest.raises(UsageError, match="expected pictures of its own; it is also in --"):
            list_sources(named | {"val": val})
    fill(tmp_path / "both", "train-0.tar", "val-0.tar")
    with pytest.raises(UsageError, match="--train .*both: expected one split; found train, val"):
        list_sources({"train": tmp_path / "both"})


def test_links_are_refused_or_counted_but_for_tars(tmp_path: Path) -> None:
    fill(tmp_path / "s", *two("train", "real"))
    os.mkfifo(tmp_path / "s/train/a/fifo.png")
    (tmp_path / "s/train/a/loop").symlink_to(tmp_path)
    assert len(listed(tmp_path / "s/train", max_refused=0.5)["train"]) == 2
    assert list_sources(tmp_path / "s/train", max_refused=0.5).notes[0].startswith("2 links, FIFOs or devices")
    with pytest.raises(UsageError, match=r"found 2 files and 2 links, FIFOs or devices; .* `cp -rL`"):
        list_sources(tmp_path / "s/train")
    (tmp_path / "s/train/a/1.png").unlink()
    with pytest.raises(UsageError, match="train/a: expected pictures of a class; found 2 links, .* `cp -rL`"):
        list_sources(tmp_path / "s/train")
    for link in ("s/train/c", "s/val"):  # a class, a split
        (tmp_path / link).symlink_to(tmp_path / "s/real/a")
        with pytest.raises(UsageError, match=f"{link}: expected a folder; found a link to one"):
            list_sources(tmp_path / ("s/train" if link == "s/train/c" else "s"))
        (tmp_path / link).unlink()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/x-train-0.tar").symlink_to(fill(tmp_path / "blobs", "f00.tar") / "f00.tar")
    item = list_sources(tmp_path / "hub").splits["train"][0]
    assert item.name == "x-train-0.tar/k.jpg" and read_source(item) == b"f00.tar"
    (tmp_path / "hub/x-train-1.tar").symlink_to("nowhere")
    with pytest.raises(UsageError, match=r"x-train-1\.tar: expected a tar; found no regular file"):
        list_sources(tmp_path / "hub")


def test_class_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))
    fill(tmp_path, f"train/{nfc}/1.png", f"val/{nfd}/2.png")
    assert listed(tmp_path) == {"train": [(f"train/{nfc}/1.png", 0)], "val": [(f"val/{nfd}/2.png", 0)]}
    assert list_sources(tmp_path).classes == (nfc,)
    with pytest.raises(UsageError, match="two of one class"):
        list_sources(fill(tmp_path, f"train/{nfd}/3.png"))


def test_a_share_of_a_flat_source_is_held_out_by_name(tmp_path: Path) -> None:
    flat = fill(tmp_path / "flat", *(f"{c}/{i}.png" for c in "ab" for i in range(200)))
    parts = {split: dict(rows) for split, rows in listed(flat, val=0.1).items()}
    train, val = parts["train"], parts["val"]
    assert {**train, **val} == dict(listed(flat)["train"]) and not train.keys() & val.keys()
    assert 25 <= len(val) <= 55 and {*val.values()} == {0, 1} and list_sources(flat).classes == ("a", "b")
    (flat / "a" / "0.png").unlink()  # no other picture changes sides
    assert dict(listed(flat, val=0.1)["val"]).keys() == val.keys() - {"a/0.png"}
    packed = tar(tmp_path / "x.tar", **{f"{i}__jpg": b"%d" % i for i in range(100)})
    splits = list_sources(packed, val=0.2).splits
    names = {split: [int(read_source(part[i])) for i in range(len(part))] for split, part in splits.items()}
    assert sorted(names["train"] + names["val"]) == [*range(100)] and 5 < len(names["val"]) < 40
    with pytest.raises(UsageError, match="--val 0.1: expected a source of split train alone; found train, val"):
        list_sources(fill(tmp_path / "split", "train/a/1.png", "val/a/1.png"), val=0.1)


def test_names_that_are_not_utf8_survive(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png")
    with open(os.fsencode(tmp_path) + b"/a/caf\xe9.png", "wb") as file:
        file.write(b"x")
    item = list_sources(tmp_path).splits["train"][1]
    assert read_source(item) == b"x" and printable(item.name) == "a/caf\\xe9.png"


def test_vanished_or_changed_pictures_are_refused(tmp_path: Path) -> None:
    item = list_sources(fill(tmp_path, "a/1.png")).splits["train"][0]
    with pytest.raises(PictureRefused, match="changed"):
        read_source(item._replace(size=100))
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(PictureRefused, match="unreadable"):
        read_source(item)


def test_tars_by_folder_glob_brace_and_file(tmp_path: Path) -> None:
    root = tmp_path / "old [1] {2}"
    for split, label in (("train", 0), ("validation", 1)):
        for i in (0, 1):
            tar(root / f"in1k-{split}-{i}.tar", k0__JPEG=b"pic%d" % i, k0__cls=b"%d\n" % label)
    train = [("in1k-train-0.tar/k0.JPEG", 0), ("in1k-train-1.tar/k0.JPEG", 0)]
    val = [("in1k-validation-0.tar/k0.JPEG", 1), ("in1k-validation-1.tar/k0.JPEG", 1)]
    assert listed(root) == {"train": train, "val": val}
    assert listed(root / "in1k-validation-1.tar") == {"val": val[1:]}
    assert read_source(list_sources(root).splits["val"][1]) == b"pic1"
    root = root.rename(tmp_path / "old [1]")
    assert listed(f"{root}/in1k-validation-{{0..1}}.tar") == {"val": val}
    root = root.rename(tmp_path / "old")
    assert listed(f"{root}/in1k-train-*.tar") == {"train": train}
    with pytest.raises(UsageError, match=r"in1k-train-2\.tar"):
        list_sources(f"{root}/in1k-train-{{1..2}}.tar")
    with pytest.raises(UsageError, match="expected an ImageFolder .* found nothing there"):
        list_sources(root / "nothing")


def test_timms_info_and_classes_txt(tmp_path: Path) -> None:
    tar(tmp_path / "x.tar", a__png=b"p", a__cls=b"1", a__json=b'{"label": 0}')
    tar(tmp_path / "unnamed.tar", a__png=b"p", a__cls=b"7")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for name, expected in (("test", "test"), ("validation", "val"), ("../x", None)):
        split = {"name": name, "filenames": ["x.tar"], "num_samples": 1, "shard_lengths": [1]}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": {name: split}}))
        if expected:
            assert listed(tmp_path) == {expected: [("x.tar/a.png", 1)]}
            assert list_sources(tmp_path).classes == ("cat", "dog")
        else:
            with pytest.raises(UsageError, match="expected the splits train"):
                list_sources(tmp_path)
    twice = dict.fromkeys(("train", "training"), split)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": twice}))
    with pytest.raises(UsageError, match="expected one entry of split train; found a second one, 'training'"):
        list_sources(tmp_path)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"val": split}}))
    (tmp_path / "x.tar").unlink()
    with pytest.raises(UsageError, match=r"x\.tar is not there"):
        list_sources(tmp_path)


def test_classes_txt_is_found_beside_the_tars(tmp_path: Path) -> None:
    fill(tmp_path, "x-0.tar", "other/x-1.tar")
    assert "no classes.txt: the classes are named 0 to 0" in list_sources(tmp_path / "x-0.tar").notes
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert not list_sources(tmp_path / "x-0.tar").notes
    first, second = tmp_path / "x-0.tar", tmp_path / "other/x-1.tar"
    for source in (first, f"{tmp_path}/*.tar", f"{tmp_path}/x-{{0..0}}.tar", {"train": second, "val": first}):
        assert list_sources(source).classes == ("cat", "dog")
    (tmp_path / "other/classes.txt").write_text("dog\ncat\n")
    with pytest.raises(UsageError, match="expected one list of classes; .*classes.txt differs"):
        list_sources({"train": first, "val": second})
    (tmp_path / "other/classes.txt").write_text("")
    with pytest.raises(UsageError, match="other/classes.txt: expected at least 1 lines"):
        list_sources(second)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"a__jpg": b"", "b__jpg": b"", "a__png": b""}, "found .a. twice"),
        ({"a__v1__jpg": b"", "a__v2__jpg": b""}, "one picture per key; found a.v1.jpg and a.v2.jpg"),
        ({"a__jpg": b"", "a__cls": b"seven"}, "expected a label"),
        ({"a__jpg": b"", "a__json": b'{"label": "x"}'}, "expected a label"),
        ({"a__jpg": b"", "a__cls": b"99999999999"}, "expected a label"),
        ({"a__jpg": b"", "b__cls": b"1"}, "a picture for every label"),
        ({"a__jpg": b"", "a__cls": b"1", "b__jpg": b""}, "split train has 1 of 2 pictures without one, .* x.tar/b.jpg"),
        ({"a__txt": b""}, "no picture"),
        ({}, "no picture"),
    ],
)
def test_contradictory_tars_are_refused(tmp_path: Path, members: dict[str, bytes], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        list_sources(tar(tmp_path / "x.tar", **members))


@pytest.mark.parametrize(
    ("members", "note"),
    [
        ({"a__jpg": b"", "a__label": b"1", "b__jpg": b"", "b__label": b"2"}, "no labels: .* 2 members .* .2 .label."),
        ({"a__jpg": b"", "a__label__cls": b"1", "a__cls__txt": b"1"}, "no labels: .* and 2 members"),
        ({"n01440764_1__JPEG": b""}, "no labels: .* 0 members .* names of tars are not labels"),
        ({"._a__jpg": b"", "a__jpg": b"", "a__cls": b"3", "x/._b__jpg": b""}, "2 members of tars left out: hidden"),
    ],
)  # fmt: skip
def test_what_tars_hold_beside_pictures_and_labels_is_said(
    tmp_path: Path, members: dict[str, bytes], note: str
) -> None:
    sources = list_sources(tar(tmp_path / "x.tar", **members))
    names = [name for name in members if name.endswith(("jpg", "JPEG")) and "._" not in name]
    assert len(sources.splits["train"]) == len(names) and re.search(note, "; ".join(sources.notes))


def test_links_and_fifos_in_tars_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        kinds = {"../../up.jpg": tarfile.REGTYPE, "link.jpg": tarfile.SYMTYPE, "fifo.jpg": tarfile.FIFOTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    assert listed(tmp_path / "x.tar") == {"train": [("x.tar/../../up.jpg", -1)]}
    assert "2 members" in list_sources(tmp_path / "x.tar").notes[0]
