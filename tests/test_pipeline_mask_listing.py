"""Sources with masks: both layouts become the same DATASET; every odd mask is refused by a line, none is clipped."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from conftest import tree_digest
from make_dataset import make_dataset
from make_scenes import CLASSES, make_ade, make_masks, png, scene
from PIL import Image
from test_pipeline_shard import make_source
from typer.testing import CliRunner

from cache_tools.dataset import Dataset
from cache_tools.errors import CorruptionError, IdentityError, TooManyRefused, UsageError
from cache_tools.info import info, summary
from cache_tools.records import encode_record
from cache_tools.repair import repair
from cache_tools.verify import verify
from pipeline.cli import app
from pipeline.shard import shard


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    shard(make_ade(root / "ade"), root / "dataset", rows_per_shard=16, workers=1)
    return root


def sources(dataset: Dataset, split: str) -> list[int]:
    """The number of the scene of each row, from the tar's own record."""
    found = [json.loads(sample["json"])["source"] for sample in dataset.webdataset(split)]
    return [int(name[-7:-4]) + 1000 * ("val" in name) for name in found]


@pytest.mark.filterwarnings("ignore")
def test_both_layouts_store_the_labels_from_zero_and_255(place, tmp_path):
    shard(make_masks(tmp_path / "masks"), tmp_path / "dataset", rows_per_shard=16, workers=1)
    for path, ignore in ((place / "dataset", (0,)), (tmp_path / "dataset", (255,))):
        dataset = Dataset(path)
        assert (dataset.record.task, dataset.record.ignore, dataset.classes) == ("segment", ignore, CLASSES)
        assert not verify(path, quiet=True).problems
        for split in ("train", "val"):
            numbers = sources(dataset, split)
            assert sorted(numbers) == [row + 1000 * (split == "val") for row in range(dataset.rows(split))]
            for row, number in enumerate(numbers):
                picture, labels = scene(number)
                assert dataset.picture(split, row) == (png(picture), -1)
                assert (dataset.mask(split, row) == labels).all()


@pytest.mark.filterwarnings("ignore")
def test_webdataset_and_timm_read_the_tars(place):
    from timm.data import create_dataset

    dataset = Dataset(place / "dataset")
    for row, sample in enumerate(dataset.webdataset("train")):
        mask = np.asarray(Image.open(io.BytesIO(sample["mask.png"])))
        assert sample["__key__"] == f"{row:09d}" and (mask == dataset.mask("train", row)).all()
        assert sample["png"] == dataset.picture("train", row)[0]
    read = create_dataset("wds/", root=str(place / "dataset/train"), split="train", is_training=False, batch_size=4)
    found = sorted(np.asarray(picture).tobytes() for picture, _ in read)
    assert found == sorted(scene(row)[0].tobytes() for row in range(20))


def odd(place, tmp_path, change):
    """A copy of the source in which `change(root)` has been done."""
    root = shutil.copytree(place / "ade", tmp_path / "ade")
    change(root)
    return root


def mask_of(data):
    return lambda root: (root / "annotations/training/003.png").write_bytes(data)


