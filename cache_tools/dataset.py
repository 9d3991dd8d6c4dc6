"""DATASET: labelled pictures in WebDataset tars, with an index that finds and checks each of them."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pydantic

from .errors import CorruptionError, UsageError, found_at
from .labels import Mask, decode_mask
from .records import Amount, Count, Record, SplitName, nearest, read_record, record_sha256
from .storage import file_sha256
from .tars import INDEX_DTYPE, TARGETS_DTYPE, read_npy, read_picture

CHUNK_ROWS = 16
ROWS_PER_SHARD = 1024
RowsPerShard = Annotated[Count, pydantic.Field(multiple_of=CHUNK_ROWS)]
MASK = "mask.png"  # the extension of a row's mask in the tar
_ABSENT = pydantic.Field(exclude_if=lambda value: value is None)
Task = Annotated[Literal["segment"] | None, _ABSENT]
Ignore = Annotated[tuple[int, ...] | None, _ABSENT]


class ShardEntry(Record):
    """One tar of a split and its index.

    The order of the split is read from `first_candidate` on to make the shard again; the first datasets left it out.
    """

    rows: Count
    first_candidate: Amount | None = pydantic.Field(None, exclude_if=lambda value: value is None)
    tar_bytes: Amount
    tar_sha256: str
    index_sha256: str
    targets_sha256: Annotated[str | None, _ABSENT] = None


class SplitEntry(Record):
    """All tars of a split; `refused` pictures are in its quarantine.jsonl; the digest is of the source's listing."""

    rows: Count
    refused: Amount
    listing_sha256: str
    shards: tuple[ShardEntry, ...]


class DatasetRecord(Record):
    """dataset.json: written last, so that a folder without it is unfinished.

    `task` is "segment" where rows have masks, and absent where they have labels. `ignore` are the values of the
    source's masks that mean unlabelled; class k was the k-th of the other values.
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

    @pydantic.model_validator(mode="after")
    def _adds_up(self) -> Self:
        for name, split in self.splits.items():
            rows = [self.rows_per_shard] * (len(split.shards) - 1)
            rows.append(split.rows - sum(rows))
            if [entry.rows for entry in split.shards] != rows or rows[-1] > self.rows_per_shard:
                raise ValueError(f"splits.{name}: its shards do not hold its {split.rows} rows")
            if any((entry.targets_sha256 is None) != (self.task is None) for entry in split.shards):
                raise ValueError(f"splits.{name}: expected targets_sha256 of every shard if task is segment, else none")
        return self


def row_key(row: int) -> str:
    """The WebDataset key of a row."""
    return f"{row:09d}"


def shard_name(shard: int) -> str:
    """The file name of a shard, without its extension."""
    return f"{shard:06d}"


def info_json(name: str, split: SplitEntry) -> bytes:
    """_info.json of a split, for timm's reader: a pure function of what dataset.json says."""
    filenames = [f"{shard_name(shard)}.tar" for shard in range(len(split.shards))]
    lengths = [entry.rows for entry in split.shards]
    info = {"name": name, "num_samples": split.rows, "filenames": filenames, "shard_lengths": lengths}
    return (json.dumps({"splits": {name: info}}, sort_keys=True) + "\n").encode()


