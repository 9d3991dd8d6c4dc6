"""The files around the source agree with it: versions, workflow, hooks, citation, Dockerfile and pages."""

import os
import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_one_version_and_one_license() -> None:
    version = PROJECT["project"]["version"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["version"], citation["license"]) == (version, PROJECT["project"]["license"])
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    headings = re.findall(r"^## (.*)", read("CHANGELOG.md"), re.M)
    assert headings[0].startswith(f"[{version}] - ")
    kinds = set(re.findall(r"^### (.*)", read("CHANGELOG.md"), re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_workflow_runs_scripts_of_this_checkout_on_the_supported_versions() -> None:
    jobs = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs == ["./scripts/test", "./scripts/lowest", "./scripts/docs"]
    assert all(os.access(ROOT / run, os.X_OK) for run in runs)
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert jobs["test"]["strategy"]["matrix"]["python"][0] == lowest
    assert jobs["lowest"]["steps"][1]["with"]["python-version"] == lowest


def test_the_hooks_are_the_checks() -> None:
    (repo,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    tools = [hook["entry"].split(" --")[0] for hook in repo["hooks"]]
    checks = [line.split(" --")[0] for line in read("scripts/check").splitlines()]
    assert repo["repo"] == "local" and set(tools) <= {c.removesuffix(" .") for c in checks}


def test_the_dockerfile_copies_what_the_wheel_is_built_from() -> None:
    copied = {name for line in re.findall(r"^COPY (.*) \./", read("Dockerfile"), re.M) for name in line.split()}
    build = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    built = {*build["only-include"], *build["force-include"]}
    assert copied == built | {"pyproject.toml", "README.md", "LICENSE"}


def test_the_architecture_names_files_and_functions_that_exist() -> None:
    text = read("docs/architecture.md")
    for name in re.findall(r"`([a-z_]+/\w+\.py)`", text):
        assert (ROOT / name).is_file(), name
    places = re.findall(r"((?:`\w+`, )?`\w+`) in `(\w+/\w+\.py)`", text)
    assert len(places) > 12
    for names, file in places:
        for name in re.findall(r"\w+", names):
            assert re.search(rf"(def|class) {name}\b", read(file)), f"{file}: {name}"