def turn(root, name="images/training/003.png"):
    """A picture whose EXIF turns it upright; its mask lies as the camera did."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene(3)[0]).save(root / name, exif=exif)


@pytest.mark.parametrize(
    ("change", "reason", "line"),
    [
        (mask_of(png(np.full((40, 32), 4, np.uint8))), "mask-value", "found 4 at row 0, column 0"),
        (turn, "mask-size", "the size of the upright picture"),
        (
            lambda root: (root / "annotations/training/003.png").unlink(),
            "no-mask",
            "expected the mask training/003.png",
        ),
    ],
)
def test_an_odd_mask_is_refused_by_reason_and_counts_for_the_budget(place, tmp_path, change, reason, line):
    root = odd(place, tmp_path, change)
    with pytest.raises(TooManyRefused, match=f"1 {reason}"):
        shard(root, tmp_path / "none", workers=1)
    record = shard(root, tmp_path / "some", max_refused=0.1, workers=1)
    (refused,) = map(json.loads, (tmp_path / "some/train/quarantine.jsonl").read_text().splitlines())
    assert refused["reason"] == reason and refused["source"] == "images/training/003.png"
    assert record.splits["train"].rows == 19
    assert re.search(line, refused["detail"])


def test_notes_say_what_is_left_out_and_palettes_are_labels(place, tmp_path, capsys):
    def change(root):
        for row in range(3):
            path = root / f"annotations/training/{row:03d}.png"
            picture = Image.open(path)
            picture.putpalette(list(range(256)) * 3)
            picture.save(path)
        (root / "annotations/training/extra.png").write_bytes(png(scene(0)[1]))
        shutil.rmtree(root / "annotations/validation")
        (root / "images/training/notes.txt").write_text("no picture")
        (root / "images/extra").mkdir()

    shard(odd(place, tmp_path, change), tmp_path / "out", workers=1)
    said = capsys.readouterr().out
    assert "1 masks of annotations/training left out: they have no picture" in said
    assert "images/validation left out: there is no annotations/validation" in said
    assert "1 other files of images/training left out" in said and "images/extra left out: no split" in said
    first, second = Dataset(place / "dataset"), Dataset(tmp_path / "out")
    assert all((first.mask("train", row) == second.mask("train", row)).all() for row in range(20))


def test_the_next_command_of_masks_is_fine_tuning(place):
    said = CliRunner().invoke(app, ["shard", f"{place}/ade", f"{place}/dataset", "--rows-per-shard", "16"]).output
    assert f"next: mcm-train finetune finetune/pets_demo --data {place}/dataset --init" in said


def test_ignore_and_classes_are_settled_here(tmp_path):
    root = make_masks(tmp_path / "masks")
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    record = shard(root, tmp_path / "out", ignore=[255, 0], classes=names, workers=1)
    assert (record.classes, record.ignore) == (("a", "b"), (0, 255))
    dataset = Dataset(tmp_path / "out")
    values = {value for row in range(20) for value in np.unique(dataset.mask("train", row)).tolist()}
    assert values == {0, 1, 255}
    with pytest.raises(IdentityError, match="ignore"):
        shard(root, tmp_path / "out", ignore=[255, 1], classes=names, workers=1)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_with_masks_may_be_named_per_split(place, tmp_path):
    root = make_masks(tmp_path / "masks")
    parts = {"train": root / "train", "val": (root / "val").rename(tmp_path / "held-out")}
    shard(parts, tmp_path / "out", rows_per_shard=16, workers=1)
    first, second = Dataset(place / "dataset"), Dataset(tmp_path / "out")
    assert second.record.ignore == (255,) and second.classes == CLASSES
    for split in ("train", "val"):
        names = [json.loads(sample["json"])["source"] for sample in second.webdataset(split)]
        for row, name in enumerate(names):
            picture, labels = scene(int(name[-7:-4]) + 1000 * (split == "val"))
            assert second.picture(split, row) == (png(picture), -1) and (second.mask(split, row) == labels).all()
    known = info(first.path)
    assert (known["task"], known["ignore"], known["names"]) == ("segment", (0,), CLASSES)
    assert "(segment): 3 classes" in summary(known)
    assert "classes  ground; left; right\n  ignored  value 0 of the source's masks" in summary(known)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"train": "masks/train", "val": "masks/train"}, "in a folder of its own per split"),
        ({"train": "masks/train", "val": "masks"}, "in a folder of its own per split"),
        ({"train": "ade"}, "expected the pictures of one split; found images/training; give .*ade as SOURCE"),
        ({"train": "masks/train", "val": "cut"}, "in a folder of its own per split"),
        ({"train": "masks/train", "val": "masks/val"}, "expected one list of classes; .*/masks/classes.txt differs"),
        ({"train": "masks/train/masks"}, "--ignore, --classes: expected a source with masks; found none in --train"),
    ],
)
def test_bad_folders_with_masks_per_split(tmp_path, parts, line):
    make_masks(tmp_path / "masks"), make_ade(tmp_path / "ade")
    for name in ("images", "annotations"):
        shutil.copytree(tmp_path / f"ade/{name}/validation", tmp_path / "cut" / name)
    (tmp_path / "masks/val/classes.txt").write_text("a\nb\nc")
    with pytest.raises(UsageError, match=line):
        shard({split: tmp_path / part for split, part in parts.items()}, tmp_path / "out", ignore=[0], workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "options", "line"),
    [
        (make_ade, {"ignore": [255]}, "expected names of the values 0 to 2, as --ignore .255. leaves them"),
        (make_ade, {"ignore": [300]}, "--ignore: expected values from 0 to 255"),
        (make_ade, {"val": 0.5}, "--val: expected a source without masks"),
        (make_source, {"ignore": [0]}, "--ignore, --classes: expected a source with masks; found none"),
    ],
)
def test_bad_requests(tmp_path, make, options, line):
    with pytest.raises(UsageError, match=line):
        shard(make(tmp_path / "source"), tmp_path / "out", workers=1, **options)


def test_class_names_are_needed_and_two_folders_of_one_split_are_a_question(tmp_path):
    root = make_masks(tmp_path / "masks")
    (root / "train").rename(root / "training")
    (root / "classes.txt").unlink()
    with pytest.raises(UsageError, match="expected a file of class names, one per line"):
        shard(root, tmp_path / "out")
    (root / "classes.txt").write_text("only")
    with pytest.raises(UsageError, match="expected masks of 2 to 255 classes; found 1"):
        shard(root, tmp_path / "out")
    (root / "classes.txt").write_bytes(b"caf\xe9\nb")
    with pytest.raises(UsageError, match="in UTF-8"):
        shard(root, tmp_path / "out")
    (root / "classes.txt").write_text("a\nb\nc")
    (root / "train/images").mkdir(parents=True)
    (root / "train/masks").mkdir()
    with pytest.raises(UsageError, match="expected one folder of split train"):
        shard(root, tmp_path / "out")
    (root / "train/images").rename(root / "images")
    (root / "train/masks").rename(root / "masks")
    with pytest.raises(UsageError, match="expected images/training and annotations/training, or train/images"):
        shard(root, tmp_path / "out")


def test_masks_that_are_lost_or_damaged_are_named_moved_and_made_again(place, tmp_path):
    path = shutil.copytree(place / "dataset", tmp_path / "dataset")
    before, dataset = tree_digest(path), Dataset(path)
    tar, targets = path / "train/000001.tar", path / "train/000001.targets.npy"
    data, position = bytearray(tar.read_bytes()), int(dataset.targets("train", 1)[1]["offset"])
    data[position + 60] ^= 1
    tar.write_bytes(data)
    targets.write_bytes(targets.read_bytes()[:-1] + b"\1")
    with pytest.raises(CorruptionError, match="row 17"):
        dataset.mask("train", 17)
    assert dataset.mask("train", 16).shape == (40, 32)
    with pytest.raises(CorruptionError, match=r"000001.targets.npy: expected the index that dataset.json names"):
        Dataset(path).mask("train", 17)
    report = verify(path, quiet=True)
    assert [(problem.what, problem.shard) for problem in report.problems] == [("targets", 1), ("tar", 1)]
    targets.write_bytes((place / "dataset/train/000001.targets.npy").read_bytes())
    assert "damaged parts: mask of row 17" in verify(path, quiet=True).problems[0].text
    targets.unlink()
    repair(verify(path, quiet=True))
    shard(place / "ade", path, rows_per_shard=16, workers=1)
    assert tree_digest(path) == before


def test_datasets_with_labels_keep_their_bytes(tmp_path):
    dataset = make_dataset(tmp_path / "dataset", 4, 4)
    assert b"task" not in encode_record(dataset.record) and b"targets" not in encode_record(dataset.record)
    with pytest.raises(UsageError, match="expected a DATASET with masks; its task is classify"):
        dataset.mask("train", 0)
