"""Object detection: batches of a DATASET with boxes, detections in pixels, and average precision.

B batch, N objects, S pixels of the canvas.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.images import RGB, encode_view
from cache_tools.rng import hash_u64
from mcm.augment import decoded
from mcm.backbones import Backbone, recorded_backbone
from mcm.config import Detect, FinetuneConfig
from mcm.downstream import Classes, Metrics, Prediction, Predictor
from mcm.draw import draw_boxes, draw_labels
from mcm.engine import device
from mcm.jitter import Array, Placement, fitted, jittered, outline, targets
from mcm.run_dir import recorded_config
from mcm.sampler import Indices
from mcm.stream import Batch, RowSource
from mcm.vitdet import Detector, Objects

Result = dict[str, Any]  # a COCO result of one object
SHOWN, LIKELY = 8, 0.5  # held-out pictures in the report; the least score of a box that is drawn
KINDS = {"bbox": "box", "segm": "mask"}
STATS = {"AP_all": "ap", "AP_50": "ap50", "AP_75": "ap75"}
STATS |= {f"AP_{size}": f"ap_{size}" for size in ("small", "medium", "large")}


class ObjectSource(RowSource):
    """Batches of the pictures of a DATASET with boxes on the canvas; one row is one chunk.

    A batch has pictures uint8 [B, S, S, 3], their rows and their places. Training adds the objects
    of all pictures in order, boxes [N, 4], labels [N] and packed masks [N, S, S / 8], and the
    counts of objects per picture. A short batch is not padded.
    """

    def __init__(
        self, dataset: Dataset, split: str, detect: Detect, mean: Sequence[float], seed: int,
        rows: Indices | None = None,
    ) -> None:  # fmt: skip
        """Without `rows`, evaluate: use every row of the split, and read no objects."""
        super().__init__(dataset, split, seed, rows)
        self.detect, self.mean, self.training = detect, mean, rows is not None

    def __call__(self, epoch: int, chunks: Indices, batch: int, used: Batch | None = None) -> Batch:
        """Return the batch of the rows; `used` is ignored."""
        rows, size = self.rows[chunks].tolist(), self.detect.size
        canvases_BSS3 = np.empty((len(rows), size, size, 3), np.uint8)
        places, objects = list[Placement](), list[dict[str, Array]]()
        for canvas_SS3, row in zip(canvases_BSS3, rows, strict=True):
            rgb = decoded(self.dataset.picture(self.split, row)[0])
            seed, source = int(hash_u64(self.seed, "augment", epoch, row)), rgb.shape[:2]
            place = jittered(source, self.detect, seed) if self.training else fitted(source, size)
            place.draw(rgb, canvas_SS3, self.mean)
            places.append(place)
            if self.training:
                boxes = self.dataset.boxes(self.split, row)
                objects.append(targets(boxes, place, size, self.detect.masks))
        out: Batch = {"pictures": torch.from_numpy(canvases_BSS3), "rows": rows, "places": places}
        if self.training:
            out |= {"epoch": epoch, "counts": [len(each["labels"]) for each in objects]}
            for name in objects[0]:
                out[name] = torch.from_numpy(np.concatenate([each[name] for each in objects]))
        return out


class Detection:
    """The task "detect" of fine-tuning: ViTDet on a DATASET with boxes.

    Raises: UsageError if ViTDet does not fit the encoder, or without objects or their masks.
    """

    headline, group = "box_ap", 1

    def __init__(self, config: FinetuneConfig, dataset: Dataset, backbone: Backbone) -> None:
        detect, seed, self.dataset = config.detect, config.train.seed, dataset
        assert detect is not None  # the config checks it
        self.shown: dict[str, Tensor] = {}
        rows = rows_to_train(dataset, detect)
        self.model = Detector(backbone, len(dataset.classes), detect, config.drop_path, seed)
        self.train = ObjectSource(dataset, "train", detect, backbone.mean, seed, rows)
        self.val = ObjectSource(dataset, "val", detect, backbone.mean, seed)

    def loss(self, wrapped: nn.Module, batch: Batch) -> Tensor:
        """Return the sum of the losses of the proposals, classes, boxes and masks."""
        extents = [place.extent for place in batch["places"]]
        objects = objects_of(batch, self.model.has_masks)
        return cast(Tensor, wrapped(batch["pictures"], extents, objects))

    def evaluate(self, items: Iterable[Batch], accelerator: Accelerator) -> tuple[Metrics, Classes]:
        """Return COCO's AP of boxes and masks, over the detections of all ranks.

        The main rank keeps the first pictures in `shown`.
        """
        own = list[Result]()  # of this rank
        for batch in items:
            pictures_BSS3 = batch["pictures"].to(accelerator.device)
            found = detections(self.model, pictures_BSS3, batch["places"])
            for row, results in zip(batch["rows"], found, strict=True):
                own += [result | {"image_id": row} for result in results]
        results = sorted(gather_object(own), key=lambda result: result["image_id"])
        metrics, classes = Metrics(), Classes()
        if accelerator.is_main_process:
            truth = ground_truth(self.dataset, "val")
            drawn = {"truth": truth["annotations"], "predicted": results}
            self.shown = {name: self._drawn(objects) for name, objects in drawn.items()}
            for kind in list(KINDS)[: 1 + self.model.has_masks]:
                kind_metrics, kind_classes = average_precision(truth, results, kind)
                metrics |= kind_metrics
                classes |= kind_classes
        scores: list[Any] = [metrics, classes]
        broadcast_object_list(scores)
        return scores[0], scores[1]

    @staticmethod
    def predictor(run: Path) -> Predictor:
        """Return a function that gives the objects of upright pictures."""
        record, backbone = recorded_backbone(run)
        detect = recorded_config(FinetuneConfig, record.config).detect
        assert detect is not None and record.category_ids is not None
        classes, ids = record.classes, record.category_ids
        model = Detector(backbone, len(classes), detect).load_newest(run).to(device())

        def detect_in(pictures: Sequence[RGB]) -> list[Prediction]:
            canvases_BSS3 = np.empty((len(pictures), detect.size, detect.size, 3), np.uint8)
            places = [fitted((rgb.shape[0], rgb.shape[1]), detect.size) for rgb in pictures]
            for rgb, place, canvas in zip(pictures, places, canvases_BSS3, strict=True):
                place.draw(rgb, canvas, backbone.mean)
            found = detections(model, torch.from_numpy(canvases_BSS3).to(device()), places)
            return [
                Prediction(
                    {"objects": len(objects)},
                    {"drawn": encode_view(draw_results(rgb, objects, classes), "png")},
                    [each | {"category_id": ids[each["category_id"]]} for each in objects],
                )
                for rgb, objects in zip(pictures, found, strict=True)
            ]

        return detect_in

    def _drawn(self, results: Iterable[Result]) -> Tensor:
        """Return the first held-out pictures with their objects, uint8 [pictures, S, S, 3]."""
        size = self.val.detect.size
        results = results if self.model.has_masks else _without("segmentation", results)
        canvases = np.empty((min(SHOWN, len(self.val.rows)), size, size, 3), np.uint8)
        for row, canvas_SS3 in enumerate(canvases):
            rgb = decoded(self.dataset.picture("val", row)[0])
            objects = [result for result in results if result["image_id"] == row]
            drawn = draw_results(rgb, objects, self.dataset.classes)
            fitted((rgb.shape[0], rgb.shape[1]), size).draw(drawn, canvas_SS3, self.val.mean)
        return torch.from_numpy(canvases)


def rows_to_train(dataset: Dataset, detect: Detect) -> Indices:
    """Return the rows of "train" to train on: all or, without `detect.empty`, those with objects.

    Raises: UsageError if a split has no object except for crowds or, with `detect.masks`, no mask.
    """
    for split in ("train", "val"):
        pictures = (dataset.boxes(split, row) for row in range(dataset.rows(split)))
        pairs = (pair for x in pictures for pair in zip(x.iscrowd_N, x.segmentation, strict=True))
        if not any(not crowd and (shape or not detect.masks) for crowd, shape in pairs):
            what, hint = ("masks", "; set detect.masks = false") if detect.masks else ("boxes", "")
            found = f"found none{hint}"
            raise UsageError(f"{dataset.path}: expected {what} in split {split!r}; {found}")
    rows = range(dataset.rows("train"))
    kept = (detect.empty or not dataset.boxes("train", row).iscrowd_N.all() for row in rows)
    return np.flatnonzero(np.fromiter(kept, bool))  # a picture with only crowds has no target


def objects_of(batch: Batch, masks: bool) -> list[Objects]:
    """Return the objects of each picture of a training batch, as `Detector` takes them."""
    names = ["boxes", "labels"] + ["masks"] * masks
    parts = {name: batch[name] for name in names}
    if masks:
        size, packed = batch["pictures"].shape[1], batch["masks"]
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
        parts["masks"] = (packed[..., None] >> shifts & 1).flatten(-2)[..., :size]
    split = [parts[name].split(batch["counts"]) for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*split, strict=True)]


@torch.no_grad()  # torchvision keeps its anchors, which training then uses
def detections(
    model: Detector, pictures_BSS3: Tensor, places: Sequence[Placement]
) -> list[list[Result]]:
    """Return the objects that the model finds in `fitted` pictures, in the pixels of the pictures.

    A result is COCO's: category_id (the class), bbox [x, y, width, height], score and, with masks,
    segmentation (RLE).
    """
    extents = [place.extent for place in places]
    objects = model(pictures_BSS3, extents) if extents else []
    return [_results(*pair) for pair in zip(objects, places, strict=True)]


def draw_results(rgb: RGB, results: Iterable[Result], classes: Sequence[str]) -> RGB:
    """Return the picture with its objects, the best on top; a score below LIKELY is left out."""
    likely = [result for result in results if result.get("score", 1.0) >= LIKELY]
    likely.sort(key=lambda result: result.get("score", 1.0))
    labels_HW = np.full(rgb.shape[:2], len(classes))
    for result in likely:
        if "segmentation" in result:
            rle = coco_mask.segmToRle(result["segmentation"], *rgb.shape[1::-1])
            labels_HW[coco_mask.decode(rle) > 0] = result["category_id"]
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (r["bbox"] for r in likely)]
    labels = [result["category_id"] for result in likely]
    scores = [f" {result['score']:.2f}" if "score" in result else "" for result in likely]
    names = [classes[label] + score for label, score in zip(labels, scores, strict=True)]
    return draw_boxes(draw_labels(rgb, labels_HW, len(classes)), boxes, labels, names)


def _without(key: str, results: Iterable[Result]) -> list[Result]:
    return [{k: v for k, v in result.items() if k != key} for result in results]


def _results(objects: Objects, place: Placement) -> list[Result]:
    boxes_N4 = place.to_source(objects["boxes"].double().cpu().numpy())
    xywh_N4 = np.concatenate([boxes_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]], axis=1)
    labels, scores = objects["labels"].tolist(), objects["scores"].tolist()
    records: list[Result] = [
        {"category_id": label - 1, "bbox": box, "score": score}
        for label, box, score in zip(labels, xywh_N4.tolist(), scores, strict=True)
    ]
    for record, box_4, mask_1MM in zip(records, boxes_N4, objects.get("masks", ()), strict=False):
        # One by one, because the masks of a large picture would not fit into memory.
        box_14 = torch.from_numpy(box_4)[None]
        mask_HW = paste_masks_in_image(mask_1MM[None].cpu(), box_14, place.source)[0, 0] > 0.5
        rle = coco_mask.encode(np.asfortranarray(mask_HW.numpy().astype(np.uint8)))
        record["segmentation"] = rle | {"counts": rle["counts"].decode()}
    return records


def ground_truth(dataset: Dataset, split: str) -> dict[str, Any]:
    """Return the objects of a split as a COCO dictionary; a picture's id is its row."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for row in range(dataset.rows(split)):
        objects = dataset.boxes(split, row)
        images.append({"id": row, "height": objects.size_HW[0], "width": objects.size_HW[1]})
        for i, (x0, y0, x1, y1) in enumerate(objects.boxes_N4.tolist()):
            annotations.append({
                "id": len(annotations) + 1,  # for COCO's evaluation, id 0 means no object
                "image_id": row,
                "category_id": int(objects.labels_N[i]),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": float(objects.area_N[i]),
                "iscrowd": int(objects.iscrowd_N[i]),
                "segmentation": outline(objects, i),
            })  # fmt: skip
    categories = [{"id": k, "name": name} for k, name in enumerate(dataset.classes)]
    return {"images": images, "annotations": annotations, "categories": categories}


