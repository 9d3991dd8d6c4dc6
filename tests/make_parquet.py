"""Parquet files as Hugging Face writes them: a struct of bytes and path, a label, and ClassLabel in the metadata."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.candidates import read_source
from pipeline.listing import list_sources

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(
    path: Path, pictures: Sequence[bytes | None], labels: Any = None, names: Any = None, rows: int = 5, **columns: Any
) -> Path:
    """A file of row groups of `rows` pictures; `names` are the class names, `columns` are added or replace others."""
    image = pa.array([{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(pictures)], IMAGE)
    found = {"image": image} | ({"label": labels} if labels is not None else {}) | columns
    table = pa.table({name: column for name, column in found.items() if column is not None})
    features = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows)
    return path


def from_folder(source: Path, root: Path, per_file: int = 10**6) -> Path:
    """ROOT/data/SPLIT-I-of-N.parquet: the pictures of an ImageFolder in the order of its listing."""
    sources = list_sources(source)
    for split, found in sources.splits.items():
        items = [found[i] for i in range(len(found))]
        parts = [items[at : at + per_file] for at in range(0, len(items), per_file)]
        for i, part in enumerate(parts):
            path = root / "data" / f"{split}-{i:05d}-of-{len(parts):05d}.parquet"
            write_parquet(path, [*map(read_source, part)], [item.label for item in part], sources.classes)
    return root
