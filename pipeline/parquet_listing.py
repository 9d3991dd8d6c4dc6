"""List the pictures of parquet files as Hugging Face writes them, and unpack their bytes.

A picture is a row of one column: a struct with `bytes`, or bytes alone. Rows are read in random
order, but a row of a parquet file cannot be read without its page of up to 1,024 pictures. Each
file is therefore unpacked once, before the first shard, into a file below DATASET/.run.
"""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from cache_tools.console import StopFlag, progress
from cache_tools.errors import Interrupted, UsageError, missing_package
from cache_tools.records import printable, sha256_hex
from cache_tools.storage import atomic_file

from .candidates import Candidates, Sources
from .tar_listing import MAX_LABEL, name_classes

LABELS = ("label", "labels", "fine_label", "class", "cls", "target")
ROWS = 16  # pictures in memory at once, beside a page
_OF_DAMAGE = (OSError, ValueError, TypeError, AttributeError, RecursionError)  # or Arrow's own
# The leaf of the pictures, such as "image.bytes"; the column of the labels, or ""; whether they are
# strings; the class names in the metadata, or ().
_Columns = tuple[str, str, bool, tuple[str, ...]]


def add_parquet(
    root: Path, files_of: Mapping[str, list[Path]], sources: Sources, wanted: Sequence[str]
) -> None:
    """Add the rows of parquet files; `wanted` names the columns to use, or is empty.

    The class names are those of the metadata, the sorted labels, those of classes.txt, or numbers.

    Raises: UsageError when a file is damaged, or when columns or classes are missing, ambiguous or
    different.
    """
    files = [(split, path) for split, paths in files_of.items() for path in paths]
    columns, values = list[_Columns](), list[list[Any]]()
    for _, path in files:
        with _opened(path) as file:
            columns.append(_find_columns(path, file.schema_arrow, wanted))
            label = columns[-1][1]
            values.append([*_values(file, label)] if label else [None] * file.metadata.num_rows)
        if columns[-1] != columns[0]:
            expected = f"expected columns and classes as in {files[0][1]}"
            raise UsageError(f"{path}: {expected}; found others; name the columns with --column")
    picture, label, is_text, classes = columns[0]
    if is_text:
        classes = tuple(sorted({text for part in values for text in part if text is not None}))
    number: dict[Any, int] = {text: i for i, text in enumerate(classes if is_text else ())}
    number[None], limit = -1, len(classes) or MAX_LABEL
    for (split, path), part in zip(files, values, strict=True):
        candidates = sources.splits.setdefault(split, Candidates())
        candidates.column, size = picture, path.stat().st_size
        candidates.roots.append(path)
        for row, value in enumerate(part):
            if not -1 <= (found := number.get(value, value)) < limit:
                expected = f"expected a label below {limit} in column {label}"
                raise UsageError(f"{path}: {expected}; found {found} in row {row}")
            candidates.add(str(row), found, (row, size))  # the digest of the listing has the size
    train = sources.splits.get("train")
    if train and is_text and (missing := {*range(len(classes))} - {*train.labels}):
        shown = printable(classes[min(missing)])
        raise UsageError(f"{root}: expected every class in train; found no class {shown!r}")
    sources.notes.append(f"parquet: pictures from {picture}, labels from {label or 'no column'}")
    folders = [root, *(path.parent for _, path in files)]
    names = tuple(map(printable, classes))
    name_classes(sources, folders, "no labels: the column of labels is missing or empty", names)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield a pyarrow ParquetFile that reads page by page, never a whole row group.

    Raises: UsageError when pyarrow is missing, or when it cannot read the file.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing_package(str(path), "pyarrow", "parquet") from error
    if not path.is_file():
        raise UsageError(f"{path}: expected a parquet file; found no regular file")
    options = {"buffer_size": 1 << 20, "pre_buffer": False, "page_checksum_verification": True}
    try:
        with ParquetFile(path, **options) as file:
            yield file
    except (ArrowException, *_OF_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the content
            raise
        said = f"cannot read: {str(error)[:200]!r}"
        raise UsageError(f"{path}: expected a whole parquet file; {said}; copy it again") from error


def _find_columns(path: Path, schema: Any, wanted: Sequence[str]) -> _Columns:
    """Return the columns of pictures and labels, by their types, names and metadata."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    shown = ", ".join(f"{printable(field.name)} ({str(field.type)[:60]})" for field in schema)
    found = f"found {shown[:600] or 'none'}; name the columns to use with --column"
    fields = {field.name: field.type for field in schema if not wanted or field.name in wanted}
    if missing := set(wanted) - fields.keys():
        raise UsageError(f"{path}: expected the column {min(missing)}; {found}")
    inner = {
        f"{name}.bytes": kind.field("bytes").type
        for name, kind in fields.items()
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    }
    pictures = [leaf for leaf, kind in (inner or fields).items() if is_bytes(kind)]
    if len(pictures) != 1:
        expected = "expected one column of pictures (a struct with bytes, or binary)"
        raise UsageError(f"{path}: {expected}; {found}")
    classes = {name: names for name, names in _classes(schema).items() if name in fields}
    labels = [*classes] or [name for name in fields if name in LABELS]
    if not labels:
        return pictures[0], "", False, ()
    kind = fields[labels[0]]
    kind = kind.value_type if types.is_dictionary(kind) else kind
    is_text = bool(types.is_string(kind) or types.is_large_string(kind))
    if len(labels) > 1 or not (is_text or types.is_integer(kind) or types.is_null(kind)):
        raise UsageError(f"{path}: expected one column of integer or string labels; {found}")
    return pictures[0], labels[0], is_text, classes.get(labels[0], ())


def _classes(schema: Any) -> dict[str, tuple[str, ...]]:
    """Return the class names of each ClassLabel column in the metadata of Hugging Face."""
    found = {}
    known = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    for column, feature in known.get("info", {}).get("features", {}).items():
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            names = feature.get("names") or []
            if isinstance(names, dict):  # {"0": name, ...}
                names = [names[key] for key in sorted(names, key=int)]
            found[column] = tuple(map(str, names))
    return found


def _values(file: Any, column: str, rows: int = 1 << 16) -> Iterator[Any]:
    """Yield the value of every row, the bytes of a struct, or None; `rows` are in memory at once.

    Raises: ValueError, which `_opened` explains, when there are fewer rows than the file states.
    """
    found, total = 0, file.metadata.num_rows
    for batch in file.iter_batches(rows, columns=[column], use_threads=False):
        for value in batch.column(0).to_pylist():
            yield value.get("bytes") if isinstance(value, dict) else value
        found += batch.num_rows
    if found != total:
        raise ValueError(f"found {found} of {total} rows")


def unpacked(candidates: Candidates, folder: Path, stop: StopFlag) -> Candidates:
    """Return candidates with their bytes in files of `folder`; missing files are written.

    Candidates of other sources are returned as they are.

    Raises: UsageError when a parquet file is damaged; Interrupted.
    """
    if not candidates.column:
        return candidates
    moved = copy.copy(candidates)
    moved.roots, moved.ends = [], []
    for path in candidates.roots:
        state = path.stat()
        key = f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {candidates.column}"
        file = folder / sha256_hex(key.encode(errors="surrogateescape"))[:16] / path.name
        if not file.is_file():
            _unpack(path, candidates.column, file, stop)
        total = int(np.fromfile(file, "<u8", offset=file.stat().st_size - 8)[0])
        moved.roots.append(file)
        moved.ends.append(np.fromfile(file, "<u8", offset=total))
    return moved


def first_pictures(candidates: Candidates, count: int) -> list[bytes]:
    """Return at most `count` pictures, from the begin of the first parquet file."""
    with _opened(candidates.roots[0]) as file:
        return [data or b"" for data in islice(_values(file, candidates.column, ROWS), count)]


def _unpack(path: Path, column: str, target: Path, stop: StopFlag) -> None:
    """Write the pictures of a parquet file one after the other, then 0 and the end of each."""
    ends = [0]
    with (
        _opened(path) as file,
        progress(file.metadata.num_rows, f"unpack {path.name}", "pictures") as bar,
        atomic_file(target) as out,
    ):
        for data in _values(file, column, ROWS):
            if stop.requested:
                raise Interrupted(f"{path}: stopped; the same command resumes")
            ends.append(ends[-1] + out.write(data or b""))
            bar.update(1)
        out.write(np.array(ends, "<u8").tobytes())
