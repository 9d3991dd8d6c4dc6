"""Every guard is caught: with its line taken out, in a copy of the repository, its test fails."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from guards import GUARDS, Guard

COPIED = ("cache_tools", "pipeline", "mcm", "tests", "configs")
CHEAP = ["written beside, then renamed", "what is there is compared", "fill is never data"]  # no import of torch
# In the copy's conftest: whoever tests must test the copy.
CHECK = """
import cache_tools, mcm, pipeline
assert all(module.__file__.startswith({copy!r}) for module in (cache_tools, mcm, pipeline)), cache_tools.__file__
"""


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_the_list_is_of_this_code(guard: Guard) -> None:
    """Whoever rewrites a guard or its test meets the list here."""
    assert (ROOT / guard.file).read_text().count(guard.old) == 1, guard.old
    file, _, test = guard.test.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()


def test_the_table_is_the_list() -> None:
    rows = re.findall(r"^\| ([^|]+) \| `([^|`]+)` \| `([^|`]+)` \|$", (ROOT / "docs/reliability.md").read_text(), re.M)
    assert rows == [(guard.name, guard.file, guard.test.removeprefix("tests/")) for guard in GUARDS]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    with open(folder / "tests" / "conftest.py", "a") as conftest:
        conftest.write(CHECK.format(copy=str(folder)))
    return folder


def outcome(copy: Path, test: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy / 'tmp'}", test]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def test_without_a_guard_its_test_fails(copy: Path, how_many, tally) -> None:
    guards = [guard for guard in GUARDS if guard.name in CHEAP][: how_many(3, 0)] or GUARDS
    missed = []
    for guard in guards:
        file = copy / guard.file
        text = file.read_text()
        file.write_text(text.replace(guard.old, guard.new))
        done = outcome(copy, guard.test)
        file.write_text(text)
        if done.returncode != 1 or f"FAILED {guard.test.partition('[')[0]}" not in done.stdout:
            missed.append(f"{guard.name}: exit {done.returncode}\n{done.stdout[-1500:]}")
    tally("guards taken out", guards=len(guards), missed=len(missed))
    assert not missed, "\n".join(missed)
