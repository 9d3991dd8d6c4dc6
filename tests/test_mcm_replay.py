"""A planted fault makes a RUN diverge; `mcm-train replay` meets the same step again and names where it begins."""

import math
import shutil

import make_cache
import pytest
from make_dataset import make_dataset
from test_mcm_finetune import config as finetune_config
from test_mcm_pretrain import make_config
from typer.testing import CliRunner

from cache_tools.errors import Diverged, Interrupted, ResourceError, UsageError
from cache_tools.records import read_record
from mcm import checkpoint
from mcm.cli import app
from mcm.finetune import finetune
from mcm.loop import STOP, Loop
from mcm.pretrain import pretrain
from mcm.replay import replay
from mcm.run_dir import ExitRecord


def files(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_poisoned_row_is_named(tmp_path, monkeypatch):
    def encode(*arguments):
        arrays = real(*arguments)
        arrays["scale"][37, 3] = math.nan  # before the checksums are made
        return arrays

    real = make_cache.encode
    with monkeypatch.context() as patch:
        patch.setattr(make_cache, "encode", encode)
        cache = make_cache.make_cache(tmp_path / "cache", rows=64, val_rows=0, views=1)
    run = tmp_path / "run"
    with pytest.raises(Diverged, match=rf"`mcm-train replay {run}`"):
        pretrain(make_config(train={"log_steps": 4}), cache.path, run)
    before = files(run)
    found = replay(run)
    message = read_record(ExitRecord, run / "exit.json").message
    assert message.startswith(f"Diverged: {found['error'][0]} on rows ") and "found nan and nan" in found["error"][0]
    assert list(found) == ["error", "batch", "forward", "loss", "gradients"]
    assert (found["batch"], found["forward"], found["loss"]) == (["scale of rows 37"], ["Targets"], ["nan"])
    assert found["gradients"][0] == "decoder.linear.bias"
    printed = CliRunner().invoke(app, ["replay", str(run)]).output
    assert "batch:     scale of rows 37\n" in printed and "decoder.norm.bias ...\n" in printed
    assert files(run) == before


def test_a_poisoned_weight_is_named_and_a_step_that_is_finite_now_is_an_error(tmp_path, monkeypatch):
    data, run = make_dataset(tmp_path / "dataset").path, tmp_path / "run"
    arguments = finetune_config(), data, "random", None, run
    real = Loop.step
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Loop, "step", lambda loop, number, *rest: real(loop, number, *rest) or STOP * (number == 3))
        finetune(*arguments)
    (healthy,) = checkpoint.complete(run)
    saved = checkpoint.load(healthy)
    shutil.copytree(healthy, tmp_path / "healthy")
    saved.model["blocks.1.mlp.fc1.weight"][0, 0] = math.nan
    checkpoint.save(run, saved.step, saved.model, saved.optimizer, saved.meta)
    with pytest.raises(Diverged, match="step 5: expected a finite loss"):
        finetune(*arguments)
    found = replay(run)
    assert list(found) == ["error", "weights", "forward", "loss", "gradients"]
    assert (found["weights"], found["forward"][0]) == (["blocks.1.mlp.fc1.weight"], "blocks.1.mlp.fc1")
    shutil.rmtree(healthy)
    shutil.copytree(tmp_path / "healthy", healthy)
    with pytest.raises(ResourceError, match="expected the step to diverge again; found finite values"):
        replay(run)
    (run / "exit.json").unlink()
    finetune(*arguments)
    with pytest.raises(UsageError, match="expected a RUN with a step that diverged; found: complete"):
        replay(run)


def test_weights_that_overflow_are_met_again_at_the_same_step(tmp_path):
    cache = make_cache.make_cache(tmp_path / "cache", rows=64, val_rows=0, views=1)
    settings = make_config(optim={"lr": 1e30, "clip_norm": 0.0}, train={"log_steps": 4})
    with pytest.raises(Diverged) as caught:
        pretrain(settings, cache.path, tmp_path / "run")
    found = replay(tmp_path / "run")
    assert str(caught.value).startswith(found["error"][0]) and "batch" not in found and found["forward"]
