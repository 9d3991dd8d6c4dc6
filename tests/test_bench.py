"""The benches run, and their tables have the shape that is reported; no time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow

COLUMNS = {
    "resume_scan": ("scan", {"s", "peak_mib", "floor_mib"}),
    "scale": (
        "1024 rows",
        {"per_cpu_s", "per_s", "rss_mb", "own_mb", "commit_ms", "commit_share", "checksum_bytes"}
        | {"per_cpu_s_ratio", "per_s_ratio", "rss_mb_ratio", "own_mb_ratio"},
    ),
    "stream": (
        "ours int8, 0 workers",
        {"per_s", "per_cpu_s", "cold_per_s", "rss_mb", "bytes_a_sample", "of_limit"},
    ),
    "remote": ("none local", {"per_s", "per_cpu_s", "ratio"}),
    "step": ("stream", {"resident_ms", "streamed_ms", "ratio", "wait_share", "images_per_s", "workers"}),
    "extract": (
        "tiny CLIP, 4 views",
        {"forward", "host", "extract", "main_ms", "limit", "of_limit", "parts", "split", "peak_mb", "gpu_mb"},
    ),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_bench_runs(name: str, tmp_path: Path) -> None:
    line = [sys.executable, ROOT / "bench" / f"{name}.py", "--quick", "--out", tmp_path / "table.json"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "table.json").read_text())
    row, columns = COLUMNS[name]
    assert result["table"][row].keys() == columns and result["hardware"] and result["versions"]["numpy"]


def test_gpu_run_on_a_cpu(tmp_path: Path) -> None:
    line = [ROOT / "scripts" / "gpu", "speed", "--quick", "--out", tmp_path, "online", "road"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "gpu.json").read_text())
    row = parts["online"]["table"]["tiny, eager teacher"]
    assert row.keys() == {"teacher_ms", "step_ms", "cached_ms", "online_ms", "gain", "bound", "ratio", "row_s"}
    assert [parts["road"]["table"][f"{name} command"]["exit"] for name in ("first", "second")] == [75, 0]
    assert "ViT-L/16, share of the matrix rate" in done.stdout


def test_science_of_the_gpu_on_a_cpu(tmp_path: Path) -> None:
    line = [ROOT / "scripts" / "gpu", "science", "--quick", "--out", tmp_path, "--deadline", "900"]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "science.json").read_text())["table"]
    assert {"k-NN folded", "R^2 masked", "R^2 train", "GMAC"} <= table["channel .25"].keys()
    assert "points above the best control" in (tmp_path / "science" / "table.md").read_text()
