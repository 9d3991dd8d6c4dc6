import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_cache import GRID, add_unit, make_cache
from make_dataset import make_dataset
from safetensors.torch import load_file

from cache_tools.errors import CorruptionError, IdentityError, McmError, UsageError
from cache_tools.records import encode_record, read_record, write_toml
from mcm import checkpoint
from mcm.backbones import load_encoder
from mcm.config import PretrainConfig
from mcm.objective import Objective, channel_stats
from mcm.pretrain import advice, pretrain
from mcm.probe import ProbeResult, probe
from mcm.run_dir import ExitRecord, PretrainRun

FIGURES = {
    "loss_masked",
    "r2_masked",
    "loss_full",
    "r2_full",
    "loss_filled",
    "r2_filled",
    "rank_features",
    "rank_target",
}
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


def command(config, cache, run, world=0):
    """The real command in a process of its own, or in `world` ones that `accelerate launch` starts.

    These leave their process ids in RUN.pids.
    """
    toml = run.with_name(f"{run.name}.toml")
    toml.write_text(write_toml(config))
    arguments = ["pretrain", str(toml), "--cache", str(cache.path), "--out", str(run)]
    if not world:
        return [sys.executable, "-c", "from mcm.cli import app; app()", *arguments]
    run.with_suffix(".pids").mkdir(exist_ok=True)
    script = run.with_suffix(".py")  # accelerate launch wants a file
    script.write_text(SCRIPT.format(pids=str(run.with_suffix(".pids"))))
    launch = ["launch", *["--multi_gpu"] * (world > 1), f"--num_processes={world}", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", str(script)]
    return [os.path.join(os.path.dirname(sys.executable), "accelerate"), *launch, *arguments]


SCRIPT = """
import os
if __name__ == "__main__":
    open(f"{pids}/{{os.environ.get('RANK', 0)}}", "w").write(str(os.getpid()))
    from mcm.cli import app
    app()
"""


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}


