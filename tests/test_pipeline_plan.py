"""The plan of a cache: its bytes and inodes are those of a real extraction, its measurements end and leave no file."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run
from make_extract import make_extracted, make_place, request
from make_parquet import from_folder

from cache_tools.errors import UsageError
from pipeline import plan as module
from pipeline.plan import plan

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("plan"), rows=300, val_rows=40)
    from_folder(root / "pictures", root / "hub")
    return root


@pytest.fixture(autouse=True)
def small_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISK_BLOCKS", 2)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_bytes_and_inodes_are_those_of_an_extraction(place: Path, dtype: str) -> None:
    found = plan(request(place, place / dtype, dtype=dtype))
    assert not (place / dtype).exists()
    cache = make_extracted(place, dtype, dtype=dtype)
    paths = [cache, *cache.rglob("*")]
    stored = sum(path.stat().st_size for path in paths if path.is_file())
    assert abs(found[f"{dtype}_gigabytes"] * 1e9 - stored) < 0.02 * stored
    assert (found["inodes"], found["units"], found["views"]) == (len(paths), 3, 640)
    again = plan(request(place, cache, dtype=dtype))
    assert (found["views_missing"], again["views_missing"], again["hours"]) == (640, 0, 0)


@pytest.mark.parametrize("source", ["pictures", "hub", "dataset"])
def test_any_source_gives_the_plan_of_its_dataset(place: Path, source: str) -> None:
    one, other = (plan(request(place, place / "new", str(place / name))) for name in (source, "dataset"))
    assert one["views"] == other["views"] == 640
    assert one["kilobytes_per_sample"] == pytest.approx(other["kilobytes_per_sample"], rel=0.05)
    assert one["shards"] == (3 if source != "dataset" else other["shards"])  # of 1,024 rows each
    with pytest.raises(UsageError, match="expected a split 'test'; found train, val"):
        plan(request(place, place / "new", str(place / source), splits=["test"]))


def test_rows_alone_give_a_plan(place: Path) -> None:
    found = plan(request(place, place / "new" / "deep"), rows=1_000_000, rate=500.0)
    assert (found["views"], found["shards"], found["pictures"]) == (2_000_000, 2 * 977, "synthetic")
    assert found["training_megabytes_per_s"] == pytest.approx(found["kilobytes_per_sample"] / 2, rel=2e-3)
    rates = {name: found[f"{name}_samples_per_s"] for name in ("step", "disk", "decoding")}
    assert rates[found["training_bottleneck"]] == min(rates.values())
    assert found["break_even_epochs"] == "never" or found["break_even_epochs"] >= 2  # it costs two epochs at least


def test_a_slow_teacher_or_disk_ends_the_measurement(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sizes = [0.0], list[int]()

    def features(pictures: torch.Tensor) -> tuple[torch.Tensor, None]:
        clock[0] += 3.0 * len(pictures)  # as ViT-L on two cores
        sizes.append(len(pictures))
        return torch.zeros(1), None

    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    teacher = SimpleNamespace(identity=SimpleNamespace(height=8, width=8), features=features)
    assert module._forward_seconds(teacher, 64) == 3.0 and sizes == [1, 2]
    monkeypatch.setattr(module, "DISK_BLOCKS", 10**9)

    def fdatasync(descriptor: int) -> None:
        clock[0] += 1.0

    def no_direct(*arguments: object) -> None:
        raise OSError(22, "no O_DIRECT")

    monkeypatch.setattr(module.os, "fdatasync", fdatasync)
    monkeypatch.setattr(module.fcntl, "fcntl", no_direct)
    monkeypatch.setattr(
        module.os, "preadv", lambda *arguments, real=module.os.preadv: (fdatasync(0), real(*arguments))[1]
    )
    assert module._disk_rate(place / "new") == 4 << 20  # 4 blocks of 4 MiB in 4 seconds


def test_text_and_json_name_the_same_figures_and_no_file_is_left(place: Path, tmp_path: Path) -> None:
    options = ["--teacher", f"open_clip:{place / 'clip'}", "--weights", place / "clip/open_clip_model.safetensors"]
    options += ["--set", "size=32"]
    command = ["mcm-cache", "plan", place / "dataset", "--cache", tmp_path / "c", *options]
    known = json.JSONDecoder().raw_decode(run(*command, "--json"))[0]  # stderr follows
    said = run("mcm-cache", "extract", place / "dataset", tmp_path / "c", *options, "--dry-run")
    lines = [line[:26].strip() for line in said.splitlines()]
    assert [line for line in lines if line.replace(" ", "_") in known] == [
        key.replace("_", " ") for key in plan(request(place, tmp_path / "c"))
    ]
    assert not [*tmp_path.iterdir()]
    priced = run("mcm-cache", "plan", "--rows", 1000, *options, "--price-per-hour", 4, "--json")
    found = json.JSONDecoder().raw_decode(priced)[0]
    slowest = min(found[f"{limit}_samples_per_s"] for limit in ("step", "disk", "decoding"))
    assert found["extraction_price"] == pytest.approx(4 * found["hours"], rel=2e-3)
    assert found["epoch_price"] == pytest.approx(4 * 1000 / slowest / 3600, rel=2e-3) and "epoch_price" not in known
    for source in ([], [place / "dataset", "--rows", 5]):
        assert "expected a SOURCE or --rows N" in run("mcm-cache", "plan", *source, *options, expect=2)
