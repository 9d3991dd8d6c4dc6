"""One split on its way into tars: every picture decoded, shards written whole, refused ones in quarantine."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cache_tools.console import Progress, StopFlag, progress
from cache_tools.dataset import ShardEntry, SplitEntry, info_json, row_key, shard_name
from cache_tools.draws import permutation
from cache_tools.errors import CorruptionError, Interrupted, TooManyRefused, UsageError
from cache_tools.images import PICTURE_RULES, PictureRefused, decode_rgb, picture_extension
from cache_tools.records import Record, encode_record, read_record, sha256_hex
from cache_tools.storage import make_dir, publish, write_atomic
from cache_tools.tars import INDEX_DTYPE, TarShardWriter, encode_npy

from .candidates import Candidates, SourceItem, printable, read_source
from .supervise import Watch

FAULTS = "faults.json"
FAULT_DETAIL = {"decoder-crash": "its decoder crashed", "decoder-hang": "its decoder did not come to an end"}


class SplitPlan(Record):
    """The candidates of a split: how many, and the digest of their names, labels and places."""

    candidates: int
    listing_sha256: str


class ShardPlan(Record):
    """All that decides the bytes of a DATASET but the pictures themselves."""

    version: Literal[1] = 1
    rows_per_shard: int
    seed: int
    picture_rules: int = PICTURE_RULES
    classes: tuple[str, ...]
    splits: dict[str, SplitPlan]


class Refusal(Record):
    """A source picture that got no row."""

    source: str
    reason: str
    detail: str


class ShardProgress(Record):
    """A committed shard; `entry` is None when only refused candidates were left."""

    version: Literal[1] = 1
    next_candidate: int
    refused: tuple[Refusal, ...]
    entry: ShardEntry | None


class Faults(Record):
    """Positions of a split's order that are refused without decoding, and why: see pipeline/supervise.py."""

    version: Literal[1] = 1
    reasons: dict[str, str]


class Picture(NamedTuple):
    """A candidate after decoding: its bytes and their kind, or a refusal."""

    item: SourceItem
    data: bytes = b""
    extension: str = ""
    refusal: Refusal | None = None


