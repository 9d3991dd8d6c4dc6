"""CUDA against the CPU: arithmetic, model, steps, stream, memory, runs, extraction and launchers.

`MCM_TEST_GPU=1 python -m pytest -rA tests/test_gpu.py` on a machine with a GPU prints the measured differences.
Without it, the tests of "cpu" run alone, which checks the tests themselves. B batch, N patches, C channels.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
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
from safetensors.torch import load_file
from test_mcm_finetune import AVERAGED, LINEAR
from test_mcm_finetune import config as finetune_config
from test_mcm_pretrain import command, make_config, metrics
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(ROOT / "bench"))
from one_step import OneStep, first_batch

from cache_tools.cache import Cache
from cache_tools.console import StopFlag
from cache_tools.errors import Interrupted
from cache_tools.quantize import channel_stats, decode, encode
from cache_tools.verify import verify
from mcm import checkpoint
from mcm.config import Target
from mcm.engine import device, engine, on_device
from mcm.export import export
from mcm.finetune import finetune
from mcm.loop import Loop
from mcm.masking import apply_fill, mask_from_pool, mask_pool
from mcm.model import MaskedChannelModel, embed_pixels
from mcm.pretrain import pretrain
from mcm.probe import probe
from mcm.run_dir import last_eval
from mcm.stream import batches
from mcm.targets import Targets
from pipeline.extract import extract
from pipeline.recompute import recompute

ASKED = os.environ.get("MCM_TEST_GPU") == "1"
needs_gpu = pytest.mark.skipif(not ASKED, reason="needs a GPU, and MCM_TEST_GPU=1 to use it")
both = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
# A library that warns on one card or version must not end the only run there.
pytestmark = pytest.mark.filterwarnings("default", "ignore:This DataLoader will create")  # 3 workers on 2 cores
STEADY = {"student": {"drop_path": 0.0}}  # what drop path drops differs between devices
EPOCHS = {"epochs": 2, "warmup_epochs": 1}
WHOLE = {"schedule": EPOCHS, **STEADY}
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


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
    """Runs inside take this device. Accelerate would keep its first choice."""
    AcceleratorState._reset_state(True)
    with mock.patch("torch.cuda.is_available", return_value=False) if device == "cpu" else nullcontext():
        yield
    AcceleratorState._reset_state(True)


def gap(found, wanted):
    """The relative L2 distance, in float64."""
    found, wanted = (torch.as_tensor(x).detach().double().cpu() for x in (found, wanted))
    return float((found - wanted).norm() / wanted.norm())


def largest(found, wanted):
    """The largest relative difference of two lists of losses."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))


def run_losses(run):
    return [line["loss"] for line in metrics(run) if "loss" in line]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """200 rows: 6 steps of 32 rows an epoch, or 12 of 16."""
    return make_cache(tmp_path_factory.mktemp("gpu") / "cache", 200).path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("gpu") / "dataset").path


@contextmanager
def stepping(config, cache, device, count, workers=0):
    """The step of a run, and `count` steps' batches on the device as Loop.run takes them."""
    with on(device), engine(config.train.precision) as accelerator:
        assert accelerator.device.type == device
        step = OneStep(config, cache, accelerator)
        end = count * step.loop.order.accumulation
        with batches(step.job.stream, 0, end, workers, device == "cuda") as loaded:
            yield step, on_device(loaded, accelerator.device)


def losses(step, items, count):
    for _ in range(count):
        step.loop.step(step.done, items, StopFlag())
        step.done += 1
    found = torch.stack(step.loop.pending)[:, 0].tolist()
    step.loop.pending.clear()
    return found


def first_losses(config, cache, device, count=10, workers=0):
    with stepping(config, cache, device, count, workers) as (step, items):
        return losses(step, items, count)


def test_a_gpu_is_seen_only_when_it_is_asked_for():
    assert torch.cuda.is_available() == ASKED


def test_convolutions_in_float32_do_not_use_tf32():
    torch.backends.cudnn.allow_tf32 = True  # the default of torch
    device()
    assert not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    with on("cpu"), engine("fp32"):
        assert not torch.backends.cudnn.allow_tf32


