"""List the labeled candidate pictures of a SOURCE: an ImageFolder, tars, or parquet files.

An ImageFolder has one folder per split with class folders inside, class folders alone, or pictures
alone (label -1). Tars or parquet files are one file, a glob, a quoted brace pattern, or a folder
of them; tars may have timm's _info.json.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from cache_tools.errors import UsageError
from cache_tools.records import sha256_hex

from .candidates import Sources
from .folder_listing import add_folders
from .parquet_listing import add_parquet
from .source_splits import LAYOUTS, Source, file_extension, locate_splits, source_name
from .tar_listing import add_tars


def list_sources(
    source: Source, val: float = 0.0, max_refused: float = 0.01, columns: Sequence[str] = ()
) -> Sources:
    """Return every candidate picture of `source`, or of one source per split.

    `val` is the share of split train that becomes split val. `max_refused` is the largest share of
    links, which are left out. `columns` names the columns of parquet files to use.

    Raises: UsageError when the source is empty, ambiguous or of another kind, or when its labels
    contradict each other.
    """
    sources = Sources()
    locations = locate_splits(source, sources.notes)
    tars = {split: place for split, place in locations.items() if isinstance(place, list)}
    kinds = {file_extension(path.name) for paths in tars.values() for path in paths}
    folders = {split: place for split, place in locations.items() if not isinstance(place, list)}
    if columns and kinds != {"parquet"}:
        raise UsageError(f"--column: expected parquet files; found others: {source_name(source)}")
    if tars and folders:
        found = f"tars ({', '.join(tars)}) and folders of pictures ({', '.join(folders)})"
        where = source_name(source)
        raise UsageError(f"{where}: expected one kind of source; found {found}; use one kind")
    if tars:
        root = next(iter(source.values())) if isinstance(source, Mapping) else source
        if kinds == {"parquet"}:
            add_parquet(Path(root), tars, sources, columns)
        else:
            add_tars(Path(root), tars, sources)
    else:
        add_folders(folders, sources, max_refused)
    if val:
        _hold_out(sources, val)
    for split, candidates in sources.splits.items():
        if not len(candidates):
            where, found = source_name(source), f"found no picture in split {split!r}"
            raise UsageError("; ".join([f"{where}: expected {LAYOUTS}", found, *sources.notes]))
    return sources


def _hold_out(sources: Sources, share: float) -> None:
    """Split train into train and val by a hash of each name.

    Adding or deleting other pictures never moves a picture to the other split.
    """
    if sources.splits.keys() != {"train"}:
        found = ", ".join(sources.splits)
        raise UsageError(f"--val {share}: expected a source of split train alone; found {found}")
    train = sources.splits["train"]
    hashes = (sha256_hex(os.fsencode(train[i].name))[:8] for i in range(len(train)))
    held_out = [int(digits, 16) < share * (1 << 32) for digits in hashes]
    rest = train.part([not held for held in held_out])
    sources.splits = {"train": rest, "val": train.part(held_out)}
