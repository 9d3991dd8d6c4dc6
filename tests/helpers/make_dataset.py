"""A tiny real DATASET written by cache_tools' own writers: the pictures of make_cache, 2 classes by tint."""

import hashlib
from pathlib import Path

import numpy as np
from make_cache import view

from cache_tools.dataset import Dataset, DatasetRecord, ShardEntry, SplitEntry, row_key
from cache_tools.images import PICTURE_RULES, encode_view
from cache_tools.records import encode_record
from cache_tools.storage import write_atomic
from cache_tools.tars import INDEX_DTYPE, encode_npy, tar_writer


def make_dataset(path: Path, rows: int = 96, val_rows: int = 40, unlabeled: bool = False, copies: int = 0) -> Dataset:
    """Write DATASET with splits train and val, one shard each; odd rows are brighter than even ones.

    The first `copies` pictures of val are the last of train, in that order.
    """
    sources = {split: [(split, row) for row in range(n)] for split, n in (("train", rows), ("val", val_rows))}
    sources["val"][:copies] = sources["train"][rows - copies :]
    splits = {split: _write_split(path, split, chosen, unlabeled) for split, chosen in sources.items()}
    classes = ("even", "odd")
    record = DatasetRecord(classes=classes, seed=0, rows_per_shard=1024, picture_rules=PICTURE_RULES, splits=splits)
    write_atomic(path / "dataset.json", encode_record(record))
    return Dataset(path)


def _write_split(path: Path, split: str, sources: list[tuple[str, int]], unlabeled: bool) -> SplitEntry:
    rows = len(sources)
    index = np.zeros(rows, INDEX_DTYPE)
    tar = path / split / "000000.tar"
    with tar_writer(tar) as writer:
        for row, (origin, number) in enumerate(sources):
            label = -1 if unlabeled else row % 2
            fields = {"png": encode_view(view(origin, 0, number), "png"), "cls": str(label).encode()}
            index[row] = (*writer.add(row_key(row), fields, indexed="png"), label)
    data = encode_npy(index)
    write_atomic(tar.with_suffix(".index.npy"), data)
    shas = [hashlib.sha256(blob).hexdigest() for blob in (tar.read_bytes(), data)]
    entry = ShardEntry(rows=rows, tar_bytes=tar.stat().st_size, tar_sha256=shas[0], index_sha256=shas[1])
    return SplitEntry(rows=rows, refused=0, listing_sha256="0" * 64, shards=(entry,))
