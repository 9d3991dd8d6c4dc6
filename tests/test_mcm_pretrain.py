import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from make_cache import GRID, add_unit, make_cache
from make_dataset import make_dataset
from safetensors.torch import load_file

from cache_tools.errors import CorruptionError, IdentityError, UsageError
from cache_tools.records import read_record, write_toml
from mcm import checkpoint
from mcm.config import PretrainConfig
from mcm.pretrain import channel_stats, pretrain
from mcm.run_folder import ExitRecord, PretrainRun

TIMED = {"images_per_s", "wait_share"}


def make_config(**sections):
    payload = {
        "student": {"width": 32, "depth": 2, "heads": 2, "drop_path": 0.2},
        "decoder": {"depth": 1},
        "mask": {"pool": 64},
        "optim": {"lr": 2e-3},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "train": {
            "global_batch": 32, "micro_batch": 16, "precision": "fp32", "workers": 0, "log_steps": 1,
            "checkpoint_steps": 2,
        },
    }  # fmt: skip
    for name, section in sections.items():
        payload[name] = payload.get(name, {}) | section
    return PretrainConfig.model_validate_json(json.dumps(payload))


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if "\n" in line]
    return [{key: value for key, value in line.items() if key not in TIMED} for line in lines]


def command(config, cache, run, *launcher):
    """The real command in a process of its own."""
    toml = run.with_name(f"{run.name}.toml")
    toml.write_text(write_toml(config))
    program = [sys.executable, "-c", "from mcm.cli import app; app()"]
    if launcher:  # accelerate launch wants a file
        program = [*launcher, str(run.with_name("train.py"))]
        run.with_name("train.py").write_text("if __name__ == '__main__':\n    from mcm.cli import app\n    app()\n")
    return [*program, "pretrain", str(toml), "--cache", str(cache.path), "--out", str(run)]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("pretrain") / "cache")


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory):
    """One run from start to end, in a process with the threads that the others have."""
    run = tmp_path_factory.mktemp("pretrain") / "straight"
    subprocess.run(command(make_config(), cache, run), env=environment(), check=True, capture_output=True)
    return run


def test_it_learns_and_leaves_a_whole_run(straight, cache):
    lines = metrics(straight)
    losses, evals = ([line[key] for line in lines if key in line] for key in ("loss", "eval"))
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    assert len(evals) == 4 and evals[-1].keys() == {"loss_masked", "r2_masked", "loss_full", "r2_full"}
    assert evals[-1]["r2_masked"] > evals[0]["r2_masked"]
    assert read_record(ExitRecord, straight / "exit.json").code == 0
    run = read_record(PretrainRun, straight / "run.json")
    assert (run.grid, run.patch, run.size, run.channels) == ((GRID, GRID), 8, (32, 32), 16)
    assert (run.cache_sha256, sorted(run.units)) == (cache.sha256, ["train/v0", "train/v1", "val/v0"])
    assert "workers" not in run.config["train"] and run.config["train"]["global_batch"] == 32
    samples = load_file(straight / "samples.safetensors")
    assert {name: (tuple(t.shape), t.dtype) for name, t in samples.items()} == {
        "views": ((8, 32, 32, 3), torch.uint8),
        "target": ((8, 16, 16), torch.float16),
        "prediction": ((8, 16, 16), torch.float16),
    }
    assert {path.name for path in straight.iterdir()} >= {"config.toml", "env.json", "tensorboard", "checkpoints"}


def test_killed_at_random_moments_it_ends_the_same(straight, cache, tmp_path):
    run = tmp_path / "killed"
    arguments = command(make_config(train={"workers": 1}), cache, run)
    log = run / "metrics.jsonl"
    for lines, number in ((3, signal.SIGKILL), (8, signal.SIGTERM), (11, signal.SIGKILL)):
        process = subprocess.Popen(arguments, env=environment(), start_new_session=True, stderr=subprocess.PIPE)
        while not (log.is_file() and log.read_bytes().count(b"\n") >= lines) and process.poll() is None:
            try:
                process.wait(timeout=0.01)
            except subprocess.TimeoutExpired:
                continue
        os.killpg(process.pid, number)  # as a launcher does: the workers and their server, too
        stderr = process.communicate()[1].decode()
        if number == signal.SIGTERM:
            assert process.returncode == 75 and "saved; the same command resumes" in stderr, stderr
            assert stderr.count("\n") == 1 and read_record(ExitRecord, run / "exit.json").code == 75
    subprocess.run(arguments, env=environment(), check=True, capture_output=True)
    assert metrics(run) == metrics(straight)
    one, other = (checkpoint.latest(path) for path in (straight, run))
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    assert (run / "samples.safetensors").read_bytes() == (straight / "samples.safetensors").read_bytes()