@both
def test_arithmetic_is_that_of_numpy(device, note):
    draw = np.random.default_rng(0)
    x_BNC = draw.standard_normal((32, 49, 64)).astype(np.float32) * np.linspace(0.1, 30, 64, dtype=np.float32)
    mean, std = channel_stats(x_BNC)
    there = [torch.from_numpy(x).to(device) for x in (x_BNC, mean, std)]
    for dtype in ("int8", "float16"):
        wanted, found = encode(dtype, x_BNC, mean, std), encode(dtype, *there, torch)
        differ = found["patch"].cpu().numpy() != wanted["patch"]
        assert note(f"{dtype} codes that differ", float(differ.mean())) <= 1e-4
        codes = torch.from_numpy(wanted["patch"]).to(device)
        decoded = decode(codes, found.get("scale"), *there[1:], xp=torch)
        assert note(f"{dtype} decoded", gap(decoded, decode(wanted["patch"], wanted.get("scale"), mean, std))) <= 1e-6
    z = x_BNC - x_BNC.mean(-1, keepdims=True, dtype=np.float64)
    z /= np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)
    assert note("layer_norm", gap(Targets(Target(), 64, 64).to(device).normalize(there[0]), z)) <= 1e-6
    pool, picks = mask_pool(0, 0, 16, 64, 0.75), draw.integers(0, 16, (32, 49))
    mask = mask_from_pool(torch.from_numpy(pool).to(device), torch.from_numpy(picks).to(device), patchwise=False)
    filled = apply_fill(there[0], mask, torch.full((64,), 5.0, device=device))
    assert np.array_equal(mask.cpu().numpy(), pool[picks])
    assert np.array_equal(filled.cpu().numpy(), np.where(pool[picks], np.float32(5), x_BNC))
    pictures, embedding = torch.from_numpy(draw.integers(0, 256, (8, 64, 64, 3))), torch.nn.Conv2d(3, 64, 16, 16)
    exact = ((pictures / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = embed_pixels(embedding.to(device), pictures.byte().to(device), MEAN, STD)
        wanted = embedding.double().cpu()(exact.double()).flatten(2).transpose(1, 2)
    assert note("patch product", gap(found, wanted)) <= 1e-6


@both
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_forward_and_gradients_are_those_of_float64(device, precision, limit, note):
    config = make_config(student={"width": 64, "heads": 1, "drop_path": 0.0})
    model = MaskedChannelModel(config, (4, 4), 8, 16, MEAN, STD)
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (32, 32, 32, 3), generator=draw)
    target, picks = torch.randn(32, 16, 16, generator=draw), torch.randint(0, 64, (32, 16), generator=draw)
    pool = torch.from_numpy(mask_pool(0, 0, 64, 64, 0.75))
    pool[:, 3] = True  # a channel that no patch shows

    def run(pictures, dtype, where):
        model.to(where, dtype).zero_grad()
        y = model(pictures.to(where), (pool.to(where), picks.to(where)))
        functional.mse_loss(y.to(dtype), target.to(where, dtype)).backward()
        return y, {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}

    exact = ((pictures.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()).permute(0, 3, 1, 2)
    with on(device), engine(precision) as accelerator, accelerator.autocast():
        convolved, _ = run(exact.float(), torch.float32, device)
        y, found = run(pictures.byte(), torch.float32, device)
    wanted_y, wanted = run(exact, torch.float64, "cpu")
    embedding = found["encoder.patch_embed.proj.weight"]
    assert embedding.any() and not embedding[3].any()
    assert note("prediction", gap(y, wanted_y)) <= limit
    assert note("prediction by a convolution", gap(convolved, wanted_y)) <= limit
    each = {name: gap(found[name], gradient) for name, gradient in wanted.items()}
    note(f"gradient furthest off, {max(each, key=each.get)}", max(each.values()))
    flat = [torch.cat([x.flatten() for x in gradients.values()]) for gradients in (found, wanted)]
    assert found.keys() == wanted.keys() and note("all gradients", gap(*flat)) <= limit


@pytest.fixture(scope="module")
def exact_losses(cache):
    """Ten float32 steps on the CPU, in micro-batches of half the size."""
    return first_losses(make_config(**STEADY, train={"micro_batch": 16}), cache, "cpu")


@both
def test_steps_have_the_losses_of_the_cpu(device, cache, exact_losses, note):
    for precision, limit in (("fp32", 1e-4), ("bf16", 1e-2), *[("fp16", 1e-2)] * (device == "cuda")):
        config = make_config(**STEADY, train={"micro_batch": 32, "precision": precision})
        assert note(precision, largest(first_losses(config, cache, device), exact_losses)) <= limit


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_never_waits_for_the_gpu(compiled, cache, exact_losses, note):
    """An operation for which the host waits raises RuntimeError."""
    config = make_config(**STEADY, train={"micro_batch": 32, "precision": "bf16", "compile": compiled})
    with stepping(config, cache, "cuda", 10) as (step, items):
        found = losses(step, items, 2)
        for pool in step.objective.pools.values():
            pool.result()  # its thread copies without pinned memory
        torch.cuda.set_sync_debug_mode("error")
        try:
            for number in range(2, 6):  # the rest of the epoch
                step.loop.step(number, items, StopFlag())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        step.done = 6
        found += losses(step, items, 4)
    assert note("losses", largest(found, exact_losses)) <= 1e-2


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True, None], ids=["eager", "compiled", "fp16"])
def test_a_stopped_run_resumes(compiled, cache, tmp_path, note):
    """Whether it is equal to the bit is reported. A compiled run compiles nothing twice."""
    precision = "fp16" if compiled is None else "bf16"
    config = make_config(schedule=EPOCHS, train={"precision": precision, "compile": bool(compiled)})
    real = Loop.step

    def step(loop, number, *rest):
        if number == 5 and loop.job.run_dir.name == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loop, number, *rest)

    with on("cuda"), torch._dynamo.config.patch(error_on_recompile=True), mock.patch.object(Loop, "step", step):
        for run in ("straight", "stopped", "stopped"):
            torch._dynamo.reset()  # another model is no recompilation
            first = run == "stopped" and not (tmp_path / run).exists()
            with pytest.raises(Interrupted) if first else nullcontext():
                pretrain(config, cache, tmp_path / run)
    logs = [run_losses(tmp_path / run) for run in ("straight", "stopped")]
    ends = [checkpoint.latest(tmp_path / run).model for run in ("straight", "stopped")]
    gaps = {name: gap(ends[1][name], x) for name, x in ends[0].items() if x.any()}
    note("equal to the bit", logs[0] == logs[1] and not any(gaps.values()))
    assert note("losses", largest(*logs)) <= 1e-3 and note("weights", max(gaps.values())) <= 1e-3


