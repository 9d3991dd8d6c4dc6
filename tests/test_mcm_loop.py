import errno
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tree_digest
from torch import nn

from cache_tools.console import StopFlag
from cache_tools.errors import CorruptionError, Diverged, Interrupted, McmError, ResourceError, UsageError
from cache_tools.records import read_record
from mcm import checkpoint
from mcm.config import Optim, Schedule, Train
from mcm.engine import engine
from mcm.loop import Job, train
from mcm.run_dir import ExitRecord, prepare, recorded_exit
from mcm.sampler import Order
from mcm.stream import Stream

ROWS, EPOCHS = 112, 3  # 3 steps of 32 rows an epoch, 9 in all
TRUTH = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))


class Source:
    """Regression rows in chunks of 16; `poison` is a row without a number, `broken` a chunk that does not read."""

    def __init__(self, poison=None, broken=None):
        self.poison, self.broken = poison, broken
        self.x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))

    def rows_of(self, chunks):
        return (chunks[:, None] * 16 + np.arange(16)).ravel()

    def __call__(self, epoch, chunks, batch, used=None):
        if self.broken in chunks:
            raise CorruptionError(f"chunk {self.broken} is damaged")
        rows = torch.from_numpy(self.rows_of(chunks))
        x = self.x[rows].clone()
        x[rows == self.poison] = float("nan")
        return {"x": x, "rows": rows, "epoch": epoch}


def make_job(run, micro_batch=32, source=None, dropout=0.3, hook=lambda step: None, evaluations=None, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 2))
    fast, slow = ({"params": list(model[i].parameters()), "lr_scale": s} for i, s in ((0, 1.0), (3, 0.5)))
    order = Order(ROWS, 16, 32, micro_batch)
    fixed = {"global_batch": 32, "micro_batch": micro_batch, "precision": "fp32", "workers": 0, "log_steps": 1}
    train = Train(**{**fixed, "checkpoint_steps": 2, **settings})
    calls = []

    def loss(wrapped, batch):
        calls.append(1)
        hook(len(calls))
        return (wrapped(batch["x"]) - batch["x"] @ TRUTH).square().mean()

    def evaluate(epochs_done):
        (evaluations if evaluations is not None else []).append(epochs_done)
        return {"norm": float(model[0].weight.detach().norm())}

    return Job(
        run_dir=run,
        model=model,
        optimizer=torch.optim.AdamW([fast, slow], lr=0.0),
        stream=Stream(order, source or Source()),
        loss=loss,
        evaluate=evaluate,
        config=SimpleNamespace(
            optim=Optim(lr=1e-2, clip_norm=1.0), schedule=Schedule(epochs=EPOCHS, warmup_epochs=1), train=train
        ),
    )  # fmt: skip


def run_job(job, loss_scale=None):
    """With `loss_scale`, in float16: `engine` offers it on GPUs only, as there Accelerate makes the scaler."""
    state = torch.get_rng_state()
    with engine("fp32") as accelerator, StopFlag() as stop, pytest.MonkeyPatch.context() as patch:
        if loss_scale:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, growth_interval=4)
            accelerator.native_amp = True
            patch.setattr(accelerator.state, "_mixed_precision", "fp16")
        train(job, accelerator, stop)
    assert torch.equal(torch.get_rng_state(), state)  # of the host process
    return metrics(job.run_dir)


