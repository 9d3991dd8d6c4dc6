"""List the candidate pictures of a SOURCE with masks, the mask of each, and the classes.

The folders are images/{training,validation} and annotations/{training,validation}, as in ADE20K
(objectInfo150.txt names the classes, and 0 is unlabeled), or {train,val}/{images,masks} (255 is
unlabeled). A mask is a PNG with the path and name of its picture.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from cache_tools.errors import UsageError
from cache_tools.labels import MaskRule

from .candidates import Candidates, Sources
from .folder_listing import add_files
from .source_splits import Source, source_name, split_name
from .tar_listing import class_lines

# A split (None: the folder has another name), a root, and the folders of pictures and masks in it.
_Place = tuple[str | None, Path, str, str]


def list_scenes(
    source: Source, ignore: Sequence[int] = (), classes: Path | None = None
) -> Sources | None:
    """Return every candidate picture of a source with masks, or None for another source.

    If each split has its own source, this holds images/ and masks/ (255 is unlabeled) or
    annotations/ (0 is unlabeled). `ignore` lists the values that mean unlabeled. `classes` is a
    file of class names, one per line.

    Raises: UsageError if folders, values and classes do not fit together.
    """
    named = isinstance(source, Mapping)
    places = _named_places(source) if isinstance(source, Mapping) else _places(Path(source))
    if not places:
        return None
    roots = list(dict.fromkeys(root for _, root, _, _ in places))
    unlabeled = 0 if any(masks.startswith("annotations") for *_, masks in places) else 255
    folders = [*roots, *(root.absolute().parent for root in roots if named)]
    names, rule = _classes(folders, classes, tuple(sorted({*(ignore or (unlabeled,))})))
    sources = Sources(names, rule=rule)
    for split, root, pictures, masks in places:
        if split is None or not (root / masks).is_dir():
            reason = f"there is no {masks}" if split else "no split"
            sources.notes.append(f"{root}: {pictures} left out: {reason}")
        elif split in sources.splits:
            expected = f"expected one folder of split {split}"
            raise UsageError(f"{root}: {expected}; found {pictures} beside another")
        else:
            sources.splits[split] = _listed(root, pictures, masks, sources.notes)
    return sources


def _places(root: Path) -> list[_Place]:
    """Return the folders of pictures in `root`, in either layout, or [] without masks."""
    is_ade = (root / "images").is_dir() and any(
        (root / name).is_dir() for name in ("annotations", "masks")
    )
    pictures, masks, parent = "{}/images", "{}/masks", root
    if is_ade:
        pictures, masks, parent = "images/{}", "annotations/{}", root / "images"
    names = sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []
    places: list[_Place] = [
        (split_name(name), root, pictures.format(name), masks.format(name)) for name in names
    ]
    places = [place for place in places if (root / place[2]).is_dir()]
    if any(split and (root / masks).is_dir() for split, _, _, masks in places):
        return places
    if is_ade:
        folders = "images/training and annotations/training, or train/images and train/masks"
        raise UsageError(f"{root}: expected {folders}; or give --train {root}")
    return []


def _named_places(source: Mapping[str, str | Path]) -> list[_Place]:
    """Return the folders of pictures of one source per split, or [] if no source has masks."""
    places: list[_Place] = []
    for split, part in source.items():
        root = Path(part)
        masks = [name for name in ("masks", "annotations") if (root / name).is_dir()]
        if masks and (root / "images").is_dir():
            places.append((split, root, "images", masks[0]))
    roots = {Path(root).resolve() for _, root, _, _ in places}
    if places and (len(roots) < len(source) or len({masks for *_, masks in places}) > 1):
        expected = "expected images/ and masks/ in a folder of its own per split"
        raise UsageError(f"{source_name(source)}: {expected}; found other folders")
    for _, root, pictures, _ in places:
        folders = [path for path in (root / pictures).iterdir() if path.is_dir()]
        if splits := sorted(path.name for path in folders if split_name(path.name)):
            found = f"found {pictures}/{splits[0]}; give {root} as SOURCE, without --train"
            raise UsageError(f"{root}: expected the pictures of one split; {found}")
    return places


def _classes(
    folders: list[Path], file: Path | None, ignore: tuple[int, ...]
) -> tuple[tuple[str, ...], MaskRule]:
    """Return the class names and the rule that reads the masks."""
    if not all(0 <= value <= 255 for value in ignore):
        raise UsageError(f"--ignore: expected values from 0 to 255; found {list(ignore)}")
    patterns = ("objectInfo*.txt", "classes.txt")
    files = [path for p in patterns for root in folders for path in sorted(root.glob(p))]
    files = [file] if file else files
    if not files or not files[0].is_file():
        expected = "expected a file of class names, one per line"
        raise UsageError(f"{folders[0]}: {expected}; found none; give one with --classes")
    lines = class_lines([path for path in files if path.name == files[0].name])
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines if line]
    head = rows.pop(0) if rows and rows[0][0] == "Idx" else ["Name"]
    table = [dict(zip(head, row, strict=False)) for row in rows if len(row) == len(head)]
    rule = MaskRule(len(table), ignore)
    values, names = list(map(str, rule.values())), tuple(row.get("Name", "") for row in table)
    stated = [row.get("Idx", value) for row, value in zip(table, values, strict=True)]
    if "" in names or len(table) < len(rows) or stated != values:
        expected = f"{values[0]} to {values[-1]}, as --ignore {list(ignore)} leaves them"
        raise UsageError(f"{files[0]}: expected names of the values {expected}; found others")
    return names, rule


def _listed(root: Path, pictures: str, masks: str, notes: list[str]) -> Candidates:
    """Return the pictures of a split; add what is left out to `notes`."""
    candidates, left_out = Candidates(), Counter[str]()
    candidates.roots, candidates.folders = [root], (pictures, masks)
    add_files(root, f"{pictures}/", -1, candidates, left_out)
    if left_out["links"]:
        found = f"found {left_out['links']} links"
        raise UsageError(f"{root / pictures}: expected files; {found}; copy them with `cp -rL`")
    targets = {candidates[i].target for i in range(len(candidates))}
    paths = {path for path in (root / masks).rglob("*.png") if path.is_file()}
    counts = {f"{kind} files of {pictures} left out": count for kind, count in left_out.items()}
    counts[f"masks of {masks} left out: they have no picture"] = len(paths - targets)
    notes += [f"{root}: {count} {what}" for what, count in counts.items() if count]
    return candidates
