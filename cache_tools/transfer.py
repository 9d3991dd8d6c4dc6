"""`mcm-cache push` and `pull`: a CACHE, DATASET or EXPORT to a remote and back, shard by shard.

The files of a shard come first and its record last: a commit, or the index of a DATASET's shard.
`files.json` on the remote has the sizes and digests of the files that no other record names.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

from .cache import Unit
from .console import StopFlag, progress
from .dataset import DatasetRecord, ShardEntry, shard_name
from .errors import CorruptionError, Interrupted, UsageError, check_output
from .info import info, summary
from .records import (
    MAX_RECORD_BYTES,
    FileEntry,
    Record,
    decode_record,
    encode_record,
    nearest,
    record_sha256,
    sha256_hex,
)
from .remote import Parcel, Remote, check_digest, open_remote
from .schema import CacheIdentity, Manifest
from .storage import settle
from .writer import manifest_json

_KINDS = {"cache.json": "a CACHE", "dataset.json": "a DATASET", "config.json": "an exported folder"}
# Files of a CACHE or DATASET that no commit and no index vouches for, and the files of an EXPORT.
_EXTRAS = re.compile(
    r"extract\.toml|projection\.npy|probe\.(npy|json)|\w+/(_info\.json|quarantine\.jsonl)"
)
LARGE = re.compile(r"\.tar$|/(patch|scale|cls)/c\.")  # files that training reads by chunk
_PLAIN = re.compile(r"(?!files\.json$)\w[\w.-]{0,99}")
_UNIT = re.compile(r"(\w+)/v(0|[1-9][0-9]{0,8})/commits/[0-9]{6,}\.json")
Step = Callable[[], Parcel]
CARD = """---
license: other
tags: [masked-channel-modeling]
---
{summary}

    mcm-cache pull {url} FOLDER
    mcm-cache verify FOLDER

{facts}