def average_precision(
    truth: dict[str, Any], results: Iterable[Result], kind: str
) -> tuple[Metrics, Classes]:
    """Return COCO's scores by name, such as box_ap50, and the AP and AP50 of each class.

    `kind` is bbox or segm. A score without any object is omitted from the metrics, and is None in
    the list of classes.
    """
    # With a bbox, loadRes would use the area of the box as the area of the mask.
    one_kind = _without("bbox" if kind == "segm" else "segmentation", results)
    coco = COCO(truth)
    evaluation = COCOeval_faster(coco, coco.loadRes(one_kind), kind, print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    stats, prefix = evaluation.stats_as_dict, KINDS[kind]
    metrics = {f"{prefix}_{name}": stats[key] for key, name in STATS.items()}
    # [IoU thresholds, recalls, classes] of all areas and 100 detections; the first IoU is 0.5
    precision_TRK, classes = evaluation.eval["precision"][:, :, :, 0, -1], Classes()
    for name, thresholds_TRK in (("ap", precision_TRK), ("ap50", precision_TRK[:1])):
        by_class = thresholds_TRK.transpose(2, 0, 1)
        classes[f"{prefix}_{name}"] = [float(p.mean()) if p.min() > -1 else None for p in by_class]
    return {name: value for name, value in metrics.items() if value > -1}, classes
