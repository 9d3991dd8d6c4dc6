"""An ablation: every row and seed once, in any number of processes, and one table of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from make_cache import make_cache
from make_dataset import make_dataset
from test_mcm_pretrain import environment, make_config, start

from cache_tools.errors import UsageError
from cache_tools.records import load_toml, read_record, write_toml
from cache_tools.storage import is_locked, try_lock, work_dir
from mcm.ablate import Ablation, Plan
from mcm.run_dir import ExitRecord
from mcm.tables import HELD_OUT_TRAIN, best_rates

FINETUNE = """
[student]
width = 32
depth = 2
heads = 2
size = 32
patch = 8
[optim]
lr = 1e-3
[schedule]
epochs = 1
[train]
global_batch = 32
micro_batch = 16
precision = "fp32"
workers = 0
"""
PLAN = """
base = "{folder}/base.toml"
set = ["schedule.epochs=2"]
seeds = {seeds}
inputs = ["full", "folded", "masked:2"]
[rows]
"""
ROWS = """
"channel .75" = {{ finetune = "{folder}/finetune.toml" }}
"random init" = {{ init = "random" }}
"""
ODD_ROWS = """
"too many views" = { set = ["data.views=9"] }
"diverges" = { set = ["optim.lr=1e30", "optim.clip_norm=0.0"] }
"none" = { cache = "float16", set = ["mask.mode=none", "data.views=1"] }
"channel .75" = {}
"""

FALLBACK = """
import torch
from cache_tools.console import guarded
from mcm.engine import engine
class Model(torch.nn.Module):
    def forward(self, x):
        return x * self.factor
@guarded
def run():
    with engine("fp32"):
        model = Model()
        model.compile(backend="eager")
        for model.factor in range(12):
            model(torch.ones(2))
