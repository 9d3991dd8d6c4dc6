"""Detection: AP is COCO's and nothing is lost on the way to it; training learns, resumes and shares rows exactly."""

import contextlib
import copy
import io
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as coco_mask
from make_dataset import make_dataset
from make_scenes import make_coco
from safetensors.torch import load_file
from test_mcm_finetune import end_of_both
from test_mcm_pretrain import environment

from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import write_toml
from mcm.backbones import load_encoder
from mcm.config import Detect, FinetuneConfig
from mcm.detect import ObjectSource, average_precision, detections, ground_truth, objects_of, rows_to_train
from mcm.finetune import finetune, starting_point
from mcm.jitter import fitted
from mcm.report import report
from mcm.run_dir import last_eval
from pipeline.shard import shard


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """The real COCO pictures: their original val JSON, and the DATASET made of them."""
    root = shared_data / "downstream/coco-sample"
    shard(root, tmp_path_factory.mktemp("real") / "dataset", workers=1)
    return root / "annotations/instances_val2017.json", Dataset(tmp_path_factory.getbasetemp() / "real0/dataset")


def truth_of(*boxes):
    made = [
        {"id": i, "image_id": 0, "category_id": 0, "bbox": box, "area": 400.0, "iscrowd": 0}
        for i, box in enumerate(boxes, 1)
    ]
    names = [{"id": k, "name": name} for k, name in enumerate("ab")]
    return {"images": [{"id": 0, "height": 400, "width": 400}], "annotations": made, "categories": names}


def test_average_precision_by_hand():
    hit, other, miss = [10.0, 10, 20, 20], [100.0, 100, 20, 20], [300.0, 10, 20, 20]
    results = [
        {"image_id": 0, "category_id": 0, "bbox": b, "score": s} for b, s in ((hit, 0.9), (miss, 0.8), (other, 0.7))
    ]
    metrics, each = average_precision(truth_of(hit, other), results, "bbox")
    by_hand = pytest.approx((51 + 50 * 2 / 3) / 101)  # precision 1 up to recall 0.5, then 2/3
    assert metrics == dict.fromkeys(("box_ap", "box_ap50", "box_ap75", "box_ap_small"), by_hand)
    assert each == dict.fromkeys(
        ("box_ap", "box_ap50"), [by_hand, None]
    )  # nothing is medium or large, and no object has class b
    assert average_precision(truth_of(hit, other), [], "bbox")[0]["box_ap"] == 0


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_annotations_as_detections_have_ap_1(real, kind):
    truth = ground_truth(real[1], "val")
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    results = [
        {"image_id": k["image_id"], "category_id": k["category_id"], "bbox": k["bbox"], "score": 1.0,
         "segmentation": coco_mask.segmToRle(k["segmentation"], *sizes[k["image_id"]])}
        for k in truth["annotations"] if not k["iscrowd"]
    ]  # fmt: skip
    assert set(average_precision(truth, results, kind)[0].values()) == {1.0}


