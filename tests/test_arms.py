"""The arms apart: each stage runs where the other cannot be imported; the waist runs without torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from make_cache import make_cache
from make_dataset import make_dataset
from make_teacher import make_teacher

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked in this test")
sys.meta_path.insert(0, Block())
"""


def python(blocked: set[str], code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_extract_without_mcm(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", rows=32, val_rows=16).path
    teacher, weights = make_teacher(tmp_path / "clip")
    arguments = ["extract", dataset, tmp_path / "cache", "--teacher", teacher, "--weights", weights, "--size", 32]
    python({"mcm"}, f"sys.argv[1:] = {[*map(str, arguments), '--views', '1']!r}\nfrom pipeline.cli import app; app()")
    assert (tmp_path / "cache" / "train" / "v0" / "manifest.json").is_file()


@pytest.mark.slow
def test_pretrain_without_pipeline_and_open_clip(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", rows=64, val_rows=16, views=1).path
    sets = ["schedule.epochs=1", "schedule.warmup_epochs=0", "student.width=32", "student.heads=2", "student.depth=1"]
    arguments = ["pretrain", "pretrain/demo", "--cache", cache, "--out", tmp_path / "run"]
    arguments += [word for text in sets for word in ("--set", text)]
    code = f"sys.argv[1:] = {list(map(str, arguments))!r}\nfrom mcm.cli import app; app()"
    python({"pipeline", "open_clip"}, code)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    "package", ["cache", "dataset", "info", "preview", "quantize", "tars", "verify", "writer", "zarr_shards"]
)
def test_the_waist_without_torch(package: str) -> None:
    python({"torch", "open_clip", "timm", "accelerate", "webdataset"}, f"import cache_tools.{package}")


def test_the_example_reads_a_cache_without_torch(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", views=1).path
    example = Path(__file__).parents[1] / "examples" / "read_cache.py"
    blocked = {"torch", "open_clip", "timm", "accelerate", "webdataset", "pipeline", "mcm"}
    python(blocked, f"import runpy\nassert runpy.run_path({str(example)!r})['main']({str(cache)!r}) > 0.9")


@pytest.mark.parametrize("program", ["pipeline", "mcm"])
def test_help_of_every_command_imports_no_torch(program: str) -> None:
    python({"torch", "zarr", "open_clip", "timm"}, f"""
from typer.testing import CliRunner
from {program}.cli import app
from typer.main import get_command
commands = [*get_command(app).commands]
assert len(commands) >= 6
for words in ([], *([name] for name in commands)):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, result.output
    """)  # fmt: skip
