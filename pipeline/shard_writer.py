"""Write one split to tars: decode every picture, write shards, quarantine refused pictures.

The quarantine of a split is quarantine.jsonl, with one line per refused picture.
"""

import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cache_tools.console import Progress, StopFlag, progress
from cache_tools.dataset import (
    TARGETS,
    Coco,
    Ignore,
    ShardEntry,
    SplitEntry,
    Task,
    info_json,
    row_key,
    shard_name,
)
from cache_tools.errors import CorruptionError, Interrupted, TooManyRefused, UsageError
from cache_tools.images import PICTURE_RULES, PictureRefused, picture_extension
from cache_tools.labels import MaskRule
from cache_tools.records import Record, encode_record, printable, read_record, sha256_hex
from cache_tools.rng import permutation
from cache_tools.storage import make_dir, publish, write_atomic
from cache_tools.tars import INDEX_DTYPE, TARGETS_DTYPE, encode_npy, tar_writer

from .candidates import Candidates, SourceItem, read_picture
from .decode_pool import DecodePool


class SplitRequest(Record):
    """The candidates of a split: their number, and the digest of names, labels and offsets."""

    candidates: int
    listing_sha256: str


class ShardRequest(Record):
    """Everything that decides the bytes of a DATASET, except for the pictures."""

    version: Literal[1] = 1
    rows_per_shard: int
    seed: int
    picture_rules: int = PICTURE_RULES
    classes: tuple[str, ...]
    splits: dict[str, SplitRequest]
    task: Task = None
    ignore: Ignore = None
    coco: Coco = None

    @property
    def rule(self) -> MaskRule | None:
        """Return the rule that reads the masks, or None without masks."""
        return None if self.ignore is None else MaskRule(len(self.classes), self.ignore)


class Refusal(Record):
    """A source picture that got no row."""

    source: str
    reason: str
    detail: str


class ShardProgress(Record):
    """A committed shard; `entry` is None if all remaining candidates were refused."""

    version: Literal[1] = 1
    next_candidate: int
    refused: tuple[Refusal, ...]
    entry: ShardEntry | None


class Picture(NamedTuple):
    """A candidate that decodes, with its bytes and the mask or boxes to store."""

    item: SourceItem
    data: bytes
    target: bytes | None


