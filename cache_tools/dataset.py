"""DATASET: labeled pictures in WebDataset tars, with an index that locates and checks each one."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic

from .errors import CorruptionError, UsageError, found_at
from .labels import Boxes, Mask, decode_boxes, decode_mask
from .records import Absent, Amount, Count, Record, SplitName, nearest, read_record, record_sha256
from .storage import file_sha256
from .tars import INDEX_DTYPE, TARGETS_DTYPE, read_npy, read_picture

CHUNK_ROWS = 16
ROWS_PER_SHARD = 1024
RowsPerShard = Annotated[Count, pydantic.Field(multiple_of=CHUNK_ROWS)]
# The extension of the masks or boxes in a tar.
TARGETS = {"segment": "mask.png", "detect": "json"}
Task = Absent[Literal["segment", "detect"]]
Ignore = Absent[tuple[int, ...]]


class ShardEntry(Record):
    """One tar of a split and its index.

    To rebuild the shard, reading starts at position `first_candidate` of the split's order. Early
    datasets do not record it.
    """

    rows: Count
    first_candidate: Absent[Amount] = None
    tar_bytes: Amount
    tar_sha256: str
    index_sha256: str
    targets_sha256: Absent[str] = None
    objects: Absent[Amount] = None


class CocoEntry(Record):
    """The COCO category id of each class, and the number of changed annotations of the source."""

    category_ids: tuple[int, ...]
    boxes_dropped: Amount
    boxes_clipped: Amount
    polygons_dropped: Amount


class SplitEntry(Record):
    """All tars of a split.

    `refused` counts the pictures in quarantine.jsonl. `listing_sha256` is the digest of the source
    listing.
    """

    rows: Count
    refused: Amount
    listing_sha256: str
    shards: tuple[ShardEntry, ...]

    @property
    def objects(self) -> int:
        """Return the number of boxes; 0 in a DATASET without boxes."""
        return sum(shard.objects or 0 for shard in self.shards)


Coco = Absent[CocoEntry]


class DatasetRecord(Record):
    """dataset.json. It is written last; a folder without it is unfinished.

    `task` is "segment" if rows have masks, "detect" if they have boxes, and absent if they have
    labels. `ignore` holds the source mask values that mean unlabeled. Class k is the k-th of the
    remaining values. `coco` describes the boxes.
    """

    format: Literal["mcm-dataset"] = "mcm-dataset"
    version: Literal[1] = 1
    classes: tuple[str, ...]
    seed: int
    rows_per_shard: RowsPerShard
    picture_rules: int
    splits: dict[SplitName, SplitEntry]
    task: Task = None
    ignore: Ignore = None
    coco: Coco = None

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> Self:
        for name, split in self.splits.items():
            rows = [self.rows_per_shard] * (len(split.shards) - 1)
            rows.append(split.rows - sum(rows))
            if [entry.rows for entry in split.shards] != rows or rows[-1] > self.rows_per_shard:
                raise ValueError(f"splits.{name}: its shards do not hold its {split.rows} rows")
            if any((shard.targets_sha256 is None) != (self.task is None) for shard in split.shards):
                expected = "expected targets_sha256 in every shard if there is a task, else in none"
                raise ValueError(f"splits.{name}: {expected}")
        if len(self.coco.category_ids if self.coco else ()) != (
            len(self.classes) if self.task == "detect" else 0
        ):
            raise ValueError("coco: expected a category id of each class if task is detect")
        return self


def row_key(row: int) -> str:
    """Return the WebDataset key of a row."""
    return f"{row:09d}"


def shard_name(shard: int) -> str:
    """Return the file name of a shard, without its extension."""
    return f"{shard:06d}"


def info_json(name: str, split: SplitEntry) -> bytes:
    """Return the _info.json of a split, for timm's reader. It depends on dataset.json alone."""
    filenames = [f"{shard_name(shard)}.tar" for shard in range(len(split.shards))]
    lengths = [entry.rows for entry in split.shards]
    info = {"name": name, "num_samples": split.rows, "filenames": filenames}
    info |= {"shard_lengths": lengths}
    return (json.dumps({"splits": {name: info}}, sort_keys=True) + "\n").encode()


