"""FSDP2 on gloo and the CPU: one run under one process, FSDP2, DDP and one process again; and what is refused.

Accelerate runs FSDP2 on GPUs only. `Stand` tells it that they are there once its processes have met over gloo: from
then on Accelerate's own FSDP2 splits the model, switches the optimizer's parameters, sums and clips.
"""

import os
import socket
import subprocess
import time
from contextlib import suppress
from functools import partialmethod

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from make_cache import make_cache
from make_dataset import make_dataset
from safetensors.torch import load_file
from test_mcm_finetune import config as make_finetune_config
from test_mcm_pretrain import command, environment, make_config, metrics

from cache_tools.cache import Cache
from cache_tools.errors import Interrupted, UsageError
from mcm import checkpoint, fsdp, loop
from mcm.finetune import finetune
from mcm.loop import Loop, engine
from mcm.pretrain import pretrain

STEPS = 8  # one an epoch, of two micro-steps a rank
TIMEOUT_S = 120  # a rank that waits for another one waits for hours


class Stand(Accelerator):
    """Accelerate, with two ranks on a CPU taken for two GPUs where FSDP2 is asked for."""

    def __init__(self, *args, fsdp_plugin, **kwargs):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin:
            self.state.fsdp_plugin, self.state.distributed_type = fsdp_plugin, DistributedType.FSDP

    def end_training(self):  # the next leg keeps the process group
        AcceleratorState._reset_state(reset_partial_state=True)


def leg(folder, kind, name, last):
    """Train what is called `name`, and stop after the step `last`."""

    def step(self, number, *rest, real=Loop.step):
        return real(self, number, *rest) or number + 1 == last

    with pytest.MonkeyPatch.context() as patch, suppress(Interrupted):
        patch.setattr(Loop, "step", step)
        patch.setenv("ACCELERATE_USE_FSDP", str(kind == "fsdp2").lower())
        patch.setenv("FSDP_VERSION", "2")
        if name == "tuned":
            finetune(configs()[name], folder / "data", "random", None, folder / name)
        else:
            pretrain(configs()[name], folder / "cache", folder / name, folder / "data")


def work(rank, port, folder, legs):
    """One of two ranks: all legs in turn."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    loop.Accelerator = Stand
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="eager")
    for kind, name, last in legs:
        leg(folder, kind, name, last)
    torch.distributed.destroy_process_group()


def ranks(folder, *legs):
    """Run the legs in two processes; those that hang fail and end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    end = time.monotonic() + TIMEOUT_S
    context = torch.multiprocessing.spawn(work, (port, folder, legs), nprocs=2, join=False)
    try:
        while not context.join(max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()


def configs():
    train = {"global_batch": 64, "keep_last": 20, "eval_epochs": 4, "knn_epochs": 4}
    student, short = {"drop_path": 0.0}, {"epochs": 2}
    plain = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "erasing": 0.0}
    return {
        "one": make_config(student=student, train=train, schedule={"epochs": STEPS}),
        "run": make_config(student=student, train=train, schedule={"epochs": STEPS}),
        "bf16": make_config(student=student, train=train | {"precision": "bf16", "compile": True}, schedule=short),
        "tuned": make_finetune_config(augment=plain, drop_path=0.0, schedule=short, train={"log_steps": 1}),
    }


@pytest.fixture(scope="module")
def legs(tmp_path_factory):
    """The folder of all runs: "run" changes its engine three times, "one" is the same in one process throughout."""
    folder = tmp_path_factory.mktemp("fsdp")
    make_cache(folder / "cache")
    make_dataset(folder / "data")
    leg(folder, "one", "one", STEPS)
    leg(folder, "one", "run", 2)
    ranks(folder, ("fsdp2", "run", 4), ("ddp", "run", 6), ("fsdp2", "bf16", STEPS), ("fsdp2", "tuned", STEPS))
    leg(folder, "one", "run", STEPS)
    return folder


def numbers(run):
    """Everything in the log of a run, by step, place and name."""
    found = {}
    for line in metrics(run):
        for place, part in (("eval", line.pop("eval", {})), ("train", line)):
            found |= {(line["step"], place, name): value for name, value in part.items()}
    return found


def test_every_leg_goes_on_as_one_process_does(legs):
    ours, theirs = numbers(legs / "run"), numbers(legs / "one")
    assert (STEPS, "train", "loss") in ours and (4, "eval", "knn_full") in ours
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_a_checkpoint_does_not_tell_who_wrote_it(legs):
    one, run = (checkpoint.complete(legs / name) for name in ("one", "run"))
    assert [path.name[-1] for path in run] == [path.name[-1] for path in one] == ["2", "4", "6", "8"]
    for ours, theirs in zip(map(checkpoint.load, run), map(checkpoint.load, one), strict=True):
        # Biases of keys have no gradient but rounding, which Adam scales up: 3e-5 of a learning rate of 2e-3.
        torch.testing.assert_close(ours.model, theirs.model, rtol=1e-4, atol=2e-4)
        torch.testing.assert_close(ours.optimizer, theirs.optimizer, rtol=1e-4, atol=1e-6)


def test_bf16_compiled_ends_with_samples(legs):
    ours, theirs = numbers(legs / "bf16"), numbers(legs / "one")
    assert all(ours[step, "train", "loss"] == pytest.approx(theirs[step, "train", "loss"], rel=0.01) for step in (1, 2))
    assert (2, "eval", "knn_full") in ours
    assert load_file(legs / "bf16" / "samples.safetensors")["prediction"].isfinite().all()


def test_fine_tuning(legs, tmp_path):
    finetune(configs()["tuned"], legs / "data", "random", None, tmp_path)
    assert numbers(tmp_path) == pytest.approx(numbers(legs / "tuned"), rel=1e-4)


def test_a_launch_on_a_cpu_does_not_become_ddp(legs, tmp_path):
    flags = ["--use_fsdp", "--fsdp_version=2"]
    arguments = command(configs()["run"], Cache(legs / "cache"), tmp_path / "run", world=1, flags=flags)
    done = subprocess.run(arguments, env=environment(), timeout=TIMEOUT_S, capture_output=True, text=True)
    said = "error: accelerate launch --use_fsdp: expected FSDP2, which needs GPUs; found"
    assert done.returncode and said in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("VERSION", "1", "expected --fsdp_version 2; found 1"),
        ("VERSION", "2", "expected FSDP2, which needs GPUs; found"),
        ("ACTIVATION_CHECKPOINTING", "true", "expected --fsdp_activation_checkpointing false; found true"),
        ("OFFLOAD_PARAMS", "yes", "expected --fsdp_offload_params false; found yes"),
    ],
)
def test_what_is_not_served_is_refused(monkeypatch, name, value, message):
    for key, setting in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", f"FSDP_{name}": value}.items():
        monkeypatch.setenv(key, setting)
    with pytest.raises(UsageError, match=message), engine("fp32"):
        pass


def test_a_whole_parameter_is_named():
    with pytest.raises(UsageError, match="expected every parameter to be split; weight is whole"):
        fsdp.check(torch.nn.LayerNorm(2))
