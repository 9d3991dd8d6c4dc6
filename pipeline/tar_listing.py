"""List the pictures of WebDataset tars. The tars are scanned once and never extracted."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_tools.errors import UsageError
from cache_tools.images import PICTURES
from cache_tools.records import printable, read_capped

from .candidates import Candidates, Sources
from .source_splits import MAX_LISTING_BYTES, NAME_SPLITS, UNLABELED, is_hidden

MAX_LABEL = 1_000_000
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json member
MAX_HEADER_BYTES = 64 << 10  # of a long name or extended header in a tar


def add_tars(root: Path, tars_of: Mapping[str, list[Path]], sources: Sources) -> None:
    """Add the samples of tars, and the class names of classes.txt in `root` or beside a tar.

    Raises: UsageError when a tar is damaged, and as `name_classes` does.
    """
    left = Counter[str]()  # by extension; "" for hidden and irregular members, and without a key
    for split, tars in tars_of.items():
        candidates = sources.splits[split] = Candidates()
        for tar in tars:
            candidates.roots.append(tar)
            scan_tar(tar, candidates, left)
    if skipped := left.pop("", 0):
        reason = "hidden, not regular files, or without an extension"
        sources.notes.append(f"{skipped} members of tars left out: {reason}")
    others = ", ".join(f"{number} .{kind}" for kind, number in left.most_common(3)) or "none"
    found = f'found no .cls, no "label" in a .json, and {left.total()} members of unknown kinds'
    unlabeled = f"no labels: {found} ({others}); names of tars are not labels"
    folders = [root, *(tar.parent for tars in tars_of.values() for tar in tars)]
    name_classes(sources, folders, unlabeled)


def name_classes(
    sources: Sources, folders: Sequence[Path], unlabeled: str, names: Sequence[str] = ()
) -> None:
    """Set the classes: `names`, the lines of classes.txt in `folders`, or numbers.

    `unlabeled` is the note about a source without labels. A split test without labels is left out
    of a source with labels.

    Raises: UsageError when only some pictures have a label, when a label has no class name, or
    when two classes.txt differ.
    """
    highest = max(max(part.labels, default=-1) for part in sources.splits.values())
    if highest < 0:
        sources.notes.append(f"{unlabeled}; {UNLABELED}")
    else:
        _refuse_unlabeled(sources)
    folders = [] if names else [*dict.fromkeys(folders)]
    files = [file for folder in folders if (file := folder / "classes.txt").is_file()]
    if highest >= 0 and not names and not files:
        sources.notes.append(f"no classes.txt: the classes are named 0 to {highest}")
    sources.classes = tuple(
        names or (class_lines(files) if files else map(str, range(highest + 1)))
    )
    if len(sources.classes) <= highest:
        expected = f"at least {highest + 1} lines, one per class"
        raise UsageError(f"{files[0]}: expected {expected}; found {len(sources.classes)}")


def _refuse_unlabeled(sources: Sources) -> None:
    """Leave out a split test without any label; raise UsageError for another picture without one.

    The error names the first such picture and their number.
    """
    for split, candidates in [*sources.splits.items()]:
        if split == "test" and max(candidates.labels, default=-1) < 0:
            sources.notes.append("test left out: it has no labels")
            del sources.splits[split]
        elif bare := [i for i, label in enumerate(candidates.labels) if label < 0]:
            first = candidates[bare[0]]
            raise UsageError(
                f"{first.path}: expected a label (.cls, or label in .json) for every picture or "
                f"for none; split {split} has {len(bare)} of {len(candidates)} pictures without "
                f"one, the first {printable(first.name)}; leave its tars out, or {NAME_SPLITS}"
            )


def class_lines(files: Sequence[Path]) -> list[str]:
    """Return the lines of one file of class names, or of several files with the same lines.

    Raises: UsageError when a file is not UTF-8, or when two files differ.
    """
    lines = []
    for file in files:
        try:
            lines.append(read_capped(file, MAX_LISTING_BYTES, UsageError).decode().splitlines())
        except UnicodeDecodeError as error:
            expected = "expected one class name per line, in UTF-8"
            raise UsageError(f"{file}: {expected}; {error}") from error
        if lines[-1] != lines[0]:
            raise UsageError(f"{files[0]}: expected one list of classes; {file} differs")
    return lines[0]


class _CappedReads(io.FileIO):
    """A tar whose reads are at most MAX_HEADER_BYTES.

    tarfile reads a header of any size that the tar states.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            found = f"found a header of {size} bytes"
            raise tarfile.ReadError(f"expected at most {MAX_HEADER_BYTES} bytes; {found}")
        return super().read(size) or b""


