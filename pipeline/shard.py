"""`mcm-cache shard`: pictures in, DATASET out; every picture is decoded before it gets a row.

A shard is written whole: tar, index, then its progress record in OUT.run/shard. A process killed at any moment leaves
a prefix of shards behind, and the same command continues after it and ends with the same bytes.
"""

import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cache_tools.console import Progress, StopFlag, one_line, progress
from cache_tools.dataset import (
    CHUNK_ROWS,
    ROWS_PER_SHARD,
    DatasetRecord,
    ShardEntry,
    SplitEntry,
    info_json,
    row_key,
    shard_name,
)
from cache_tools.draws import permutation
from cache_tools.errors import CorruptionError, IdentityError, Interrupted, TooManyRefused, UsageError
from cache_tools.images import PICTURE_RULES, PictureRefused, decode_rgb, picture_extension
from cache_tools.records import Record, differences, encode_record, read_record, sha256_hex
from cache_tools.storage import copy_durably, make_dir, publish, remove_tree, run_folder, settle, try_lock, write_atomic
from cache_tools.tars import INDEX_DTYPE, TarShardWriter, encode_npy

from .candidates import Candidates, SourceItem, printable, read_source
from .sources import list_sources
from .supervise import SLOTS, Watch

_FAULTS = "faults.json"
_DETAIL = {"decoder-crash": "its decoder crashed", "decoder-hang": "its decoder did not come to an end"}


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


def shard(
    source: str | Path,
    out: str | Path,
    rows_per_shard: int = ROWS_PER_SHARD,
    seed: int = 0,
    max_refused: float = 0.01,
    workers: int | None = None,
) -> DatasetRecord:
    """Shard `source` into the DATASET `out`, or continue one; `max_refused` is a share of a split's candidates.

    Raises: UsageError, IdentityError (another request was begun or finished there), TooManyRefused, Interrupted.
    """
    return Job(source, out, rows_per_shard, seed, max_refused, workers).run(Watch())


class Job:
    """A request with its listing: `run` makes the DATASET; the rest is what a supervisor asks (pipeline/supervise.py).

    Raises: UsageError, before anything is written.
    """

    def __init__(
        self, source: str | Path, out: str | Path, rows_per_shard: int, seed: int, max_refused: float,
        workers: int | None = None,
    ) -> None:  # fmt: skip
        self.out, self.max_refused = Path(out), max_refused
        self.workers = min(workers or len(os.sched_getaffinity(0)), SLOTS)
        self.folder = run_folder(self.out)
        self.lock, self.work = self.folder / "shard.lock", self.folder / "shard"
        _check_request(source, self.out, self.folder, rows_per_shard, seed, max_refused)
        sources = list_sources(source)
        for note in sources.notes:
            print(one_line(f"{source}: {note}"))
        self.candidates = sources.splits
        listing = {name: SplitPlan(candidates=len(c), listing_sha256=c.sha256()) for name, c in sources.splits.items()}
        self.plan = ShardPlan(rows_per_shard=rows_per_shard, seed=seed, classes=sources.classes, splits=listing)

    def run(self, watch: Watch) -> DatasetRecord:
        """Make the DATASET, or continue one."""
        with self._locked(), StopFlag() as stop:
            for folder in (self.out, self.folder):
                settle(folder)
            if (self.out / "dataset.json").is_file():
                record = read_record(DatasetRecord, self.out / "dataset.json")
                _check_same(self.out, self.plan, _plan_of(record))
                self._make_again(record, watch, stop)
                print(f"{self.out}: complete")
            else:
                _begin(self.out, self.work / "plan.json", self.plan)
                splits = {name: self._split(name, watch).write(self.workers, stop) for name in self.candidates}
                record = DatasetRecord(**self.plan.model_dump(exclude={"version", "splits"}), splits=splits)
                write_atomic(self.out / "dataset.json", encode_record(record))
            remove_tree(self.work)
        return record

    def _make_again(self, record: DatasetRecord, watch: Watch, stop: StopFlag) -> None:
        """Fill in what `verify --repair` moved away, or anyone lost: the same sources give the same bytes.

        Splits that miss a file are sharded whole beside the DATASET, as refused pictures before a shard move its rows.
        Raises: IdentityError when the sources make another file than dataset.json says.
        """
        again = self.folder / "again"
        for name, entry in record.splits.items():
            tars = [self.out / name / f"{shard_name(k)}.tar" for k in range(len(entry.shards))]
            files = {file: k for k, tar in enumerate(tars) for file in (tar, tar.with_suffix(".index.npy"))}
            missing = {file: k for file, k in files.items() if not file.is_file()}
            if not missing:
                continue
            print(f"{self.out}: {len(missing)} files of {name} are missing; made again from the sources", flush=True)
            if not again.is_dir():  # progress there may be that of the DATASET itself, when a kill spared it
                remove_tree(self.work)
                make_dir(again)
            where = (again / name, self.work / name)
            made = _Split(name, self.candidates[name], self.plan, *where, self.max_refused, watch)
            shards = made.write(self.workers, stop).shards
            same = [file for file, k in missing.items() if shards[k : k + 1] == entry.shards[k : k + 1]]
            for file in same:
                copy_durably(again / name / file.name, file)
            if len(same) < len(missing):
                remove_tree(self.work)
                remove_tree(again)
                other = next(file for file in missing if file not in same)
                raise IdentityError(f"{other}: expected the pictures that it was made of; the source has others now")
        for name, entry in record.splits.items():
            if not (self.out / name / "_info.json").is_file():
                publish(self.out / name / "_info.json", info_json(name, entry))
        remove_tree(self.work)
        remove_tree(again)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with try_lock(self.lock) as held:
            if not held:
                raise UsageError(f"{self.lock}: another process shards into {self.out}; wait until it ends")
            yield

    def _split(self, name: str, watch: Watch) -> "_Split":
        return _Split(
            name, self.candidates[name], self.plan, self.out / name, self.work / name, self.max_refused, watch
        )

    def _place(self, number: int) -> tuple["_Split", int]:
        names = list(self.candidates)
        return self._split(names[number % len(names)], Watch()), number // len(names)

    def name(self, number: int) -> str:
        """The name of a picture that a Watch noted."""
        split, position = self._place(number)
        return printable(split.item(position).name)

    def alone(self, number: int, watch: Watch) -> None:
        """Decode one picture and nothing else."""
        split, position = self._place(number)
        split.watch = watch
        split.read(position)

    def refuse(self, faults: dict[int, str]) -> None:
        """Have `run` refuse these pictures without decoding them."""
        with self._locked():
            for number, reason in faults.items():
                split, position = self._place(number)
                reasons = {str(place): why for place, why in split.faults.items()} | {str(position): reason}
                write_atomic(split.work / _FAULTS, encode_record(Faults(reasons=reasons)))
                print(one_line(f"warning: {self.name(number)}: refused, {_DETAIL[reason]}"), flush=True)


