"""Predictions of a fine-tuned RUN for pictures of any source.

B batch, H W pixels, S pixels of a detector's canvas.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from cache_tools.console import one_line, progress
from cache_tools.errors import TooManyRefused, UsageError, found_at
from cache_tools.images import PICTURES, RGB, PictureRefused, decode_rgb, encode_view
from cache_tools.labels import encode_mask
from cache_tools.records import printable
from cache_tools.storage import atomic_folder, write_atomic
from cache_tools.weights import load_whole
from mcm.augment import eval_transform
from mcm.backbones import load_encoder, newest, recorded_backbone
from mcm.config import FinetuneConfig
from mcm.dense import most_probable
from mcm.detect import detections, draw_results
from mcm.draw import draw_labels
from mcm.jitter import fitted
from mcm.loop import device
from mcm.run_dir import recorded, recorded_config
from mcm.scenes import for_windows
from mcm.segment import Segmenter, slide
from mcm.vitdet import Detector

TOP = 5  # classes per picture


class Prediction(NamedTuple):
    """The line of a picture in predictions.jsonl, its drawings by folder, and COCO results."""

    line: dict[str, Any]
    drawings: dict[str, bytes]
    objects: list[dict[str, Any]] | None = None


Predictor = Callable[[Sequence[RGB]], list[Prediction]]


def predict(
    run: Path, pictures: Path, out: Path, batch: int = 16, max_refused: float = 0.01,
    quiet: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Write the predictions of a fine-tuned RUN for a picture or a folder to the new folder `out`.

    Returns the number of lines in predictions.jsonl and of refused pictures in quarantine.jsonl. A
    detector also gives results.json, COCO's results with the category ids of its source. The image
    id of a picture is its name if all names are numbers, otherwise its position from 1.

    Raises: UsageError; TooManyRefused, after `out` is written, when more pictures are refused than
    the share `max_refused`.
    """
    if out.exists():
        raise UsageError(f"{out}: expected a new name; found {found_at(out)}; choose another name")
    files, predictor = _listed(pictures), _predictor(run)
    lines, refused, results = list[dict[str, Any]](), list[dict[str, str]](), list[dict[str, Any]]()
    numbers = _image_ids(files)
    with (
        atomic_folder(out) as folder,
        progress(len(files), f"predict {pictures}", "pictures", quiet=quiet) as bar,
    ):
        for decoded in _batches(files, batch):
            good = [(name, rgb) for name, rgb in decoded if not isinstance(rgb, PictureRefused)]
            for name, error in decoded:
                if isinstance(error, PictureRefused):
                    refused.append({"source": name, "reason": error.reason, "detail": error.detail})
                    print(one_line(f"{name}: refused: {error}"), file=sys.stderr, flush=True)
            found = predictor([rgb for _, rgb in good]) if good else []
            for (name, _), prediction in zip(good, found, strict=True):
                number = {"image_id": numbers[name]} if prediction.objects is not None else {}
                results += [number | found for found in prediction.objects or ()]
                lines.append({"picture": name} | number | prediction.line)
                for place, data in prediction.drawings.items():
                    write_atomic(folder / place / f"{name}.png", data)
            bar.update(len(decoded))
        for file, records in (("predictions.jsonl", lines), ("quarantine.jsonl", refused)):
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_atomic(folder / file, text.encode())
        if any("image_id" in line for line in lines):
            write_atomic(folder / "results.json", json.dumps(results).encode())
    if len(refused) > (budget := int(max_refused * len(files))):
        expected = f"expected at most {budget} of {len(files)} pictures refused"
        remedy = "replace them, or allow more with --max-refused"
        raise TooManyRefused(
            f"{out / 'quarantine.jsonl'}: {expected}; found {len(refused)}; {remedy}"
        )
    return {"pictures": len(lines), "refused": len(refused)}


def _listed(pictures: Path) -> dict[str, Path]:
    """Return the pictures of a folder and its subfolders by sorted name; hidden ones are left out.

    Raises: UsageError if there is none.
    """
    if pictures.is_file():
        return {printable(pictures.name): pictures}
    found = {path.relative_to(pictures): path for path in pictures.rglob("*.*") if path.is_file()}
    files = {
        printable(name.as_posix()): found[name]
        for name in sorted(found)
        if name.suffix[1:].lower() in PICTURES and not any(p.startswith(".") for p in name.parts)
    }
    if not files:
        expected = f"expected a picture, or a folder with pictures ({', '.join(sorted(PICTURES))})"
        raise UsageError(f"{pictures}: {expected}; found {found_at(pictures)}")
    return files


