"""List the candidate pictures of a SOURCE with masks, the mask of each, and the classes.

The folders are images/{training,validation} and annotations/{training,validation}, as in ADE20K
(objectInfo150.txt names the classes, and 0 is unlabelled), or {train,val}/{images,masks} (255 is
unlabelled). A mask is a PNG with the path and name of its picture.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cache_tools.errors import UsageError
from cache_tools.labels import MaskRule, has_palette

from .candidates import Candidates, Sources
from .folder_listing import add_files
from .source_splits import split_name
from .tar_listing import class_lines


def list_scenes(
    root: Path, ignore: Sequence[int] = (), classes: Path | None = None
) -> Sources | None:
    """Return every candidate picture of a source with masks, or None for another source.

    `ignore` holds the values that mean unlabelled. `classes` is a file of class names, one per
    line.

    Raises: UsageError when folders, values and classes do not fit together.
    """
    is_ade = (root / "images").is_dir() and any(
        (root / name).is_dir() for name in ("annotations", "masks")
    )
    forms, parent = (
        (("images/{}", "annotations/{}"), "images") if is_ade else (("{}/images", "{}/masks"), "")
    )
    names = (
        sorted(path.name for path in (root / parent).iterdir()) if (root / parent).is_dir() else []
    )
    places = [(split_name(name), forms[0].format(name), forms[1].format(name)) for name in names]
    places = [place for place in places if (root / place[1]).is_dir()]
    if not any(split and (root / masks).is_dir() for split, _, masks in places):
        if is_ade:
            folders = "images/training and annotations/training, or train/images and train/masks"
            raise UsageError(f"{root}: expected {folders}")
        return None
    found, rule = _classes(
        root, classes, tuple(sorted({*(ignore or ((0,) if is_ade else (255,)))}))
    )
    sources = Sources(found, rule=rule)
    for split, pictures, masks in places:
        if split is None or not (root / masks).is_dir():
            reason = f"there is no {masks}" if split else "no split"
            sources.notes.append(f"{root}: {pictures} left out: {reason}")
        elif split in sources.splits:
            expected = f"expected one folder of split {split}"
            raise UsageError(f"{root}: {expected}; found {pictures} beside another")
        else:
            sources.splits[split] = _listed(root, pictures, masks, sources.notes)
    return sources


def _classes(
    root: Path, file: Path | None, ignore: tuple[int, ...]
) -> tuple[tuple[str, ...], MaskRule]:
    """Return the class names and the rule that reads the masks."""
    if not all(0 <= value <= 255 for value in ignore):
        raise UsageError(f"--ignore: expected values from 0 to 255; found {list(ignore)}")
    found = [file] if file else [*sorted(root.glob("objectInfo*.txt")), *root.glob("classes.txt")]
    if not found or not found[0].is_file():
        expected = "expected a file of class names, one per line"
        raise UsageError(f"{root}: {expected}; found none; give one with --classes")
    rows = [[cell.strip() for cell in line.split("\t")] for line in class_lines(found[0]) if line]
    head = rows.pop(0) if rows and rows[0][0] == "Idx" else ["Name"]
    table = [dict(zip(head, row, strict=False)) for row in rows if len(row) == len(head)]
    rule = MaskRule(len(table), ignore)
    values, names = (
        [str(value) for value in rule.values()],
        tuple(row.get("Name", "") for row in table),
    )
    if (
        "" in names
        or len(table) < len(rows)
        or values != [row.get("Idx", values[i]) for i, row in enumerate(table)]
    ):
        left = f"{values[0]} to {values[-1]}, as --ignore {list(ignore)} leaves them"
        raise UsageError(f"{found[0]}: expected names of the values {left}; found others")
    return names, rule


def _listed(root: Path, pictures: str, masks: str, notes: list[str]) -> Candidates:
    """Return the pictures of a split; add what is left out and what the masks are to `notes`."""
    candidates, left = Candidates(), Counter[str]()
    candidates.roots, candidates.folders = [root], (pictures, masks)
    add_files(root, f"{pictures}/", -1, candidates, left)
    if left["links"]:
        found = f"found {left['links']} links"
        raise UsageError(f"{root / pictures}: expected files; {found}; copy them with `cp -rL`")
    wanted = {candidates[i].target for i in range(len(candidates))}
    there = {path for path in (root / masks).rglob("*.png") if path.is_file()}
    palettes = 0
    for path in there & wanted:
        with open(path, "rb") as file:
            palettes += has_palette(file.read(26))
    counts = {f"{kind} files of {pictures} left out": number for kind, number in left.items()}
    counts[f"masks of {masks} left out: they have no picture"] = len(there - wanted)
    counts[f"masks of {masks} have a palette: their indices are the labels"] = palettes
    notes += [f"{root}: {number} {what}" for what, number in counts.items() if number]
    return candidates
