"""Damage of every kind to a CACHE and a DATASET: what is read is what was written, or an error names the file."""

import functools
import io
import itertools
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from make_extract import make_extracted, make_place
from make_scenes import make_ade, make_coco

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset, DatasetRecord
from cache_tools.errors import CorruptionError, IdentityError, UsageError
from cache_tools.records import decode_record
from cache_tools.schema import CacheIdentity, Commit, Manifest
from cache_tools.verify import verify
from mcm.pretrain import choose_units
from mcm.stream import CacheSource
from pipeline.shard import shard

Content = dict[str, bytes | Exception]
DECLARED = (CorruptionError, IdentityError, UsageError)  # any other error fails a test
KINDS = ["int8", "float16", "dataset", "scenes", "boxes"]
# No row depends on it, and no hash of it is kept.
NOTES = {"quarantine.jsonl", "extract.toml"}
# Where they are missing the work counts as unfinished: the unit is not read, the same command writes them.
MADE_AGAIN = {"manifest.json", "_info.json", "probe.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATASETs with labels, masks and boxes, a CACHE of each dtype, and the CACHE and DATASET of another seed."""
    root = make_place(tmp_path_factory.mktemp("damage"), refused=2)
    for dtype in ("int8", "float16"):
        make_extracted(root, dtype, dtype=dtype)
    make_extracted(root, "int8-other", seed=1)
    shard(make_ade(root / "ade", 72, 8), root / "scenes", rows_per_shard=32)
    shard(make_coco(root / "coco", 72, 8), root / "boxes", rows_per_shard=32)
    shard(str(root / "pictures"), root / "dataset-other", rows_per_shard=32, seed=1, max_refused=0.5)
    return root


def attempt(read: Callable[[], bytes]) -> bytes | Exception:
    try:
        return read()
    except DECLARED as error:
        return error


def stream_of(cache: Path) -> Content:
    """What pre-training gets of each chunk, opened as it opens a cache; all is one error where that fails."""
    try:
        units, val = choose_units(Cache(cache), ())
    except DECLARED as error:
        return {"all": error}
    chunks = ((unit, number) for unit in (*units, *val) for number in range(unit.num_chunks))
    return {f"{unit} {number}": attempt(lambda u=unit, n=number: chunk_bytes(u, n)) for unit, number in chunks}


def chunk_bytes(unit, number: int) -> bytes:
    size = (unit.identity.view_height, unit.identity.view_width)
    batch = CacheSource([unit], size, 0, 1, seed=0)(0, np.array([number]), 16)
    return b"".join(batch[name].numpy().tobytes() for name in sorted(batch) if hasattr(batch[name], "numpy"))


def pictures_of(path: Path) -> Content:
    """Every picture, label, mask and box of a DATASET."""
    try:
        dataset = Dataset(path)
    except DECLARED as error:
        return {"all": error}

    def picture(split: str, row: int) -> bytes:
        data, label = dataset.picture(split, row)
        task = dataset.record.task
        mask = dataset.mask(split, row).tobytes() if task == "segment" else b""
        boxes = repr(dataset.boxes(split, row)).encode() if task == "detect" else b""
        return data + str(label).encode() + mask + boxes

    rows = ((split, row) for split, entry in dataset.record.splits.items() for row in range(entry.rows))
    return {f"{split} {row}": attempt(lambda s=split, r=row: picture(s, r)) for split, row in rows}


def read(path: Path) -> Content:
    return stream_of(path) if (path / "cache.json").is_file() else pictures_of(path)


def problems_of(path: Path) -> list[str]:
    try:
        return [problem.text for problem in verify(path, quiet=True).problems]
    except DECLARED as error:
        return [str(error)]


def judge(path: Path, damaged: list[Path], good: Content, what: str) -> None:
    """The heart of it: `verify` names a damaged file, and no row is other than it was."""
    # A foreign or missing record at the root is told by the folder, or by all that does not belong to it.
    names = [str(path) if file.parent == path else str(file) for file in damaged]
    named = any(name in problem for name in names for problem in problems_of(path))
    assert named or damaged[0].name in NOTES, f"{what}: {names}: {problems_of(path)}"
    for key, value in read(path).items():
        if isinstance(value, Exception):
            assert str(path) in str(value), f"{what}: {key}: the error names no file: {value}"
        else:
            assert value == good[key], f"{what}: {names}: {key} is silently wrong"


def files_of(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]


@contextmanager
def restored(*files: Path) -> Iterator[None]:
    """Whatever happens inside, these files are as before."""
    kept = [file.read_bytes() for file in files]
    try:
        yield
    finally:
        for file, data in zip(files, kept, strict=True):
            file.write_bytes(data)


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits(place: Path, kind: str, how_many, tally) -> None:
    path = place / kind
    good, files = read(path), files_of(path)
    assert not problems_of(path) and not any(isinstance(value, Exception) for value in good.values())
    draw, each = np.random.default_rng(1), how_many(60 // len(files) + 1, 1800 // len(files) + 1)
    for file, _ in itertools.product(files, range(each)):
        bit = int(draw.integers(8 * file.stat().st_size))
        with restored(file):
            flip(file, bit)
            judge(path, [file], good, f"bit {bit}")
    tally(f"bits flipped: {kind}", flips=each * len(files), silent=0)


RECORDS = {
    "dataset/dataset.json": DatasetRecord,
    "int8/cache.json": CacheIdentity,
    "int8/train/v0/commits/000000.json": Commit,
    "int8/train/v0/manifest.json": Manifest,
}


@pytest.mark.parametrize("name", RECORDS)
def test_every_bit_of_every_record(place: Path, name: str, how_many, tally) -> None:
    """The reader of records alone, so that each bit has its turn."""
    file = place / name
    data = file.read_bytes()
    bits = range(0, 8 * len(data), how_many(7, 1))
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptionError, IdentityError), match=str(file)):
            decode_record(RECORDS[name], bytes(damaged), file)
    tally(f"every bit of {name}", flips=len(bits), silent=0)


