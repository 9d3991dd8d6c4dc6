"""Sources: every layout that is read, every contradiction that is refused before any write."""

import io
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path

import pytest
from webdataset.tariterators import tar_file_iterator

from cache_tools.errors import UsageError
from cache_tools.images import PictureRefused
from pipeline.candidates import printable, read_source
from pipeline.sources import list_sources


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
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


def listed(source) -> dict[str, list[tuple[str, int]]]:
    sources = list_sources(source)
    return {split: [(c[i].name, c[i].label) for i in range(len(c))] for split, c in sources.splits.items()}


def test_folder_with_splits_takes_labels_from_sorted_classes(tmp_path):
    fill(tmp_path, "train/b/2.png", "train/b/1.png", "train/a/x/deep.jpg", "train/a/.hidden", "val/b/3.png")
    assert list_sources(tmp_path).classes == ("a", "b")
    assert listed(tmp_path) == {
        "train": [("train/a/x/deep.jpg", 0), ("train/b/1.png", 1), ("train/b/2.png", 1)],
        "val": [("val/b/3.png", 1)],
    }
    assert read_source(list_sources(tmp_path).splits["val"][0]) == b"val/b/3.png"


def test_flat_folder_of_classes_and_of_pictures_alone(tmp_path):
    fill(tmp_path / "flat", "b/1.png", "a/2.png", "README")
    assert listed(tmp_path / "flat") == {"train": [("a/2.png", 0), ("b/1.png", 1)]}
    assert "1 files beside" in list_sources(tmp_path / "flat").notes[0]
    assert listed(fill(tmp_path / "alone", "2.png", "1.png")) == {"train": [("1.png", -1), ("2.png", -1)]}
    assert list_sources(tmp_path / "alone").classes == ()


@pytest.mark.parametrize("name", ["validation", "valid", "val"])
def test_folders_of_splits_are_known_by_their_other_names(tmp_path, name):
    fill(tmp_path, "train/a/1.png", "train/b/2.png", f"{name}/b/3.png", "test/a/4.png", "extra/a/5.png")
    found = {"val": [(f"{name}/b/3.png", 1)], "test": [("test/a/4.png", 0)]}
    assert listed(tmp_path) == {"train": [("train/a/1.png", 0), ("train/b/2.png", 1)]} | found
    assert list_sources(tmp_path).notes == ["left out beside the splits: extra"]


def test_a_test_folder_without_the_classes_is_left_out_and_named(tmp_path):
    fill(tmp_path, "train/a/1.png", "val/a/2.png", "test/images/3.png")
    assert listed(tmp_path).keys() == {"train", "val"}
    assert list_sources(tmp_path).notes == ["test left out: it has no class folder of train"]
    fill(tmp_path, "valid/a/1.png")
    with pytest.raises(UsageError, match="one folder of split val; found val/ and valid/"):
        list_sources(tmp_path)
    assert listed(fill(tmp_path / "flat", "test/1.png", "cat/2.png")).keys() == {"train"}  # classes of these names


def test_a_share_of_a_flat_source_is_held_out_by_name(tmp_path):
    flat = fill(tmp_path / "flat", *(f"{c}/{i}.png" for c in "ab" for i in range(200)))
    sources = list_sources(flat, val=0.1)
    train, val = ({item.name: item.label for item in map(part.__getitem__, range(len(part)))} for part in
                  (sources.splits["train"], sources.splits["val"]))  # fmt: skip
    assert {**train, **val} == dict(listed(flat)["train"]) and not train.keys() & val.keys()
    assert 25 <= len(val) <= 55 and {*val.values()} == {0, 1} and sources.classes == ("a", "b")
    (flat / "a" / "0.png").unlink()  # nobody else changes sides
    again = list_sources(flat, val=0.1).splits["val"]
    assert {again[i].name for i in range(len(again))} == val.keys() - {"a/0.png"}
    packed = tar(tmp_path / "x.tar", **{f"{i}__jpg": b"%d" % i for i in range(100)})
    parts = list_sources(packed, val=0.2).splits
    names = {split: [int(read_source(part[i])) for i in range(len(part))] for split, part in parts.items()}
    assert sorted(names["train"] + names["val"]) == [*range(100)] and 5 < len(names["val"]) < 40
    with pytest.raises(UsageError, match="--val: expected a source of split train alone; it also has train, val"):
        list_sources(fill(tmp_path / "split", "train/a/1.png", "val/a/1.png"), val=0.1)


