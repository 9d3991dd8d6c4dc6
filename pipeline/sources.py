"""What stands in a SOURCE: every candidate picture of an ImageFolder or of WebDataset tars, with its label.

ImageFolder: train/<class>/** and val/<class>/**, or <class>/** (split "train"), or pictures alone (no label: -1).
Tars: one, a glob, a quoted brace pattern, a folder of them, with timm's _info.json or without; scanned once, never
extracted. Hidden files are left out; links, FIFOs and the like too, and counted.
"""

import glob
import io
import json
import os
import re
import tarfile
from pathlib import Path
from typing import Any

from cache_tools.errors import UsageError
from cache_tools.records import read_capped

from .candidates import Candidates, Sources, printable

MAX_LABEL = 1_000_000
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json
MAX_LISTING_BYTES = 64 << 20  # of timm's _info.json (20 bytes a tar) and of classes.txt
MAX_HEADER_BYTES = 64 << 10  # of a long name or extended header in a tar: tarfile asks for as much as it is told to
# What tarfile was seen to raise, or read to, on headers that lie.
_TAR_ERRORS = (tarfile.TarError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError, EOFError)
_EXPECTED = "expected an ImageFolder (train/<class>/*, val/<class>/*, or <class>/*) or WebDataset tars"
_PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}  # the last four: refused by name, not unseen
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|test)(?:id|idation)?(?=[-_.]|$)")


def list_sources(source: str | Path) -> Sources:
    """Every candidate picture of `source`.

    Raises: UsageError when it is none of the kinds above, empty, or its labels contradict each other.
    """
    root = Path(source)
    if (root / "dataset.json").is_file():
        raise UsageError(f"{root}: expected pictures to shard; found a DATASET, sharded already: use it as it is")
    tars = _find_tars(str(source))
    sources = _tar_sources(root, tars) if tars else _folder_sources(root)
    for split, candidates in sources.splits.items():
        if not len(candidates):
            raise UsageError("; ".join([f"{source}: {_EXPECTED}; found no picture in split {split!r}", *sources.notes]))
    return sources


def _scan(path: Path) -> tuple[list[str], list[str], int]:
    """(folders, files, number of links and the like) in a folder, sorted, without hidden ones."""
    folders, files, skipped = [], [], 0
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.is_file(follow_symlinks=False):
                files.append(entry.name)
            else:
                skipped += 1
    return sorted(folders), sorted(files), skipped


def _folder_sources(root: Path) -> Sources:
    if not root.is_dir():
        raise UsageError(f"{root}: {_EXPECTED}; found {'another file' if root.exists() else 'nothing there'}")
    sources, (folders, _, skipped) = Sources(), _scan(root)
    prefixes = {name: f"{name}/" for name in ("train", "val") if name in folders} or {"train": ""}
    parts = {split: _scan(root / prefix) for split, prefix in prefixes.items()}
    classes = sorted({name for part in parts.values() for name in part[0]})
    for split, (names, files, links) in parts.items():
        if missing := [name for name in classes if name not in names and (split == "train" or not names)]:
            raise UsageError(f"{root / split}: expected every class of its sibling; found no {printable(missing[0])!r}")
        candidates = sources.splits[split] = Candidates()
        candidates.roots.append(root)
        for label, name in enumerate(classes) if classes else [(-1, "")]:
            before = len(candidates)
            skipped += _walk(root, prefixes[split] + name, label, candidates) if name in ("", *names) else 0
            if name in names and len(candidates) == before:
                raise UsageError(f"{root / prefixes[split] / name}: expected pictures of a class; found none")
        if classes and (links or files):
            sources.notes.append(f"{len(files) + links} files beside the class folders of {split} left out")
    if len(prefixes) < len(folders) and "train" in folders:
        others = ", ".join(printable(name) for name in folders if name not in prefixes)
        sources.notes.append(f"left out beside the splits: {others}")
    if skipped:
        sources.notes.append(f"{skipped} links, FIFOs or devices left out: links are never followed")
    sources.classes = tuple(printable(name) for name in classes)
    return sources


def _walk(root: Path, below: str, label: int, candidates: Candidates) -> int:
    """Add every file under root/below in sorted order; returns how many links and the like were skipped."""
    todo, skipped = [below], 0
    while todo:
        below = todo.pop()
        folders, files, links = _scan(root / below)
        prefix = below if not below or below.endswith("/") else f"{below}/"
        for name in files:
            candidates.add(prefix + name, label)
        todo += [prefix + name for name in reversed(folders)]
        skipped += links
    return skipped


def _find_tars(source: str) -> list[tuple[str, Path]]:
    """(split, tar) in order; empty when `source` is no source of tars."""
    root = Path(source)
    if (root / "_info.json").is_file():
        return _info_tars(root / "_info.json")
    if root.is_dir():
        tars = sorted([*root.glob("*.tar"), *root.glob("train/*.tar"), *root.glob("val/*.tar")])
        tars = [tar for tar in tars if not tar.is_dir()]  # a class may be called so
    elif glob.has_magic(source) or "{" in source:
        import braceexpand  # what webdataset expands its patterns with

        try:
            parts = {part: sorted(glob.glob(part)) for part in braceexpand.braceexpand(source)}
        except ValueError as error:
            raise UsageError(f"{source}: expected tars by a pattern such as {{0000..0031}}.tar; {error}") from error
        if missing := [part for part, found in parts.items() if not found]:
            raise UsageError(f"{source}: expected tars; found no file {missing[0]}")
        tars = [Path(path) for found in parts.values() for path in found]
    else:
        tars = [root] if root.suffix == ".tar" and root.is_file() else []
    matches = [_SPLIT.search(tar.name) or _SPLIT.fullmatch(tar.parent.name) for tar in tars]
    return [(match[1] if match else "train", tar) for match, tar in zip(matches, tars, strict=True)]


