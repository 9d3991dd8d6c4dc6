"""Prediction: what a fine-tuned RUN finds in the pictures of a user."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from cache_tools.console import one_line, progress
from cache_tools.errors import TooManyRefused, UsageError, found_at
from cache_tools.images import PICTURES, RGB, PictureRefused, decode_rgb
from cache_tools.records import printable
from cache_tools.storage import atomic_folder, write_atomic
from mcm.augment import eval_transform
from mcm.backbones import load_encoder
from mcm.features import device
from mcm.run_dir import recorded

TOP = 5  # classes per picture


class Prediction(NamedTuple):
    """The line of a picture in predictions.jsonl, and its files: {folder: bytes}."""

    line: dict[str, Any]
    files: dict[str, bytes]


Predictor = Callable[[Sequence[RGB]], list[Prediction]]


def predict(
    run: Path, pictures: Path, out: Path, batch: int = 16, max_refused: float = 0.01,
    quiet: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Write what a fine-tuned RUN finds in a picture or a folder to the new folder `out`.

    Returns the number of lines in predictions.jsonl and of refused pictures in quarantine.jsonl.

    Raises: UsageError; TooManyRefused, after `out` is written, when more pictures are refused than
    the share `max_refused`.
    """
    if out.exists():
        raise UsageError(f"{out}: expected a new name; found {found_at(out)}; choose another name")
    files, predictor = _listed(pictures), _predictor(run)
    lines, refused = list[dict[str, Any]](), list[dict[str, str]]()
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
                lines.append({"picture": name} | prediction.line)
                for place, data in prediction.files.items():
                    write_atomic(folder / place / f"{name}.png", data)
            bar.update(len(decoded))
        for file, records in (("predictions.jsonl", lines), ("quarantine.jsonl", refused)):
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_atomic(folder / file, text.encode())
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
    return _classifier(run, identity["classes"])


def _classifier(run: Path, classes: Sequence[str]) -> Predictor:
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
