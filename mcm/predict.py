"""Predictions of a fine-tuned RUN for pictures of any source."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cache_tools.console import one_line, progress
from cache_tools.errors import TooManyRefused, UsageError, found_at
from cache_tools.images import PICTURES, RGB, PictureRefused, decode_rgb
from cache_tools.records import printable
from cache_tools.storage import atomic_folder, write_atomic
from mcm.downstream import Predictor
from mcm.finetune import TASKS
from mcm.run_dir import recorded


def predict(
    run: Path, pictures: Path, out: Path, batch: int = 16, max_refused: float = 0.01,
    quiet: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Write the predictions of a fine-tuned RUN for a picture or a folder to the new folder `out`.

    Returns the number of lines in predictions.jsonl and of refused pictures in quarantine.jsonl. A
    detector also gives results.json, COCO's results with the category ids of its source. The image
    id of a picture is its name if all names are numbers, otherwise its position from 1.

    Raises: UsageError; TooManyRefused, after `out` is written, if more pictures are refused than
    the share `max_refused`.
    """
    if out.exists():
        raise UsageError(f"{out}: expected a new name; found {found_at(out)}; choose another name")
    predictor, files = _predictor(run), _listed(pictures)
    lines, refused, results = list[dict[str, Any]](), list[dict[str, str]](), list[dict[str, Any]]()
    image_ids = _image_ids(files)
    with (
        atomic_folder(out) as folder,
        progress(len(files), f"predict {pictures}", "pictures", quiet=quiet) as bar,
    ):
        for decoded in _batches(files, batch):
            for name, error in decoded:
                if isinstance(error, PictureRefused):
                    refused.append({"source": name, "reason": error.reason, "detail": error.detail})
                    print(one_line(f"{name}: refused: {error}"), file=sys.stderr, flush=True)
            valid = {name: rgb for name, rgb in decoded if not isinstance(rgb, PictureRefused)}
            predictions = predictor(list(valid.values())) if valid else []
            for name, (line, drawings, objects) in zip(valid, predictions, strict=True):
                image_id = {} if objects is None else {"image_id": image_ids[name]}
                results += [image_id | result for result in objects or ()]
                lines.append({"picture": name} | image_id | line)
                for kind, data in drawings.items():
                    write_atomic(folder / kind / f"{name}.png", data)
            bar.update(len(decoded))
        for file, records in (("predictions.jsonl", lines), ("quarantine.jsonl", refused)):
            text = "".join(json.dumps(record) + "\n" for record in records)
            write_atomic(folder / file, text.encode())
        if any("image_id" in line for line in lines):
            write_atomic(folder / "results.json", json.dumps(results).encode())
    if len(refused) > (budget := int(max_refused * len(files))):
        expected = f"expected at most {budget} of {len(files)} pictures refused"
        found = f"found {len(refused)}; replace them, or allow more with --max-refused"
        raise TooManyRefused(f"{out / 'quarantine.jsonl'}: {expected}; {found}")
    return {"pictures": len(lines), "refused": len(refused)}


def _predictor(run: Path) -> Predictor:
    identity = recorded(run)
    if identity.get("kind") != "finetune":
        found = "a pre-training RUN" if identity else found_at(run)
        advice = "make one with `mcm-train finetune`"
        raise UsageError(f"{run}: expected a fine-tuned RUN; found {found}; {advice}")
    return TASKS[identity["config"].get("task", "classify")].predictor(run)


def _listed(pictures: Path) -> dict[str, Path]:
    """Return the pictures of a folder and its subfolders by sorted name; hidden ones are left out.

    Raises: UsageError if there is none.
    """
    if pictures.is_file():
        return {printable(pictures.name): pictures}
    names = [path.relative_to(pictures) for path in pictures.rglob("*.*") if path.is_file()]
    files = {
        printable(name.as_posix()): pictures / name
        for name in sorted(names)
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
