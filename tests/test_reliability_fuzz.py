"""Fuzz: whatever bytes a reader is handed, it returns or raises a declared error; the same bytes in every run."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from make_cache import make_cache
from make_dataset import make_dataset
from make_run import make_run
from test_pipeline_shard import picture

from cache_tools.cache import Cache
from cache_tools.dataset import DatasetRecord
from cache_tools.errors import McmError
from cache_tools.images import PictureRefused, decode_rgb
from cache_tools.records import Record, _sealed, decode_record, encode_record, load_toml
from cache_tools.schema import CacheIdentity, Commit, Manifest
from cache_tools.tars import INDEX_DTYPE, VIEW_INDEX_DTYPE, encode_npy, read_npy
from mcm.checkpoint import State
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.run_dir import PretrainRun
from pipeline.candidates import Candidates, read_source
from pipeline.tar_listing import scan_tar

CONFIGS = Path(__file__).parents[1] / "configs"
NUMBERS = st.integers(-3, 3) | st.sampled_from([2**31, 2**32, 2**63, 2**64, 10**12, 10**400]) | st.integers()
LEAVES = st.none() | st.booleans() | NUMBERS | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Hypothesis keeps what it learns of the source files; not here."""
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture
def fuzz(how_many, tally) -> Callable[..., None]:
    """fuzz(name, test, strategy, ...): run `test` on as many inputs as are asked for."""

    def run(name: str, test: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
        count, seen = how_many(100, 5_000), [0]

        def counted(drawn: tuple[Any, ...]) -> None:
            seen[0] += 1
            test(*drawn)

        fixed = settings(
            max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        fixed(given(st.tuples(*strategies))(counted))()
        tally(f"fuzz: {name}", inputs=seen[0], failures=0)

    return run


@st.composite
def mutations(draw: st.DrawFn, seeds: list[bytes], pieces: tuple[bytes, ...] = ()) -> bytes:
    """One of `seeds` after a few edits: bytes changed, cut, put in, repeated; or bytes of no origin at all."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at, span = draw(st.integers(0, len(data))), draw(st.integers(0, 600))
        kind = draw(st.sampled_from(("change", "flip", "cut", "put", "repeat", "truncate", "piece")))
        if kind == "change":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + span]
        elif kind == "put":
            data[at:at] = draw(st.binary(max_size=20))
        elif kind == "repeat":
            data[at:at] = data[at : at + span]
        elif kind == "truncate":
            del data[at:]
        elif pieces:
            data[at : at + span] = draw(st.sampled_from(pieces))
    return bytes(data)


def declared(work: Callable[[], Any]) -> Any:
    """What `work` returns, None where it raises a declared error; anything else is a failure."""
    try:
        return work()
    except (McmError, PictureRefused, OSError):
        return None


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[type[Record], bytes]:
    """A real one of each record that is read from disk."""
    root = tmp_path_factory.mktemp("records")
    cache = make_cache(root / "cache", rows=20, val_rows=0, views=1)
    unit = cache.all_units()[0]
    make_dataset(root / "dataset", rows=4, val_rows=2)
    run = make_run(root / "run")
    paths = {
        CacheIdentity: root / "cache/cache.json",
        Commit: unit.commit_file(0),
        Manifest: unit.manifest_file,
        DatasetRecord: root / "dataset/dataset.json",
        PretrainRun: run / "run.json",
        State: next(run.glob("checkpoints/*/state.json")),
    }
    return {kind: path.read_bytes() for kind, path in paths.items()}


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from _places(item, (*place, key))


def _changed(payload: Any, place: tuple[Any, ...], value: Any) -> Any:
    """`payload` with `value` at a place of it."""
    if not place:
        return value
    items = dict(payload) if isinstance(payload, dict) else list(payload)
    items[place[0]] = _changed(payload[place[0]], place[1:], value)
    return items


@st.composite
def resealed(draw: st.DrawFn, data: bytes) -> bytes:
    """A record with a value changed, lost or added, and the right sha256 of that."""
    payload = json.loads(data)
    del payload["sha256"]
    place = draw(st.sampled_from(list(_places(payload))[1:]))
    payload = _changed(payload, place, draw(VALUES))
    if draw(st.booleans()):
        payload[draw(st.sampled_from([*payload, "run", ""]))] = draw(VALUES)
    if draw(st.integers(0, 5)) == 0:
        payload.pop(draw(st.sampled_from(sorted(payload))))
    payload.pop("sha256", None)
    return _sealed(payload)


@pytest.mark.parametrize("kind", [CacheIdentity, Commit, Manifest, DatasetRecord, PretrainRun, State])
def test_records(records, fuzz, kind):
    def read(data: bytes) -> None:
        record = declared(lambda: decode_record(kind, data, "x.json"))
        if record is not None:
            assert encode_record(record) == data  # what was accepted is what would have been written
        if isinstance(record, CacheIdentity):
            for split in record.rows:
                assert all(spec.chunk_bytes < 1 << 31 for spec in record.arrays(split).values())

    pieces = (
        b"NaN",
        b"1e999",
        b"[[[[",
        b'"\\ud800"',
        b"true",
        b"9" * 5000,
        b'"sha256":"x",',
        b" ",
        b"\n",
        b"1.0",
        b"-0",
    )
    fuzz(f"{kind.__name__} with its right sha256", read, resealed(records[kind]))
    fuzz(f"{kind.__name__}, bytes", read, mutations([records[kind]], pieces))


def test_canonical_json_comes_back(fuzz):
    def back(meta: dict[str, Any]) -> None:
        state = State(step=1, files={}, meta=meta)
        data = encode_record(state)
        assert data.isascii() and data.count(b"\n") == 1
        assert encode_record(decode_record(State, data, "x")) == data

    fuzz("canonical JSON", back, st.dictionaries(st.text(max_size=9), VALUES, max_size=3))


def test_npy(fuzz, tmp_path):
    arrays = [np.zeros(20, INDEX_DTYPE), np.zeros(3, VIEW_INDEX_DTYPE), np.ones((2, 3, 4), np.float32)]
    pieces = (b"(1000000000000,)", b"'|O'", b"'shape': ", b"True", b"-1", b"((((", b"__import__('os')")

    def read(data: bytes, dtype: np.dtype[Any]) -> None:
        (tmp_path / "x.npy").write_bytes(data)
        array = declared(lambda: read_npy(tmp_path / "x.npy", dtype))
        assert array is None or (array.dtype == dtype and array.nbytes <= len(data))

    fuzz(".npy", read, mutations([encode_npy(a) for a in arrays], pieces), st.sampled_from([a.dtype for a in arrays]))


LONG = "p" * 60 + "/" + "n" * 60


def _tar(format: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name in ("a.png", "a.cls", LONG + ".jpg", LONG + ".json", "d/\u00e9.webp"):
            data = {"cls": b"1", "json": b'{"label": 1}'}.get(name.rpartition(".")[2], b"picture")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _summed(data: bytes) -> bytes:
    """Every block that may be a header gets a right checksum, so that tarfile looks into it."""
    blocks = bytearray(data)
    for at in range(0, len(blocks) - 511, 512):
        header = blocks[at : at + 512]
        if any(header):
            blocks[at + 148 : at + 156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * 32)
    return bytes(blocks)


def test_tars(fuzz, tmp_path):
    seeds = [_tar(format) for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    pieces = (
        b"\xff" * 12,
        b"\x80" + b"\0" * 10 + b"\1",
        b"27 GNU.sparse.major=1\n",
        b"20 size=-9999999999\n",
        b"L",
        b"x",
        b"S",
    )
    path = tmp_path / "x.tar"

    def scan(data: bytes, summed: bool) -> None:
        path.write_bytes(_summed(data) if summed else data)
        found = Candidates()
        found.roots.append(path)
        if declared(lambda: scan_tar(path, found, Counter())) is not None:
            for i in range(len(found)):
                assert found[i].size is not None and 0 <= found[i].offset
                declared(lambda i=i: read_source(found[i]))

    fuzz("tars", scan, mutations(seeds, pieces), st.booleans())


def test_configs(fuzz, tmp_path):
    texts = [(CONFIGS / f"{kind}/demo.toml").read_bytes() for kind in ("pretrain", "finetune")]
    pieces = (
        b"inf",
        b"nan",
        b"1979-05-27",
        b"[[",
        b"[a.b]",
        b"'''",
        b"=",
        b"\n",
        b"-1",
        b"0x",
        b"[student]\n",
        b"true",
        b"{}",
    )
    keys = st.sampled_from(
        ["optim.lr", "optim", "x.y", "student.width", "", "a.", "=", "schedule.epochs", "optim.lr.x"]
    )

    def load(data: bytes, kind: type[Record], key: str, value: str) -> None:
        (tmp_path / "x.toml").write_bytes(data)
        declared(lambda: load_toml(kind, tmp_path / "x.toml"))
        (tmp_path / "y.toml").write_bytes(texts[kind is FinetuneConfig])
        declared(lambda: load_toml(kind, tmp_path / "y.toml", [f"{key}={value}"]))

    kinds = st.sampled_from([PretrainConfig, FinetuneConfig])
    fuzz("TOML", load, mutations(texts, pieces), kinds, keys, st.text(max_size=20) | LEAVES.map(repr))


def test_pictures(fuzz):
    seeds = [picture(seed) for seed in range(3)]
    pieces = (
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"IHDR",
        b"eXIf",
        b"iCCP",
        b"tRNS",
        b"acTL",
        b"VP8X",
        b"ANMF",
        b"\xff\xe1",
    )

    def decode(data: bytes) -> None:
        rgb = declared(lambda: decode_rgb(data))
        assert rgb is None or (rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3)

    fuzz("pictures", decode, mutations(seeds, pieces))


def test_whole_caches_of_changed_records(fuzz, tmp_path):
    """A CACHE whose cache.json was rewritten by somebody who knows the format: opening and reading it."""
    cache = make_cache(tmp_path / "cache", rows=20, val_rows=0, views=1)
    path = cache.path / "cache.json"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        if opened := declared(lambda: Cache(cache.path)):
            for unit in opened.all_units():
                declared(unit.check_arrays)
                declared(lambda unit=unit: unit.chunk(0).features())

    fuzz("cache.json of a whole CACHE", read, resealed(path.read_bytes()))
