"""`mcm-cache shard`: pictures in, DATASET out; every picture is decoded before it gets a row.

A shard is written whole: tar, index, then its progress record in OUT/.run/shard. A process killed at any moment leaves
a prefix of shards behind, and the same command continues after it and ends with the same bytes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cache_tools.console import StopFlag, one_line
from cache_tools.dataset import CHUNK_ROWS, ROWS_PER_SHARD, DatasetRecord, info_json, shard_name
from cache_tools.errors import IdentityError, UsageError, check_output
from cache_tools.records import differences, encode_record, read_record
from cache_tools.storage import move_durably, publish, remove_tree, settle, try_lock, work_dir, write_atomic

from .decode_pool import DecodePool
from .listing import Source, list_sources
from .mask_listing import list_scenes
from .shard_writer import ShardPlan, SplitPlan, SplitWriter


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
) -> DatasetRecord:
    """Shard `source` into the DATASET `out`, or continue one.

    `source` is one source, or one per split: `{"train": ..., "val": ...}`. `max_refused` is a share of a split's
    candidates; `val` is the share of split train that becomes split val. Of masks, `ignore` are the values that mean
    unlabelled, and `classes` is a file with a class name per line.

    Raises: UsageError, IdentityError (another request was begun or finished there), TooManyRefused, Interrupted.
    """
    return _Job(source, out, rows_per_shard, seed, max_refused, workers, val, ignore, classes).run()


class _Job:
    """A request with its listing; `run` makes the DATASET.

    Raises: UsageError, before anything is written.
    """

    def __init__(
        self, source: Source, out: str | Path, rows_per_shard: int, seed: int, max_refused: float,
        workers: int | None, val: float, ignore: Sequence[int], classes: Path | None,
    ) -> None:  # fmt: skip
        self.out, self.max_refused = Path(out), max_refused
        self.workers = workers or len(os.sched_getaffinity(0))
        self.folder = work_dir(self.out)
        self.lock, self.work = self.folder / "shard.lock", self.folder / "shard"
        _check_request(source, self.out, self.folder, rows_per_shard, seed, max_refused, val)
        scenes = None if isinstance(source, Mapping) else list_scenes(Path(source), ignore, classes)
        if scenes and val:
            raise UsageError(f"--val: expected a source without masks; {source} has folders of its own for its splits")
        if not scenes and (ignore or classes):
            raise UsageError(f"--ignore, --classes: expected a source with masks; found none in {source}")
        sources = scenes or list_sources(source, val, max_refused)
        for note in sources.notes:
            print(one_line(note))
        self.candidates = sources.splits
        listing = {name: SplitPlan(candidates=len(c), listing_sha256=c.sha256()) for name, c in sources.splits.items()}
        self.plan = ShardPlan(
            rows_per_shard=rows_per_shard, seed=seed, classes=sources.classes, splits=listing,
            task="segment" if sources.rule else None, ignore=sources.rule and sources.rule.ignore,
        )  # fmt: skip

    def run(self) -> DatasetRecord:
        """Make the DATASET, or continue one."""
        with (
            try_lock(self.lock) as held,
            StopFlag("the shard in work is finished") as stop,
            DecodePool(self.workers) as pool,
        ):
            if not held:
                raise UsageError(f"{self.lock}: another process shards into {self.out}; wait until it ends")
            settle(self.out)
            if (self.out / "dataset.json").is_file():
                record = read_record(DatasetRecord, self.out / "dataset.json")
                _check_same(self.out, self.plan, _plan_of(record))
                self._make_again(record, pool)
                print(f"{self.out}: complete")
            else:
                begun = self.work / "plan.json"
                if begun.is_file():
                    _check_same(self.out, self.plan, read_record(ShardPlan, begun))
                publish(begun, encode_record(self.plan))
                splits = {
                    name: self._split(name, self.out, self.max_refused, pool).write(stop) for name in self.candidates
                }
                record = DatasetRecord(**self.plan.model_dump(exclude={"version", "splits"}), splits=splits)
                write_atomic(self.out / "dataset.json", encode_record(record))
            remove_tree(self.work)
        return record

    def _make_again(self, record: DatasetRecord, pool: DecodePool) -> None:
        """Make the shards again that were lost or moved away: the same sources give the same bytes.

        Raises: IdentityError when the sources make another file than dataset.json says.
        """
        again = self.folder / "again"
        for name, entry in record.splits.items():
            for shard, committed in enumerate(entry.shards):
                tar = self.out / name / f"{shard_name(shard)}.tar"
                suffixes = (".tar", ".index.npy", *((".targets.npy",) if record.task else ()))
                missing = [file for file in map(tar.with_suffix, suffixes) if not file.is_file()]
                if not missing:
                    continue
                made = self._split(name, again, 1, pool).write_again(shard, entry)
                if made.model_copy(update={"first_candidate": committed.first_candidate}) != committed:
                    remove_tree(again)
                    raise IdentityError(
                        f"{missing[0]}: expected the pictures that it was made of; the source has others now"
                    )
                for file in missing:
                    move_durably(again / name / file.name, file)
                    print(f"{file}: made again from the sources", flush=True)
            if not (self.out / name / "_info.json").is_file():
                publish(self.out / name / "_info.json", info_json(name, entry))
        remove_tree(again)

    def _split(self, name: str, out: Path, max_refused: float, pool: DecodePool) -> SplitWriter:
        return SplitWriter(name, self.candidates[name], self.plan, out / name, self.work / name, max_refused, pool)


def _check_request(
    source: Source, out: Path, run: Path, rows_per_shard: int, seed: int, max_refused: float, val: float
) -> None:
    if rows_per_shard < CHUNK_ROWS or rows_per_shard % CHUNK_ROWS:
        raise UsageError(f"--rows-per-shard: expected a multiple of {CHUNK_ROWS}, such as 1024; found {rows_per_shard}")
    if not 0 <= max_refused <= 1:
        raise UsageError(f"--max-refused: expected a share from 0 to 1, such as 0.01; found {max_refused}")
    if not 0 <= val < 1:
        raise UsageError(f"--val: expected a share from 0 to below 1, such as 0.1; found {val}")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed: expected 0 or a positive number; found {seed}")
    check_output(out, "a DATASET")
    for part in source.values() if isinstance(source, Mapping) else [source]:
        if Path(part).is_dir() and out.resolve().is_relative_to(Path(part).resolve()):
            raise UsageError(f"{out}: expected a DATASET outside its source {part}; choose another DATASET")
    begun = (out / "dataset.json").is_file() or (run / "shard" / "plan.json").is_file()
    if not begun and out.is_dir() and any(path != run for path in out.iterdir()):
        raise UsageError(f"{out}: expected a new or empty folder; found other files; choose another DATASET")


def _plan_of(record: DatasetRecord) -> ShardPlan:
    """The plan that a finished DATASET was made by."""
    splits = {
        name: SplitPlan(candidates=entry.rows + entry.refused, listing_sha256=entry.listing_sha256)
        for name, entry in record.splits.items()
    }
    return ShardPlan(
        **record.model_dump(include={"rows_per_shard", "seed", "picture_rules", "classes", "task", "ignore"}),
        splits=splits,
    )


def _check_same(out: Path, plan: ShardPlan, begun: ShardPlan) -> None:
    if diff := differences(plan, begun):
        found = f"found another (asked != there): {', '.join(diff)[:500]}"
        raise IdentityError(
            f"{out}: expected the request that began it; {found}; repeat that or choose another DATASET"
        )