def _info_tars(info: Path) -> list[tuple[str, Path]]:
    """The tars that timm's _info.json names (timm/data/readers/reader_wds.py)."""
    try:
        splits = json.loads(read_capped(info, MAX_LISTING_BYTES, UsageError))["splits"]
        tars = [(_split_name(info, split), info.parent / n) for split in splits for n in splits[split]["filenames"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{info}: expected timm's splits.<name>.filenames; found {error!r}") from error
    if outside := [tar for _, tar in tars if ".." in tar.parts or not tar.is_relative_to(info.parent)]:
        raise UsageError(f"{info}: expected tars beside it or below; found {printable(str(outside[0]))}")
    if missing := [tar for _, tar in tars if not tar.is_file()]:
        raise UsageError(f"{info}: expected the tars that it names; {missing[0]} is not there")
    return tars


def _split_name(info: Path, name: str) -> str:
    """train, val or test: "validation" and "valid" are val, as training asks for it."""
    if match := _SPLIT.fullmatch(name):
        return match[1]
    raise UsageError(f"{info}: expected the splits train, val (validation) or test; found {printable(name)!r}")


def _tar_sources(root: Path, tars: list[tuple[str, Path]]) -> Sources:
    sources, skipped = Sources(), 0
    for split, tar in tars:
        candidates = sources.splits.setdefault(split, Candidates())
        candidates.roots.append(tar)
        skipped += _scan_tar(tar, candidates)
    lowest = min(min(candidates.labels, default=-1) for candidates in sources.splits.values())
    highest = max(max(candidates.labels, default=-1) for candidates in sources.splits.values())
    if lowest < 0 <= highest:
        raise UsageError(f"{root}: expected a label (.cls or .json's label) for every picture or for none; found both")
    names = root / "classes.txt"
    named = _lines(names) if names.is_file() else None
    sources.classes = tuple(map(str, range(highest + 1)) if named is None else named)
    if len(sources.classes) <= highest:
        raise UsageError(f"{names}: expected a line a class; found {len(sources.classes)} and the label {highest}")
    if skipped:
        sources.notes.append(f"{skipped} members of tars that are no regular files left out")
    return sources


def _lines(path: Path) -> list[str]:
    try:
        return read_capped(path, MAX_LISTING_BYTES, UsageError).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected a class name a line, in UTF-8; {error}") from error


class _Headers(io.FileIO):
    """A tar as tarfile may read it: in small pieces."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; expected {MAX_HEADER_BYTES} at most")
        return super().read(size) or b""


def _scan_tar(path: Path, candidates: Candidates) -> int:
    """Add the picture of every key of a tar; returns how many members that are no regular files were skipped."""
    if not path.is_file():
        raise UsageError(f"{path}: expected a tar; found no regular file")
    pictures: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, tuple[str, int]] = {}
    skipped, end, size = 0, 0, path.stat().st_size
    try:
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
                if not end < tar.offset <= size or member.size < 0:  # tarfile would seek anywhere, backwards too
                    raise tarfile.ReadError(f"{printable(member.name)} does not end inside the file")
                end = tar.offset
                if member.isreg() and not member.issparse():
                    _add_member(path, member, file.fileno(), pictures, labels)
                else:
                    skipped += not member.isdir()
            if not (mark := os.pread(file.fileno(), 512, end)) or any(mark):
                raise UsageError(f"{path}: expected a whole tar; it is cut short (no end mark): copy it again")
    except _TAR_ERRORS as error:
        raise UsageError(f"{path}: expected a whole, uncompressed tar; it does not read: {error}") from error
    if strays := sorted(labels.keys() - pictures.keys()):
        raise UsageError(f"{path}: expected a picture for every label; key {printable(strays[0])!r} has none")
    for key, (name, offset, size) in pictures.items():
        candidates.add(name, labels[key][1] if key in labels else -1, (offset, size))
    return skipped


def _add_member(
    path: Path,
    member: tarfile.TarInfo,
    descriptor: int,
    pictures: dict[str, tuple[str, int, int]],
    labels: dict[str, tuple[str, int]],
) -> None:
    """Note the place of a picture or a label, by key; a .cls goes before a .json."""
    folder, slash, base = member.name.rpartition("/")
    stem, _, extensions = base.partition(".")  # cut at the first dot, as webdataset does
    key, extension = folder + slash + stem, extensions.lower().rpartition(".")[2]
    if extension in _PICTURES:
        if key in pictures:
            both = f"{printable(pictures[key][0])} and {printable(member.name)}"
            raise UsageError(f"{path}: expected one picture a key; found {both}")
        pictures[key] = (member.name, member.offset_data, member.size)
    elif extensions.lower() in ("cls", "json"):
        data = os.pread(descriptor, min(member.size, MAX_LABEL_BYTES), member.offset_data)
        label = _label(f"{path}: {printable(member.name)}", extension, data)
        before = labels.get(key, ("", label))
        if before[0] == extension and before[1] != label:
            raise UsageError(f"{path}: expected one label a key; {printable(key)!r} has {before[1]} and {label}")
        if label is not None and before[0] != "cls":
            labels[key] = (extension, label)


def _label(where: str, extension: str, data: bytes) -> int | None:
    """The label in a .cls, or under "label" in a .json (None where there is no such key)."""
    try:
        value: Any = int(data) if extension == "cls" else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected a label; found {data[:40]!r}") from error
    if extension == "json" and not (isinstance(value, dict) and "label" in value):
        return None
    label = value["label"] if extension == "json" else value
    if type(label) is not int or not -1 <= label < MAX_LABEL:
        raise UsageError(f"{where}: expected a label below {MAX_LABEL}; found {str(label)[:40]!r}")
    return label
