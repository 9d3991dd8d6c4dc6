"""`mcm-train`: exit codes, JSON, and --help without the heavy libraries."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from make_cache import make_cache
from make_dataset import make_dataset
from make_run import make_run
from typer.testing import CliRunner

from mcm.cli import app

COMMANDS = ["pretrain", "finetune", "probe", "export", "report"]


def mcm_train(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from mcm.cli import app\n"
        "for command in sys.argv[1:]:\n"
        "    result = CliRunner().invoke(app, [command, '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, result.output\n"
        "heavy = {'torch', 'timm', 'sklearn', 'matplotlib', 'zarr', 'accelerate', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *COMMANDS], check=True)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--version"], 0, f"mcm-train {version('masked-channel-modeling')} (cache format 1)\n"),
        ([], 2, "Commands:\n  pretrain "),
        (["pretrain"], 2, "Made by `mcm-cache extract`; or its remote."),
        (["report"], 2, "Example: mcm-train report "),
    ],
)
def test_the_module_answers_in_plain_text(words, code, said):
    done = subprocess.run([sys.executable, "-m", "mcm.cli", *words], capture_output=True, text=True)
    assert done.returncode == code and said in done.stdout + done.stderr


def test_probe_export_and_report_from_the_command_line(tmp_path):
    run, data = make_run(tmp_path / "run"), make_dataset(tmp_path / "dataset", 32, 16).path
    answer = mcm_train("probe", run, "--data", data, "--method", "knn", "--json")
    assert answer.exit_code == 0, answer.stderr
    assert [entry["input"] for entry in json.loads(answer.stdout)] == ["full", "folded"]
    scale = json.loads(answer.stdout)[1]["fold_scale"]
    cache = make_cache(tmp_path / "cache", 32, 16, 1).path
    answer = mcm_train("probe", cache, "--method", "knn")
    assert answer.exit_code == 0, answer.stderr
    assert ": full-both:" in answer.stdout and "outliers  0 of 16 channels" in answer.stdout
    answer = mcm_train("export", run, tmp_path / "probed", "--folded", "probed")
    assert f"| fold_scale | {scale} |" in (tmp_path / "probed" / "README.md").read_text()
    assert "advice: " not in answer.stderr and mcm_train("export", run, "no", "--folded", "half").exit_code == 2
    other = mcm_train("export", make_run(tmp_path / "other"), tmp_path / "no", "--folded", "probed")
    assert other.exit_code == 2 and "expected one S, chosen by its probe; found []" in other.stderr
    assert "advice: " in mcm_train("export", run, tmp_path / "unfolded").stderr
    answer = mcm_train("export", run, tmp_path / "out", "--folded", "0.5")
    assert answer.exit_code == 0 and "local-dir:" in answer.stdout
    answer = mcm_train("report", run, "--out", tmp_path / "r.html", "--note", "one run")
    assert answer.exit_code == 0 and "k-NN folded" in answer.stdout
    assert "one run" in (tmp_path / "r.html").read_text()


def test_a_folder_of_another_kind_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_cache(tmp_path / "cache", 32, 16, 1), make_dataset(tmp_path / "data", 32, 16), make_run(tmp_path / "run")
    Path("empty").mkdir(), Path("file").touch()
    kinds = {"cache": "a CACHE", "data": "a DATASET", "run": "a RUN", "file": "a file", "empty": "another folder"}
    lines = {
        "pretrain pretrain/demo --out x --cache {}": "cache",
        "pretrain pretrain/demo --out x --cache cache --data {}": "data",
        "pretrain pretrain/demo --cache cache --out {}": "run empty",
        "pretrain {} --cache cache --out x": "file",  # TOML
        "finetune finetune/demo --out x --init random --data {}": "data",
        "finetune finetune/demo --out x --data data --init {} --set data.shots=0 --set train.global_batch=16": "run",
        "finetune finetune/demo --data data --init random --out {}": "run empty",
        "probe run --data {}": "data",
        "probe --data data {}": "run cache",
        "export {} x": "run",
        "export run {}": "",
        "report --out x {}": "run cache",
        "report run --out {}": "file",
        "ablate ablate/demo --out x --data data --cache {}": "cache",
        "ablate ablate/demo --out x --cache cache --data {}": "data",
        "ablate ablate/demo --cache cache --data data --out {}": "empty",
    }
    for line, fitting in lines.items():
        for name in kinds.keys() - set(fitting.split()):
            answer = mcm_train(*line.format(name).split())
            assert answer.exit_code == 2 and len(answer.stderr.splitlines()) == 1, (line, name, answer.stderr)
            assert re.search(rf"\b{name}\b.*found {kinds[name]}", answer.stderr), (line, name, answer.stderr)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("finetune finetune/dmo --data . --init random --out r", 2, "did you mean 'finetune/demo'"),
        ("pretrain pretrain/demo --cache nowhere --out r", 2, "expected a CACHE"),
        ("pretrain pretrain/demo --cache c --out r --set optim.lrr=1", 2, "did you mean 'optim.lr'"),
        ("export nowhere out", 2, "expected a RUN"),
        ("probe nowhere --data nowhere", 2, "expected a finished DATASET"),
    ],
)
def test_a_users_fault_is_one_line_and_its_exit_code(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = mcm_train(*arguments.split())
    assert answer.exit_code == code, answer.stderr
    assert message in answer.stderr and len(answer.stderr.splitlines()) == 1


def test_overwrite_removes_runs_only(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    data = make_dataset(tmp_path / "dataset", 32, 16).path
    begin = ["finetune", "finetune/demo", "--init", "random", "--overwrite"]
    for command in (begin, begin[:-1]):  # a run that mixes with pictures would be removed with them
        answer = mcm_train(*command, "--data", data, "--out", tmp_path / "photos")
        assert answer.exit_code == 2 and "found other files, such as a.jpg" in answer.stderr
        assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    run = make_run(tmp_path / "run")
    assert mcm_train(*begin, "--data", tmp_path, "--out", run).exit_code == 2
    assert (run / "checkpoints").exists(), "a mistyped DATASET must not cost a run"
    assert mcm_train(*begin, "--data", data, "--out", run).exit_code == 2  # too few labels a class: the run is gone
    assert not (run / "checkpoints").exists()