class Dataset:
    """A finished DATASET folder, opened for reading.

    Raises: UsageError when the folder is none or unfinished; CorruptionError when bytes are not as committed.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "dataset.json").is_file():
            expected = "expected a finished DATASET (dataset.json)"
            raise UsageError(f"{path}: {expected}; found {found_at(path)}; make one with `mcm-cache shard`")
        self.path = path
        self.record = read_record(DatasetRecord, path / "dataset.json")
        self.sha256 = record_sha256(self.record)
        self._indexes: dict[tuple[str, int, str], npt.NDArray[np.void]] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a position in it, -1 where a picture has none."""
        return self.record.classes

    def split(self, split: str) -> SplitEntry:
        """The entry of a split.

        Raises: UsageError naming the splits there are.
        """
        if split not in self.record.splits:
            names = ", ".join(sorted(self.record.splits))
            raise UsageError(f"{self.path}: no split {split!r}; it has {names}{nearest(split, self.record.splits)}")
        return self.record.splits[split]

    def rows(self, split: str) -> int:
        """Pictures in a split."""
        return self.split(split).rows

    def tar(self, split: str, shard: int) -> Path:
        """The tar of a shard."""
        return self.path / split / f"{shard_name(shard)}.tar"

    def webdataset(self, split: str) -> Any:
        """The rows of a split in order, as a `webdataset.WebDataset` of undecoded samples.

        Keys of a sample: `jpg`, `png` or `webp` (the picture), `cls` (its label), `json` (its source).
        webdataset does not compare checksums; `picture` does.
        """
        import webdataset  # imports torch

        tars = [str(self.tar(split, shard)) for shard in range(len(self.split(split).shards))]
        return webdataset.WebDataset(tars, shardshuffle=False)

    def index(self, split: str, shard: int) -> npt.NDArray[np.void]:
        """The index of a shard, checked against dataset.json; 20 bytes a row stay in memory."""
        return self._index(split, shard, ".index.npy", self.split(split).shards[shard].index_sha256)

    def targets(self, split: str, shard: int) -> npt.NDArray[np.void]:
        """The index of a shard's masks, checked against dataset.json.

        Raises: UsageError where rows have no masks.
        """
        sha256 = self.split(split).shards[shard].targets_sha256
        if sha256 is None:
            raise UsageError(f"{self.path}: expected a DATASET with masks; its task is classify")
        return self._index(split, shard, ".targets.npy", sha256)

    def _index(self, split: str, shard: int, suffix: str, sha256: str) -> npt.NDArray[np.void]:
        key = (split, shard, suffix)
        if key not in self._indexes:
            path, rows = self.tar(split, shard).with_suffix(suffix), self.split(split).shards[shard].rows
            if not path.is_file() or file_sha256(path) != sha256:
                raise CorruptionError(f"{path}: expected the index that dataset.json names; it is missing or changed")
            index = read_npy(path, TARGETS_DTYPE if suffix == ".targets.npy" else INDEX_DTYPE)
            if index.shape != (rows,):
                raise CorruptionError(f"{path}: expected {rows} rows as dataset.json says; found {index.shape}")
            self._indexes[key] = index
        return self._indexes[key]

    def labels(self, split: str) -> npt.NDArray[np.int32]:
        """Labels of all rows of a split."""
        shards = range(len(self.split(split).shards))
        return np.concatenate([self.index(split, shard)["label"] for shard in shards])

    def copies(self, split: str, of: str) -> npt.NDArray[np.int64]:
        """Rows of `split` whose pictures are also in `of`, byte for byte.

        Only those are read whose size and crc32c are also in the indexes of `of`.
        """
        keys, there = self._keys(split), self._keys(of)
        order = np.argsort(there)
        first, last = np.searchsorted(there[order], keys, "left"), np.searchsorted(there[order], keys, "right")
        alike = ((row, order[first[row] : last[row]].tolist()) for row in np.flatnonzero(first < last).tolist())
        same = (row for row, rows in alike if self.picture(split, row)[0] in (self.picture(of, i)[0] for i in rows))
        return np.fromiter(same, np.int64)

    def _keys(self, split: str) -> npt.NDArray[np.uint64]:
        """Size and crc32c of every picture, as one number."""
        indexes = (self.index(split, shard) for shard in range(len(self.split(split).shards)))
        return np.concatenate([index["size"].astype(np.uint64) << 32 | index["crc32c"] for index in indexes])

    def picture(self, split: str, row: int) -> tuple[bytes, int]:
        """(source bytes, label) of a row, its crc32c checked."""
        shard, position = divmod(row, self.record.rows_per_shard)
        place: Any = self.index(split, shard)[position]
        return read_picture(self.tar(split, shard), place, row), int(place["label"])

    def mask(self, split: str, row: int) -> Mask:
        """The labels [H, W] of a row's pixels, IGNORED where there are none; its crc32c is checked.

        Raises: UsageError where rows have no masks; CorruptionError.
        """
        shard, position = divmod(row, self.record.rows_per_shard)
        tar = self.tar(split, shard)
        data = read_picture(tar, self.targets(split, shard)[position], row)
        return decode_mask(data, len(self.classes), f"{tar}: row {row}")
