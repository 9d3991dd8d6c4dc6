"""`mcm-train doctor`: each fault is real, is found before the first step, and names its remedy."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tree_digest
from make_cache import add_unit, make_cache, make_identity
from typer.testing import CliRunner

from cache_tools import remote
from cache_tools.images import pixels_sha256
from cache_tools.records import config_file, load_toml
from cache_tools.writer import publish_identity
from mcm.cli import app
from mcm.config import PretrainConfig
from mcm.doctor import doctor
from mcm.sampler import Order


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("made") / "cache").path


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def find(cache: Path, *sets: str, processes: int = 1) -> dict[str, tuple[str, str]]:
    config = load_toml(PretrainConfig, config_file("pretrain/demo"), sets)
    return {check: (status, text) for check, status, text in doctor(config, cache, processes)}


def test_a_sound_set_up_exits_with_0_and_nothing_is_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    before = tree_digest(cache)
    answer = CliRunner().invoke(app, ["doctor", "pretrain/demo", "--cache", str(cache), "--json"])
    found = json.loads(answer.stdout)
    assert answer.exit_code == 0 and found.keys() == {
        "versions",
        "processes",
        "workers",
        "cache",
        "/dev/shm",
        "disk",
        "pixels",
    }
    warned = {name for name, line in found.items() if line["status"] != "ok"}
    assert "processes" in warned and warned <= {"processes", "disk"}  # no GPU; the disk of the tests may be slow
    assert found["cache"]["text"] == f"{Order(100, 16, 32, 32)}; the target has 16 channels"
    assert tree_digest(cache) == before


@pytest.mark.parametrize(
    ("sets", "processes", "check", "status", "words"),
    [
        (["train.global_batch=128"], 1, "cache", "fail", "found 100 rows; lower train.global_batch or add rows"),
        ([], 3, "cache", "fail", "numbers of processes that fit: 1, 2;"),
        (["data.views=3"], 1, "cache", "fail", "extract more views or lower data.views"),
        (["target.features=joint"], 1, "cache", "fail", "expected a teacher with a projection"),
        (["train.workers=1000000"], 1, "/dev/shm", "fail", "enlarge it (docker: --ipc=host), or lower train.workers"),
        (["train.workers=1000"], 1, "workers", "warn", "set train.workers to at most"),
    ],
)
def test_a_fault_is_found(
    cache: Path, sets: list[str], processes: int, check: str, status: str, words: str
) -> None:  # fmt: skip
    found = find(cache, *sets, processes=processes)[check]
    assert found[0] == status and words in found[1]


@pytest.mark.parametrize("cls", [False, True])
def test_shared_memory_is_that_of_the_batches_of_all_workers(cache: Path, cls: bool) -> None:
    row = 32 * 32 * 3 + 16 * 16 + 16 * 4 + 16 * 2 * cls + 16 * 4 + 2 * 8 + 4  # pixels, codes, scale, CLS, picks, rows
    stats = 2 * 2 * 16 * 4  # mean and std of two chunks
    text = find(cache, "train.workers=1000", f"loss.cls={cls}".lower())["/dev/shm"][1]
    assert text.startswith(f"{1000 * 3 * (32 * row + stats) / 1e6:,.0f} MB for the batches of 1000 workers")


def test_without_a_cache_the_machine_is_checked_alone_and_the_exit_code_is_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    answer = CliRunner().invoke(app, ["doctor", "pretrain/demo", "--cache", str(tmp_path / "none")])
    *machine, last = answer.stdout.splitlines()
    assert answer.exit_code == 2 and [line.split()[1] for line in machine] == ["versions", "processes", "workers"]
    assert last.startswith("fail  cache      ") and "expected a CACHE (cache.json); found nothing there" in last


def test_a_package_outside_the_bounds(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, lines in {
        "masked_channel_modeling-9": 'Requires-Dist: old>=2,<3\nRequires-Dist: lost\nRequires-Dist: x; extra == "ray"',
        "old-1.5": "",
    }.items():
        (tmp_path / f"{name}.dist-info").mkdir()
        head = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format(*name.split("-"))
        (tmp_path / f"{name}.dist-info/METADATA").write_text(head + lines)
    text = "expected old<3,>=2, found 1.5; lost, found none; install these versions with pip"
    assert find(cache)["versions"] == ("fail", text)


def test_a_disk_that_a_worker_waits_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = remote._opened
    monkeypatch.setattr(remote, "_opened", lambda *arguments: (time.sleep(0.02), opened(*arguments))[1])
    status, text = find(cache)["disk"]
    assert status == "warn" and text.endswith("copy the cache to a faster disk, or raise train.workers")


def test_a_card_without_bf16(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    found = find(cache, "train.precision=bf16")["processes"]
    assert found == ("fail", 'train.precision = "bf16": expected a GPU that computes in bf16; found Tesla T4;'
                     " use --set train.precision=fp16")  # fmt: skip


def test_fp16_on_a_cpu(cache: Path) -> None:
    assert find(cache, "train.precision=fp16")["processes"] == (
        "fail", 'train.precision = "fp16": expected a GPU that computes in fp16; found the CPU;'
        " use --set train.precision=bf16",
    )  # fmt: skip


@pytest.mark.slow
def test_a_launcher_that_runs_one_process_where_two_were_asked(cache: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mcm.cli"]
    command += ["doctor", "pretrain/demo", "--cache", str(cache), "--processes", "2"]
    paths = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    words = "expected --processes 2 in one training; the launcher started 1; use `accelerate launch --multi_gpu"
    assert done.returncode != 0 and words in done.stdout
    command[3:4] = ["--multi_gpu"]  # two gloo ranks
    done = subprocess.run(command, capture_output=True, text=True, env=paths)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("warn  processes") == 1


def test_other_pixels_than_the_teacher_saw(tmp_path: Path) -> None:
    for name, digest in ("same", pixels_sha256("jpeg:95:444")), ("other", "0" * 64):
        identity = make_identity({"train": 64}).model_copy(update={"pixels_sha256": digest})
        publish_identity(tmp_path / name, identity)
        add_unit(tmp_path / name, identity, "train", 0)
    assert find(tmp_path / "same")["pixels"] == ("ok", "decoded as for the teacher")
    status, text = find(tmp_path / "other")["pixels"]
    assert status == "warn" and text.endswith("install pillow unknown, simplejpeg unknown")