def _image_ids(names: Iterable[str]) -> dict[str, int]:
    stems = {name: Path(name).stem for name in names}
    if all(map(str.isdecimal, stems.values())) and len(set(map(int, stems.values()))) == len(stems):
        return {name: int(stem) for name, stem in stems.items()}
    return {name: number for number, name in enumerate(stems, start=1)}


def _batches(
    files: dict[str, Path], batch: int
) -> Iterator[list[tuple[str, RGB | PictureRefused]]]:
    """Yield the names and pixels of `batch` pictures at a time, decoded by a thread per core."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for start in range(0, len(files), batch):
            names = list(files)[start : start + batch]
            yield list(zip(names, pool.map(_decoded, map(files.get, names)), strict=True))


def _decoded(path: Path) -> RGB | PictureRefused:
    try:
        return decode_rgb(path.read_bytes())
    except (PermissionError, FileNotFoundError) as error:
        return PictureRefused("unreadable", str(error.strerror))
    except PictureRefused as error:
        return error


def _predictor(run: Path) -> Predictor:
    """Return the function that maps upright pictures to the predictions of a fine-tuned RUN."""
    identity = recorded(run)
    if identity.get("kind") != "finetune":
        found = "a pre-training RUN" if identity else found_at(run)
        advice = "make one with `mcm-train finetune`"
        raise UsageError(f"{run}: expected a fine-tuned RUN; found {found}; {advice}")
    tasks = {"segment": _segmenter, "detect": _detector}
    return tasks.get(identity["config"].get("task"), _classifier)(run)


def _classifier(run: Path) -> Predictor:
    classes = recorded(run)["classes"]
    backbone = load_encoder(str(run), head=True)
    model = backbone.model.to(device()).eval()
    transform = eval_transform(backbone).transform

    @torch.inference_mode()
    def classify(pictures: Sequence[RGB]) -> list[Prediction]:
        views_B3HW = torch.stack([transform(Image.fromarray(rgb)) for rgb in pictures])
        probabilities_BK = model(views_B3HW.to(device())).softmax(1).cpu()
        top = zip(*probabilities_BK.topk(min(TOP, len(classes))), strict=True)
        found = ([*zip(k.tolist(), p.tolist(), strict=True)] for p, k in top)
        return [
            Prediction({"top5": [{"class": classes[k], "probability": p} for k, p in pairs]}, {})
            for pairs in found
        ]

    return classify


def _load(model: nn.Module, run: Path) -> None:
    """Load the newest weights of a RUN into a model for evaluation, and move it to the device."""
    found = newest(run)
    load_whole(model, found.model, str(found.path))
    model.to(device()).eval()


def _segmenter(run: Path) -> Predictor:
    record, backbone = recorded_backbone(run)
    segment, classes = recorded_config(FinetuneConfig, record.config).segment, record.classes
    assert segment is not None
    _load(model := Segmenter(backbone, len(classes), segment), run)
    colour = [255 * value for value in backbone.mean]

    def segmented(rgb: RGB) -> Prediction:
        picture_HW3, (height, width) = for_windows(rgb, segment.crop, colour)
        logits_KHW = slide(model, picture_HW3.to(device()), segment.crop, segment.stride)
        size = (rgb.shape[0], rgb.shape[1])
        labels_HW = most_probable(logits_KHW[:, :height, :width], size).byte().cpu().numpy()
        shares = np.bincount(labels_HW.ravel(), minlength=len(classes)) / labels_HW.size
        found = {name: share for name, share in zip(classes, shares.tolist(), strict=True) if share}
        overlay = draw_labels(rgb, labels_HW, len(classes))
        pictures = {"masks": encode_mask(labels_HW), "drawn": encode_view(overlay, "png")}
        return Prediction({"shares": found}, pictures)

    return lambda pictures: [segmented(rgb) for rgb in pictures]


def _detector(run: Path) -> Predictor:
    record, backbone = recorded_backbone(run)
    detect = recorded_config(FinetuneConfig, record.config).detect
    assert detect is not None and record.category_ids is not None
    classes, ids = record.classes, record.category_ids
    _load(model := Detector(backbone, len(classes), detect), run)

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
