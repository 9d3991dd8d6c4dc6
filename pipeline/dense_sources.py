"""What stands in a SOURCE with masks: every candidate picture, the mask of each, and the classes.

images/{training,validation} with annotations/{training,validation} (ADE20K: objectInfo150.txt names the classes, 0 is
unlabelled), or {train,val}/{images,masks} (255 is unlabelled). A mask is a PNG with its picture's path and name.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from cache_tools.errors import UsageError
from cache_tools.labels import MaskRule, has_palette
from cache_tools.records import read_capped

from .candidates import Candidates, Sources

SPLITS = {"training": "train", "train": "train", "validation": "val", "val": "val", "valid": "val"}
ADE_IGNORE, IGNORE = (0,), (255,)
MAX_NAMES_BYTES = 1 << 20


def list_scenes(root: Path, ignore: Sequence[int] = (), classes: Path | None = None) -> Sources | None:
    """Every candidate picture of a source with masks, or None where `root` is no such source.

    `ignore` are the values that mean unlabelled, `classes` is a file with a class name per line.
    Raises: UsageError when folders, values and classes do not fit together.
    """
    is_ade = (root / "images").is_dir() and (root / "annotations").is_dir()
    below = ("images/{}", "annotations/{}") if is_ade else ("{}/images", "{}/masks")
    folders = [(split, *(form.format(name) for form in below)) for name, split in SPLITS.items()]
    folders = [found for found in folders if (root / found[1]).is_dir()]
    if not any((root / masks).is_dir() for _, _, masks in folders):
        return None
    values = tuple(sorted({*(ignore or (ADE_IGNORE if is_ade else IGNORE))}))
    names, rule = _classes(root, classes, values)
    sources = Sources(names, rule=rule)
    for split, pictures, masks in folders:
        if split in sources.splits:
            raise UsageError(f"{root}: expected one folder of split {split}; found {pictures} beside another")
        if (root / masks).is_dir():
            sources.splits[split] = _listed(root, pictures, masks, sources.notes)
        else:
            sources.notes.append(f"{pictures} left out: there is no {masks}")
    return sources


def _classes(root: Path, file: Path | None, ignore: tuple[int, ...]) -> tuple[tuple[str, ...], MaskRule]:
    """The class names and the rule of the masks' values."""
    if not all(0 <= value <= 255 for value in ignore):
        raise UsageError(f"--ignore: expected values from 0 to 255; found {list(ignore)}")
    found = [file] if file else [*sorted(root.glob("objectInfo*.txt")), *root.glob("classes.txt")]
    if not found or not found[0].is_file():
        raise UsageError(f"{root}: expected the class names, one per line, in a file that --classes names; found none")
    try:
        lines = [line for line in read_capped(found[0], MAX_NAMES_BYTES, UsageError).decode().splitlines() if line]
    except UnicodeDecodeError as error:
        raise UsageError(f"{found[0]}: expected class names in UTF-8; {error}") from error
    if not lines or not lines[0].startswith("Idx\t"):
        return tuple(lines), MaskRule(len(lines), ignore)
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    rule = MaskRule(len(rows), ignore)
    names = tuple((row.get("Name") or "").strip() for row in rows)
    if [row["Idx"].strip() for row in rows] != list(map(str, rule.values())) or "" in names:
        span = f"{rule.values()[0]} to {rule.values()[-1]}, as --ignore {list(ignore)} leaves them"
        raise UsageError(f"{found[0]}: expected names of the values {span}; found others")
    return names, rule


def _listed(root: Path, pictures: str, masks: str, notes: list[str]) -> Candidates:
    """The pictures of a folder, sorted; notes say what its masks are like."""
    candidates = Candidates()
    candidates.roots.append(root)
    candidates.folders = (pictures, masks)
    for path in sorted((root / pictures).rglob("*")):
        if not path.is_dir() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            candidates.add(str(path.relative_to(root)), -1)
    wanted = {item.mask for item in map(candidates.__getitem__, range(len(candidates)))}
    there = {path for path in (root / masks).rglob("*.png") if path.is_file()}
    if unused := len(there - wanted):
        notes.append(f"{unused} masks of {masks} left out: they have no picture")
    palettes = 0
    for path in there & wanted:
        with open(path, "rb") as file:
            palettes += has_palette(file.read(26))
    if palettes:
        notes.append(f"{palettes} masks of {masks} have a palette: their indices are the labels")
    return candidates
