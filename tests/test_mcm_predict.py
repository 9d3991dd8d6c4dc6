"""Prediction on a user's pictures: the figures of the evaluation, refused pictures by name, and requests."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, tree_digest
from make_dataset import make_dataset
from make_run import make_run
from make_scenes import CLASSES, make_ade, make_coco, scene
from PIL import Image
from test_mcm_finetune import config
from test_mcm_segment import config as segment_config

from cache_tools.errors import TooManyRefused, UsageError
from mcm.config import FinetuneConfig
from mcm.dense import confusion, scores
from mcm.detect import average_precision
from mcm.draw import color, draw_boxes, draw_labels
from mcm.finetune import finetune
from mcm.predict import predict
from pipeline.shard import shard


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A RUN, and the pictures of its val split in folders by class."""
    root = tmp_path_factory.mktemp("predict")
    data = make_dataset(root / "dataset")
    finetune(config(), data.path, "random", None, root / "tuned")
    for row in range(data.rows("val")):
        picture, label = data.picture("val", row)
        folder = root / "pictures" / data.classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row:03d}.PNG").write_bytes(picture)
    return root


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_accuracy_is_that_of_the_evaluation_in_any_batches(place, tmp_path):
    assert predict(place / "tuned", place / "pictures", tmp_path / "out", quiet=True) == {"pictures": 40, "refused": 0}
    found = lines(tmp_path / "out/predictions.jsonl")
    assert [line["picture"] for line in found] == sorted(line["picture"] for line in found)
    right = [line["picture"].split("/")[0] == line["top5"][0]["class"] for line in found]
    assert np.mean(right) == lines(place / "tuned/metrics.jsonl")[-1]["eval"]["top1"]
    assert all(abs(sum(each["probability"] for each in line["top5"]) - 1) < 1e-6 for line in found)
    predict(place / "tuned", place / "pictures", tmp_path / "other", batch=7, quiet=True)
    for one, other in zip(found, lines(tmp_path / "other/predictions.jsonl"), strict=True):
        values = [[each["probability"] for each in line["top5"]] for line in (one, other)]
        assert one["picture"] == other["picture"] and np.allclose(*values, atol=1e-6)


def test_one_picture_of_any_name_is_upright(place, tmp_path):
    """The four views of an EXIF-turned picture are the same; the name does not decide the format."""
    pixels, exif = np.arange(48 * 32 * 3, dtype=np.uint8).reshape(48, 32, 3), Image.Exif()
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "turned.png").rename(tmp_path / "turned.data")
    for name in ("upright.png", "turned.data"):
        predict(place / "tuned", tmp_path / name, tmp_path / "out" / name, quiet=True)
    one, other = (lines(tmp_path / "out" / name / "predictions.jsonl") for name in ("upright.png", "turned.data"))
    assert one[0].pop("picture") == "upright.png" and other[0].pop("picture") == "turned.data"
    assert one == other


def test_bad_pictures_are_named_counted_and_over_the_budget_an_error(place, tmp_path, capsys):
    folder = tmp_path / "pictures"
    for name in ("a.jpg", "sub/b.tiff", ".hidden.png", "._c.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no picture")
    Image.new("L", (9, 7)).save(folder / "gray.png")
    Image.new("LA", (9, 7)).save(folder / "sub" / "alpha.png")
    with pytest.raises(TooManyRefused, match=r"expected at most 0 of 4 pictures refused; found 2"):
        predict(place / "tuned", folder, tmp_path / "out", quiet=True)
    assert [line["picture"] for line in lines(tmp_path / "out/predictions.jsonl")] == ["gray.png", "sub/alpha.png"]
    refused = lines(tmp_path / "out/quarantine.jsonl")
    assert [(line["source"], line["reason"]) for line in refused] == [("a.jpg", "format"), ("sub/b.tiff", "format")]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": refused: format")[0] for line in said] == ["a.jpg", "sub/b.tiff"]
    found = predict(place / "tuned", folder, tmp_path / "more", max_refused=0.5, quiet=True)
    assert found == {"pictures": 2, "refused": 2} and tree_digest(tmp_path / "more") == tree_digest(tmp_path / "out")


@pytest.mark.parametrize(
    ("run", "pictures", "out", "line"),
    [
        ("tuned", "nothing", "new", "expected a picture, or a folder with pictures .*; found nothing there"),
        ("tuned", "tuned/checkpoints", "new", "expected a picture, or a folder with pictures"),
        ("tuned", "pictures", "pictures", "expected a new name; found another folder"),
        ("plain", "pictures", "new", "expected a fine-tuned RUN; found a pre-training RUN; make one with"),
        ("dataset", "pictures", "new", "expected a fine-tuned RUN; found a DATASET"),
    ],
)
def test_bad_requests(place, run, pictures, out, line):
    if run == "plain" and not (place / "plain").exists():
        make_run(place / "plain")
    with pytest.raises(UsageError, match=line):
        predict(place / run, place / pictures, place / out, quiet=True)
    assert not (place / "new").exists()


