"""The program mcm-cache: its version, its help, its completion, and that its module runs."""

import os
import subprocess
import sys
from importlib.metadata import version

import pytest


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--version"], 0, f"mcm-cache {version('masked-channel-modeling')} (cache format 1)\n"),
        ([], 2, "Commands:\n  demo-data "),
        (["shard"], 2, "Usage: python -m pipeline.cli shard [OPTIONS]"),
        (["extract", "--help"], 0, "\nOptions:\n"),
    ],
)
def test_the_module_answers_in_plain_text(words: list[str], code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.cli", *words], capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr


@pytest.mark.parametrize(("words", "found"), [("mcm-cache ver", "verify\n"), ("mcm-cache verify --rep", "--repair\n")])
def test_a_shell_completes_commands_and_options(words: str, found: str) -> None:
    code = "import sys; from pipeline.cli import app; sys.argv[0] = 'mcm-cache'; app()"
    shell = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # not the shell that runs the tests
    line = [sys.executable, "-c", code, "--show-completion", "bash"]
    script = subprocess.run(line, env=shell, capture_output=True, text=True)
    assert script.returncode == 0 and "complete -o default -F _mcm_cache_completion mcm-cache" in script.stdout
    asked = {"_MCM_CACHE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert done.stdout == found, done.stderr
