"""CUDA against the CPU: arithmetic, model, steps, stream, memory, runs, extraction and launchers.

`MCM_TEST_GPU=1 python -m pytest -rA tests/test_gpu.py` on a machine with a GPU prints the measured differences.
Without it, the tests of "cpu" run alone, which checks the tests themselves. B batch, N patches, C channels, D width.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from unittest import mock

from conftest import ROOT, tree_digest  # before torch is imported: it hides the GPU

# isort: split
import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from make_cache import make_cache
from make_dataset import make_dataset
from make_extract import make_extracted, make_place, request
from make_run import make_run
from safetensors.torch import load_file
from test_mcm_finetune import AVERAGED, LINEAR
from test_mcm_finetune import config as finetune_config
from test_mcm_pretrain import make_config, metrics

sys.path.insert(0, str(ROOT / "bench"))
from one_step import OneStep, first_batch

from cache_tools.cache import Cache
from cache_tools.console import StopFlag
from cache_tools.errors import Interrupted
from cache_tools.quantize import channel_stats, decode, encode
from cache_tools.records import write_toml
from cache_tools.verify import verify
from mcm import checkpoint
from mcm.config import Target
from mcm.export import export
from mcm.finetune import finetune
from mcm.loop import Loop, engine, on_device
from mcm.masking import apply_fill, mask_from_pool, mask_pool
from mcm.model import MaskedChannelModel, embed_pixels
from mcm.pretrain import pretrain
from mcm.probe import probe
from mcm.run_folder import last_eval
from mcm.stream import batches
from mcm.targets import Targets
from pipeline.extract import extract
from pipeline.recompute import recompute

ASKED = os.environ.get("MCM_TEST_GPU") == "1"
needs_gpu = pytest.mark.skipif(not ASKED, reason="needs a GPU, and MCM_TEST_GPU=1 to use it")
both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
# A library that warns on one card or version must not end the only run there.
pytestmark = pytest.mark.filterwarnings("default")
STEADY = {"student": {"drop_path": 0.0}}  # what drop path drops differs between devices


@pytest.fixture
def note(record_property):
    """note(name, value): a measured figure, for the output and the XML report."""

    def write(name, value):
        record_property(name, value)
        print(f"{name} = {value:.3g}" if isinstance(value, float) else f"{name} = {value}")
        return value

    return write


@contextmanager
def on(device):
    """Inside, runs take this device; Accelerate keeps its first choice otherwise."""
    AcceleratorState._reset_state(True)
    with mock.patch("torch.cuda.is_available", return_value=device == "cuda"):
        yield
    AcceleratorState._reset_state(True)


def gap(found, wanted):
    """The relative L2 distance, in float64."""
    found, wanted = (torch.as_tensor(x).detach().double().cpu() for x in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def largest(found, wanted):
    """The largest relative difference of two lists of losses."""
    assert len(found) == len(wanted) > 0
    return max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("gpu") / "cache").path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("gpu") / "dataset").path


@contextmanager
def one_step(config, cache, device):
    """The step of a run; the stream's batches come from `taking`."""
    with on(device), engine(config.train.precision) as accelerator:
        assert accelerator.device.type == device
        yield OneStep(config, cache, accelerator)


@contextmanager
def taking(step, count, workers=0):
    """The batches of the next `count` steps on the device, as Loop.run has them."""
    micro_steps = step.loop.order.accumulation
    start, end = step.done * micro_steps, (step.done + count) * micro_steps
    with batches(step.job.stream, start, end, workers, step.device.type == "cuda") as loaded:
        yield on_device(loaded, step.device)


def losses(step, items, count):
    for _ in range(count):
        step.loop.step(step.done, items, StopFlag())
        step.done += 1
    found = torch.stack(step.loop.pending)[:, 0].tolist()
    step.loop.pending.clear()
    return found


def first_losses(config, cache, device, count=10, workers=0):
    with one_step(config, cache, device) as step, taking(step, count, workers) as items:
        return losses(step, items, count)