def test_links_and_fifos_are_counted_and_never_opened(tmp_path):
    fill(tmp_path, "a/1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "link.png").symlink_to("1.png")
    os.mkfifo(tmp_path / "a" / "fifo.png")
    assert listed(tmp_path) == {"train": [("a/1.png", 0)]}
    assert list_sources(tmp_path).notes[0].startswith("3 links, FIFOs")


def test_names_that_are_not_utf8_survive(tmp_path):
    fill(tmp_path, "a/1.png")
    name = os.fsencode(tmp_path) + b"/a/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(b"x")
    item = list_sources(tmp_path).splits["train"][1]
    assert read_source(item) == b"x"
    assert printable(item.name) == "a/caf\\xe9.png"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no picture"),
        (["train/a/1.png", "val/b/1.png"], "'b'"),
        (["train/a/1.png", "val/1.png"], "every class of its sibling"),
        (["train/a/1.png", "train/b/.keep"], "found none"),
        (["dataset.json"], "found a DATASET"),
        (["cache.json", "train/v0/views/000000.tar"], "found a CACHE"),
        (["_info.json", "a.png"], "splits.<name>.filenames"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, names, message):
    with pytest.raises(UsageError, match=message):
        list_sources(fill(tmp_path, *names))


def test_missing_folder_says_what_was_expected(tmp_path):
    with pytest.raises(UsageError, match="expected an ImageFolder .* found nothing there"):
        list_sources(tmp_path / "nothing")


def test_vanished_or_changed_pictures_are_refused(tmp_path):
    item = list_sources(fill(tmp_path, "a/1.png")).splits["train"][0]
    with pytest.raises(PictureRefused, match="changed"):
        read_source(item._replace(size=100))
    (tmp_path / "a/1.png").unlink()
    with pytest.raises(PictureRefused, match="unreadable"):
        read_source(item)


def test_tars_by_folder_glob_brace_and_file(tmp_path):
    for split, label in (("train", 0), ("validation", 1)):
        for i in (0, 1):
            tar(tmp_path / f"in1k-{split}-{i}.tar", k0__JPEG=b"pic%d" % i, k0__cls=b"%d\n" % label)
    train = [("in1k-train-0.tar/k0.JPEG", 0), ("in1k-train-1.tar/k0.JPEG", 0)]
    val = [("in1k-validation-0.tar/k0.JPEG", 1), ("in1k-validation-1.tar/k0.JPEG", 1)]
    assert listed(tmp_path) == {"train": train, "val": val}
    assert listed(str(tmp_path / "in1k-train-*.tar")) == {"train": train}
    assert listed(str(tmp_path / "in1k-validation-{0..1}.tar")) == {"val": val}
    assert listed(tmp_path / "in1k-validation-1.tar") == {"val": val[1:]}
    assert list_sources(tmp_path).classes == ("0", "1")
    assert read_source(list_sources(tmp_path).splits["val"][1]) == b"pic1"
    with pytest.raises(UsageError, match="in1k-train-2.tar"):
        list_sources(str(tmp_path / "in1k-train-{1..2}.tar"))


def test_tars_in_split_folders_and_by_timms_info(tmp_path):
    for split in ("train", "val"):
        tar(tmp_path / "split" / split / "0.tar", a__png=b"p", a__json=b'{"label": 2}')
    assert listed(tmp_path / "split") == {"train": [("0.tar/a.png", 2)], "val": [("0.tar/a.png", 2)]}
    tar(tmp_path / "info" / "x.tar", a__png=b"p", a__cls=b"1", a__json=b'{"label": 0}')
    tar(tmp_path / "info" / "unnamed.tar", a__png=b"p", a__cls=b"7")
    (tmp_path / "info" / "classes.txt").write_text("cat\ndog\n")
    info = {"splits": {"test": {"name": "test", "num_samples": 1, "filenames": ["x.tar"], "shard_lengths": [1]}}}
    (tmp_path / "info" / "_info.json").write_text(json.dumps(info))
    assert listed(tmp_path / "info") == {"test": [("x.tar/a.png", 1)]}
    assert list_sources(tmp_path / "info").classes == ("cat", "dog")
    (tmp_path / "info" / "x.tar").unlink()
    with pytest.raises(UsageError, match="x.tar is not there"):
        list_sources(tmp_path / "info")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a__jpg": b"", "b__jpg": b"", "a__png": b""}, "'a' comes twice"),
        ({"a__v1__jpg": b"", "a__v2__jpg": b""}, "one picture per key; found a.v1.jpg and a.v2.jpg"),
        ({"a__jpg": b"", "a__cls": b"seven"}, "expected a label"),
        ({"a__jpg": b"", "a__json": b'{"label": "x"}'}, "expected a label"),
        ({"a__jpg": b"", "a__cls": b"99999999999"}, "expected a label"),
        ({"a__jpg": b"", "b__cls": b"1"}, "a picture for every label"),
        ({"a__jpg": b"", "a__cls": b"1", "b__jpg": b""}, "for every picture or for none"),
        ({"a__txt": b""}, "no picture"),
    ],
)
def test_contradictory_tars_are_refused(tmp_path, members, message):
    with pytest.raises(UsageError, match=message):
        list_sources(tar(tmp_path / "x.tar", **members))


def test_hostile_members_are_never_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        kinds = {"../../up.jpg": tarfile.REGTYPE, "link.jpg": tarfile.SYMTYPE, "fifo.jpg": tarfile.FIFOTYPE}
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    assert listed(tmp_path / "x.tar") == {"train": [("x.tar/../../up.jpg", -1)]}
    assert "2 members" in list_sources(tmp_path / "x.tar").notes[0]


def test_every_cut_of_a_tar_is_noticed(tmp_path):
    path = tar(tmp_path / "x.tar", a__jpg=b"p" * 700, a__cls=b"0", b__jpg=b"q", b__cls=b"1")
    whole, silent = path.read_bytes(), 0
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # behind the last member's data
    for size in range(0, end + 1, 64):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"x\.tar"):
            list_sources(path)
        with suppress(tarfile.ReadError), open(path, "rb") as file:
            silent += len(list(tar_file_iterator(file))) < 4
    assert silent > 0  # or webdataset's own iterator would do


def test_info_json_names_splits_as_training_does(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", **{"0.png": b"picture", "0.cls": b"0"})
    for name, expected in (("validation", "val"), ("../x", None)):
        split = {"name": name, "filenames": ["a.tar"], "num_samples": 1, "shard_lengths": [1]}
        (tmp_path / "_info.json").write_text(json.dumps({"splits": {name: split}}))
        if expected:
            assert list(list_sources(tmp_path).splits) == [expected]
        else:
            with pytest.raises(UsageError, match="expected the splits train"):
                list_sources(tmp_path)


def test_an_empty_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(UsageError, match="found no picture"):
        list_sources(tmp_path / "empty.tar")