def metrics(run):
    timed = {"images_per_s", "wait_share"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def stop_at(step, number=signal.SIGTERM):
    """A signal in the middle of a step: the processes agree on it in the next one, and stop after that."""
    return lambda called: os.kill(os.getpid(), number) if called == step else None


def test_a_run_from_start_to_end(tmp_path):
    evaluations = []
    lines = run_job(make_job(tmp_path, evaluations=evaluations))
    assert evaluations == [1, 2, 3]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] and lines[0].keys() == {"step", "epoch", "loss", "lr", "grad_norm"}
    assert [line["lr"] for line in lines if "lr" in line][:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
    assert [path.name[-1] for path in checkpoint.complete(tmp_path)] == ["6", "8", "9"]
    assert any((tmp_path / "tensorboard").iterdir())
    assert run_job(make_job(tmp_path)) == lines  # a run that is complete stays as it is


def test_accumulation_equals_one_batch(tmp_path):
    whole = run_job(make_job(tmp_path / "whole", dropout=0.0))
    parts = run_job(make_job(tmp_path / "parts", micro_batch=16, dropout=0.0))
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_fp16_skips_a_step_that_overflows_and_resumes_to_the_bit(tmp_path):
    exact = run_job(make_job(tmp_path / "float32", dropout=0.0))
    straight = run_job(make_job(tmp_path / "straight"), loss_scale=2.0**18)
    plain = run_job(make_job(tmp_path / "plain", dropout=0.0), loss_scale=2.0**8)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (exact, plain)]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    scales = [line["loss_scale"] for line in straight if "loss" in line]
    assert scales[0] == 2.0**17 and min(scales) < scales[0] and max(scales[4:]) > min(scales)  # halved, doubled
    assert all(np.isfinite(line["grad_norm"]) for line in straight if "loss" in line)
    with pytest.raises(Interrupted):
        run_job(make_job(tmp_path / "stopped", hook=stop_at(5)), loss_scale=2.0**18)
    assert run_job(make_job(tmp_path / "stopped"), loss_scale=2.0**18) == straight
    with pytest.raises(Diverged, match="expected a finite loss and gradient norm; found nan"):
        run_job(make_job(tmp_path / "poisoned", source=Source(poison=40)), loss_scale=2.0**8)


def test_groups_scale_the_learning_rate(tmp_path):
    job = make_job(tmp_path, hook=stop_at(1))
    with pytest.raises(Interrupted):
        run_job(job)
    assert [group["lr"] for group in job.optimizer.param_groups] == [0.01 * 2 / 3, 0.005 * 2 / 3]


@pytest.mark.parametrize("log_steps", [1, 4])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_is_the_straight_run_to_the_bit(tmp_path, log_steps, number):
    straight = run_job(make_job(tmp_path / "straight", log_steps=log_steps))
    stopped = tmp_path / "stopped"
    for stop, step in ((1, 2), (1, 4), (2, 7)):
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 9") as caught:
            run_job(make_job(stopped, hook=stop_at(stop, number), log_steps=log_steps))
        assert caught.value.exit_code == 75
    assert run_job(make_job(stopped, log_steps=log_steps)) == straight
    one, other = (checkpoint.latest(run) for run in (tmp_path / "straight", stopped))
    assert one.step == other.step == 9
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    assert all(torch.equal(one.optimizer[name], other.optimizer[name]) for name in one.optimizer)


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, capsys):
    straight = run_job(make_job(tmp_path / "straight"))
    run = tmp_path / "damaged"
    with pytest.raises(Interrupted):
        run_job(make_job(run, hook=stop_at(6)))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # torn
    (checkpoint.folder(run, 7) / "model.safetensors").write_bytes(b"damaged")
    (run / "checkpoints" / ".step_000000009.0a1b2c3d.partial").mkdir()
    assert run_job(make_job(run)) == straight
    said = capsys.readouterr().out
    assert "step_000000007/model.safetensors: expected" in said and "resumes after step 6 of 9" in said
    assert [path.name[-1] for path in sorted((run / "checkpoints").iterdir())] == ["6", "8", "9"]