def start(arguments):
    """A process in a session of its own."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, env=environment(), start_new_session=True, **pipes)


def wait_for(lines, process, run):
    """Until the run has logged so many lines and handles signals, or has ended."""
    log, handles_signals = run / "metrics.jsonl", run / "exit.json"
    while not (handles_signals.is_file() and log.is_file() and log.read_bytes().count(b"\n") >= lines):
        if process.poll() is not None:
            return
        time.sleep(0.01)


def process_ids(run):
    """Those of the ranks that `command` launched."""
    return [int(path.read_text()) for path in sorted(run.with_suffix(".pids").iterdir())]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("pretrain") / "cache")


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory):
    """One run from start to end, in a process with the threads that the others have."""
    run = tmp_path_factory.mktemp("pretrain") / "straight"
    subprocess.run(command(make_config(), cache, run), env=environment(), check=True, capture_output=True)
    return run


@pytest.mark.slow
def test_it_learns_and_leaves_a_whole_run(straight, cache):
    lines = metrics(straight)
    losses, evals = ([line[key] for line in lines if key in line] for key in ("loss", "eval"))
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    assert len(evals) == 4 and evals[-1].keys() == FIGURES
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


@pytest.mark.slow
def test_killed_at_random_steps_it_ends_the_same(straight, cache, tmp_path, how_many, tally):
    for number in range(runs := how_many(1, 7)):
        run = tmp_path / f"killed{number}"
        arguments = command(make_config(train={"workers": 1}), cache, run)
        moments = sorted(np.random.default_rng(number).choice(range(1, 12), 3, replace=False))
        for lines, kind in zip(moments, (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL), strict=True):
            (run / "exit.json").unlink(missing_ok=True)
            wait_for(lines, process := start(arguments), run)
            # The kernel kills the trainer alone. A launcher sends SIGTERM to its workers and their server, too.
            process.kill() if kind == signal.SIGKILL else os.killpg(process.pid, kind)
            stderr = process.communicate(timeout=60)[1].decode()  # each of these processes holds the pipe open
            if kind == signal.SIGTERM:
                assert process.returncode == 75 and "saved; the same command resumes" in stderr, stderr
                assert (
                    stderr.count("\n") == 3
                    and "press Ctrl-C again" in stderr
                    and read_record(ExitRecord, run / "exit.json").code == 75
                )
        subprocess.run(arguments, env=environment(), check=True, capture_output=True)
        assert metrics(run) == metrics(straight)
        one, other = (checkpoint.latest(path) for path in (straight, run))
        assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
        assert (run / "samples.safetensors").read_bytes() == (straight / "samples.safetensors").read_bytes()
    tally("killed while it trains, resumed to the bit", kills=3 * runs, failures=0)


# Masks and rows are the same for every world; which paths are dropped is not.
ANY_WORLD = make_config(
    student={"drop_path": 0.0}, train={"global_batch": 64, "checkpoint_steps": 1}, schedule={"epochs": 8}
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(CACHE, DATASET): one step per epoch, two incomplete chunks, and fewer chunks of val than four ranks."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_cache(folder / "cache", rows=70, val_rows=20), make_dataset(folder / "data", rows=40, val_rows=20)


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """A run of one process."""
    cache, data = tiny
    pretrain(ANY_WORLD, cache.path, run := tmp_path_factory.mktemp("alone") / "run", data.path)
    assert "knn_full" in metrics(run)[-1]["eval"]
    return run


def assert_same_losses(run, other):
    """Equal within the rounding of float32."""
    for ours, theirs in zip(metrics(run), metrics(other), strict=True):
        numbers = [line | line.pop("eval", {}) for line in (ours, theirs)]
        assert numbers[0] == pytest.approx(numbers[1], rel=2e-4, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_world_has_the_same_losses_on_a_tiny_dataset(alone, tiny, tmp_path, world):
    run = tmp_path / "ranks"
    cache, data = tiny
    arguments = [*command(ANY_WORLD, cache, run, world), "--data", str(data.path)]
    subprocess.run(arguments, env=environment(), check=True, capture_output=True, timeout=120)
    assert json.loads((run / "env.json").read_text())["processes"] == world
    assert_same_losses(run, alone)


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_and_the_run_resumes_in_another_world(alone, tiny, tmp_path):
    run, (cache, data) = tmp_path / "run", tiny
    two, one = ([*command(ANY_WORLD, cache, run, world), "--data", str(data.path)] for world in (2, 0))
    wait_for(5, process := start(two), run)
    ranks = process_ids(run)
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode and not any(map(is_alive, ranks))
    record = read_record(ExitRecord, run / "exit.json")
    assert record.code == 7 and "lost the connection to another rank" in record.message
    wait_for(9, process := start(one), run)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert 0 < checkpoint.latest(run).step < 8  # a thread saves, which may lag behind the log
    subprocess.run(two, env=environment(), check=True, capture_output=True, timeout=120)
    assert_same_losses(run, alone)


@pytest.mark.slow
def test_ranks_save_and_stop_when_their_launcher_is_killed(cache, tmp_path):
    config, run = make_config(schedule={"epochs": 99999}, train={"workers": 1}), tmp_path / "run"
    wait_for(3, process := start(command(config, cache, run, 2)), run)
    process.kill()
    process.communicate(timeout=100)  # the ranks hold the pipe open
    assert read_record(ExitRecord, run / "exit.json").code == 75


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
    assert "100 rows in 2 views; left out: 2 views that are incomplete or beyond data.views" in capsys.readouterr().out
    pretrain(again, cache.path, tmp_path / "three")
    assert len(read_record(PretrainRun, tmp_path / "three" / "run.json").units) == 4


def test_bad_requests_stop_before_anything_is_written(cache, tmp_path):
    with pytest.raises(UsageError, match="too few rows for one global batch: .*128"):
        pretrain(make_config(train={"global_batch": 128}), cache.path, tmp_path / "run")
    with pytest.raises(UsageError, match="mask.ratio = 0.01 hides 0 of 16 patches"):
        pretrain(make_config(mask={"mode": "patch", "ratio": 0.01}), cache.path, tmp_path / "run")
    with pytest.raises(UsageError, match="mask.final_ratio = 0.99 hides 16 of 16 patches"):
        pretrain(make_config(mask={"mode": "patch", "final_ratio": 0.99}), cache.path, tmp_path / "run")
    with pytest.raises(UsageError, match="expected a CACHE"):
        pretrain(make_config(), tmp_path / "none", tmp_path / "run")
    empty = make_cache(tmp_path / "cache", views=1)
    empty.complete_units("train")[0].manifest_file.unlink()
    with pytest.raises(UsageError, match="expected a complete unit of 'train'; found 1 begun"):
        pretrain(make_config(), empty.path, tmp_path / "run")
    blind = make_dataset(tmp_path / "blind", 20, 20, unlabeled=True)
    with pytest.raises(UsageError, match="expected labels for every picture of 'train'"):
        pretrain(make_config(), cache.path, tmp_path / "run", blind.path)
    with pytest.raises(UsageError, match="expected a teacher with a projection"):
        pretrain(make_config(target={"features": "joint"}), cache.path, tmp_path / "run")
    with pytest.raises(UsageError, match="expected data.views = 3 complete units of 'train'; found 2"):
        pretrain(make_config(data={"views": 3}), cache.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_advice_names_what_goes_wrong_at_a_small_scale(tmp_path):
    cache = make_cache(tmp_path / "cache")
    probe(str(cache.path), None, ["knn"], quiet=True, features=["mean"])
    rank = read_record(ProbeResult, tmp_path / "cache/.run/teacher.json").teacher.effective_rank
    assert 3 < rank < 8

    def said(mode, ratio, epochs=1):
        config = make_config(mask={"mode": mode, "ratio": ratio}, schedule={"epochs": epochs, "warmup_epochs": 0})
        return list(advice(config, cache, 64, 1))

    narrow, few = "leaves 3 of 32 channels of a patch", "64 pictures x 1 views for 99 epochs may overfit"
    assert [line.partition(";")[0] for line in said("channel", 0.9, 99)] == [
        f"mask.ratio = 0.9 {narrow}, and the effective rank of the teacher's features is {rank:.0f}",
        f"mask.ratio = 0.9 {narrow}",
        few,
    ]
    assert not said("channel", 0.25) and not said("patch", 0.75) and len(said("none", 0.75, 99)) == 1


@pytest.mark.parametrize("mode", ["dropout", "patch", "none", "gaussian", "pixels"])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_every_control_runs_from_every_cache(tmp_path, mode, dtype, capsys):
    cache = make_cache(tmp_path / "cache", val_rows=0, dtype=dtype)
    target = {"norm": "channel", "projection": "orthogonal"}
    changes = {"mask": {"mode": mode}, "decoder": {"depth": 0}, "target": target, "train": {"knn_epochs": 1}}
    pretrain(make_config(**changes, schedule={"epochs": 2}), cache.path, tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    said = capsys.readouterr().out
    assert losses[-1] < losses[0] and "no complete unit of 'val'" in said and "without --data DATASET" in said


@pytest.mark.parametrize("target", [{"features": "joint"}, {"features": "pixels"}, {}])
@pytest.mark.parametrize("loss", [{"cls": True}, {"cls": False}])
def test_every_target_runs_and_is_read_back(tmp_path, target, loss):
    cache = make_cache(tmp_path / "cache", projection=np.eye(16, 12, dtype=np.float32))
    if loss["cls"] and target.get("features") == "pixels":
        with pytest.raises(ValueError, match="no CLS target"):
            make_config(target=target, loss=loss)
        return
    mask = {"final_ratio": 0.0, "unmasked_fraction": 0.25}
    config = make_config(target=target, loss=loss, mask=mask, data={"views": 1})
    pretrain(config, cache.path, tmp_path / "run")
    channels = {"joint": 12, "pixels": 192}.get(target.get("features"), 16)
    run = read_record(PretrainRun, tmp_path / "run" / "run.json")
    assert (run.channels, sorted(run.units)) == (channels, ["train/v0", "val/v0"])
    assert {len(x) for x in load_file(tmp_path / "run" / "channels.safetensors").values()} == {channels}
    lines = metrics(tmp_path / "run")
    assert [line["loss"] for line in lines if "loss" in line][-1] < lines[0]["loss"]
    load_encoder(str(tmp_path / "run"))


def test_a_learned_projection_collapses_and_is_stopped(cache, tmp_path):
    config = make_config(target={"projection": "learned", "norm": "none"}, optim={"lr": 1e-2}, schedule={"epochs": 60})
    with pytest.raises(McmError, match='target.projection = "learned" has collapsed') as caught:
        pretrain(config, cache.path, tmp_path / "run")
    lines = metrics(tmp_path / "run")
    stds = [line["eval"]["target_std"] for line in lines if "eval" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert stds[-1] < 0.5 * stds[0] and losses[-1] < 0.1 * losses[0]  # a beautiful loss
    assert caught.value.exit_code == read_record(ExitRecord, tmp_path / "run" / "exit.json").code


def test_a_run_of_an_older_version_resumes(cache, tmp_path):
    pretrain(make_config(), cache.path, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    run = read_record(PretrainRun, path)
    del run.config["mask"]["unmasked_fraction"], run.config["loss"], run.config["data"]
    path.write_bytes(encode_record(run.model_copy(update={"cache": None})))
    pretrain(make_config(), cache.path, tmp_path / "run")
    with pytest.raises(IdentityError, match=r"mask\.unmasked_fraction: 0\.5 != 0\.0"):
        pretrain(make_config(mask={"unmasked_fraction": 0.5}), cache.path, tmp_path / "run")


@pytest.mark.parametrize(("knn_epochs", "steps"), [(3, [9, 12]), (0, [12])])
def test_knn_runs_when_it_is_due_and_at_the_end(cache, tmp_path, knn_epochs, steps):
    data = make_dataset(tmp_path / "data")
    pretrain(make_config(train={"knn_epochs": knn_epochs}), cache.path, tmp_path / "run", data.path)
    found = {line["step"]: line["eval"]["knn_full"] for line in metrics(tmp_path / "run") if "knn_full" in str(line)}
    assert list(found) == steps and all(0.3 <= value <= 1.0 for value in found.values())


def test_a_held_out_batch_keeps_the_pools_of_training(cache):
    units = cache.complete_units("train")
    run = SimpleNamespace(grid=(2, 2), patch=8, channels=16, mean=(0.5,) * 3, std=(0.5,) * 3)
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    objective = Objective(make_config(schedule={"epochs": 8}), run, cache, units, accelerator)
    picks = torch.zeros(1, dtype=torch.int32)
    for epoch in (0, 1, 4, 5):
        pool, _ = objective.masks({"epoch": epoch, "picks": picks})
        following = objective.pools[epoch + 1]
        objective.masks({"epoch": 0, "picks": picks})
        assert objective.pools.keys() == {0, epoch, epoch + 1}
        assert objective.masks({"epoch": epoch, "picks": picks})[0] is pool
        assert objective.pools[epoch + 1] is following


def test_channel_statistics_are_those_of_all_units(cache):
    units = cache.complete_units("train")
    features = np.concatenate([unit.chunk(i).features() for unit in units for i in range(unit.num_chunks)])
    mean, std = channel_stats(units)
    flat = features.reshape(-1, 16)
    assert np.allclose(mean, flat.mean(0), atol=0.01) and np.allclose(std, flat.std(0), rtol=0.01)
