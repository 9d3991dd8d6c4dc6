"""The wheel holds the three packages, the entry points and the shipped configs, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_contents(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"cache_tools", "pipeline", "mcm", "masked_channel_modeling.py"}
    assert {f"{package}/py.typed" for package in ("cache_tools", "pipeline", "mcm")} <= set(names)
    shipped = {name.removeprefix("cache_tools/configs/") for name in names if name.endswith(".toml")}
    assert shipped == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.toml")}
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"mcm-cache = masked_channel_modeling:mcm_cache" in zipfile.ZipFile(wheel).read(entry_points)