@pytest.mark.slow
def test_the_command_prints_json_and_ends_with_3(place, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    words = [
        sys.executable,
        "-m",
        "mcm.cli",
        "predict",
        place / "tuned",
        tmp_path / "bad.png",
        "--out",
        tmp_path / "out",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 3 and done.stderr.startswith("bad.png: refused: empty: ")
    assert done.stderr.splitlines()[1].startswith("error: ") and len(done.stderr.splitlines()) == 2
    picture = next((place / "pictures").rglob("*.PNG"))
    words[5:] = [picture, "--out", tmp_path / "good", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout) == {"pictures": 1, "refused": 0} and done.stderr == ""


@pytest.mark.slow
def test_masks_of_a_segmenter_have_the_miou_of_the_evaluation(tmp_path):
    root = make_ade(tmp_path / "ade", 16, 7)
    shard(root, tmp_path / "dataset", workers=1)
    finetune(segment_config(), tmp_path / "dataset", "random", None, tmp_path / "run")
    assert predict(tmp_path / "run", root / "images/validation", tmp_path / "out", quiet=True)["pictures"] == 7
    total = torch.zeros(3, 3, dtype=torch.int64)
    for row, line in enumerate(lines(tmp_path / "out/predictions.jsonl")):
        labels_HW = np.asarray(Image.open(tmp_path / f"out/masks/{line['picture']}.png"))
        total += confusion(scene(1000 + row)[1], torch.tensor(labels_HW, dtype=torch.int64), 3)
        shares = [line["shares"].get(name, 0) for name in CLASSES]
        assert shares == (np.bincount(labels_HW.ravel(), minlength=3) / labels_HW.size).tolist()
        assert np.asarray(Image.open(tmp_path / f"out/drawn/{line['picture']}.png")).shape == (40, 32, 3)
    assert scores(total)["miou"] == pytest.approx(lines(tmp_path / "run/metrics.jsonl")[-1]["eval"]["miou"], abs=1e-9)


DETECT = {
    "task": "detect",
    "student": {"width": 32, "depth": 2, "heads": 2, "size": 48, "patch": 8},
    "optim": {"lr": 3e-3},
    "schedule": {"epochs": 10, "warmup_epochs": 1},
    "train": {"global_batch": 8, "micro_batch": 8, "precision": "fp32", "workers": 0, "eval_epochs": 0},
    "detect": {
        "size": 48, "channels": 16, "window": 0, "scale": [0.7, 1.3], "anchors": [8, 12, 16, 24, 32], "regions": 32
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_results_of_a_detector_have_the_ap_of_the_evaluation_on_the_original_json(tmp_path):
    root = make_coco(tmp_path / "coco", 64, 8)
    shard(root, tmp_path / "dataset", workers=1)
    config = FinetuneConfig.model_validate_json(json.dumps(DETECT))
    ap = finetune(config, tmp_path / "dataset", "random", None, tmp_path / "run")
    for path in (root / "val2017").iterdir():  # named by COCO's id
        path.rename(path.with_name(f"{10 * int(path.stem):012d}.png"))
    predict(tmp_path / "run", root / "val2017", tmp_path / "out", batch=3, quiet=True)
    truth = json.loads((root / "annotations/instances_val2017.json").read_text())
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {each["category_id"] for each in results} == {3} and ap > 0.05  # the other class is crowds
    assert average_precision(truth, results, "bbox")[0]["box_ap"] == pytest.approx(ap, abs=1e-6)
    found = lines(tmp_path / "out/predictions.jsonl")
    assert [line["image_id"] for line in found] == [10 * row for row in range(8)]
    assert sum(line["objects"] for line in found) == len(results)
    drawn = np.asarray(Image.open(tmp_path / "out/drawn/000000000000.png.png"))
    assert drawn.shape == (40, 32, 3)


def test_drawings_keep_other_pixels_and_stay_in_the_picture():
    gray_HW3 = np.full((60, 80, 3), 100, np.uint8)
    boxes = [[60, 2, 79, 30], [0, 0, 10, 10]]
    drawn = draw_boxes(gray_HW3, boxes, [0, 1], ["right at the border", "left"])
    assert (drawn[40:] == gray_HW3[40:]).all() and (drawn[30, 60:80] == color(0)).all()
    assert (drawn[10, :11] == color(1)).all() and (gray_HW3 == 100).all()
    labels_HW = np.full((60, 80), 255)
    labels_HW[:5] = 1
    mixed = draw_labels(gray_HW3, labels_HW, 2)
    assert (mixed[5:] == 100).all() and np.abs(mixed[:5].astype(int) - (100 + np.array(color(1))) / 2).max() <= 1