@pytest.mark.parametrize("kind", KINDS)
def test_files_cut_grown_emptied_and_deleted(place: Path, kind: str, how_many, tally) -> None:
    """In the lane one of the seven damages a file, another one for the next file."""
    path, done = place / kind, 0
    good = read(path)
    for number, file in enumerate(files_of(path)):
        data = file.read_bytes()
        size = len(data)
        damages = [None, b"", data[:1], data[: size // 2], data[:-1], data[: (size - 1) // 512 * 512], data + b"\0"]
        for damage in itertools.islice(itertools.cycle(damages), 3 * number, 3 * number + how_many(1, 7)):
            if damage is None and file.name in MADE_AGAIN:
                continue
            with restored(file):
                file.unlink() if damage is None else file.write_bytes(damage)
                judge(path, [file], good, "deleted" if damage is None else f"{len(damage)} of {size} bytes")
            done += 1
    tally(f"files cut, grown, emptied, deleted: {kind}", cuts=done, silent=0)


def kind_of(file: Path) -> tuple[str, str]:
    return ("", file.name) if file.suffix == ".json" and not file.stem.isdigit() else (file.parent.name, file.suffix)


def alike(path: Path) -> list[tuple[Path, Path]]:
    """Every two files of one kind inside a folder that are not the same."""
    pairs = itertools.combinations(files_of(path), 2)
    return [(a, b) for a, b in pairs if kind_of(a) == kind_of(b) and a.read_bytes() != b.read_bytes()]


def twins(path: Path, other: Path) -> list[tuple[Path, Path]]:
    """Every file with the one in the same place of a foreign folder, where they are not the same."""
    pairs = [(file, other / file.relative_to(path)) for file in files_of(path)]
    return [(a, b) for a, b in pairs if b.is_file() and a.read_bytes() != b.read_bytes()]


def whole(path: Path, other: Path, pattern: str, *renames: tuple[str, str]) -> list[tuple[Path, Path]]:
    """The files whose relative path matches, each with that of the renamed path in `other`."""
    pairs = []
    for file in files_of(path):
        name = str(file.relative_to(path))
        twin = other / functools.reduce(lambda text, rename: text.replace(*rename), renames, name)
        if re.match(pattern, name) and twin.is_file() and twin.read_bytes() != file.read_bytes():
            pairs.append((file, twin))
    return pairs


SHARD = r"train/v0/.*(000000|/c\.0)"
WHOLES = {
    "two shards and their commits": (SHARD, ("000000", "000001"), ("/c.0", "/c.1")),
    "a shard of two views and its commit": (SHARD, ("v0", "v1")),
    "tars and indexes": ("train/v0/views", ("v0", "v1")),
    "features of two views": ("train/v0/features", ("v0", "v1")),
    "units but for the manifests": ("train/v0/[vfc]", ("v0", "v1")),
    "two units": ("train/v0/", ("v0", "v1")),
    "units of two splits": ("train/v0/", ("train", "val")),
    "two shards of the dataset": ("train/000000", ("000000", "000001")),
}


def exchange(pairs: list[tuple[Path, Path]]) -> None:
    for first, second in pairs:
        a, b = first.read_bytes(), second.read_bytes()
        first.write_bytes(b)
        second.write_bytes(a)


def swaps(path: Path) -> dict[str, list[tuple[Path, Path]]]:
    """Every two files of a kind, every file with its twin in a foreign folder, and what belongs together."""
    other = path.with_name(f"{path.name}-other")
    single = [[pair] for pair in (*alike(path), *twins(path, other))]
    named = {name: whole(path, path, *rules) for name, rules in WHOLES.items()}
    named |= {f"foreign: {pattern}": whole(path, other, pattern) for pattern in (SHARD, "train/v0/", "train/")}
    named = {name: pairs for name, pairs in named.items() if pairs}
    return {f"{a} and {b}": [(a, b)] for ((a, b),) in single} | named


@pytest.mark.parametrize("kind", ["int8", "dataset", "scenes", "boxes"])
def test_swapped_files_shards_units(place: Path, kind: str, how_many, tally) -> None:
    """Each piece is intact by itself: only what binds the pieces together can tell."""
    path = place / kind
    good, all_swaps = read(path), swaps(path)
    draw = np.random.default_rng(2)
    chosen = list(all_swaps)[-12:] + list(draw.permutation(list(all_swaps))[: how_many(30, len(all_swaps))])
    for what in dict.fromkeys(chosen):
        pairs = all_swaps[what]
        with restored(*(file for pair in pairs for file in pair)):
            exchange(pairs)
            judge(path, [file for pair in pairs for file in pair], good, what)
    tally(f"swapped: {kind}", swaps=len(set(chosen)), silent=0)
    assert read(path) == good


def swap_members(tar: Path, extension: str, first: int, second: int) -> None:
    """Rewrite a tar with the contents of two members exchanged, as a well-meaning tool would."""
    with tarfile.open(tar) as opened:
        members = [(member, opened.extractfile(member).read()) for member in opened]
    places = [i for i, (member, _) in enumerate(members) if member.name.endswith(extension)]
    one, two = places[first], places[second]
    contents = [data for _, data in members]
    contents[one], contents[two] = contents[two], contents[one]
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as opened:
        for (member, _), data in zip(members, contents, strict=True):
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("kind", "tar", "extensions"),
    [
        ("int8", "train/v0/views/000001.tar", (".jpg", ".cls")),
        ("dataset", "train/000001.tar", (".jpg", ".cls")),
        ("scenes", "train/000001.tar", (".mask.png",)),
        ("boxes", "train/000001.tar", (".json",)),
    ],
)
def test_swapped_pictures_labels_and_chunks(place: Path, kind: str, tar: str, extensions, how_many, tally) -> None:
    path, count = place / kind, how_many(8, 31)
    good, file, done = read(path), place / kind / tar, 0
    for extension, row in itertools.product(extensions, range(count)):
        before = file.read_bytes()
        with restored(file):
            swap_members(file, extension, row, row + 1)
            if file.read_bytes() != before:  # neighbors of one class
                judge(path, [file], good, f"{extension} of rows {row} and {row + 1}")
                done += 1
    arrays = [array for array in files_of(path) if array.name.startswith("c.0.") and "channel" not in str(array)]
    for array in arrays:
        with restored(array):
            data, half = array.read_bytes(), (array.stat().st_size - 2 * 16 - 4) // 2  # an index of two chunks follows
            array.write_bytes(data[half : 2 * half] + data[:half] + data[2 * half :])
            judge(path, [array], good, "two chunks")
    tally(f"swapped inside a file: {kind}", swaps=done + len(arrays), silent=0)