@both
def test_workers_and_their_used_memory_give_the_same_losses(device, cache):
    """In 36 steps of 3 workers, each of their 9 buffers is used four times."""
    config = make_config(train={"global_batch": 16})
    with sdpa_kernel(SDPBackend.MATH):  # the same sums in the same order
        assert first_losses(config, cache, device, 36, 0) == first_losses(config, cache, device, 36, 3)


@needs_gpu
def test_memory_does_not_grow(cache, note):
    config, found = make_config(train={"precision": "bf16", "global_batch": 16}), []
    with stepping(config, cache, "cuda", 70) as (step, items):
        for count in (21, 42):  # both end within an epoch after the first, which has three mask pools
            losses(step, items, count)
            [pool.result() for pool in step.objective.pools.values()]
            torch.cuda.synchronize()
            pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
            found.append(note(f"bytes after {step.done} steps, pinned", (torch.cuda.memory_allocated(), pinned)))
        batch = first_batch(step.job.stream, torch.device("cpu")).values()
    assert found[1][0] == found[0][0]
    assert found[1][1] <= found[0][1] + 2 * sum(x.nbytes for x in batch if torch.is_tensor(x))


@pytest.fixture(scope="module")
def whole_run(cache, data, tmp_path_factory):
    """A float32 run on the CPU with k-NN."""
    run = tmp_path_factory.mktemp("gpu") / "cpu"
    with on("cpu"):
        pretrain(make_config(**WHOLE, train={"knn_epochs": 1}), cache, run, data)
    return run


@both
def test_a_run_has_the_figures_of_the_cpu(device, whole_run, cache, data, tmp_path, note):
    with on(device):
        pretrain(make_config(**WHOLE, train={"knn_epochs": 1, "micro_batch": 32}), cache, tmp_path / "run", data)
    found, wanted = last_eval(tmp_path / "run"), last_eval(whole_run)
    assert found.keys() == wanted.keys() and {"loss_masked", "r2_full", "knn_full"} <= found.keys()
    for name, value in wanted.items():
        limit = 1.01 / 40 if name == "knn_full" else 1e-3 * max(1.0, abs(value))  # one picture of 40
        assert note(name, abs(found[name] - value)) <= limit
    ours, theirs = (load_file(run / "samples.safetensors") for run in (tmp_path / "run", whole_run))
    assert torch.equal(ours["views"], theirs["views"])
    assert note("target of samples", gap(ours["target"], theirs["target"])) <= 1e-3
    assert note("prediction of samples", gap(ours["prediction"], theirs["prediction"])) <= 2e-3