def _check_request(
    source: str | Path, out: Path, run: Path, rows_per_shard: int, seed: int, max_refused: float
) -> None:
    if rows_per_shard < CHUNK_ROWS or rows_per_shard % CHUNK_ROWS:
        raise UsageError(f"--rows-per-shard: expected a multiple of {CHUNK_ROWS}, such as 1024; found {rows_per_shard}")
    if not 0 <= max_refused <= 1:
        raise UsageError(f"--max-refused: expected a share from 0 to 1, such as 0.01; found {max_refused}")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed: expected 0 or a positive number; found {seed}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: expected a folder or a new name; found a file; choose another DATASET")
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise UsageError(f"{out}: expected a DATASET outside its source {source}; choose another DATASET")
    begun = (out / "dataset.json").is_file() or (run / "shard" / "plan.json").is_file()
    if not begun and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: expected a new or empty folder; found other files; choose another DATASET")


def _plan_of(record: DatasetRecord) -> ShardPlan:
    """The plan that a finished DATASET was made by."""
    splits = {
        name: SplitPlan(candidates=entry.rows + entry.refused, listing_sha256=entry.listing_sha256)
        for name, entry in record.splits.items()
    }
    return ShardPlan(**record.model_dump(include={"rows_per_shard", "seed", "picture_rules", "classes"}), splits=splits)


def _begin(out: Path, path: Path, plan: ShardPlan) -> None:
    """Publish the plan, or check that the one begun there is the same."""
    if path.is_file():
        _check_same(out, plan, read_record(ShardPlan, path))
    publish(path, encode_record(plan))


def _check_same(out: Path, plan: ShardPlan, begun: ShardPlan) -> None:
    if diff := differences(plan, begun):
        found = f"found another (asked != there): {', '.join(diff)[:500]}"
        raise IdentityError(f"{out}: expected the request begun there; {found}; repeat that or choose another DATASET")


class _Split:
    """One split on its way into tars."""

    def __init__(
        self, name: str, candidates: Candidates, plan: ShardPlan, folder: Path, work: Path, max_refused: float,
        watch: Watch,
    ) -> None:  # fmt: skip
        self.name, self.candidates, self.plan, self.folder, self.work = name, candidates, plan, folder, work
        self.watch, self.of, self.nth = watch, len(plan.splits), list(plan.splits).index(name)
        faults = read_record(Faults, work / _FAULTS).reasons if (work / _FAULTS).is_file() else {}
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
                raise PictureRefused(reason, _DETAIL[reason])
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