@contextmanager
def no_waiting():
    """Inside, an operation that makes the host wait for the GPU raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_gpu_is_seen_only_when_it_is_asked_for():
    assert torch.cuda.is_available() == ASKED


@both
def test_arithmetic_is_that_of_numpy(device, note):
    draw = np.random.default_rng(0)
    x_BNC = draw.standard_normal((32, 49, 64)).astype(np.float32) * np.linspace(0.1, 30, 64, dtype=np.float32)
    mean, std = channel_stats(x_BNC)
    there = [torch.from_numpy(x).to(device) for x in (x_BNC, mean, std)]
    for dtype in ("int8", "float16"):
        wanted, found = encode(dtype, x_BNC, mean, std), encode(dtype, *there, torch)
        codes = {name: tensor.cpu().numpy() for name, tensor in found.items()}
        assert note(f"{dtype} codes that differ", float((codes["patch"] != wanted["patch"]).mean())) <= 1e-4
        scale = (wanted["scale"], found["scale"]) if dtype == "int8" else (None, None)
        here = decode(wanted["patch"], scale[0], mean, std)
        same = torch.from_numpy(wanted["patch"]).to(device)
        assert note(f"{dtype} decoded", gap(decode(same, scale[1], *there[1:], xp=torch), here)) <= 1e-6
    z = x_BNC.astype(np.float64)
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    assert note("layer_norm", gap(Targets(Target(), 64, 64).to(device).normalise(there[0]), z)) <= 1e-6
    pool, picks = mask_pool(0, 0, 16, 64, 0.75), draw.integers(0, 16, (32, 49))
    mask = mask_from_pool(torch.from_numpy(pool).to(device), torch.from_numpy(picks).to(device), patchwise=False)
    filled = apply_fill(there[0], mask, torch.full((64,), 5.0, device=device))
    assert np.array_equal(mask.cpu().numpy(), pool[picks])
    assert np.array_equal(filled.cpu().numpy(), np.where(pool[picks], np.float32(5), x_BNC))
    pictures = torch.from_numpy(draw.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8))
    projection = torch.nn.Conv2d(3, 64, 16, 16)
    mean3, std3 = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    exact = (pictures.double() / 255 - torch.tensor(mean3).double()) / torch.tensor(std3).double()
    with torch.no_grad():
        wanted = torch.nn.functional.conv2d(
            exact.permute(0, 3, 1, 2), projection.weight.double(), projection.bias.double(), 16
        )
        found = embed_pixels(projection.to(device), pictures.to(device), mean3, std3)
    assert note("patch product", gap(found, wanted.flatten(2).transpose(1, 2))) <= 1e-6


@both
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_forward_and_gradients_are_those_of_float64(device, precision, limit, note):
    config = make_config(student={"width": 64, "heads": 1, "drop_path": 0.0})
    model = MaskedChannelModel(config, (4, 4), 8, 16, (0.5,) * 3, (0.25,) * 3)
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (32, 32, 32, 3), generator=draw).byte()
    target = torch.randn(32, 16, 16, generator=draw)
    pool = torch.from_numpy(mask_pool(0, 0, 64, 64, 0.75))
    pool[:, 3] = True  # a channel that no patch shows
    masks = pool, torch.randint(0, 64, (32, 16), generator=draw)

    def run(model, pictures, where):
        model = model.to(where)
        y = model(pictures.to(where), tuple(x.to(where) for x in masks))
        wanted = target.to(where, torch.promote_types(pictures.dtype, torch.float32))
        torch.nn.functional.mse_loss(y.to(wanted.dtype), wanted).backward()
        return y, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with on(device), engine(precision) as accelerator:
        with accelerator.autocast():
            y, gradients = run(model, pictures, device)
    assert (
        not gradients["encoder.patch_embed.proj.weight"][3].any() and gradients["encoder.patch_embed.proj.weight"].any()
    )
    model.zero_grad()
    exact = (pictures.double().permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    wanted_y, wanted = run(model.double(), exact, "cpu")
    assert note("prediction", gap(y, wanted_y)) <= limit
    each = {name: gap(gradients[name], gradient) for name, gradient in wanted.items()}
    note("gradient furthest off", max(each, key=each.get))
    note("its distance", max(each.values()))
    flat = [torch.cat([x.double().cpu().flatten() for x in found.values()]) for found in (gradients, wanted)]
    assert gradients.keys() == wanted.keys() and note("all gradients", gap(*flat)) <= limit


@pytest.fixture(scope="module")
def exact_losses(cache):
    """Ten float32 steps on the CPU, in micro-batches of half the size."""
    return first_losses(make_config(**STEADY, train={"micro_batch": 16}), cache, "cpu")


@both
def test_steps_have_the_losses_of_the_cpu(device, cache, exact_losses, note):
    for precision, limit in (("fp32", 1e-4), ("bf16", 1e-2)):
        config = make_config(**STEADY, train={"micro_batch": 32, "precision": precision})
        assert note(precision, largest(first_losses(config, cache, device), exact_losses)) <= limit


@needs_gpu
def test_compiled_steps_have_the_losses_of_the_cpu_and_never_wait(cache, exact_losses, note):
    config = make_config(**STEADY, train={"micro_batch": 32, "precision": "bf16", "compile": True})
    with one_step(config, cache, "cuda") as step, taking(step, 16) as items:
        found = losses(step, items, 10)
        assert note("bf16, compiled", largest(found, exact_losses)) <= 1e-2
        with no_waiting():
            for done in range(10, 14):
                step.loop.step(done, items, StopFlag())


@needs_gpu
def test_a_step_never_waits_for_the_gpu(cache):
    config = make_config(train={"precision": "bf16"})
    with one_step(config, cache, "cuda") as step, taking(step, 12) as items:
        losses(step, items, 3)
        for pool in step.task.pools.values():
            pool.result()
        with no_waiting():
            for done in range(3, 7):
                step.loop.step(done, items, StopFlag())


def stopped_and_resumed(config, cache, straight, stopped):
    """Run it to its end; run it again with SIGTERM in the sixth step, and resume it."""
    torch._dynamo.reset()  # models of other tests are no recompilation
    pretrain(config, cache, straight)
    torch._dynamo.reset()
    real = Loop.step

    def step(loop, number, *rest):
        if number == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loop, number, *rest)

    with mock.patch.object(Loop, "step", step), pytest.raises(Interrupted):
        pretrain(config, cache, stopped)
    assert checkpoint.latest(stopped).step == 6
    torch._dynamo.reset()
    pretrain(config, cache, stopped)


def assert_resumed(straight, stopped, note):
    """Report whether two runs are equal to the bit, and require that they are close."""
    logs = [[line["loss"] for line in metrics(run) if "loss" in line] for run in (straight, stopped)]
    ends = [checkpoint.latest(run).model for run in (straight, stopped)]
    equal = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    note("equal to the bit", equal and logs[0] == logs[1])
    assert note("losses", largest(*logs)) <= 1e-3
    assert note("weights", max(gap(ends[1][name], x) for name, x in ends[0].items() if x.any())) <= 1e-3


@needs_gpu
@pytest.mark.parametrize("attention", ["cudnn", "flash"])
def test_a_stopped_run_resumes(attention, cache, tmp_path, note):
    config = make_config(train={"precision": "bf16"})
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(attention == "cudnn")
    try:
        with on("cuda"):
            stopped_and_resumed(config, cache, tmp_path / "straight", tmp_path / "stopped")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert_resumed(tmp_path / "straight", tmp_path / "stopped", note)


@needs_gpu
def test_a_stopped_compiled_run_resumes_and_nothing_is_compiled_twice(cache, tmp_path, note):
    config = make_config(train={"precision": "bf16", "compile": True})
    with on("cuda"), torch._dynamo.config.patch(error_on_recompile=True):
        stopped_and_resumed(config, cache, tmp_path / "straight", tmp_path / "stopped")
    assert_resumed(tmp_path / "straight", tmp_path / "stopped", note)


@both
def test_workers_and_their_used_memory_give_the_same_losses(device, cache):
    """36 steps of 3 workers: each of their 9 buffers is used four times."""
    config = make_config(train={"global_batch": 16})
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the same sums in the same order
        found = [first_losses(config, cache, device, 36, workers) for workers in (0, 3)]
    assert found[0] == found[1]


@needs_gpu
def test_memory_does_not_grow(cache, note):
    config = make_config(train={"precision": "bf16", "global_batch": 16})
    with one_step(config, cache, "cuda") as step, taking(step, 70) as items:
        found = []
        for count in (21, 42):  # both in the middle of an epoch of 6 steps, which has three mask pools
            losses(step, items, count)
            [pool.result() for pool in step.task.pools.values()]
            torch.cuda.synchronize()
            found.append((torch.cuda.memory_allocated(), torch.cuda.host_memory_stats()["allocated_bytes.current"]))
        note("GPU and pinned bytes after 21 steps", found[0])
        note("GPU and pinned bytes after 63 steps", found[1])
    assert found[1][0] == found[0][0]
    batch = sum(x.nbytes for x in first_batch(step.job.stream, torch.device("cpu")).values() if torch.is_tensor(x))
    assert found[1][1] <= found[0][1] + 2 * batch


@pytest.fixture(scope="module")
def whole_run(cache, data, tmp_path_factory):
    """A float32 run on the CPU with k-NN."""
    run = tmp_path_factory.mktemp("gpu") / "cpu"
    with on("cpu"):
        pretrain(make_config(**STEADY, **WHOLE), cache, run, data)
    return run


WHOLE = {"schedule": {"epochs": 2, "warmup_epochs": 1}, "train": {"knn_epochs": 1}}


@both
def test_a_run_has_the_figures_of_the_cpu(device, whole_run, cache, data, tmp_path, note):
    whole = {**WHOLE, "train": {"knn_epochs": 1, "micro_batch": 32}}
    with on(device):
        pretrain(make_config(**STEADY, **whole), cache, run := tmp_path / "run", data)
    assert json.loads((run / "env.json").read_text())["processes"] == 1
    ours, wanted = last_eval(run), last_eval(whole_run)
    assert ours.keys() == wanted.keys() and {"loss_masked", "r2_full", "knn_full"} <= ours.keys()
    for name, value in wanted.items():
        limit = 1.01 / 40 if name == "knn_full" else 1e-3 * max(1.0, abs(value))  # one picture of 40
        assert abs(note(name, ours[name]) - value) <= limit, (name, ours[name], value)
    samples = [load_file(folder / "samples.safetensors") for folder in (run, whole_run)]
    assert torch.equal(samples[0]["views"], samples[1]["views"])
    assert note("target of samples", gap(samples[0]["target"], samples[1]["target"])) <= 1e-3
    assert note("prediction of samples", gap(samples[0]["prediction"], samples[1]["prediction"])) <= 2e-3


@both
def test_probes_and_the_export(device, data, tmp_path, note):
    run = make_run(tmp_path / "run")
    found = []
    for where in ("cpu", device):
        with on(where):
            found.append({result.label: result.knn for result in probe(str(run), data, ["knn"], quiet=True)})
    assert found[0].keys() == {"full", "folded"}
    for label, knn in found[0].items():
        assert abs(note(label, found[1][label]) - knn) <= 1.01 / 40
    with on(device):
        export(run, tmp_path / "out")
        loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval().to(device)
        assert loaded(torch.zeros(1, 3, 32, 32, device=device)).isfinite().all()


@both
@pytest.mark.parametrize("changes", [LINEAR, AVERAGED], ids=["frozen", "averaged"])
def test_fine_tuning(device, changes, data, tmp_path, note):
    """A frozen encoder has the figures of the CPU; with EMA, drop path and mixup, in bfloat16, it learns."""
    frozen = changes is LINEAR
    settings = finetune_config(**changes, train={"precision": "fp32" if frozen else "bf16"})
    found = []
    for where in ("cpu", device) if frozen else (device,):
        with on(where):
            finetune(settings, data, "random", None, run := tmp_path / f"{where}{len(found)}")
        found.append(last_eval(run))
    if frozen:
        assert note("loss", abs(found[1]["loss"] / found[0]["loss"] - 1)) <= 1e-3
    assert note("top1", found[-1]["top1"]) > 0.7 or frozen


@both
def test_extraction(device, tmp_path, note):
    place = make_place(tmp_path)
    wanted = make_extracted(place, "cpu", precision="fp32", views=1)
    for name in ("one", "two"):
        make_extracted(place, name, device=device)  # a GPU's own precision is fp16
    assert tree_digest(place / "one") == tree_digest(place / "two")
    extract(request(place, begun := place / "begun", precision="fp32", views=1, splits=("val",)))
    extract(request(place, begun, precision="fp32", views=1, device=device))
    caches = [Cache(path) for path in (begun, wanted, place / "one")]
    found = [np.concatenate([c.units("train")[0].chunk(k).features() for k in range(5)]) for c in caches]
    assert note("fp32", gap(found[0], found[1]) ** 2) <= 1e-5
    assert note("the default precision", gap(found[2], found[1]) ** 2) <= 1e-3
    assert not verify(begun, quiet=True).problems
    weights = str(place / "clip" / "open_clip_model.safetensors")
    for path in (begun, place / "one"):
        again = recompute(path, 16, f"open_clip:{place / 'clip'}", weights, device)
        assert not again.problems and note(f"{path.name}: 1 - cosine", 1 - again.lowest_cosine) <= 1e-3


RANK = """
import torch
if __name__ == "__main__":
    if {gloo}:  # before Accelerate, which keeps the group: NCCL refuses two ranks on one card
        torch.distributed.init_process_group("gloo")
    from mcm.cli import app
    app()
