"""`mcm-cache shard`: write pictures into a DATASET; a picture gets a row after it decodes.

A shard is written as a whole: the tar, the index, then a progress record in OUT/.run/shard. A
process that is killed leaves the first shards. The same command resumes after them and ends with
the same bytes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_tools import storage
from cache_tools.console import StopFlag, one_line
from cache_tools.dataset import CHUNK_ROWS, ROWS_PER_SHARD, DatasetRecord, info_json, shard_name
from cache_tools.errors import IdentityError, Interrupted, UsageError, check_output
from cache_tools.records import differences, encode_record, read_record

from .candidates import Candidates
from .coco_listing import list_coco
from .decode_pool import DecodePool
from .listing import list_sources
from .mask_listing import list_scenes
from .parquet_listing import unpacked
from .shard_writer import ShardRequest, SplitRequest, SplitWriter
from .source_splits import Source, source_name


def shard(
    source: Source,
    out: str | Path,
    rows_per_shard: int = ROWS_PER_SHARD,
    seed: int = 0,
    max_refused: float = 0.01,
    workers: int | None = None,
    val: float = 0.0,
    ignore: Sequence[int] = (),
    classes: Path | None = None,
    columns: Sequence[str] = (),
) -> DatasetRecord:
    """Shard `source` into the DATASET `out`, or resume an unfinished one, and return its record.

    `source` is one source, or one per split: `{"train": ..., "val": ...}`. `max_refused` is the
    largest share of refused candidates per split. `val` is the share of split train that becomes
    split val. For masks, `ignore` holds the values that mean unlabeled, and `classes` is a file
    with one class name per line. `columns` names the columns of parquet files to use.

    Raises: UsageError, IdentityError (`out` belongs to another request), TooManyRefused,
    Interrupted.
    """
    _check_request(source, Path(out), rows_per_shard, seed, max_refused, val)
    coco = None if isinstance(source, Mapping) else list_coco(Path(source))
    scenes = coco or list_scenes(source, ignore, classes)
    if scenes and val:
        what = f"{'masks' if scenes.rule else 'boxes'}, and a folder per split"
        found = f"{source_name(source)} has {what}"
        raise UsageError(f"--val: expected a source without masks or boxes; {found}")
    if not (scenes and scenes.rule) and (ignore or classes):
        expected = "expected a source with masks"
        raise UsageError(f"--ignore, --classes: {expected}; found none in {source_name(source)}")
    sources = scenes or list_sources(source, val, max_refused, columns)
    for note in sources.notes:
        print(one_line(note))
    request = ShardRequest(
        rows_per_shard=rows_per_shard,
        seed=seed,
        classes=sources.classes,
        splits={
            name: SplitRequest(candidates=len(found), listing_sha256=found.sha256())
            for name, found in sources.splits.items()
        },
        task="segment" if sources.rule else "detect" if sources.coco else None,
        ignore=sources.rule and sources.rule.ignore,
        coco=sources.coco,
    )
    workers = workers or len(os.sched_getaffinity(0))
    return _Job(Path(out), sources.splits, request, max_refused, workers).run()


@dataclass
class _Job:
    """A DATASET to make or to resume, from the candidates of each split."""

    out: Path
    candidates: dict[str, Candidates]
    request: ShardRequest
    max_refused: float
    workers: int

    @property
    def work(self) -> Path:
        """The folder of request.json and the progress records."""
        return storage.work_dir(self.out) / "shard"

    def run(self) -> DatasetRecord:
        """Make the DATASET, or resume an unfinished one."""
        lock = storage.work_dir(self.out) / "shard.lock"
        with (
            storage.try_lock(lock) as held,
            StopFlag("the current shard is finished") as stop,
            DecodePool(self.workers) as pool,
        ):
            if not held:
                found = f"another process shards into {self.out}"
                raise UsageError(f"{lock}: {found}; wait until it ends")
            storage.settle(self.out)
            if (self.out / "dataset.json").is_file():
                record = read_record(DatasetRecord, self.out / "dataset.json")
                _check_same(self.out, self.request, _request_of(record))
                self._make_again(record, pool, stop)
                print(f"{self.out}: complete")
            else:
                begun = self.work / "request.json"
                if begun.is_file():
                    _check_same(self.out, self.request, read_record(ShardRequest, begun))
                storage.publish(begun, encode_record(self.request))
                splits = {
                    name: self._split(name, self.out, self.max_refused, pool, stop).write(stop)
                    for name in self.candidates
                }
                request = self.request.model_dump(exclude={"version", "splits"})
                record = DatasetRecord(**request, splits=splits)
                storage.write_atomic(self.out / "dataset.json", encode_record(record))
            storage.remove_tree(self.work)
        return record

    def _make_again(self, record: DatasetRecord, pool: DecodePool, stop: StopFlag) -> None:
        """Make missing shards again; the same sources give the same bytes.

        Raises: IdentityError when the sources give a file that differs from dataset.json;
        Interrupted when a stop is requested, before the next shard.
        """
        again = storage.work_dir(self.out) / "again"
        for name, entry in record.splits.items():
            for shard, committed in enumerate(entry.shards):
                tar = self.out / name / f"{shard_name(shard)}.tar"
                suffixes = (".tar", ".index.npy", *((".targets.npy",) if record.task else ()))
                missing = [file for file in map(tar.with_suffix, suffixes) if not file.is_file()]
                if not missing:
                    continue
                if stop.requested:
                    raise Interrupted(f"{self.out}: stopped; the same command resumes")
                made = self._split(name, again, 1, pool, stop).write_again(shard, entry)
                made = made.model_copy(update={"first_candidate": committed.first_candidate})
                if made != committed:
                    storage.remove_tree(again)
                    expected = "expected the pictures that this file was made from"
                    raise IdentityError(f"{missing[0]}: {expected}; the source has changed")
                for file in missing:
                    storage.move_durably(again / name / file.name, file)
                    print(f"{file}: made again from the sources", flush=True)
            if not (self.out / name / "_info.json").is_file():
                storage.publish(self.out / name / "_info.json", info_json(name, entry))
        storage.remove_tree(again)

    def _split(
        self, name: str, out: Path, max_refused: float, pool: DecodePool, stop: StopFlag
    ) -> SplitWriter:
        candidates = unpacked(self.candidates[name], self.work / "unpacked", stop)
        folder, work = out / name, self.work / name
        return SplitWriter(name, candidates, self.request, folder, work, max_refused, pool)


def _check_request(
    source: Source, out: Path, rows_per_shard: int, seed: int, max_refused: float, val: float
) -> None:
    if rows_per_shard < CHUNK_ROWS or rows_per_shard % CHUNK_ROWS:
        expected = f"expected a multiple of {CHUNK_ROWS}, such as 1024"
        raise UsageError(f"--rows-per-shard: {expected}; found {rows_per_shard}")
    if not 0 <= max_refused <= 1:
        expected = "expected a share from 0 to 1, such as 0.01"
        raise UsageError(f"--max-refused: {expected}; found {max_refused}")
    if not 0 <= val < 1:
        raise UsageError(f"--val: expected a share from 0 to below 1, such as 0.1; found {val}")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed: expected 0 or a positive number; found {seed}")
    check_output(out, "a DATASET")
    for part in source.values() if isinstance(source, Mapping) else [source]:
        if Path(part).is_dir() and out.resolve().is_relative_to(Path(part).resolve()):
            expected = f"expected a DATASET outside its source {part}"
            raise UsageError(f"{out}: {expected}; choose another DATASET")


def _request_of(record: DatasetRecord) -> ShardRequest:
    """Return the request of a finished DATASET."""
    splits = {}
    for name, entry in record.splits.items():
        candidates, sha256 = entry.rows + entry.refused, entry.listing_sha256
        splits[name] = SplitRequest(candidates=candidates, listing_sha256=sha256)
    kept = {"rows_per_shard", "seed", "picture_rules", "classes", "task", "ignore", "coco"}
    return ShardRequest(**record.model_dump(include=kept), splits=splits)


def _check_same(out: Path, request: ShardRequest, begun: ShardRequest) -> None:
    if diff := differences(request, begun):
        found = f"found a difference (asked != found): {', '.join(diff)[:500]}"
        expected = "expected the first request of this DATASET"
        raise IdentityError(f"{out}: {expected}; {found}; repeat it or choose another DATASET")
