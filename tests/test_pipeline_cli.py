"""The program mcm-cache: its version, its help, and that its module runs."""

import subprocess
import sys
from importlib.metadata import version

import pytest


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--version"], 0, f"mcm-cache {version('masked-channel-modeling')}\n"),
        ([], 2, "Commands:\n  demo-data "),
        (["shard"], 2, "Usage: python -m pipeline.cli shard [OPTIONS]"),
        (["extract", "--help"], 0, "\nOptions:\n"),
    ],
)
def test_the_module_answers_in_plain_text(words: list[str], code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *words], capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr
    assert "completion" not in done.stdout + done.stderr