def test_two_ranks_equal_one(straight, cache, tmp_path):
    run = tmp_path / "ranks"
    accelerate = os.path.join(os.path.dirname(sys.executable), "accelerate")
    flags = ["launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    arguments = command(make_config(student={"drop_path": 0.0}), cache, run, accelerate, *flags, "--dynamo_backend=no")
    subprocess.run(arguments, env=environment(), check=True, capture_output=True)
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    pretrain(make_config(student={"drop_path": 0.0}), cache.path, tmp_path / "one")
    for ours, theirs in zip(metrics(run), metrics(tmp_path / "one"), strict=True):
        for one, other in ((ours, theirs), (ours.get("eval", {}), theirs.get("eval", {}))):
            assert {k: v for k, v in one.items() if k != "eval"} == pytest.approx(
                {k: v for k, v in other.items() if k != "eval"}, rel=1e-4, abs=1e-4
            )


@pytest.mark.parametrize("workers", [0, 2])
def test_corruption_stops_by_name_also_in_a_worker(tmp_path, capsys, workers):
    cache = make_cache(tmp_path / "cache", views=1)
    path = cache.path / "train/v0/features.zarr/patch/c.0.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match=r"patch/c\.0\.0\.0: chunk 0: ") as caught:
        pretrain(make_config(train={"workers": workers}), cache.path, tmp_path / "run")
    assert caught.value.exit_code == 4 == read_record(ExitRecord, tmp_path / "run" / "exit.json").code


def test_a_folder_that_holds_another_run_is_refused(straight, cache, tmp_path):
    before = (straight / "exit.json").read_bytes()
    other = make_config(optim={"lr": 3e-3}, mask={"mode": "patch"})
    with pytest.raises(IdentityError, match=r"config\.mask\.mode: 'patch' != 'channel'; config\.optim\.lr: 0\.003 != "):
        pretrain(other, cache.path, straight)
    another = make_cache(tmp_path / "other", seed=9)
    with pytest.raises(IdentityError, match="cache_sha256: .*; units.train/v0: "):
        pretrain(make_config(), another.path, straight)
    (tmp_path / "run.json").write_text('{"kind": "finetune"}')
    with pytest.raises(IdentityError, match="kind: 'pretrain' != 'finetune'"):
        pretrain(make_config(), cache.path, tmp_path)
    assert (straight / "exit.json").read_bytes() == before


def test_engine_settings_may_change_and_later_units_are_left_out(tmp_path, capsys):
    cache = make_cache(tmp_path / "cache")
    val = cache.units("val")[0].manifest_file.rename(tmp_path / "val.json")
    config = make_config(schedule={"epochs": 2})
    pretrain(config, cache.path, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    shutil.rmtree(checkpoint.folder(tmp_path / "run", 6))
    val.rename(cache.units("val")[0].manifest_file)
    add_unit(cache.path, cache.identity, "train", 2)
    add_unit(cache.path, cache.identity, "train", 3).manifest_file.unlink()
    again = make_config(schedule={"epochs": 2}, train={"workers": 1, "micro_batch": 64, "keep_last": 1})
    pretrain(again, cache.path, tmp_path / "run")
    ours, theirs = ([line["loss"] for line in found if "loss" in line] for found in (metrics(tmp_path / "run"), lines))
    assert ours[:4] == theirs[:4]  # the last two with other draws of drop path, one a micro-batch
    assert len(ours) == len(metrics(tmp_path / "run")) == 6  # and the val unit came too late
    assert "100 rows in 2 views; 2 incomplete or later views are left out" in capsys.readouterr().out
    pretrain(again, cache.path, tmp_path / "three")
    assert len(read_record(PretrainRun, tmp_path / "three" / "run.json").units) == 4


def test_bad_requests_stop_before_anything_is_written(cache, tmp_path):
    with pytest.raises(UsageError, match="too few rows for one global batch: .*128"):
        pretrain(make_config(train={"global_batch": 128}), cache.path, tmp_path / "run")
    with pytest.raises(UsageError, match="mask.ratio = 0.01 hides 0 of 16 patches"):
        pretrain(make_config(mask={"mode": "patch", "ratio": 0.01}), cache.path, tmp_path / "run")
    with pytest.raises(UsageError, match="expected a CACHE"):
        pretrain(make_config(), tmp_path / "none", tmp_path / "run")
    empty = make_cache(tmp_path / "cache", views=1)
    empty.complete_units("train")[0].manifest_file.unlink()
    with pytest.raises(UsageError, match="expected a complete unit of 'train'; found 1 begun"):
        pretrain(make_config(), empty.path, tmp_path / "run")
    blind = make_dataset(tmp_path / "blind", 20, 20, unlabelled=True)
    with pytest.raises(UsageError, match="expected labels for every picture of 'train'"):
        pretrain(make_config(), cache.path, tmp_path / "run", blind.path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", ["dropout", "patch", "none"])
@pytest.mark.parametrize("dtype", ["int8", "float16", "int4"])
def test_every_control_runs_from_every_cache(tmp_path, mode, dtype, capsys):
    cache = make_cache(tmp_path / "cache", val_rows=0, dtype=dtype)
    target = {"norm": "channel", "projection": "orthogonal"}
    changes = {"mask": {"mode": mode}, "decoder": {"depth": 0}, "target": target, "train": {"knn_epochs": 1}}
    pretrain(make_config(**changes, schedule={"epochs": 2}), cache.path, tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    said = capsys.readouterr().out
    assert losses[-1] < losses[0] and "no complete unit of 'val'" in said and "there is no --data DATASET" in said


@pytest.mark.parametrize(("knn_epochs", "steps"), [(3, [9, 12]), (0, [12])])
def test_knn_runs_when_it_is_due_and_at_the_end(cache, tmp_path, knn_epochs, steps):
    data = make_dataset(tmp_path / "data")
    pretrain(make_config(train={"knn_epochs": knn_epochs}), cache.path, tmp_path / "run", data.path)
    found = {line["step"]: line["eval"]["knn_full"] for line in metrics(tmp_path / "run") if "knn_full" in str(line)}
    assert list(found) == steps and all(0.3 <= value <= 1.0 for value in found.values())


def test_channel_statistics_are_those_of_all_units(cache):
    units = cache.complete_units("train")
    features = np.concatenate([unit.chunk(i).features() for unit in units for i in range(unit.num_chunks)])
    mean, std = channel_stats(units)
    flat = features.reshape(-1, 16)
    assert np.allclose(mean, flat.mean(0), atol=0.01) and np.allclose(std, flat.std(0), rtol=0.01)