class SplitWriter:
    """Write the shards of one split; progress records in `work` let a later run resume."""

    def __init__(
        self,
        name: str,
        candidates: Candidates,
        request: ShardRequest,
        folder: Path,
        work: Path,
        max_refused: float,
        pool: DecodePool,
    ) -> None:
        self.name, self.candidates, self.request = name, candidates, request
        self.folder, self.work, self.max_refused, self.pool = folder, work, max_refused, pool
        self.order = permutation(len(candidates), request.seed, f"shard/{name}")
        self.done: list[ShardProgress] = []
        self.refused: list[Refusal] = []

    def write(self, stop: StopFlag) -> SplitEntry:
        """Write the missing shards, quarantine.jsonl and _info.json; return the split's record."""
        make_dir(self.folder)
        self._resume()
        start, total = self._next_candidate(), len(self.candidates)
        with progress(total, f"shard {self.name}", "pictures", start) as bar:
            accepted = self._accepted(start, bar)
            while self._next_candidate() < total:
                if stop.requested:
                    done = f"stopped after {len(self.done)} shards"
                    raise Interrupted(f"{self.folder}: {done}; the same command resumes")
                self._write_shard(accepted)
                self._check_budget(slack=0)
        return self._finish()

    def write_again(self, shard: int, entry: SplitEntry) -> ShardEntry:
        """Write one shard of a finished split again."""
        rows, first = entry.shards[shard].rows, entry.shards[shard].first_candidate
        if first is None:  # early datasets lack this field
            first = shard * self.request.rows_per_shard
        make_dir(self.folder)
        with progress(rows, f"shard {self.name} {shard_name(shard)}", "pictures") as bar:
            return self._write_tar(shard, first, islice(self._accepted(first, bar), rows))

    def _next_candidate(self) -> int:
        return self.done[-1].next_candidate if self.done else 0

    def _progress_file(self) -> Path:
        return self.work / f"{shard_name(len(self.done))}.json"

    def _resume(self) -> None:
        while (path := self._progress_file()).is_file():
            record, tar = read_record(ShardProgress, path), self.folder / f"{path.stem}.tar"
            tar_bytes = tar.stat().st_size if tar.is_file() else None
            if record.entry and tar_bytes != record.entry.tar_bytes:
                expected = f"expected {record.entry.tar_bytes} bytes"
                raise CorruptionError(f"{tar}: {expected}; to start again, delete {path.parent}")
            self.done.append(record)
            self.refused += record.refused
        self._check_budget(slack=0)

    def _accepted(self, first: int, bar: Progress) -> Iterator[Picture]:
        """Yield the pictures that get a row, from position `first` of the order.

        Refused pictures are appended to `refused`.
        """
        items, tasks = tee(self.candidates[int(i)] for i in self.order[first:])
        read = partial(read_picture, rule=self.request.rule)
        for item, result in zip(items, self.pool.map(read, tasks), strict=True):
            bar.update(1, f"{len(self.refused)} refused" if self.refused else "")
            if isinstance(result, PictureRefused):
                source, detail = printable(item.name), printable(result.detail)
                self.refused.append(Refusal(source=source, reason=result.reason, detail=detail))
                self._check_budget(slack=self.request.rows_per_shard)
            else:
                yield Picture(item, *result)

    def _write_shard(self, accepted: Iterator[Picture]) -> None:
        """Write and commit one shard; there is no tar if all remaining candidates are refused."""
        path, num_refused, first = self._progress_file(), len(self.refused), self._next_candidate()
        head = next(accepted, None)
        pictures = islice(chain([head], accepted), self.request.rows_per_shard) if head else None
        entry = self._write_tar(len(self.done), first, pictures) if pictures else None
        refused = tuple(self.refused[num_refused:])
        position = first + len(refused) + (entry.rows if entry else 0)
        self.done.append(ShardProgress(next_candidate=position, refused=refused, entry=entry))
        publish(path, encode_record(self.done[-1]))

    def _write_tar(self, shard: int, first: int, pictures: Iterator[Picture]) -> ShardEntry:
        index, rows = np.zeros(self.request.rows_per_shard, INDEX_DTYPE), 0
        targets, objects = np.zeros(self.request.rows_per_shard, TARGETS_DTYPE), 0
        task = self.request.task
        path, first_row = (
            self.folder / f"{shard_name(shard)}.tar",
            shard * self.request.rows_per_shard,
        )
        with tar_writer(path) as tar:
            for rows, (item, data, target) in enumerate(pictures, start=1):
                key = row_key(first_row + rows - 1)
                extension, source = picture_extension(data), {"source": printable(item.name)}
                fields = {extension: data, "cls": str(item.label).encode()}
                if task != "detect":  # its target holds the source
                    fields["json"] = json.dumps(source).encode()
                index[rows - 1] = (*tar.add(key, fields, extension), item.label)
                if task and target:
                    targets[rows - 1] = tar.add(key, {TARGETS[task]: target}, TARGETS[task])
                if task == "detect" and target:
                    objects += len(json.loads(target)["annotations"])
        index_npy, targets_npy = encode_npy(index[:rows]), encode_npy(targets[:rows])
        write_atomic(path.with_suffix(".index.npy"), index_npy)
        if task:
            write_atomic(path.with_suffix(".targets.npy"), targets_npy)
        return ShardEntry(
            rows=rows,
            first_candidate=first,
            tar_bytes=tar.file.bytes,
            tar_sha256=tar.file.sha256,
            index_sha256=sha256_hex(index_npy),
            targets_sha256=sha256_hex(targets_npy) if task else None,
            objects=objects if task == "detect" else None,
        )

    def _check_budget(self, slack: int) -> None:
        """Raise TooManyRefused if more pictures are refused than the budget plus `slack`.

        With the slack, a shard is finished first, so the user sees more than one refusal.
        """
        budget = int(self.max_refused * len(self.candidates))
        if len(self.refused) > budget + slack:
            counts = Counter(refusal.reason for refusal in self.refused).most_common()
            found = ", ".join(f"{count} {reason}" for reason, count in counts)
            expected = f"at most {budget} of {len(self.candidates)} pictures refused"
            raise TooManyRefused(
                f"{self._write_quarantine()}: expected {expected}; found {found}; replace them and "
                "shard into a new DATASET, or resume by `mcm-cache shard SOURCE "
                f"{self.folder.parent}` with a --max-refused above {self.max_refused}"
            )

    def _write_quarantine(self) -> Path:
        path = self.folder / "quarantine.jsonl"
        lines = [
            json.dumps(refusal.model_dump(), sort_keys=True) + "\n" for refusal in self.refused
        ]
        write_atomic(path, "".join(lines).encode())
        return path

    def _finish(self) -> SplitEntry:
        shards = tuple(record.entry for record in self.done if record.entry)
        rows = sum(entry.rows for entry in shards)
        if not rows:
            expected = f"expected a picture in split {self.name!r}"
            raise UsageError(f"{self._write_quarantine()}: {expected}; all were refused")
        self._write_quarantine()
        listing = self.request.splits[self.name].listing_sha256
        entry = SplitEntry(
            rows=rows, refused=len(self.refused), listing_sha256=listing, shards=shards
        )
        write_atomic(self.folder / "_info.json", info_json(self.name, entry))
        return entry