class SplitWriter:
    """One split on its way into tars."""

    def __init__(
        self, name: str, candidates: Candidates, plan: ShardPlan, folder: Path, work: Path, max_refused: float,
        watch: Watch,
    ) -> None:  # fmt: skip
        self.name, self.candidates, self.plan, self.folder, self.work = name, candidates, plan, folder, work
        self.watch, self.of, self.nth = watch, len(plan.splits), list(plan.splits).index(name)
        faults = read_record(Faults, work / FAULTS).reasons if (work / FAULTS).is_file() else {}
        self.faults = {int(position): reason for position, reason in faults.items()}
        self.order = permutation(len(candidates), plan.seed, f"shard/{name}")
        self.max_refused = max_refused
        self.done: list[ShardProgress] = []
        self.refused: list[Refusal] = []

    def write(self, workers: int, stop: StopFlag) -> SplitEntry:
        """Write what is missing of the split: shards, quarantine.jsonl, _info.json."""
        make_dir(self.folder)
        self._resume()
        start, total = self._next_candidate(), len(self.candidates)
        with ThreadPoolExecutor(workers) as pool, progress(total, f"shard {self.name}", "pictures", start) as bar:
            pictures = _in_order(pool, self.read, range(start, total), 4 * workers)
            while self._next_candidate() < total:
                self._write_shard(self._accepted(pictures, bar))
                self._check_budget(slack=0)
                if stop.requested:
                    raise Interrupted(f"{self.folder}: stopped after {len(self.done)} shards; the same command resumes")
        return self._finish()

    def _next_candidate(self) -> int:
        return self.done[-1].next_candidate if self.done else 0

    def _path(self) -> Path:
        return self.work / f"{shard_name(len(self.done))}.json"

    def _resume(self) -> None:
        while (path := self._path()).is_file():
            record, tar = read_record(ShardProgress, path), self.folder / f"{path.stem}.tar"
            if record.entry and not (tar.is_file() and tar.stat().st_size == record.entry.tar_bytes):
                raise CorruptionError(f"{tar}: expected {record.entry.tar_bytes} bytes; to redo, delete {path.parent}")
            self.done.append(record)
            self.refused += record.refused
        self._check_budget(slack=0)

    def item(self, position: int) -> SourceItem:
        """The candidate at a position of the order in which they are read."""
        return self.candidates[int(self.order[position])]

    def read(self, position: int) -> Picture:
        """The bytes of a candidate that decodes, or its refusal."""
        item = self.item(position)
        try:
            if reason := self.faults.get(position):
                raise PictureRefused(reason, FAULT_DETAIL[reason])
            data = read_source(item)
            with self.watch.on(position * self.of + self.nth):
                decode_rgb(data)
            return Picture(item, data, picture_extension(data))
        except PictureRefused as refused:
            refusal = Refusal(source=printable(item.name), reason=refused.reason, detail=printable(refused.detail))
            return Picture(item, refusal=refusal)

    def _accepted(self, pictures: Iterator[Picture], bar: Progress) -> Iterator[Picture]:
        """The pictures that get a row; refused ones are noted in passing."""
        for picture in pictures:
            bar.update(1, f"{len(self.refused)} refused" if self.refused else "")
            if picture.refusal:
                self.refused.append(picture.refusal)
                self._check_budget(slack=self.plan.rows_per_shard)
            else:
                yield picture

    def _write_shard(self, accepted: Iterator[Picture]) -> None:
        """Fill one shard and commit it; nothing is written when only refused candidates were left."""
        record, refused = self._path(), len(self.refused)
        first = next(accepted, None)
        pictures = islice(chain([first], accepted), self.plan.rows_per_shard) if first else None
        entry = self._write_tar(self.folder / f"{record.stem}.tar", pictures) if pictures else None
        new = tuple(self.refused[refused:])
        position = self._next_candidate() + len(new) + (entry.rows if entry else 0)
        self.done.append(ShardProgress(next_candidate=position, refused=new, entry=entry))
        publish(record, encode_record(self.done[-1]))

    def _write_tar(self, path: Path, pictures: Iterator[Picture]) -> ShardEntry:
        index, rows = np.zeros(self.plan.rows_per_shard, INDEX_DTYPE), 0
        first_row = len(self.done) * self.plan.rows_per_shard
        with TarShardWriter(path) as tar:
            for rows, (item, data, extension, _) in enumerate(pictures, start=1):
                source = json.dumps({"source": printable(item.name)}).encode()
                fields = {extension: data, "cls": str(item.label).encode(), "json": source}
                index[rows - 1] = (*tar.add(row_key(first_row + rows - 1), fields, extension), item.label)
        index_npy = encode_npy(index[:rows])
        write_atomic(path.with_suffix(".index.npy"), index_npy)
        tar_bytes, tar_sha256 = tar.file.bytes, tar.file.sha256
        return ShardEntry(rows=rows, tar_bytes=tar_bytes, tar_sha256=tar_sha256, index_sha256=sha256_hex(index_npy))

    def _check_budget(self, slack: int) -> None:
        """Raises: TooManyRefused; `slack` lets a shard end first, so that the user sees more than the first refusal."""
        budget = int(self.max_refused * len(self.candidates))
        if len(self.refused) > budget + slack:
            counts = Counter(refusal.reason for refusal in self.refused).most_common()
            found = ", ".join(f"{count} {reason}" for reason, count in counts)
            raise TooManyRefused(
                f"{self._write_quarantine()}: expected at most {budget} of {len(self.candidates)} pictures refused; "
                f"found {found}; mend them and shard anew, or resume with a --max-refused above {self.max_refused}"
            )

    def _write_quarantine(self) -> Path:
        path = self.folder / "quarantine.jsonl"
        lines = [json.dumps(refusal.model_dump(), sort_keys=True) + "\n" for refusal in self.refused]
        write_atomic(path, "".join(lines).encode())
        return path

    def _finish(self) -> SplitEntry:
        shards = tuple(record.entry for record in self.done if record.entry)
        rows = sum(entry.rows for entry in shards)
        if not rows:
            raise UsageError(f"{self._write_quarantine()}: expected a picture in split {self.name!r}; all were refused")
        self._write_quarantine()
        listing = self.plan.splits[self.name].listing_sha256
        entry = SplitEntry(rows=rows, refused=len(self.refused), listing_sha256=listing, shards=shards)
        write_atomic(self.folder / "_info.json", info_json(self.name, entry))
        return entry


def _in_order(
    pool: ThreadPoolExecutor, read: Callable[[int], Picture], positions: range, depth: int
) -> Iterator[Picture]:
    """`read` of every position by the pool, in order, `depth` of them ahead."""
    rest = iter(positions)
    pending: deque[Future[Picture]] = deque(pool.submit(read, position) for position in islice(rest, depth))
    while pending:
        picture = pending.popleft().result()
        pending.extend(pool.submit(read, position) for position in islice(rest, 1))
        yield picture
