"""The house stands: who imports whom, no cycles, writes in one file only, a purpose on each first line, the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cache_tools", "pipeline", "mcm")
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).glob("*.py"))]
FORBIDDEN = {
    "cache_tools": {"torch", "open_clip", "timm", "accelerate", "pipeline", "mcm"},
    "pipeline": {"mcm"},
    "mcm": {"pipeline", "open_clip"},
}
WRITES = re.compile(
    r"\bopen\([^)]*[\"'](?:[wax]b?\+?|r\+b?)[\"']|\.write_(?:text|bytes)\(|os\.(?:replace|rename|link|unlink|remove|mkdir|makedirs)\("
    r"|shutil\.(?:rmtree|copy(?!fileobj)|move)|np\.save\((?!buffer)|\bsave_file\(|torch\.save\((?!\w+, buffer\))"
    r"|\.(?:unlink|rmdir|touch|mkdir|rename)\("
)


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.name
            module = f"{package}.{node.module}" if node.level and node.module else node.module or package
            names.add(module)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arms_and_waist_import_only_what_they_may(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    allowed = {"torch", "timm"} if path.name == "weights.py" else set()  # inside its functions: the next test
    assert not roots & FORBIDDEN[path.parent.name] - allowed


def test_cache_tools_imports_without_torch() -> None:
    names = ", ".join(f"cache_tools.{path.stem}" for path in FILES if path.parent.name == "cache_tools")
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_cycles() -> None:
    modules = {f"{path.parent.name}.{path.stem}": imports_of(path) for path in FILES}
    graph = {name: {other for other in found & modules.keys() if other != name} for name, found in modules.items()}
    while graph:
        leaves = {name for name, below in graph.items() if not below & graph.keys()}
        assert leaves, f"these files import each other: {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in leaves}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_storage_writes(path: Path) -> None:
    if path.name != "storage.py":
        text = path.read_text().replace("save_file(tensors, path)", "")  # into a folder that storage publishes
        assert not WRITES.findall(text)


def test_the_pattern_for_writes_finds_writes() -> None:
    assert WRITES.search("open(path, 'wb')") and WRITES.search("path.write_text('x')") and WRITES.search("path.mkdir()")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_first_line_tells_the_purpose(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith('"""') and len(first) > 20


def test_the_tree_in_the_documentation_is_the_tree_on_disk() -> None:
    tree = re.search(r"## The tree\n+```\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.S)
    assert tree, "docs/architecture.md has no tree"
    named = set(re.findall(r"^  (\w+\.py) ", tree.group(1), re.M))
    assert named == {path.name for path in FILES if path.name != "__init__.py"}


def test_the_readme_names_functions_where_they_are() -> None:
    table = (ROOT / "README.md").read_text().split("## Where things are in the code")[1].split("\n## ")[0]
    found = [(names, path) for names, path in re.findall(r"((?:`[\w.]+`(?:,| and)? ?)+)in \[([\w/.]+)\]", table)]
    named = [(name.split(".")[-1], path) for names, path in found for name in re.findall(r"`([\w.]+)`", names)]
    assert len(named) >= 12
    for name, path in named:
        assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / path).read_text(), re.M), f"{path} has no {name}"
