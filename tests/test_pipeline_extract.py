"""Extraction: exact pixels, resumed to the byte after SIGTERM, refused when the request is another."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, run, tree_digest
from make_cache import view
from make_extract import request
from make_teacher import make_teacher
from PIL import Image

from cache_tools import images
from cache_tools.cache import Cache, Unit
from cache_tools.errors import CorruptionError, IdentityError, Interrupted, UsageError
from cache_tools.images import decode_rgb, decode_view_into
from cache_tools.info import info
from cache_tools.quantize import decode
from cache_tools.schema import CropPolicy
from cache_tools.verify import verify
from pipeline.config import load_config
from pipeline.extract import check_grid, extract, missing_shards, versions
from pipeline.shard import shard
from pipeline.teachers import Teacher, load_teacher
from pipeline.views import draw_crop
from pipeline.worker import WorkerInfo

ROWS, VAL_ROWS, ROWS_PER_SHARD = 100, 24, 32


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a DATASET of odd-sized pictures and a teacher."""
    root = tmp_path_factory.mktemp("extract")
    for split, rows in (("train", ROWS), ("val", VAL_ROWS)):
        for row in range(rows):
            folder = root / "pictures" / split / ("odd" if row % 2 else "even")
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(view(split, 0, row)).resize((40 + row % 30, 36 + row % 17))
            picture.save(folder / f"{row}.jpg", quality=95)
    shard(str(root / "pictures"), root / "dataset", ROWS_PER_SHARD)
    make_teacher(root / "clip")
    return root


def options(place: Path) -> list[object]:
    weights = place / "clip" / "open_clip_model.safetensors"
    return ["--teacher", f"open_clip:{place / 'clip'}", "--weights", weights, "--views", 2, "--size", 32, "--batch", 16]


@pytest.fixture(scope="module")
def cache(place: Path) -> Path:
    extract(request(place, place / "cache"))
    return place / "cache"