run()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two caches, a dataset and two plans."""
    folder = tmp_path_factory.mktemp("ablate")
    make_cache(folder / "cache")
    make_cache(folder / "float16", dtype="float16")
    make_dataset(folder / "data")
    (folder / "base.toml").write_text(write_toml(make_config()))
    (folder / "finetune.toml").write_text(FINETUNE)
    (folder / "plan.toml").write_text((PLAN + ROWS).format(folder=folder, seeds=[0]))
    (folder / "odd.toml").write_text(PLAN.format(folder=folder, seeds=[0]) + ODD_ROWS)
    return folder


def command(place, out, plan="plan"):
    arguments = [str(place / f"{plan}.toml"), "--cache", str(place / "cache"), "--data", str(place / "data")]
    program = [sys.executable, "-m", "mcm.cli", "ablate", *arguments]
    return [*program, "--out", str(out), "--workers", "0"]


def results(out):
    return json.loads((out / "results.json").read_text())


def files(out):
    """The bytes of everything that a training or a probe made: work that was done twice would show."""
    found = [*out.glob("*/*/metrics.jsonl"), *out.glob("*/*/checkpoints/*/*"), *out.glob("*/*/probe/*")]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


@pytest.fixture(scope="module")
def shared(place):
    """What two processes that start at once make, and what they print."""
    logs = [place / f"log{number}" for number in range(2)]
    with logs[0].open("wb") as first, logs[1].open("wb") as second:
        line = command(place, place / "shared")
        both = [subprocess.Popen(line, env=environment(), stdout=out, stderr=out) for out in (first, second)]
        codes = [process.wait(timeout=500) for process in both]
    printed = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], printed
    return place / "shared", printed


@pytest.mark.slow
def test_two_processes_share_a_plan_and_each_command_runs_once(shared):
    out, printed = shared
    for kind, command, count in (("runs", "pretrain", 1), ("runs", "probe", 2), ("finetune", "finetune", 1)):
        assert printed.count(f"{out / kind / 'channel-.75-s0'}: {command}\n") == count
    assert len(list(out.glob("*/*/run.json"))) == 2
    assert [printed.count(f"| {name} ") for name in ("channel .75", "random init")] == [2, 2]


@pytest.mark.slow
def test_the_table_holds_every_row_seed_and_column(shared):
    rows = {row["name"]: row for row in results(shared[0])["rows"]}
    kinds, both = ("full", "folded", "masked:2"), ("k-NN", "linear")
    probed = {f"{name} {kind}" for name in both for kind in kinds} | {"k-NN folded, held-out train"}
    tuned = json.loads((shared[0] / "finetune/channel-.75-s0/run.json").read_text())["init"]
    assert tuned == str(shared[0] / "runs/channel-.75-s0/folded")
    columns = [
        {"k-NN full", "linear full"},
        probed | {"fine-tuned", "R^2 masked", "R^2 full", "R^2 full, filled", "R^2 train", "GMAC", "minutes"},
        probed,
    ]
    assert [row["values"].keys() for row in rows.values()] == columns
    counts = {len(values) for name in ("channel .75", "random init") for values in rows[name]["values"].values()}
    assert counts == {1} and "ablations shared</h2>" in (shared[0] / "report.html").read_text()


@pytest.mark.slow
def test_the_same_command_under_other_names_of_its_folders_has_nothing_to_do(shared, place, tmp_path):
    before, table = files(shared[0]), results(shared[0])
    (tmp_path / "place").symlink_to(place)
    done = subprocess.run(command(tmp_path / "place", shared[0]), env=environment(), capture_output=True)
    assert done.returncode == 0 and files(shared[0]) == before, done.stderr
    assert results(shared[0])["rows"] == table["rows"]


@pytest.mark.slow
def test_a_failed_row_is_shown_and_the_others_go_on(shared, place, tmp_path):
    shutil.copytree(shared[0], tmp_path / "out")
    done = subprocess.run(command(place, tmp_path / "out", "odd"), env=environment(), capture_output=True, text=True)
    run = tmp_path / "out/runs/too-many-views-s0"
    assert done.returncode == 2
    assert f"error: {place}/cache: expected data.views = 9" in done.stderr
    assert f"{run}: pretrain failed with exit code 2\n" in done.stderr
    assert done.stderr.endswith(f"error: 1 commands failed: pretrain of {run}\n")
    _, failed, diverges, none, _ = results(tmp_path / "out")["rows"]
    assert failed["values"] == diverges["values"] == {} and diverges["mark"] == "diverged"
    fit = {"R^2 full", "R^2 train", "GMAC", "minutes", "k-NN folded, held-out train"}
    assert none["values"].keys() == fit | {"k-NN full", "linear full", "k-NN folded", "linear folded"}
    (found,) = [e for e in results(tmp_path / "out")["differences"] if e["column"] == "k-NN full"]
    assert "| points above the best control |" in (tmp_path / "out/table.md").read_text()
    assert (found["row"], found["control"]) == ("channel .75", "none") and found["low"] <= found["difference"]
    units = json.loads((tmp_path / "out/runs/none-s0/run.json").read_text())["units"]
    assert sorted(units) == ["train/v0", "val/v0"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_ablation_stops_its_command_which_saves(shared, place, tmp_path, number):
    shutil.copytree(shared[0], tmp_path / "out")
    plan = (place / "plan.toml").read_text().replace("[rows]", '[rows]\n"long" = { set = ["schedule.epochs=9999"] }')
    (place / "long.toml").write_text(plan)
    process = start(command(place, tmp_path / "out", "long"))
    run = tmp_path / "out/runs/long-s0"
    while process.poll() is None and not (run / "metrics.jsonl").is_file():
        time.sleep(0.05)
    os.kill(process.pid, number)
    stderr = process.communicate(timeout=120)[1].decode()
    while is_locked(run / ".run" / "lock"):
        time.sleep(0.05)
    code = read_record(ExitRecord, run / "exit.json").code
    if number == signal.SIGKILL:
        assert process.returncode == -9 and code in (7, 75)  # 7: it printed before it met the signal
        return
    assert code == 75 and list((run / "checkpoints").iterdir())
    assert process.returncode == 75 and "stopping: the running command saves and exits" in stderr, stderr
    rows = {row["name"]: row["values"] for row in results(tmp_path / "out")["rows"]}
    assert rows["long"] == {} and len(rows["channel .75"]["fine-tuned"]) == 1


@pytest.mark.slow
def test_the_run_of_a_killed_ablation_is_left_alone_while_its_command_trains(place, tmp_path):
    plan = load_toml(Plan, place / "plan.toml")
    ablation = Ablation(plan, place / "cache", place / "data", tmp_path / "out", None, 0)
    steps = ablation.steps["channel .75", 0]
    with try_lock(work_dir(steps[0].run) / "lock"):
        assert not ablation._advance(steps)
    assert not list(tmp_path.glob("out/runs/*/run.json")) and not ablation.failed


def test_a_sweep_of_learning_rates_is_more_rows(place):
    plan = load_toml(Plan, place / "plan.toml", ["lr=[1e-3, 4e-3]", "seeds=[0, 5]"])
    steps = Ablation(plan, place / "cache", place / "data", place / "out", None, 0).steps["channel .75, lr 0.004", 5]
    assert steps[0].run.name == "channel-.75-lr-0.004-s5" and "train.seed=5" in steps[0].args
    rows = plan.all_rows()
    assert list(rows) == ["channel .75, lr 0.001", "channel .75, lr 0.004", "random init"]
    assert rows["channel .75, lr 0.004"].set == ("schedule.epochs=2", "optim.lr=0.004")
    names, scores = ("a, lr 0.1", "a, lr 0.2", "b"), (0.5, 0.6, 0.1)
    table = [{"name": name, "mark": "", "values": {HELD_OUT_TRAIN: [x]}} for name, x in zip(names, scores, strict=True)]
    assert best_rates(table) == ["a, lr 0.2", "b"] and [row["mark"] for row in table] == ["", "chosen lr", ""]


@pytest.mark.slow
def test_a_run_whose_compiled_model_falls_back_to_eager_says_so():
    done = subprocess.run([sys.executable, "-c", FALLBACK], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "hit config.recompile_limit" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rows.x.set=['mask.raito=0.5']", "mask.ratio"),
        ("rows.x.cache=nowhere", "expected a CACHE"),
        ("rows.x.init='timm:vit_tiny_patch16_224'", "expected a `finetune` for rows.x"),
        ("seeds=[]", "seeds"),
        ("inputs=['folded', 'sideways']", "sideways"),
        ("rows.x.init=rnadom", "rows.x.init"),
        ("rows.Random--Init.init=random", "found .'random init', 'Random--Init'.; rename"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_trained(place, tmp_path, override, named):
    with pytest.raises(UsageError, match=named):
        plan = load_toml(Plan, place / "plan.toml", [override])
        Ablation(plan, place / "cache", place / "data", tmp_path / "out", None, 0)
    assert not (tmp_path / "out").exists()