@pytest.mark.parametrize("log_steps", [1, 50])
def test_a_poisoned_batch_stops_and_is_not_saved(tmp_path, log_steps):
    order = Order(ROWS, 16, 32, 32)
    chunk = int(order.step_chunks(4)[1][1])
    rows = f"{chunk * 16}-{chunk * 16 + 15}"
    seen = [step for step in range(5) if chunk in order.step_chunks(step)[1]]
    job = make_job(tmp_path, source=Source(poison=chunk * 16 + 3), log_steps=log_steps, checkpoint_steps=1)
    with pytest.raises(McmError, match=rf"step {seen[0] + 1}: expected a finite.*found nan.* rows .*{rows}"):
        run_job(job)
    assert checkpoint.latest(tmp_path).step == seen[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_data_raise_arrives_as_it_is(tmp_path, workers):
    with pytest.raises(CorruptionError, match="^chunk 2 is damaged$"), recorded_exit(tmp_path, main=True):
        run_job(make_job(tmp_path, source=Source(broken=2), workers=workers))
    assert read_record(ExitRecord, tmp_path / "exit.json").code == 4


@pytest.mark.parametrize(
    ("error", "code"), [(Interrupted("stop"), 75), (OSError(28, "No space", "f"), 7), (ValueError("x"), 1)]
)
def test_every_outcome_is_recorded(tmp_path, error, code):
    with recorded_exit(tmp_path, main=True):
        pass
    assert read_record(ExitRecord, tmp_path / "exit.json").code == 0
    with pytest.raises(type(error)), recorded_exit(tmp_path, main=True):
        running = read_record(ExitRecord, tmp_path / "exit.json")  # what a killed command leaves
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher stops the other ranks when one has ended
        raise error
    assert (running.code, running.message) == (None, "running")
    assert read_record(ExitRecord, tmp_path / "exit.json").code == code


def test_two_commands_on_one_run_do_not_meet(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with recorded_exit(tmp_path, main=True):
        before = tree_digest(tmp_path)
        with pytest.raises(UsageError, match="another process trains"), recorded_exit(tmp_path, main=True):
            pass
        with pytest.raises(UsageError, match="another process trains"):
            prepare(tmp_path, overwrite=True)
        assert tree_digest(tmp_path) == before
    prepare(tmp_path, overwrite=True)
    assert not tmp_path.exists()


def test_the_first_error_of_any_rank_is_recorded(tmp_path):
    with pytest.raises(ResourceError, match="lost the connection to another rank"), recorded_exit(tmp_path, main=True):
        with pytest.raises(CorruptionError), recorded_exit(tmp_path, main=False):
            raise CorruptionError("chunk 2 is damaged")
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert read_record(ExitRecord, tmp_path / "exit.json").code == 4


def test_compiled_in_place_keeps_the_names(tmp_path):
    job = make_job(tmp_path, dropout=0.0)
    names = job.model.state_dict().keys()
    job.model.compile(backend="eager")
    run_job(job)
    assert checkpoint.latest(tmp_path).model.keys() == names


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("USE_FSDP", "true", "expected one process or DDP; found --use_fsdp; leave it out"),
        ("USE_DEEPSPEED", "true", "expected one process or DDP; found --use_deepspeed; leave it out"),
        ("DYNAMO_BACKEND", "INDUCTOR", "found --dynamo_backend inductor; leave it out .train.compile = true"),
    ],
)
def test_a_launcher_mode_that_is_not_supported_is_refused(monkeypatch, name, value, message):
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UsageError, match=message), engine("fp32"):
        pass


def full_disk(monkeypatch, steps):
    """Saving fails at these steps, as on a disk that others fill."""

    def save(run_dir, step, *rest, real=checkpoint.save):
        if step in steps:
            raise OSError(errno.ENOSPC, "No space left on device", str(run_dir))
        return real(run_dir, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, monkeypatch, capsys):
    straight = run_job(make_job(tmp_path / "straight"))
    full_disk(monkeypatch, {2, 4, 8})
    assert run_job(make_job(tmp_path / "run")) == straight
    assert [path.name[-1] for path in checkpoint.complete(tmp_path / "run")] == ["6", "9"]
    said = capsys.readouterr().out
    assert all(f"warning: step {step} is not saved: " in said for step in (2, 4, 8)) and "No space left" in said


@pytest.mark.parametrize(("steps", "last"), [({4, 6, 8, 9}, "2"), ({9}, "8")])
def test_a_run_that_cannot_save_stops(tmp_path, monkeypatch, steps, last):
    """After three failures in a row, or where the end cannot be saved; it resumes from what it saved before."""
    straight = run_job(make_job(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        full_disk(patch, steps)
        with pytest.raises(OSError, match="No space left"):
            run_job(make_job(tmp_path / "run"))
    assert checkpoint.complete(tmp_path / "run")[-1].name.endswith(last)
    assert run_job(make_job(tmp_path / "run")) == straight


@pytest.mark.parametrize(("minutes", "kept"), [(1e-9, range(1, 10)), (1e9, [9])])
def test_checkpoints_by_minutes_are_written_while_training_goes_on(tmp_path, minutes, kept):
    straight = run_job(make_job(tmp_path / "straight"))
    job = make_job(tmp_path / "run", checkpoint_steps=None, checkpoint_minutes=minutes, keep_last=9)
    assert run_job(job) == straight
    assert [int(path.name[-1]) for path in checkpoint.complete(tmp_path / "run")] == list(kept)
