"""COCO sources: every annotation comes back as it was; what is odd is dropped and counted, refused, or one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import tree_digest
from make_scenes import make_coco, png, scene
from test_pipeline_mask_listing import turn

from cache_tools.dataset import Dataset
from cache_tools.errors import CorruptionError, IdentityError, TooManyRefused, UsageError
from cache_tools.info import info, summary
from cache_tools.labels import decode_boxes
from cache_tools.repair import repair
from cache_tools.verify import verify
from pipeline.coco_listing import _run_lengths
from pipeline.shard import shard

TRAIN = "annotations/instances_train2017.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    shard(make_coco(root / "coco"), root / "dataset", rows_per_shard=16, workers=1)
    return root


def content(root: Path, split: str = "train") -> dict:
    return json.loads((root / f"annotations/instances_{split}2017.json").read_text())


@pytest.fixture
def odd(place, tmp_path):
    """A function that returns a copy of the source whose train JSON `change` has changed in place."""

    def make(change) -> Path:
        root = shutil.copytree(place / "coco", tmp_path / "coco")
        known = content(root)
        known = change(known) or known
        (root / TRAIN).write_text(known if isinstance(known, str) else json.dumps(known))
        return root

    return make


def check_rows(dataset: Dataset, root: Path, split: str) -> int:
    """Compare each row with the original JSON; return the number of objects."""
    known, objects = content(root, split), 0
    images = {image["id"]: image for image in known["images"]}
    names = {category["id"]: category["name"] for category in known["categories"]}
    for row, sample in enumerate(dataset.webdataset(split)):
        found, stored = dataset.boxes(split, row), json.loads(sample["json"])
        image = images.pop(found.image_id)
        expected = [each for each in known["annotations"] if each["image_id"] == found.image_id]
        assert stored["annotations"] == expected and stored["source"].endswith(f"/{image['file_name']}")
        assert found.size_HW == (image["height"], image["width"]) and sample["cls"] == b"-1"
        assert [dataset.classes[label] for label in found.labels_N] == [names[each["category_id"]] for each in expected]
        xywh = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in found.boxes_N4.tolist()]
        assert np.allclose(np.reshape(xywh, (-1, 4)), np.reshape([each["bbox"] for each in expected], (-1, 4)))
        assert (found.boxes_N4 <= [image["width"], image["height"]] * 2).all() and (found.boxes_N4 >= 0).all()
        for values, key in ((found.area_N, "area"), (found.iscrowd_N, "iscrowd")):
            assert values.tolist() == [each[key] for each in expected]
        assert found.segmentation == [each.get("segmentation", []) for each in expected]
        objects += len(expected)
    assert not images and objects == dataset.split(split).objects
    return objects


@pytest.mark.filterwarnings("ignore")
def test_every_annotation_comes_back_as_it_was(place):
    dataset = Dataset(place / "dataset")
    assert (dataset.record.task, dataset.classes) == ("detect", ("left", "right"))
    assert dataset.record.coco.model_dump() == {
        "category_ids": (3, 7), "boxes_dropped": 0, "boxes_clipped": 0, "polygons_dropped": 0,
    }  # fmt: skip
    assert [check_rows(dataset, place / "coco", split) for split in ("train", "val")] == [20, 6]
    for row in range(20):
        picture, labels = scene(dataset.boxes("train", row).image_id // 10)
        (x0, y0, x1, y1), *_ = dataset.boxes("train", row).boxes_N4.astype(int).tolist()
        assert dataset.picture("train", row) == (png(picture), -1)
        assert (labels[y0:y1, x0:x1] % 255 > 0).all() and labels[y0:y1, x0:x1].size == (labels % 255 > 0).sum()
    assert not verify(place / "dataset", quiet=True).problems
    assert "(detect): 2 classes" in summary(info(place / "dataset"))
    assert "20 rows in 2 shards, 20 objects, 0 refused" in summary(info(place / "dataset"))
    with pytest.raises(UsageError, match="expected a DATASET with masks; its task is detect"):
        dataset.mask("train", 0)
    with pytest.raises(UsageError, match="it has boxes, and no labels"):
        dataset.labeled()


@pytest.mark.filterwarnings("ignore")
def test_timm_reads_the_tars(place):
    from timm.data import create_dataset

    read = create_dataset("wds/", root=str(place / "dataset/train"), split="train", is_training=False, batch_size=4)
    found = sorted(np.asarray(picture).tobytes() for picture, _ in read)
    assert found == sorted(scene(row)[0].tobytes() for row in range(20))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "objects"), [("bccd", [3943, 945]), ("coco-sample", [165, 256])])
def test_real_pictures(tmp_path, shared_data, name, objects):
    real = shared_data / "downstream" / name
    shard(real, tmp_path / "out")
    assert [check_rows(Dataset(tmp_path / "out"), real, split) for split in ("train", "val")] == objects


def move(root: Path, names: dict[str, str]) -> None:
    for old, new in names.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (root / old).rename(root / new)


@pytest.mark.parametrize(
    "names",
    [
        {TRAIN: "annotations/train.json", "train2017": "images/training", "val2017": "images/val"},
        {
            TRAIN: "train2017/_annotations.coco.json",
            "annotations/instances_val2017.json": "val2017/_annotations.coco.json",
            "train2017": "train",
            "val2017": "valid",
        },
    ],
)
def test_other_spellings_give_the_same_rows(place, tmp_path, names):
    root = shutil.copytree(place / "coco", tmp_path / "coco")
    move(root, names)
    shard(root, tmp_path / "out", rows_per_shard=16, workers=1)
    for row in range(20):
        one, other = (repr(Dataset(path).boxes("train", row)) for path in (place / "dataset", tmp_path / "out"))
        assert one == other


def test_names_from_the_root_and_notes(place, odd, tmp_path, capsys):
    def change(known):
        for image in known["images"][1:]:
            image["file_name"] = f"./train2017/{image['file_name']}"
        known["images"].pop(0), known["annotations"].pop(0)

    root = odd(change)
    (root / "annotations/captions_train2017.json").write_text("{}")
    record = shard(root, tmp_path / "out", workers=1)
    assert (record.splits["train"].rows, record.splits["train"].refused) == (19, 0)
    said = capsys.readouterr().out
    assert "captions_train2017.json left out" in said and "1 files of " in said and "does not name them" in said


def test_odd_boxes_and_polygons_are_counted(odd, tmp_path):
    nan, inf = float("nan"), float("inf")
    boxes = [[0, 0, 0, 5], [1, 1, 5, -1], [nan, 0, 1, 1], [0, 0, inf, 1], [-5, 0, 5, 5], [32, 0, 5, 5]]
    polygons = [[0, 0, 1, 1], [0, 0, 1, 1, 2], [0, 0, 1, 1, nan, 2], [0, 0, 9, 0, 9, 9]]

    def change(known):
        base = known["annotations"][0] | {"image_id": 0}
        known["annotations"] = [base | {"id": i, "bbox": box} for i, box in enumerate(boxes)]
        known["annotations"].append(base | {"id": 8, "bbox": [-2.5, 30, 50, 20], "segmentation": polygons})
        known["annotations"].append({"id": 9, "image_id": 0, "category_id": 3, "bbox": [1, 2, 3, 4.5]})

    record = shard(odd(change), tmp_path / "out", workers=1)
    assert (record.coco.boxes_dropped, record.coco.boxes_clipped, record.coco.polygons_dropped) == (6, 1, 3)
    dataset = Dataset(tmp_path / "out")
    found = {boxes.image_id: boxes for boxes in (dataset.boxes("train", row) for row in range(20))}
    assert found[0].boxes_N4.tolist() == [[0, 30, 32, 40], [1, 2, 4, 6.5]]
    assert found[0].segmentation == [polygons[3:], []] and found[0].area_N.tolist() == [250.5, 13.5]
    assert found[10].boxes_N4.shape == (0, 4) and record.splits["train"].objects == 2


@pytest.mark.parametrize(
    ("change", "reason", "line"),
    [
        (lambda root: turn(root, "train2017/003.png"), "box-size", "found an upright picture of 40x32"),
        (lambda root: (root / "train2017/003.png").unlink(), "unreadable", "No such file"),
    ],
)
def test_a_picture_of_another_size_or_a_missing_one_is_refused(odd, tmp_path, change, reason, line):
    change(root := odd(lambda known: None))
    with pytest.raises(TooManyRefused, match=f"1 {reason}"):
        shard(root, tmp_path / "none", workers=1)
    record = shard(root, tmp_path / "some", max_refused=0.1, workers=1)
    (refused,) = map(json.loads, (tmp_path / "some/train/quarantine.jsonl").read_text().splitlines())
    assert refused["reason"] == reason and refused["source"] == "train2017/003.png" and line in refused["detail"]
    assert record.splits["train"].objects == 19


def first(key: str, **changes):
    """A change of the first record of a list."""
    return lambda known: known[key][0].update(changes)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda known: "{", "expected COCO's JSON; found Expecting property name"),
        (lambda known: "[" * 100_000, "expected COCO's JSON"),
        (
            lambda known: known.pop("annotations") and None,
            "expected the lists images, annotations, categories; found no",
        ),
        (first("annotations", category_id=99), "annotation 100 of image 0 and category 99"),
        (first("annotations", image_id=99), "annotation 100 of image 99"),
        (first("annotations", id=101), "expected unique ids in annotations; found id 101 twice"),
        (first("images", id=10), "expected unique ids in images; found id 10 twice"),
        (first("categories", id=3), "unique ids in categories"),
        (first("categories", name="left"), "expected categories with unique names"),
        (first("categories", id=8), "annotation 101 of image 10 and category 7"),
        (
            lambda known: known["categories"].append({"id": 8, "name": "more"}),
            "expected the same categories in every split",
        ),
        (lambda known: known.update(categories=[], annotations=[]), "expected categories with unique names"),
        (first("images", file_name="../x.png"), "names of pictures below its folder; found '../x.png'"),
        (first("images", file_name="a\0b"), "names of pictures below its folder"),
        (first("images", file_name="001.png"), "expected one image per picture; found '001.png' twice"),
        (first("images", width="32"), "images.0.width: Input should be a valid integer; found '32'"),
        (lambda known: known["images"][0].pop("height") and None, "images.0.height: Field required"),
        (first("annotations", bbox=[1, 2, 3]), "annotations.0.bbox: List should have at least 4 items"),
        (first("annotations", bbox=[1, 2, 3, None]), "annotations.0.bbox: Input should be a valid number; found None"),
        (first("annotations", segmentation=[1, 2, 3]), "annotations.0.segmentation: Input should be a valid list"),
        (first("annotations", segmentation={"size": [32, 40], "counts": [1280]}), "expected an RLE of 40 x 32 pixels"),
        (first("annotations", segmentation={"size": [40, 32], "counts": "T"}), "expected an RLE of 40 x 32 pixels"),
        (first("annotations", segmentation={"size": [40, 32], "counts": "PX1P"}), "expected an RLE of 40 x 32 pixels"),
        (first("annotations", area=float("nan")), "annotations.0.area"),
        (first("annotations", score=float("inf")), "expected annotations of finite numbers for image 0"),
        (lambda known: known.update(images=[], annotations=[]), "train2017; found none of its 0"),
    ],
)
def test_a_json_that_is_wrong_is_one_line_before_anything_is_written(odd, tmp_path, change, line):
    with pytest.raises(UsageError) as caught:
        shard(odd(change), tmp_path / "out", workers=1)
    assert line in str(caught.value) and "\n" not in str(caught.value) and "annotations/instances_" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_missing_or_ambiguous(place, tmp_path):
    root = shutil.copytree(place / "coco", tmp_path / "coco")
    for options in ({"val": 0.5}, {"ignore": [0]}):
        with pytest.raises(UsageError, match="expected a source with"):
            shard(root, tmp_path / "out", **options)
    (root / "training").mkdir()
    with pytest.raises(UsageError, match="expected one folder of pictures of split train, such as train2017; found "):
        shard(root, tmp_path / "out")
    (root / "annotations/training.json").write_text("{}")
    with pytest.raises(UsageError, match="expected one JSON of split train"):
        shard(root, tmp_path / "out")
    for path in (root / "annotations").iterdir():
        path.unlink()
    (root / "annotations/instances_default.json").write_text("{}")
    with pytest.raises(UsageError, match=r"instances_default.json: expected a split in its name"):
        shard(root, tmp_path / "out")


def test_damage_is_named_repaired_and_another_json_is_another_request(place, tmp_path):
    path = shutil.copytree(place / "dataset", tmp_path / "dataset")
    before, tar = tree_digest(path), path / "train/000001.tar"
    data, position = bytearray(tar.read_bytes()), int(Dataset(path).targets("train", 1)[1]["offset"])
    data[position + 9] ^= 1
    tar.write_bytes(data)
    with pytest.raises(CorruptionError, match="row 17"):
        Dataset(path).boxes("train", 17)
    report = verify(path, quiet=True)
    assert "damaged parts: boxes of row 17" in report.problems[0].text
    repair(report)
    shard(place / "coco", path, rows_per_shard=16, workers=1)
    assert tree_digest(path) == before
    root = shutil.copytree(place / "coco", tmp_path / "coco")
    known = content(root)
    known["annotations"][3]["bbox"][0] += 1
    (root / TRAIN).write_text(json.dumps(known))
    with pytest.raises(IdentityError, match=r"splits\.train\.listing_sha256"):
        shard(root, path, rows_per_shard=16, workers=1)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"image_id":1,"width":2,"height":2,"annotations":[{"id":1}]}'])
def test_stored_boxes_that_are_none_are_corruption(data):
    with pytest.raises(CorruptionError, match="here: expected the COCO annotations of a picture; found"):
        decode_boxes(data, (1,), "here")


@pytest.mark.filterwarnings("ignore")
def test_compressed_runs_are_those_of_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    for seed, share in ((0, 0.5), (1, 0.01), (2, 0.0)):
        bits_HW = np.random.default_rng(seed).random((70, 90)) < share
        runs = np.diff([0, *(np.flatnonzero(np.diff(bits_HW.T.ravel(), prepend=False))).tolist(), bits_HW.size])
        assert _run_lengths(mask.encode(np.asfortranarray(bits_HW, np.uint8))["counts"].decode()) == runs.tolist()
