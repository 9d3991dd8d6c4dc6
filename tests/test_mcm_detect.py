"""Detection: AP is COCO's and nothing is lost on the way to it; training learns, resumes and shares rows exactly."""

import contextlib
import copy
import io
import json
import warnings

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from cache_tools.dataset import Dataset
from mcm.detect import average_precision, ground_truth
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
    assert each == [by_hand, None]  # nothing is medium or large, and no object has class b
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
