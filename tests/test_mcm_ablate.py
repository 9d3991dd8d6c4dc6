"""An ablation: every row and seed once, whoever does it and however often it is stopped."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
from make_cache import make_cache
from make_dataset import make_dataset
from test_mcm_pretrain import environment, make_config, start

from cache_tools.errors import IdentityError, UsageError
from cache_tools.records import encode_record, load_toml, write_toml
from mcm import checkpoint
from mcm.ablate import Ablation, ablate
from mcm.plan import Plan
from mcm.run_folder import ExitRecord

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
base = "{base}"
finetune = "{finetune}"
set = ["schedule.epochs=2"]
seeds = [0, 1]
lr = [1e-3, 4e-3]
inputs = ["full", "masked:2"]
[rows]
"channel .75" = {{}}
"none" = {{ set = ["mask.mode=none"] }}
"float16" = {{ cache = "float16", set = ["data.views=1"] }}
"random init" = {{ init = "random" }}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two caches, a dataset and a plan."""
    folder = tmp_path_factory.mktemp("ablate")
    make_cache(folder / "cache")
    make_cache(folder / "float16", dtype="float16")
    make_dataset(folder / "data")
    (folder / "base.toml").write_text(write_toml(make_config()))
    (folder / "finetune.toml").write_text(FINETUNE)
    (folder / "plan.toml").write_text(PLAN.format(base=folder / "base.toml", finetune=folder / "finetune.toml"))
    return folder


def command(place, out):
    arguments = [str(place / "plan.toml"), "--cache", str(place / "cache"), "--data", str(place / "data")]
    program = "from mcm.cli import app; app()"
    return [sys.executable, "-c", program, "ablate", *arguments, "--out", str(out), "--workers", "0"]


def results(out):
    """The table without the one column that a clock makes."""
    found = json.loads((out / "results.json").read_text())
    for row in found["rows"]:
        row["values"].pop("minutes", None)
    return found


def steps(out):
    """Lines of every log: work done twice would show."""
    return {path.parent.name: path.read_text().count("\n") for path in sorted(out.glob("*/*/metrics.jsonl"))}


@pytest.fixture(scope="module")
def straight(place):
    subprocess.run(command(place, place / "straight"), env=environment(), check=True, capture_output=True)
    return place / "straight"


def test_the_table_holds_every_row_seed_and_column(straight, place):
    rows = {row["name"]: row for row in results(straight)["rows"]}
    assert list(rows) == ["teacher's features", "channel .75", "none", "float16", "random init"]
    measured = {"k-NN full", "linear full", "k-NN masked:2", "linear masked:2", "fine-tuned"}
    assert rows["channel .75"]["values"].keys() == measured | {"R^2 masked", "R^2 full"}
    assert rows["none"]["values"].keys() == {"k-NN full", "linear full", "fine-tuned", "R^2 full"}
    assert rows["random init"]["values"].keys() == measured
    assert all(
        len(values) == 2 for name in rows if name != "teacher's features" for values in rows[name]["values"].values()
    )
    assert {row["lr"] for row in rows.values() if row["lr"]} <= {1e-3, 4e-3}
    fit = rows["channel .75"]["values"]["R^2 masked"]
    assert rows["channel .75"]["mark"] == ("underfitted" if sum(fit) / 2 < 0.2 else "")
    # Three rows at two rates and a second seed at one of them; one fine-tuning a row and seed.
    assert len(list(straight.glob("runs/*"))) == 9 and len(list(straight.glob("finetune/*"))) == 8
    units = json.loads(next(straight.glob("runs/float16-*/run.json")).read_text())["units"]
    assert sorted(units) == ["train/v0", "val/v0"]


