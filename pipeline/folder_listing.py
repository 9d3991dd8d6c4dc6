"""List the pictures of an ImageFolder: class folders with pictures, or pictures alone (label -1).

Hidden files, files of known other kinds, and links to pictures or folders are left out and counted.
"""

import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from cache_tools.errors import UsageError
from cache_tools.records import printable

from .candidates import Candidates, Sources
from .source_splits import (
    ARCHIVES,
    OTHERS,
    UNLABELED,
    file_extension,
    refuse_splits,
    scan_folder,
)

LINKS = "links, FIFOs or devices; links are never followed; copy the pictures with `cp -rL`"


def add_folders(
    locations: Mapping[str, tuple[Path, str]], sources: Sources, max_refused: float
) -> None:
    """Add the pictures of folders. A label is a position in the sorted classes of all splits."""
    parts = {split: _classes(root / below) for split, (root, below) in locations.items()}
    _drop_unsorted(locations, parts, sources.notes)
    classes = sorted({name for part in parts.values() for name in part})
    left = Counter[str]()
    for split, names in parts.items():
        root, below = locations[split]
        missing = [name for name in classes if name not in names]
        if missing and (split == "train" or not names):
            shown = printable(missing[0])
            raise UsageError(f"{root / below}: expected every class; found no class {shown!r}")
        own = Counter[str]()
        candidates = sources.splits[split] = _folder_candidates(root, below, names, classes, own)
        if own["links"] > max_refused * (own["links"] + len(candidates)):
            found = f"{len(candidates)} files and {own['links']} {LINKS}"
            raise UsageError(f"{root / below}: expected files; found {found}")
        if own["beside"]:
            sources.notes.append(f"{own['beside']} files beside the classes of {split} left out")
        left += own
    said = {"hidden": "hidden files", "other": "files of other kinds (such as .txt, .xml or .db)"}
    said["links"] = "links, FIFOs or devices (links are never followed)"
    sources.notes += [f"{left[kind]} {text} left out" for kind, text in said.items() if left[kind]]
    sources.classes = tuple(map(printable, classes))
    if len(classes) == 1:
        shown = printable(classes[0])
        sources.notes.append(f"one class alone, {shown}: give that folder if it holds the classes")
    if not classes:
        sources.notes.append(f"no labels: the pictures are in no class folders; {UNLABELED}")


def _drop_unsorted(
    locations: Mapping[str, tuple[Path, str]], parts: dict[str, dict[str, str]], notes: list[str]
) -> None:
    """Delete split test from `parts` when it has no class of train.

    Raises: UsageError when split val has no class of train.
    """
    train = parts.get("train", {})
    for split in [split for split in parts if train and not train.keys() & parts[split].keys()]:
        if split == "val":
            root, below = locations[split]
            found = ", ".join(map(printable, [*parts[split]][:3])) or "no folder"
            raise UsageError(
                f"{root / below}: expected the class folders of train; found {found}: this split "
                "is not sorted into classes; sort it, or shard train alone with --val 0.1"
            )
        notes.append("test left out: it has no class folder of train")
        del parts[split]


def _classes(folder: Path) -> dict[str, str]:
    """Return {class: name of its folder}, with each class in Unicode normal form C.

    Raises: UsageError when two folders of one class differ only in their normal form.
    """
    names = scan_folder(folder, no_links=True).folders
    refuse_splits(folder, names)
    classes = {unicodedata.normalize("NFC", name): name for name in names}
    if len(classes) < len(names):
        raise UsageError(
            f"{folder}: expected one folder per class; found two of one class; join them"
        )
    return classes


def _folder_candidates(
    root: Path, below: str, names: dict[str, str], classes: list[str], left: Counter[str]
) -> Candidates:
    """Return the pictures of one split; `left` counts what is left out, by kind."""
    candidates = Candidates()
    candidates.roots.append(root)
    if not classes:
        add_files(root, below, -1, candidates, left)
        return candidates
    here = scan_folder(root / below)
    left.update(beside=len(here.files), links=len(here.links), hidden=len(here.hidden))
    for label, name in enumerate(classes):
        before, links = len(candidates), left["links"]
        if name in names:
            add_files(root, below + names[name], label, candidates, left)
            if len(candidates) == before:
                folder, links = root / below / names[name], left["links"] - links
                found = f"{links} {LINKS}" if links else "none"
                raise UsageError(f"{folder}: expected pictures of a class; found {found}")
    return candidates


def add_files(
    root: Path, below: str, label: int, candidates: Candidates, left: Counter[str]
) -> None:
    """Add every file under root/below as a candidate: a folder's sorted files, then its folders.

    `left` counts what is left out: files with the extension of another kind, hidden files, links.

    Raises: UsageError when a file is an archive, or when subfolders are named like splits.
    """
    todo = [below]
    while todo:
        below = todo.pop()
        here = scan_folder(root / below)
        prefix = below if not below or below.endswith("/") else f"{below}/"
        refuse_splits(root / below, here.folders)
        for name in here.files:
            if (extension := file_extension(name)) in ARCHIVES:
                raise UsageError(
                    f"{root / prefix / name}: expected a picture; found an archive (.{extension}); "
                    "unpack or move it; tars or parquet files belong in SOURCE, its train/ or val/"
                )
            if extension in OTHERS:
                left["other"] += 1
            else:
                candidates.add(prefix + name, label)
        todo += [prefix + name for name in reversed(here.folders)]
        left.update(links=len(here.links), hidden=len(here.hidden))
