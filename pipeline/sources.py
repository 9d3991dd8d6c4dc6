"""What stands in a SOURCE: every candidate picture of an ImageFolder or of WebDataset tars, with its label.

ImageFolder: train/<class>/** with val/, validation/, valid/ or test/ beside it, or <class>/** (split "train"), or
pictures alone (no label: -1). Tars: one, a glob, a quoted brace pattern, a folder of them, with timm's _info.json or
without; scanned once, never extracted. Hidden files are left out; links, FIFOs and the like too, and counted.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_tools.errors import UsageError, found_at
from cache_tools.records import read_capped, sha256_hex

from .candidates import Candidates, Sources, printable

MAX_LABEL = 1_000_000
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json
MAX_LISTING_BYTES = 64 << 20  # of timm's _info.json (20 bytes a tar) and of classes.txt
MAX_HEADER_BYTES = 64 << 10  # of a long name or extended header in a tar: tarfile asks for as much as it is told to
_EXPECTED = "expected an ImageFolder (train/<class>/*, val/<class>/*, or <class>/*) or WebDataset tars"
_PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}  # the last four: refused by name, not unseen
_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|test)(?:id|idation)?(?=[-_.]|$)")


def list_sources(source: str | Path, val: float = 0.0) -> Sources:
    """Every candidate picture of `source`; `val` is the share of split train that becomes split val.

    Raises: UsageError when it is none of the kinds above, empty, or its labels contradict each other.
    """
    root = Path(source)
    if (found := found_at(root)) in ("a DATASET", "a CACHE", "a RUN"):
        raise UsageError(f"{root}: expected pictures to shard; found {found}; give the folder of its pictures")
    tars = _find_tars(str(source))
    sources = _tar_sources(root, tars) if tars else _folder_sources(root)
    if val:
        _hold_out(sources, val)
    for split, candidates in sources.splits.items():
        if not len(candidates):
            raise UsageError("; ".join([f"{source}: {_EXPECTED}; found no picture in split {split!r}", *sources.notes]))
    return sources


def _hold_out(sources: Sources, share: float) -> None:
    """Split train into train and val by a hash of each name, so that a picture never changes sides."""
    if sources.splits.keys() != {"train"}:
        raise UsageError(f"--val: expected a source of split train alone; it also has {', '.join(sources.splits)}")
    train = sources.splits["train"]
    chosen = [int(sha256_hex(os.fsencode(train[i].name))[:8], 16) < share * (1 << 32) for i in range(len(train))]
    sources.splits = {"train": train.part([not held for held in chosen]), "val": train.part(chosen)}


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
    prefixes = _split_folders(root, folders)
    parts = {split: _scan(root / prefix) for split, prefix in prefixes.items()}
    if "test" in parts and set(known := parts.get("train", ([],))[0]).isdisjoint(parts["test"][0]) and known:
        sources.notes.append("test left out: it has no class folder of train")
        del parts["test"]
    classes = sorted({name for part in parts.values() for name in part[0]})
    for split, (names, files, links) in parts.items():
        if missing := [name for name in classes if name not in names and (split == "train" or not names)]:
            folder = root / prefixes[split]
            raise UsageError(f"{folder}: expected every class of its sibling; found no {printable(missing[0])!r}")
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
        others = ", ".join(printable(name) for name in folders if f"{name}/" not in prefixes.values())
        sources.notes.append(f"left out beside the splits: {others}")
    if skipped:
        sources.notes.append(f"{skipped} links, FIFOs or devices left out: links are never followed")
    sources.classes = tuple(printable(name) for name in classes)
    return sources


def _split_folders(root: Path, folders: list[str]) -> dict[str, str]:
    """The prefix of each split; the whole folder is split train where no folder is called train or val."""
    if not {"train", "val"} & set(folders) and (not folders or set(folders) - _SPLIT_FOLDERS.keys()):
        return {"train": ""}
    prefixes: dict[str, str] = {}
    for name in folders:
        if split := _SPLIT_FOLDERS.get(name):
            if split in prefixes:
                raise UsageError(f"{root}: expected one folder of split {split}; found {prefixes[split]} and {name}/")
            prefixes[split] = f"{name}/"
    return dict(sorted(prefixes.items(), key=lambda item: list(_SPLIT_FOLDERS).index(item[0])))


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
        from webdataset.shardlists import expand_urls

        try:
            parts = {part: sorted(glob.glob(part)) for part in expand_urls(source)}
        except Exception as error:
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
        sources.notes.append(f"{skipped} members of tars left out: no regular files, or without key and extension")
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
    """Add the picture of every sample of a tar; returns how many members were skipped.

    webdataset groups the members into samples. Its own iterator is not used: it reads every picture, gives no offset,
    and lets a cut tar pass.
    """
    from webdataset.tariterators import group_by_keys

    if not path.is_file():
        raise UsageError(f"{path}: expected a tar; found no regular file")
    keys, skipped = set[str](), list[str]()
    try:
        with _Headers(path) as file:
            for sample in group_by_keys(_members(path, file, skipped)):
                key = sample["__key__"]
                if key in keys:
                    raise UsageError(
                        f"{path}: expected the members of a key side by side; {printable(key)!r} comes twice"
                    )
                keys.add(key)
                _add_sample(f"{path}: {printable(key)}", file.fileno(), sample, candidates)
    except (UsageError, OSError):
        raise
    except Exception as error:  # tarfile and webdataset raise many kinds of errors on damaged tars
        said = error.args[0] if error.args else repr(error)
        raise UsageError(f"{path}: expected a whole, uncompressed tar; it does not read: {said}") from error
    return len(skipped)


def _members(path: Path, file: _Headers, skipped: list[str]) -> Iterator[dict[str, Any]]:
    """The regular members that have a key, as webdataset's iterator yields them, but with the header as data."""
    from webdataset.tariterators import base_plus_ext

    end, size = 0, path.stat().st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
            if not end < tar.offset <= size or member.size < 0:  # tarfile would seek anywhere, backwards too
                raise tarfile.ReadError(f"{printable(member.name)} does not end inside the file")
            end = tar.offset
            if member.isreg() and not member.issparse() and base_plus_ext(member.name)[0] is not None:
                yield {"fname": member.name, "data": member, "__url__": str(path)}
            elif not member.isdir():
                skipped.append(member.name)
    if not (mark := os.pread(file.fileno(), 512, end)) or any(mark):
        raise UsageError(f"{path}: expected a whole tar; it is cut short (no end mark): copy it again")


def _add_sample(where: str, descriptor: int, sample: dict[str, Any], candidates: Candidates) -> None:
    """Add the picture of a sample; a .cls goes before a .json."""
    pictures = [sample[name] for name in sample if name.rpartition(".")[2] in _PICTURES]
    if len(pictures) > 1:
        both = " and ".join(printable(member.name) for member in pictures[:2])
        raise UsageError(f"{where}: expected one picture per key; found {both}")
    label = -1
    for extension in ("json", "cls"):
        if member := sample.get(extension):
            data = os.pread(descriptor, min(member.size, MAX_LABEL_BYTES), member.offset_data)
            found = _label(f"{where}.{extension}", extension, data)
            label = label if found is None else found
    if pictures:
        candidates.add(pictures[0].name, label, (pictures[0].offset_data, pictures[0].size))
    elif label >= 0:
        raise UsageError(f"{where}: expected a picture for every label; found none")


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