def test_same_pixels(place: Path, cache: Path) -> None:
    """Behind every feature lies the very picture that the stream yields, and the commit tells the error."""
    from mcm.stream import CacheSource

    teacher = load_teacher(f"open_clip:{place / 'clip'}", str(place / "clip" / "open_clip_model.safetensors"))
    opened = Cache(cache)
    assert [str(unit) for unit in opened.all_units()] == ["train/v0", "train/v1", "val/v0"]
    for unit in opened.all_units():
        source, sums = CacheSource([unit], (32, 32), 0, 1, seed=0), np.zeros((2, unit.num_shards))
        for number in range(unit.num_chunks):
            chunk = unit.chunk(number)
            batch = source(0, np.array([number]), 16)
            streamed = batch["pictures"][: chunk.rows]
            direct = np.zeros((chunk.rows, 32, 32, 3), np.uint8)
            for data, picture in zip(chunk.pictures, direct, strict=True):
                decode_view_into(data, picture)
            assert (streamed.numpy() == direct).all()
            patch, cls = teacher.features(streamed)
            codes = [batch[name][: chunk.rows] for name in ("codes", "scale")]
            decoded = decode(*codes, batch["mean"], batch["std"], xp=torch)
            parts = ((decoded - patch) / batch["std"], (patch - batch["mean"]) / batch["std"])
            sums[:, number // 2] += [float((part**2).sum()) for part in parts]
            assert np.allclose(chunk.cls, cls.numpy(), atol=1e-2)
        for number, measured in enumerate(sums[0] / sums[1]):  # shards of two chunks
            assert unit.commit(number).fidelity.relative_mse == pytest.approx(measured, rel=1e-3) and measured < 4e-4


def test_geometry_is_the_drawn_crop_and_labels_are_the_datasets(place: Path, cache: Path) -> None:
    from cache_tools.dataset import Dataset

    dataset, opened = Dataset(place / "dataset"), Cache(cache)
    for unit in opened.all_units():
        index = np.concatenate([np.load(unit.index_file(k)) for k in range(unit.num_shards)])
        assert index["label"].tolist() == dataset.labels(unit.split).tolist()
        for row in range(0, unit.rows, 7):
            size = decode_rgb(dataset.picture(unit.split, row)[0]).shape[:2]
            crop = draw_crop(CropPolicy(kind="rrc"), 0, unit.split, row, unit.view, *size)
            assert tuple(index[row])[4:] == tuple(crop)


@pytest.mark.slow
def test_sigterm_stops_at_a_shard_and_the_same_command_goes_on(place: Path, cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "cache"
    line = command("mcm-cache", "extract", place / "dataset", target, *options(place))
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(target.rglob("*.tar.*.partial")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1]
    assert process.returncode == 75 and "stopped; the same command resumes" in error
    run("mcm-cache", "extract", place / "dataset", target, *options(place))
    assert tree_digest(target) == tree_digest(cache)


def test_a_stop_before_the_first_shard_makes_no_shard(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(teacher: Teacher) -> dict[str, str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return versions(teacher)

    monkeypatch.setattr("pipeline.extract.versions", stop)  # called just before the shards
    with pytest.raises(Interrupted, match="stopped; the same command resumes"):
        extract(request(place, tmp_path / "cache"))
    assert not list(tmp_path.rglob("*.tar*"))


def test_each_worker_begins_with_its_own_shards(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def orders() -> list[list[int]]:
        units = {"train": [Unit(tmp_path, Cache(cache).identity, "train", 0)]}
        return [[k for _, k in missing_shards(units, tmp_path, WorkerInfo(w, 3))] for w in range(3)]

    assert orders() == [[0, 3, 2, 1], [1, 3, 2, 0], [2, 3, 1, 0]]
    monkeypatch.setattr("cache_tools.storage.locks_work", lambda _: False)
    assert orders() == [[0, 3], [1], [2]]


def test_views_are_added_without_touching_those_there(place: Path, tmp_path: Path, cache: Path) -> None:
    extract(request(place, tmp_path / "cache", views=1, splits=("train",)))
    before = tree_digest(tmp_path / "cache")
    extract(request(place, tmp_path / "cache", views=2))
    after = tree_digest(tmp_path / "cache")
    assert before.items() <= after.items() and after | {"extract.toml": ""} == tree_digest(cache) | {"extract.toml": ""}
    again = load_config(str(tmp_path / "cache" / "extract.toml"), {})
    assert again.teacher_mean == Cache(tmp_path / "cache").identity.teacher.mean
    again = again.model_copy(update={"teacher_mean": None, "teacher_std": None})
    assert again == request(place, cache, views=1, splits=("train",)).config  # the request that began it


def test_a_folder_of_pictures_is_sharded_first_and_float16_is_exact(place: Path, tmp_path: Path) -> None:
    extract(request(place, tmp_path / "cache", source=str(place / "pictures"), dtype="float16", splits=("val",)))
    assert (tmp_path / "cache" / "dataset" / "dataset.json").is_file()
    (unit,) = Cache(tmp_path / "cache").all_units()
    assert unit.commit(0).fidelity.relative_mse < 1e-6 and unit.chunk(0).codes.dtype == np.float16


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(seed=1), r"seed: 1 != 0"),
        (dict(crop={"kind": "center"}), r"crop.kind: 'center' != 'rrc'"),
        (dict(encoding="png"), "view_encoding"),
        (dict(dtype="float16"), r"dtype: 'float16' != 'int8'"),
        (dict(size=64), "view_height: 64 != 32"),
        (dict(teacher_size=64, size=64), "teacher.height: 64 != 32"),
    ],
)
def test_another_request_is_refused_with_what_differs(
    place: Path, cache: Path, changes: dict[str, object], said: str
) -> None:
    before = tree_digest(cache)
    with pytest.raises(IdentityError, match=said):
        extract(request(place, cache, **changes))
    assert tree_digest(cache) == before


def test_other_weights_and_another_activation_are_refused(place: Path, cache: Path, tmp_path: Path) -> None:
    teacher, weights = make_teacher(tmp_path / "other" / "clip", seed=1)
    with pytest.raises(IdentityError, match=r"teacher.weights_sha256"):
        extract(request(place, cache, teacher=teacher, weights=weights))
    teacher, weights = make_teacher(tmp_path / "quick" / "clip", quick_gelu=True)
    with pytest.raises(IdentityError, match=r"teacher.activation: 'quick_gelu' != 'gelu'"):
        extract(request(place, cache, teacher=teacher, weights=weights))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(size=42), "expected a multiple of 4"),
        (dict(patch=16), "use --teacher-size 16"),
        (dict(size=40, patch=16), "--size 40: expected a multiple of the patch, 16 pixels; use 32 or 48"),
        (dict(teacher_mean="0.5"), "expected both teacher_mean and teacher_std"),
        (dict(teacher_mean="123,117,104", teacher_std="1"), "teacher_mean.0: Input should be less than or equal to 1"),
        (dict(teacher_mean="a,b,c"), "teacher_mean: Input should be a valid .*; found 'a,b,c'"),
        (dict(teacher_mean=[[0.5]]), "teacher_mean: .*"),
        (dict(batch=10_000), "batch: Input should be less than or equal to 4096"),  # a batch is padded to its size
        (dict(batch=20), "batch: Input should be a multiple of 16"),
        (dict(dtype="int3"), "dtype: Input should be 'int8' or 'float16'"),
        (dict(compress="lz4"), "compress: Input should be 'zstd'"),
        (dict(max_error=0.0), "max_error: Input should be greater than 0"),
        (dict(view=3), "unknown key 'view'; did you mean 'views'"),
        (dict(crop={"scale": [0.5, 2.0]}), r"expected crop.scale = .LOW, HIGH. in"),
        (dict(teacher=None), "expected --teacher and --weights, or --config"),
        (dict(encoding="jpeg:120:420"), "jpeg:QUALITY"),
        (dict(splits=("tset",)), "expected a split 'tset'"),
    ],
)
def test_usage_errors_come_before_any_work(place: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        extract(request(place, tmp_path / "cache", **changes))
    assert not (tmp_path / "cache").exists()


def test_a_folder_with_other_files_is_no_cache(place: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UsageError, match="a new or empty folder; found other files, such as a.jpg"):
        extract(request(place, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]
    (tmp_path / "begun" / ".run").mkdir(parents=True)  # by a killed command
    with pytest.raises(UsageError, match="found an unfinished folder; the command that began it resumes"):
        info(tmp_path / "begun")


@pytest.mark.parametrize("patch", [None, 16])
def test_a_teacher_without_a_square_grid_is_refused(patch: int | None) -> None:
    teacher = load_teacher("timm:vit_tiny_patch16_224", "random", 32, device="cpu")
    config = load_config(None, dict(teacher="timm:vit", weights="random", size=112, patch=patch))
    with pytest.raises(UsageError, match="timm:vit: expected a teacher with a square grid; found 7x14 tokens"):
        check_grid(config, replace(teacher, grid=(7, 14)))


@pytest.mark.parametrize(
    ("dtype", "value", "where", "said"),
    [
        ("float16", float("inf"), "patch", "found inf in the last layer, row 21 .1 of 24 rows.; use --set prec"),
        ("int8", float("nan"), "patch", "found nan in the last layer, row 21 .* use --set precision"),
        ("float16", 7e4, "patch", "found 7e[+]04 in the last layer, row 21 .* use --dtype int8"),
        ("int8", float("nan"), "cls", "found nan in the last layer, row 21 .* use --set precision"),
    ],
)
def test_features_that_cannot_be_stored_stop_the_shard(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, value: float, where: str, said: str
) -> None:
    from pipeline.teachers import Teacher

    forward, batches = Teacher.features, []

    def poisoned(self: Teacher, pictures: torch.Tensor, precision: str | None = None) -> object:
        patch, cls = (part.clone() for part in forward(self, pictures, precision))
        if precision is None:  # not the probe
            batches.append(len(pictures))
            if len(batches) == 2:
                (patch[5, 3] if where == "patch" else cls[5])[7] = value
        return patch, cls

    monkeypatch.setattr(Teacher, "features", poisoned)
    with pytest.raises(UsageError, match=said):
        extract(request(place, tmp_path / "cache", dtype=dtype, splits=("val",)))
    assert not list(tmp_path.rglob("commits/*.json"))


def test_max_error_refuses_before_anything_is_committed(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"relative MSE of at most 1e-06; found .* with int8; use a wider --dtype"):
        extract(request(place, tmp_path / "cache", max_error=1e-6))
    assert not list(tmp_path.rglob("commits/*.json"))
    extract(request(place, tmp_path / "cache", max_error=1e-3, splits=("val",)))


def test_a_damaged_probe_is_named(place: Path, cache: Path) -> None:
    path = cache / "probe.npy"
    good = path.read_bytes()
    path.write_bytes(good[:300] + bytes([good[300] ^ 1]) + good[301:])
    with pytest.raises(CorruptionError, match=r"probe\.npy: expected the sha256 in probe\.json"):
        extract(request(place, cache))
    path.write_bytes(good)


def test_a_probe_that_ends_in_its_crc32c_is_read(place: Path, cache: Path) -> None:
    """The first caches had that, and no probe.json."""
    path, record = cache / "probe.npy", cache / "probe.json"
    before = path.read_bytes(), record.read_bytes()
    path.write_bytes(before[0] + b"\0\1\2\3")
    record.unlink()
    extract(request(place, cache))
    assert not verify(cache, quiet=True).problems and record.read_bytes() != before[1]
    path.write_bytes(before[0])
    record.write_bytes(before[1])


def test_a_library_that_changes_pixels_is_refused(place: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another Pillow would: its resize rounds otherwise."""
    monkeypatch.setattr(images, "resize_rgb", lambda *a, real=images.resize_rgb: real(*a) ^ 1)
    with pytest.raises(IdentityError, match="pixels_sha256"):
        extract(request(place, cache))


@pytest.mark.slow
def test_commands_answer(place: Path, cache: Path) -> None:
    known = json.loads(run("mcm-cache", "info", cache, "--json"))
    assert all(unit["complete"] and unit["cosine"] > 0.9999 for unit in known["units"].values())
    assert json.loads(run("mcm-cache", "verify", cache, "--json"))["problems"] == []
    assert "100 rows in 4 shards, 0 refused" in run("mcm-cache", "info", place / "dataset")
    assert "expected a DATASET" in run("mcm-cache", "info", place, expect=2)


def test_a_missing_library_does_not_stop_an_extraction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU machine may offer timm without open_clip and without numcodecs."""
    teacher = load_teacher("timm:vit_tiny_patch16_224", "random", 32, device="cpu")

    def installed(name: str) -> str:
        if name in ("open_clip_torch", "numcodecs"):
            raise PackageNotFoundError(name)
        return "1.0"

    assert "open_clip_torch" not in versions(teacher)
    monkeypatch.setattr("cache_tools.schema.version", installed)
    assert versions(teacher).keys() == {"torch", "timm", "numpy", "pillow", "simplejpeg", "threads"}