def scan_tar(path: Path, candidates: Candidates, left: Counter[str]) -> None:
    """Add the picture of every sample of a tar, and count the members left out.

    webdataset groups the members into samples. Its own iterator is not used: it reads every
    picture, gives no offset, and accepts a truncated tar.
    """
    from webdataset.tariterators import group_by_keys

    if not path.is_file():
        raise UsageError(f"{path}: expected a tar; found no regular file")
    keys = set[str]()
    try:
        with _CappedReads(path) as file:
            for sample in group_by_keys(_members(path, file, left)):
                key = printable(sample["__key__"])
                if sample["__key__"] in keys:
                    found = f"found {key!r} twice"
                    raise UsageError(f"{path}: expected the members of a key side by side; {found}")
                keys.add(sample["__key__"])
                _add_sample(f"{path}: {key}", file.fileno(), sample, candidates, left)
    except (UsageError, OSError):
        raise
    except Exception as error:  # tarfile and webdataset raise many kinds of errors on damaged tars
        said = f"cannot read: {error.args[0] if error.args else repr(error)}"
        raise UsageError(f"{path}: expected a whole, uncompressed tar; {said}") from error


def _members(path: Path, file: _CappedReads, left: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the regular members that are not hidden and have a key, for `group_by_keys`.

    `data` holds the TarInfo, not the bytes.
    """
    from webdataset.tariterators import base_plus_ext

    end, size = 0, path.stat().st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # drop the headers that tarfile keeps
            # tarfile seeks to any stated offset, also backwards.
            if not end < tar.offset <= size or member.size < 0:
                raise tarfile.ReadError(f"{printable(member.name)} does not end inside the file")
            end = tar.offset
            regular = member.isreg() and not member.issparse() and not is_hidden(member.name)
            if regular and base_plus_ext(member.name)[0] is not None:
                yield {"fname": member.name, "data": member, "__url__": str(path)}
            elif not member.isdir():
                left[""] += 1
    if not (mark := os.pread(file.fileno(), 512, end)) or any(mark):
        raise UsageError(f"{path}: expected a whole tar; found no end mark; copy the tar again")


def _add_sample(
    where: str, descriptor: int, sample: dict[str, Any], candidates: Candidates, left: Counter[str]
) -> None:
    """Add the picture of a sample. The label of a .cls overrides that of a .json."""
    members = {name: sample[name] for name in sample if not name.startswith("__")}
    pictures = [members[name] for name in members if name.rpartition(".")[2] in PICTURES]
    known = ("cls", "json")
    left.update(n for n in members if n not in known and members[n] not in pictures)
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
    """Return the label in a .cls, or "label" of a .json (None where the .json has no such key)."""
    try:
        value: Any = int(data) if extension == "cls" else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected a label; found {data[:40]!r}") from error
    if extension == "json" and not (isinstance(value, dict) and "label" in value):
        return None
    label = value["label"] if extension == "json" else value
    if type(label) is not int or not -1 <= label < MAX_LABEL:
        shown = str(label)[:40]
        raise UsageError(f"{where}: expected a label below {MAX_LABEL}; found {shown!r}")
    return label
