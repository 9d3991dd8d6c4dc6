"""Candidate pictures: the path, name and label of each (50 bytes per picture), and their bytes."""

import errno
import hashlib
import json
import os
import stat
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache_tools.dataset import CocoEntry
from cache_tools.images import PictureRefused, decode_rgb
from cache_tools.labels import MaskRule, stored_mask
from cache_tools.records import printable

MAX_PICTURE_BYTES = 1 << 28
# Errors of one file; every other error, such as too many open files, ends the command.
UNREADABLE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP}
UNREADABLE |= {errno.ENXIO, errno.ENOTDIR, errno.EISDIR}


class SourceItem(NamedTuple):
    """One candidate: the file `path`, or `size` bytes at `offset` of the tar `path`.

    `size` is None for a whole file.
    """

    name: str
    path: Path
    offset: int
    size: int | None
    label: int
    target: Path | bytes | None = None  # a mask, or the KEY.json of boxes


class Candidates:
    """The candidate pictures of a split, in columns: 50 bytes per picture plus its name."""

    def __init__(self) -> None:
        self.roots: list[Path] = []  # one folder, or tars, or parquet files
        self.column = ""  # of the pictures in parquet files, which must be unpacked
        self.ends: list[npt.NDArray[np.uint64]] = []  # of the pictures in each unpacked file
        self.folders: tuple[str, str] | None = None  # of pictures and of masks, below the root
        self.boxes: list[bytes] = []  # the KEY.json of each picture
        self.labels = array("i")
        self._names = bytearray()
        self._ends, self._roots = array("Q"), array("I")
        self._offsets, self._sizes = array("Q"), array("Q")  # empty for a folder

    def add(self, name: str, label: int, place: tuple[int, int] | None = None) -> None:
        """Append a picture of the last root.

        `name` is relative to the root. When the root is a tar, `place` is (offset, size) in it.
        When it is a parquet file, `place` is (row, size of the file).
        """
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._roots.append(len(self.roots) - 1)
        self.labels.append(label)
        if place:
            self._offsets.append(place[0])
            self._sizes.append(place[1])

    def part(self, chosen: Sequence[bool]) -> "Candidates":
        """Return the candidates for which `chosen` is true, in order."""
        part = Candidates()
        part.roots, part.column = self.roots, self.column
        for i in compress(range(len(self)), chosen):
            part._names += self._names[self._ends[i - 1] if i else 0 : self._ends[i]]
            part._ends.append(len(part._names))
            for new, column in zip(part._columns(), self._columns(), strict=True):
                if column:
                    new.append(column[i])
        return part

    def _columns(self) -> tuple["array[int]", ...]:
        return self._roots, self.labels, self._offsets, self._sizes

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> SourceItem:
        name = os.fsdecode(bytes(self._names[self._ends[i - 1] if i else 0 : self._ends[i]]))
        root = self.roots[self._roots[i]]
        if self._sizes:
            name, place = f"{root.name}/{name}", (self._offsets[i], self._sizes[i])
            if self.ends:
                start, end = self.ends[self._roots[i]][place[0] : place[0] + 2].tolist()
                place = start, end - start
            return SourceItem(name, root, *place, self.labels[i])
        target: Path | bytes | None = self.boxes[i] if self.boxes else None
        if self.folders:
            mask = root / self.folders[1] / Path(name).relative_to(self.folders[0])
            target = mask.with_suffix(".png")
        return SourceItem(name, root / name, 0, None, self.labels[i], target)

    def sha256(self) -> str:
        """Return the digest of names, labels, boxes and offsets, but not of the source's path."""
        roots = (os.fsencode(root.name) for root in self.roots if self._sizes)
        digest = hashlib.sha256(b"\0".join(roots))
        digest.update(self._names)
        for column in (self._ends, *self._columns()):
            digest.update(column)
        for boxes in self.boxes:
            digest.update(boxes)
        return digest.hexdigest()


@dataclass
class Sources:
    """All splits of a source; a label is a position in `classes`.

    `notes` lists what is left out. `rule` describes the masks and `coco` the boxes, if any.
    """

    classes: tuple[str, ...] = ()
    splits: dict[str, Candidates] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rule: MaskRule | None = None
    coco: CocoEntry | None = None


def read_source(item: SourceItem) -> bytes:
    """Return the bytes of a candidate.

    Raises: PictureRefused if the file is missing, unreadable, changed or over MAX_PICTURE_BYTES.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK
    if item.size is None:  # only a tar may be a link, as in a snapshot of a hub
        flags |= os.O_NOFOLLOW
    try:
        descriptor = os.open(item.path, flags)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise PictureRefused("unreadable", error.strerror or "cannot be opened") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PictureRefused("changed", "expected the regular file that was listed; found none")
        size = status.st_size if item.size is None else item.size
        if size > MAX_PICTURE_BYTES:
            raise PictureRefused("too-large", f"{size} bytes is over {MAX_PICTURE_BYTES}")
        data = os.pread(descriptor, size, item.offset)
    except OSError as error:
        error.filename = str(item.path)  # os.pread reports no file name
        raise
    finally:
        os.close(descriptor)
    if len(data) != size:
        raise PictureRefused("changed", f"expected {size} bytes; found {len(data)}")
    return data


def read_picture(item: SourceItem, rule: MaskRule | None = None) -> tuple[bytes, bytes | None]:
    """Return the bytes of a candidate that decodes, and the mask or boxes to store, if any.

    Raises: PictureRefused; its reason is no-mask if the mask cannot be read, and box-size if the
    boxes belong to a picture of another size.
    """
    data = read_source(item)
    size = decode_rgb(data).shape[:2]
    if isinstance(item.target, bytes):
        boxes = json.loads(item.target)
        if (boxes["height"], boxes["width"]) != size:
            expected = f"expected {boxes['width']}x{boxes['height']} pixels, the size in the JSON"
            found = f"found an upright picture of {size[1]}x{size[0]}"
            raise PictureRefused("box-size", f"{expected}; {found}")
        return data, item.target
    if rule is None or item.target is None:
        return data, None
    try:
        mask = read_source(item._replace(path=item.target))
    except PictureRefused as error:
        name = printable(f"{item.target.parent.name}/{item.target.name}")
        raise PictureRefused("no-mask", f"expected the mask {name}: {error.detail}") from error
    return data, stored_mask(mask, size, rule)