class Dataset:
    """A finished DATASET folder, opened for reading.

    Raises: UsageError if the folder is not a finished DATASET; CorruptionError if bytes differ from
    what was committed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        if not (path / "dataset.json").is_file():
            found = f"found {found_at(path)}; make one with `mcm-cache shard`"
            raise UsageError(f"{path}: expected a finished DATASET (dataset.json); {found}")
        self.record = read_record(DatasetRecord, path / "dataset.json")
        self.sha256 = record_sha256(self.record)
        self._indexes: dict[tuple[str, int, str], npt.NDArray[np.void]] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names. A label is a position in this tuple, or -1 for a picture without a label."""
        return self.record.classes

    def split(self, split: str) -> SplitEntry:
        """Return the entry of a split.

        Raises: UsageError with the names of the splits if there is no such split.
        """
        splits = self.record.splits
        if split not in splits:
            found = f"found {', '.join(sorted(splits))}{nearest(split, splits)}"
            raise UsageError(f"{self.path}: expected a split {split!r}; {found}")
        return splits[split]

    def rows(self, split: str) -> int:
        """Return the number of pictures in a split."""
        return self.split(split).rows

    def tar(self, split: str, shard: int) -> Path:
        """Return the path of the tar of a shard."""
        return self.path / split / f"{shard_name(shard)}.tar"

    def webdataset(self, split: str) -> Any:
        """Return the rows of a split in order, as a `webdataset.WebDataset` of undecoded samples.

        The keys of a sample are `jpg`, `png` or `webp` (the picture), `cls` (its label) and `json`
        (its source). webdataset does not compare checksums; `picture` does.
        """
        import webdataset  # imports torch

        tars = [str(self.tar(split, shard)) for shard in range(len(self.split(split).shards))]
        return webdataset.WebDataset(tars, shardshuffle=False)

    def index(self, split: str, shard: int) -> npt.NDArray[np.void]:
        """Return the index of a shard, checked against dataset.json.

        The index stays in memory (20 bytes per row).
        """
        return self._index(split, shard, ".index.npy", self.split(split).shards[shard].index_sha256)

    def targets(self, split: str, shard: int) -> npt.NDArray[np.void]:
        """Return the index of a shard's masks or boxes, checked against dataset.json."""
        sha256 = self.split(split).shards[shard].targets_sha256
        return self._index(split, shard, ".targets.npy", str(sha256))

    def _index(self, split: str, shard: int, suffix: str, sha256: str) -> npt.NDArray[np.void]:
        key = (split, shard, suffix)
        if key not in self._indexes:
            path = self.tar(split, shard).with_suffix(suffix)
            rows = self.split(split).shards[shard].rows
            if not path.is_file() or file_sha256(path) != sha256:
                expected = "expected the index that dataset.json names"
                raise CorruptionError(f"{path}: {expected}; it is missing or changed")
            index = read_npy(path, TARGETS_DTYPE if suffix == ".targets.npy" else INDEX_DTYPE)
            if index.shape != (rows,):
                found = f"found {index.shape}"
                raise CorruptionError(f"{path}: expected {rows} rows as in dataset.json; {found}")
            self._indexes[key] = index
        return self._indexes[key]

    def labels(self, split: str) -> npt.NDArray[np.int32]:
        """Return the labels of all rows of a split."""
        shards = range(len(self.split(split).shards))
        return np.concatenate([self.index(split, shard)["label"] for shard in shards])

    def labeled(self) -> Self:
        """Return the dataset itself after a check of its labels.

        Raises: UsageError unless every picture of "train" and "val" has a label.
        """
        for split in ("train", "val"):
            rows, unlabeled = self.rows(split), int((self.labels(split) < 0).sum())
            if not rows or unlabeled or len(self.classes) < 2:
                expected = f"expected labels for every picture of {split!r}, of two classes or more"
                found = f"{len(self.classes)} classes, {unlabeled} of {rows} without a label"
                hints = {"segment": "; it has masks: use `mcm-train probe`"}
                hints["detect"] = "; it has boxes, and no labels"
                hint = hints.get(self.record.task or "", "")
                raise UsageError(f"{self.path}: {expected}; found {found}{hint}")
        return self

    def copies(self, split: str, of: str) -> npt.NDArray[np.int64]:
        """Return the rows of `split` that are byte-for-byte copies of a picture in `of`.

        A picture is read only if the indexes of both splits contain its size and crc32c.
        """
        keys, keys_of = self._keys(split), self._keys(of)
        order = np.argsort(keys_of)
        first = np.searchsorted(keys_of[order], keys, "left")
        last = np.searchsorted(keys_of[order], keys, "right")
        copies = []
        for row in np.flatnonzero(first < last).tolist():
            picture = self.picture(split, row)[0]
            rows_of = order[first[row] : last[row]].tolist()  # those with the same key
            if any(self.picture(of, row_of)[0] == picture for row_of in rows_of):
                copies.append(row)
        return np.array(copies, np.int64)

    def _keys(self, split: str) -> npt.NDArray[np.uint64]:
        """Return the size and crc32c of every picture, as one number per picture."""
        indexes = (self.index(split, shard) for shard in range(len(self.split(split).shards)))
        keys = [index["size"].astype(np.uint64) << 32 | index["crc32c"] for index in indexes]
        return np.concatenate(keys)

    def picture(self, split: str, row: int) -> tuple[bytes, int]:
        """Return the source bytes of a row, after a crc32c check, and its label."""
        shard, position = divmod(row, self.record.rows_per_shard)
        entry: Any = self.index(split, shard)[position]
        return read_picture(self.tar(split, shard), entry, row), int(entry["label"])

    def mask(self, split: str, row: int) -> Mask:
        """Return the class of each pixel [H, W] of a row; an unlabeled pixel is IGNORED.

        Raises: UsageError if rows have no masks; CorruptionError if the crc32c differs.
        """
        data, where = self._target(split, row, "segment", "masks")
        return decode_mask(data, len(self.classes), where)

    def boxes(self, split: str, row: int) -> Boxes:
        """Return the objects of a row, in pixels of the upright picture.

        Raises: UsageError if rows have no boxes; CorruptionError if the crc32c differs.
        """
        data, where = self._target(split, row, "detect", "boxes")
        assert self.record.coco is not None
        return decode_boxes(data, self.record.coco.category_ids, where)

    def _target(self, split: str, row: int, task: str, kind: str) -> tuple[bytes, str]:
        """Return the checked bytes of a row's mask or boxes, and their place for an error."""
        if self.record.task != task:
            found = f"its task is {self.record.task or 'classify'}"
            raise UsageError(f"{self.path}: expected a DATASET with {kind}; {found}")
        shard, position = divmod(row, self.record.rows_per_shard)
        tar = self.tar(split, shard)
        data = read_picture(tar, self.targets(split, shard)[position], row)
        return data, f"{tar}: row {row}"