@both
def test_probes_and_the_export(device, whole_run, data, tmp_path, note):
    found = []
    for where in ("cpu", device):
        with on(where):
            found.append({result.label: result.knn for result in probe(str(whole_run), data, ["knn"], quiet=True)})
    for label in ("full", "folded"):
        assert note(label, abs(found[1][label] - found[0][label])) <= 1.01 / 40
    with on(device):
        export(whole_run, tmp_path / "out")
        loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval().to(device)
        assert loaded(torch.zeros(1, 3, 32, 32, device=device)).isfinite().all()


@both
def test_fine_tuning(device, data, tmp_path, note):
    """With mixup, EMA and drop path in bfloat16 it learns; a frozen encoder has the figures of the CPU."""
    with on(device):
        settings = finetune_config(**AVERAGED, train={"precision": "bf16"})
        assert note("top1", finetune(settings, data, "random", None, tmp_path / "averaged")) > 0.7
    for name, where in (("wanted", "cpu"), ("found", device)):
        with on(where):
            finetune(finetune_config(**LINEAR), data, "random", None, tmp_path / name)
    wanted, found = (last_eval(tmp_path / name)["loss"] for name in ("wanted", "found"))
    assert note("loss of the frozen one", abs(found / wanted - 1)) <= 1e-3


@both
def test_extraction(device, tmp_path, note):
    place = make_place(tmp_path)
    wanted = make_extracted(place, "cpu", precision="fp32", views=1)
    for name in ("one", "two"):
        make_extracted(place, name, device=device)  # a GPU's own precision is fp16
    assert tree_digest(place / "one") == tree_digest(place / "two")
    extract(request(place, begun := place / "begun", precision="fp32", views=1, splits=("val",)))
    extract(request(place, begun, precision="fp32", views=1, device=device))
    units = [Cache(path).units("train")[0] for path in (begun, wanted, place / "one")]
    found = [np.concatenate([unit.chunk(k).features() for k in range(unit.num_chunks)]) for unit in units]
    assert note("fp32", gap(found[0], found[1]) ** 2) <= 1e-5
    assert note("the default precision", gap(found[2], found[1]) ** 2) <= 1e-3
    assert not verify(begun, quiet=True).problems
    weights = str(place / "clip" / "open_clip_model.safetensors")
    for path in (begun, place / "one"):
        again = recompute(path, 16, f"open_clip:{place / 'clip'}", weights, device)
        assert not again.problems and note(f"{path.name}: 1 - cosine", 1 - again.lowest_cosine) <= 1e-3


def launched(config, cache, run, world, script="from mcm.cli import app; app()"):
    """The losses of a run by `world` processes of torchrun."""
    run.with_suffix(".py").write_text(script)
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={world}"]
    line = [sys.executable, "-m", *torchrun, str(run.with_suffix(".py")), *command(config, Cache(cache), run)[3:]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(line, env=env, text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return run_losses(run)


@needs_gpu
def test_torchrun_with_nccl_and_compiled_ddp(whole_run, cache, tmp_path, note):
    config = make_config(**WHOLE, train={"precision": "bf16", "compile": True})
    found = launched(config, cache, tmp_path / "run", 1)
    assert note("losses", largest(found, run_losses(whole_run))) <= 1e-2
    assert checkpoint.latest(tmp_path / "run").step == len(found)


@needs_gpu
def test_two_ranks_on_one_card_over_gloo(whole_run, cache, tmp_path, note):
    """Accelerate keeps the group that is there; NCCL refuses two ranks on one card."""
    start = "import os, torch\nos.environ['LOCAL_RANK'] = '0'\ntorch.distributed.init_process_group('gloo')\n"
    found = launched(make_config(**WHOLE), cache, tmp_path / "run", 2, start + "from mcm.cli import app; app()")
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    assert note("losses", largest(found, run_losses(whole_run))) <= 2e-4