def perturbed(known):
    """Three detections of each annotation, crowds too: moved, resized, and with the wrong class at times."""
    draw, results = np.random.default_rng(0), []
    images = {image["id"]: image for image in known["images"]}
    for each in known["annotations"] * 3:
        box = np.array(each["bbox"]) + draw.normal(0, 0.1, 4) * np.tile(each["bbox"][2:], 2)
        x, y, w, h = np.maximum(box, [-9, -9, 1, 1]).tolist()
        shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if isinstance(each["segmentation"], list) and draw.random() < 0.7:
            shape = [(np.array(each["segmentation"][0]) + draw.normal(0, 2)).tolist()]
        rle = coco_mask.segmToRle(shape, images[each["image_id"]]["width"], images[each["image_id"]]["height"])
        ids = [category["id"] for category in known["categories"]]
        category = each["category_id"] if draw.random() < 0.9 else int(draw.choice(ids))
        result = {"image_id": each["image_id"], "category_id": category, "bbox": [x, y, w, h]}
        results.append(result | {"score": draw.random(), "segmentation": rle})
    return results


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_scores_through_the_dataset_equal_pycocotools_on_the_original_json(real, kind):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    path, dataset = real
    results = perturbed(json.loads(path.read_bytes()))
    rows = {dataset.boxes("val", row).image_id: row for row in range(dataset.rows("val"))}
    label = dataset.record.coco.category_ids.index
    ours = [r | {"image_id": rows[r["image_id"]], "category_id": label(r["category_id"])} for r in results]
    found = average_precision(ground_truth(dataset, "val"), ours, kind)[0]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pycocotools 2.0.11 with NumPy 2.4
        coco = COCO(str(path))
        theirs = [{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in copy.deepcopy(results)]
        scored = COCOeval(coco, coco.loadRes(theirs), kind)
        scored.evaluate(), scored.accumulate(), scored.summarize()
    np.testing.assert_allclose(list(found.values()), scored.stats[:6], atol=1e-12)
    assert 0.2 < found[f"{'box' if kind == 'bbox' else 'mask'}_ap"] < 0.9


def config(**changes):
    payload = {
        "task": "detect",
        "drop_path": 0.1,
        "student": {"width": 32, "depth": 2, "heads": 2, "size": 32, "patch": 8},
        "detect": {"size": 48, "window": 2, "global_blocks": [2], "channels": 16, "regions": 32, "scale": [0.8, 1.2]},
        "optim": {"lr": 2e-3, "layer_decay": 0.9},
        "schedule": {"epochs": 10},
        "train": {"global_batch": 8, "micro_batch": 4, "precision": "fp32", "workers": 0, "log_steps": 5},
    }
    payload["detect"]["anchors"] = [8, 16, 24, 32, 64]
    payload["train"]["eval_epochs"] = 10
    for section, values in changes.items():
        payload[section] = {**payload[section], **values} if isinstance(values, dict) else values
    return FinetuneConfig.model_validate_json(json.dumps(payload))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("boxes")
    shard(make_coco(root / "coco", 24, 7), root / "dataset", workers=1)
    return Dataset(root / "dataset")


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "tuned"
    return run, finetune(config(), data.path, "random", None, run)


def test_a_batch_is_a_function_of_its_epoch_and_holds_each_picture_with_its_objects(data):
    source = ObjectSource(data, "train", config().detect, (0.5,) * 3, 0, np.arange(8))
    one, other, later = (source(epoch, np.array([4, 1, 2]), 4) for epoch in (0, 0, 1))
    assert one["rows"] == [4, 1, 2] and [place.source for place in one["places"]] == [(40, 32)] * 3
    assert all(torch.equal(one[name], other[name]) for name in ("pictures", "boxes", "labels", "masks"))
    assert not torch.equal(one["pictures"], later["pictures"])
    objects = objects_of(one, masks=True)
    assert [len(each["labels"]) for each in objects] == one["counts"] and sum(one["counts"]) > 0
    for each, canvas in zip(objects, one["pictures"], strict=True):
        for mask, box in zip(each["masks"], each["boxes"].int().tolist(), strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == [*map(int, (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))]
            assert canvas[mask.bool()].float().max(-1).values.mean() > 150  # the object is bright


def test_detections_are_in_pixels_of_the_picture():
    class Finder:
        def __call__(self, pictures, extents):
            assert extents == [(32, 64)]
            box, mask = torch.tensor([[8.0, 8, 24, 24]]), torch.ones(1, 1, 28, 28)
            return [{"boxes": box, "labels": torch.tensor([2]), "scores": torch.tensor([0.5]), "masks": mask}]

    ((found,),) = detections(Finder(), torch.zeros(1, 64, 64, 3, dtype=torch.uint8), [fitted((100, 200), 64)])
    assert found["bbox"] == [25, 25, 50, 50] and found["category_id"] == 1
    mask = coco_mask.decode(found["segmentation"])
    assert mask.shape == (100, 200) and mask[26:74, 26:74].all() and mask.sum() <= 52 * 52


def test_rows_without_objects_train_only_if_asked_and_missing_masks_are_refused(data, tmp_path):
    assert rows_to_train(data, Detect()).tolist() == list(range(24))
    rows = rows_to_train(data, Detect(empty=False))
    assert 0 < len(rows) < 24 and not any(data.boxes("train", row).iscrowd_N.all() for row in rows)

    def changed(name, change):
        root = make_coco(tmp_path / name, 4, 4)
        for path in root.glob("annotations/*.json"):
            known = json.loads(path.read_bytes())
            for each in known["annotations"]:
                change(each, path.name)
            path.write_text(json.dumps(known))
        shard(root, tmp_path / f"{name}_dataset", workers=1)
        return Dataset(tmp_path / f"{name}_dataset")

    bare = changed("bare", lambda each, name: each.pop("segmentation"))
    with pytest.raises(UsageError, match="expected masks in split 'train'; found none; set detect.masks = false"):
        rows_to_train(bare, Detect())
    assert len(rows_to_train(bare, Detect(masks=False))) == 4
    crowds = changed("crowds", lambda each, name: each.update(iscrowd=int("val" in name)))
    for masks in (True, False):  # the evaluation ignores crowds
        with pytest.raises(UsageError, match="in split 'val'; found none"):
            rows_to_train(crowds, Detect(masks=masks))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detect": None}, "needs a .detect. section"),
        ({"frozen": True}, 'frozen does not belong to task = "detect"; remove it'),
        ({"task": "classify"}, 'detect does not belong to task = "classify"; remove it'),
        ({"detect": {"scale": [2.0, 0.5]}}, r"detect.scale = \[2.0, 0.5\] must rise"),
    ],
)
def test_a_section_of_another_task_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_labeled_pictures_are_refused(tmp_path):
    labeled = make_dataset(tmp_path / "dataset", 20, 20)
    with pytest.raises(UsageError, match="expected a DATASET .*; .*classify"):
        finetune(config(), labeled.path, "random", None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_writes_its_classes_and_scenes_and_resumes_to_the_bit(tuned, data, tmp_path, monkeypatch):
    (run, score), stopped = tuned, tmp_path / "stopped"
    classes = json.loads((run / "classes.json").read_bytes())
    assert classes["class"] == ["left", "right"] and classes["box_ap"] == [score, None] and score > 0
    assert starting_point(run, config(), str(tmp_path / "gone"), None).weights == "random"
    with pytest.raises(UsageError, match=r"found a detector, .*; use the weights that it began with \(random\)"):
        load_encoder(str(run))
    drawings = load_file(run / "shown.safetensors")
    assert sorted(drawings) == ["predicted", "truth"] and drawings["truth"].shape == (7, 48, 48, 3)
    report([run], tmp_path / "report.html")
    assert "<button>box_ap50</button></th><th><button>mask_ap<" in (tmp_path / "report.html").read_text()
    end_of_both(config(), data, run, stopped, 7, monkeypatch)


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_and_each_row_once(tuned, data, tmp_path):
    run = shutil.copytree(tuned[0], tmp_path / "run")
    wanted, classes = last_eval(run), (run / "classes.json").read_bytes()
    lines = (run / "metrics.jsonl").read_text().splitlines(True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "eval" not in line))
    (run / "classes.json").unlink()
    (tmp_path / "config.toml").write_text(write_toml(config()))
    (tmp_path / "tune.py").write_text("from mcm.cli import app\napp()\n")
    launch = ["launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    launch += ["--dynamo_backend=no", "--main_process_port=0", str(tmp_path / "tune.py"), "finetune"]
    launch += [str(tmp_path / "config.toml"), "--data", str(data.path), "--init", "random", "--out", str(run)]
    accelerate = os.path.join(os.path.dirname(sys.executable), "accelerate")
    subprocess.run([accelerate, *launch], env=environment(), check=True, capture_output=True, timeout=300)
    assert last_eval(run) == wanted and (run / "classes.json").read_bytes() == classes