"""


def launch(config, cache, run, gloo, arguments=(), **env):
    """The command of a rank, or of a launcher's `arguments`, in a process of its own."""
    toml, script = run.with_suffix(".toml"), run.with_suffix(".py")
    toml.write_text(write_toml(config))
    script.write_text(RANK.format(gloo=gloo))
    line = [sys.executable, *arguments, str(script), "pretrain", str(toml), "--cache", str(cache), "--out", str(run)]
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        line, env=os.environ | {"PYTHONPATH": path} | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_ends(*processes):
    """All of them succeed within 100 s."""
    try:
        said = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its rank then
    assert not any(process.returncode for process in processes), said


def run_losses(run):
    return [line["loss"] for line in metrics(run) if "loss" in line]


@needs_gpu
def test_torchrun_with_nccl_and_compiled_ddp(whole_run, cache, tmp_path, note):
    config = make_config(**STEADY, schedule=WHOLE["schedule"], train={"precision": "bf16", "compile": True})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    assert_ends(launch(config, cache, run := tmp_path / "run", False, torchrun))
    assert note("losses", largest(run_losses(run), run_losses(whole_run))) <= 1e-2
    assert checkpoint.latest(run).step == len(run_losses(run))


@needs_gpu
def test_two_ranks_on_one_card_over_gloo(whole_run, cache, tmp_path, note):
    config = make_config(**STEADY, schedule=WHOLE["schedule"])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    env = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = tmp_path / "run"
    ranks = [launch(config, cache, run, True, RANK=str(rank), **env) for rank in range(2)]
    assert_ends(*ranks)
    assert json.loads((run / "env.json").read_text())["processes"] == 2
    assert note("losses", largest(run_losses(run), run_losses(whole_run))) <= 2e-4