The licenses of the pictures and of the teacher's weights apply to this copy: NAME THEM HERE.
"""


class FilesRecord(Record):
    """files.json: the size and digest of each file that no other record of the remote names."""

    format: Literal["mcm-files"] = "mcm-files"
    version: Literal[1] = 1
    files: dict[str, FileEntry]


class Part(NamedTuple):
    """The part of a CACHE to pull: a share of the shards, splits (or all), views (0: all)."""

    first: float = 1.0
    splits: Collection[str] = ()
    views: int = 0
    features_only: bool = False
    small: bool = False  # leave out the large files of every shard

    def identity(self, whole: CacheIdentity) -> CacheIdentity:
        """Return the identity of the part: another one if it has fewer rows, or no pictures."""
        update: dict[str, object] = {"pictures": False} if self.features_only else {}
        if self.first < 1:
            shards = {split: math.ceil(self.first * whole.shards(split)) for split in whole.rows}
            most = {split: count * whole.rows_per_shard for split, count in shards.items()}
            update["rows"] = {split: min(n, most[split]) for split, n in whole.rows.items()}
        return whole.model_copy(update=update)


WHOLE = Part()


def push(path: Path, url: str) -> str:
    """Copy a DATASET, an EXPORT or the committed shards of a CACHE to a remote.

    What is there already is compared and left. Return a line that says what was done.

    Raises: UsageError if `path` is none of these, or another kind is at `url`; CorruptionError if a
    file is damaged, before it is sent; IdentityError if the remote has another record;
    ResourceError if the remote fails.
    """
    source, remote = Source(Remote(str(path))), open_remote(url)
    stages, sizes = source.stages(WHOLE, listed=True), remote.sizes()
    for other in (_KINDS.keys() & sizes.keys()) - {source.kind}:
        expected = f"expected {_KINDS[source.kind]} or nothing there"
        raise UsageError(f"{url}: {expected}; found {_KINDS[other]}; choose another place")
    if source.kind != "config.json" and "README.md" not in sizes:
        stages.append([lambda: Parcel({}, {"README.md": _card(path, remote.url).encode()})])
    return _copy(source.remote, remote, stages, sizes, f"push {path}")


def pull(url: str, out: Path, part: Part = WHOLE) -> str:
    """Copy a CACHE or a part of it, a DATASET or an EXPORT to a folder, and check every digest.

    The folder is a valid CACHE at every moment. Return a line that says what was done.

    Raises: UsageError if nothing is at `url`; CorruptionError if bytes differ from their record;
    IdentityError if `out` holds something else; ResourceError if the remote fails.
    """
    source, target = Source(open_remote(url)), Remote(str(out))
    stages = source.stages(part)
    own = {name.partition("/")[0] for name in source.sizes}  # in an unfinished folder
    check_output(out, _KINDS[source.kind], own)
    return _copy(source.remote, target, stages, target.sizes(), f"pull {url}")


def _copy(
    source: Remote, target: Remote, stages: list[list[Step]], sizes: dict[str, int], label: str
) -> str:
    if target.root.is_dir() and type(target) is Remote:
        settle(target.root)  # removes the temporary files of a killed command
    copied, total, size = 0, sum(map(len, stages)), target.batch
    with (
        StopFlag("the shards in work are finished; the same command resumes") as stop,
        progress(total, label, "shards and records") as bar,
        ThreadPoolExecutor(target.threads) as pool,
    ):
        for steps in stages:
            batches = (steps[i : i + size] for i in range(0, len(steps), size))
            work = {pool.submit(_add, source, target, sizes, batch): batch for batch in batches}
            try:
                for future in as_completed(work):
                    copied += future.result()
                    bar.update(len(work[future]))
                    if stop.requested:
                        raise Interrupted(f"{label}: interrupted; the same command resumes")
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return f"{target.url}: {copied} of {total} shards and records copied; the others were there"


def _add(source: Remote, target: Remote, sizes: dict[str, int], steps: Sequence[Step]) -> int:
    """Copy what `target` lacks of the steps; return the number of steps that it lacked."""
    parcels = []
    for files, records in (step() for step in steps):
        there = [name for name in records if name in sizes]
        for name in there:
            target.compare(name, records[name])
        done = len(there) == len(records)
        lacking = {n: one for n, one in files.items() if not done or sizes.get(n) != one.bytes}
        if lacking or not done:
            parcels.append(Parcel(lacking, records))
    if parcels:
        target.add(source, parcels)
    return len(parcels)


class Source:
    """A remote to copy from. `kind` is the name of its main record."""

    def __init__(self, remote: Remote) -> None:
        self.remote, self.sizes = remote, remote.sizes()
        kind = next((name for name in _KINDS if name in self.sizes), None)
        if kind is None:
            expected = "expected a CACHE, a DATASET or an exported folder"
            raise UsageError(f"{remote.url}: {expected}; found {len(self.sizes)} other files")
        self.kind = kind

    def where(self, name: str) -> str:
        """Return the address of a file, for an error."""
        return f"{self.remote.url}/{name}"

    def record(self, name: str) -> bytes:
        """Return the bytes of a record. Raises: CorruptionError if it is missing or too large."""
        if not 0 < self.sizes.get(name, 0) <= MAX_RECORD_BYTES:
            found = f"found {self.sizes.get(name, 'no')} bytes"
            raise CorruptionError(f"{self.where(name)}: expected a record; {found}")
        return self.remote.content(name)

    def stages(self, part: Part, listed: bool = False) -> list[list[Step]]:
        """Return the steps of a copy; those of one stage may run in any order.

        `listed` adds files.json.
        """
        extras: Step = partial(self.extras, listed)
        if self.kind == "cache.json":
            return self.cache_stages(part, extras)
        if part != WHOLE:
            expected = "expected a CACHE: no other folder can be pulled in part"
            raise UsageError(f"{self.remote.url}: {expected}; found {_KINDS[self.kind]}")
        if self.kind == "config.json":
            return [[extras]]
        data = self.record(self.kind)
        splits = decode_record(DatasetRecord, data, self.where(self.kind)).splits.items()
        shards = [(split, k, one) for split, of in splits for k, one in enumerate(of.shards)]
        tars: list[Step] = [partial(self.tar, *shard) for shard in shards]
        return [tars, [extras], [lambda: Parcel({}, {self.kind: data})]]

    def extras(self, listed: bool) -> Parcel:
        """Return the files that no other record vouches for."""
        kind = _PLAIN if self.kind == "config.json" else _EXTRAS
        if "files.json" in self.sizes:
            data, where = self.record("files.json"), self.where("files.json")
            listing = decode_record(FilesRecord, data, where).files.items()
            files = {name: entry for name, entry in listing if kind.fullmatch(name)}
        else:
            names = sorted(filter(kind.fullmatch, self.sizes), key=lambda name: name == self.kind)
            files = {name: self.entry(name) for name in names}
        record = {"files.json": encode_record(FilesRecord(files=files))} if listed else {}
        return Parcel(files, record)

    def entry(self, name: str) -> FileEntry:
        """Return the size and digest of a file that no record names, as it is now."""
        self.remote.read(name, SimpleNamespace(write=(digest := hashlib.sha256()).update))
        return FileEntry(bytes=self.sizes[name], sha256=digest.hexdigest())

    def tar(self, split: str, shard: int, known: ShardEntry) -> Parcel:
        """Return a shard of a DATASET; its record is its index."""
        name = f"{split}/{shard_name(shard)}"
        index, targets = self.record(f"{name}.index.npy"), f"{name}.targets.npy"
        entry = FileEntry(bytes=len(index), sha256=known.index_sha256)
        check_digest(self.where(f"{name}.index.npy"), entry, len(index), sha256_hex(index))
        files = {f"{name}.tar": FileEntry(bytes=known.tar_bytes, sha256=known.tar_sha256)}
        if known.targets_sha256:
            size = self.sizes.get(targets, 0)
            files[targets] = FileEntry(bytes=size, sha256=known.targets_sha256)
        return Parcel(files, {f"{name}.index.npy": index})

    def cache_stages(self, part: Part, extras: Step) -> list[list[Step]]:
        """Return the steps for a part of a CACHE; the names are those of `Unit`."""
        where = self.where(self.kind)
        whole = decode_record(CacheIdentity, self.record(self.kind), where)
        if unknown := [split for split in part.splits if split not in whole.rows]:
            found = f"found {', '.join(whole.rows)}{nearest(unknown[0], whole.rows)}"
            raise UsageError(f"{where}: expected a split {unknown[0]!r}; {found}")
        identity = part.identity(whole)
        matches = filter(None, map(_UNIT.fullmatch, self.sizes))
        names = {(match[1], int(match[2])) for match in matches if match[1] in whole.rows}
        shards, manifests = list[Step](), list[Step]()
        for split, view in sorted(names):
            if (part.splits and split not in part.splits) or 0 < part.views <= view:
                continue
            theirs, ours = (Unit(Path(), one, split, view) for one in (whole, identity))
            manifest, digests = None, dict[int, str]()
            if (name := str(ours.manifest_file)) in self.sizes:
                manifest = theirs.decode_manifest(self.record(name), self.where(name))
                manifests.append(partial(self.manifest, ours, digests))
            shards += [
                partial(self.commit, theirs, ours, shard, manifest, digests, part.small)
                for shard in range(ours.num_shards)
                if manifest or str(ours.commit_file(shard)) in self.sizes
            ]
        first: Step = partial(Parcel, {}, {self.kind: encode_record(identity)})
        return [[first], [extras], shards, manifests]

    def commit(
        self, theirs: Unit, ours: Unit, shard: int, manifest: Manifest | None,
        digests: dict[int, str], small: bool,
    ) -> Parcel:  # fmt: skip
        """Return a shard of a CACHE. Its commit names the identity of `ours`."""
        name = str(ours.commit_file(shard))
        commit = theirs.decode_commit(shard, self.record(name), self.where(name), manifest)
        inside = [str(path.relative_to(ours.path)) for path in ours.shard_files(shard).values()]
        files = {file: commit.files[file] for file in inside}
        update = {"files": files, "identity_sha256": ours.identity_sha256}
        commit = commit.model_copy(update=update)
        digests[shard] = record_sha256(commit)
        left_out = set(filter(LARGE.search, files)) if small else set()
        chosen = {f"{ours}/{file}": files[file] for file in files.keys() - left_out}
        return Parcel(chosen, {name: encode_record(commit)})

    def manifest(self, unit: Unit, digests: dict[int, str]) -> Parcel:
        """Return the manifest of a unit, after every zarr.json."""
        manifest = manifest_json(unit, [digests[shard] for shard in range(unit.num_shards)])
        records = {str(path): data for path, data in unit.zarr_files().items()}
        return Parcel({}, records | {str(unit.manifest_file): manifest})


def _card(path: Path, url: str) -> str:
    """Return a README.md that describes a CACHE or DATASET; the Hub reads its first lines."""
    known = info(path) | {"path": url}
    teacher = known.get("identity", {}).get("teacher", {})
    facts = {
        "layer of the teacher": teacher.get("layer"),
        "sha256 of the identity": known["sha256"],
    }
    facts["sha256 of the teacher's weights"] = teacher.get("weights_sha256")
    lines = [f"- {name}: {value}" for name, value in facts.items() if value]
    text = "\n".join(f"    {line}" for line in summary(known).splitlines())
    return CARD.format(summary=text, url=url, facts="\n".join(lines))