def test_two_processes_share_it_and_neither_does_anything_twice(straight, place):
    out = place / "shared"
    both = [start(command(place, out)) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert steps(out) == steps(straight)
    assert results(out) == results(straight)


def test_stopped_and_started_again_it_ends_with_the_same_table(straight, place, tmp_path):
    out, plan = tmp_path / "out", load_toml(Plan, place / "plan.toml")
    shutil.copytree(straight, out)
    for path in (*out.glob("runs/none-*"), *out.glob("finetune/none-*")):
        shutil.rmtree(path)
    left = sum(steps(out).values())
    for number, more in ((signal.SIGKILL, 2), (signal.SIGTERM, 4)):
        process = start(command(place, out))
        while process.poll() is None and sum(steps(out).values()) < left + more:
            pass
        process.send_signal(number)
        process.communicate(timeout=60)
    assert results(out)["rows"][2]["seeds"] == []  # the table of what is done
    ablate(plan, place / "cache", place / "data", out, workers=0)
    assert results(out) == results(straight)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/checkpoints/*")}
    ablate(plan, place / "cache", place / "data", out, workers=0)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*/checkpoints/*")}  # nothing was left to do


def test_a_target_that_collapses_is_a_row_that_says_so(place, tmp_path, monkeypatch):
    monkeypatch.setattr("mcm.task.COLLAPSED", 2.0)  # a real one takes a minute: test_mcm_pretrain has it
    collapsing = "rows={learned={set=['target.projection=learned', 'target.norm=none']}, plain={}}"
    overrides = [collapsing, "lr=[1e-2]", "seeds=[0]", "finetune=''"]
    plan = load_toml(Plan, place / "plan.toml", overrides)
    table = ablate(plan, place / "cache", place / "data", tmp_path / "out", workers=0).read_text()
    learned, plain = results(tmp_path / "out")["rows"][1:]
    assert learned == {"name": "learned", "lr": None, "seeds": [], "values": {}, "mark": "collapsed"}
    assert plain["seeds"] == [0] and "| learned (collapsed) | -" in table


def test_a_rate_that_diverges_is_not_chosen_and_a_row_of_such_rates_says_so(place, tmp_path):
    overrides = ["lr=[1e30, 1e-3]", "seeds=[0]", "rows={plain={}, 'random init'={init='random'}}", "inputs=['full']"]
    plan = load_toml(Plan, place / "plan.toml", [*overrides, "set=['optim.clip_norm=0.0']", "finetune=''"])
    ablate(plan, place / "cache", place / "data", tmp_path / "out", workers=0)
    _, plain, random = results(tmp_path / "out")["rows"]
    assert (plain["lr"], plain["seeds"], plain["mark"], random["seeds"]) == (1e-3, [0], plain["mark"], [0])
    alone = plan.model_copy(update={"lr": (1e30,)})
    ablate(alone, place / "cache", place / "data", tmp_path / "out", workers=0)
    assert [row["mark"] for row in results(tmp_path / "out")["rows"]] == ["", "diverged", ""]


def test_a_fine_tuning_half_done_is_not_in_the_table(straight, place, tmp_path):
    shutil.copytree(straight, tmp_path / "out")
    ended = next(tmp_path.glob("out/finetune/none-s1/exit.json"))
    ended.write_bytes(encode_record(ExitRecord(code=75, message="stopped")))
    plan = load_toml(Plan, place / "plan.toml")
    found = Ablation(plan, place / "cache", place / "data", tmp_path / "out").results()
    assert [row["seeds"] for row in found["rows"]] == [[], [0, 1], [0], [0, 1], [0, 1]]


def test_a_folder_keeps_to_its_data_and_caches(straight, place, tmp_path):
    plan = load_toml(Plan, place / "plan.toml")
    make_cache(tmp_path / "cache", seed=1)
    make_cache(tmp_path / "float16", dtype="float16")
    with pytest.raises(IdentityError, match=r"caches\.CACHE: "):
        ablate(plan, tmp_path / "cache", place / "data", straight, workers=0)


def test_a_changed_plan_does_not_take_the_runs_of_the_old_one(straight, place):
    plan = load_toml(Plan, place / "plan.toml", ["set=['schedule.epochs=3']"])
    step = checkpoint.latest(next(straight.glob("runs/*"))).step
    with pytest.raises(IdentityError, match="another configuration"):
        ablate(plan, place / "cache", place / "data", straight, workers=0)
    assert checkpoint.latest(next(straight.glob("runs/*"))).step == step


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rows.x.set=['mask.raito=0.5']", "mask.ratio"),
        ("rows.x.cache=nowhere", "expected a CACHE"),
        ("rows={x={init='random'}}", "expected a row to pre-train"),
        ("seeds=[]", "seeds"),
        ("inputs=['folded', 'sideways']", "sideways"),
        ("rows.x.init=rnadom", "rows.x.init"),
        ("rows.x.set=['data.views=9']", "data.views = 9"),
        ("rows.x.set=['target.features=joint']", "joint"),
        ("rows.x.set=['train.precision=bf16']", "one train.precision"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_trained(place, tmp_path, override, named):
    with pytest.raises(UsageError, match=named):
        plan = load_toml(Plan, place / "plan.toml", [override])
        ablate(plan, place / "cache", place / "data", tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()
