"""Every message of docs/troubleshooting.md is printed by a real command, or by the function that raises it."""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import tarfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from make_cache import make_cache, reseal
from make_dataset import make_dataset
from make_extract import make_extracted, make_place
from make_run import make_run
from make_scenes import make_coco, png, scene
from misbehave import misbehave
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import mcm.cli
import pipeline.cli
from cache_tools.console import error_line
from cache_tools.errors import McmError
from cache_tools.storage import file_sha256
from cache_tools.tars import encode_npy
from mcm import stream
from mcm.run_dir import run_lock
from mcm.sampler import Order
from pipeline.decode_pool import DecodePool
from pipeline.open_clip_teachers import _open_clip_config
from pipeline.worker_pool import run_workers

pytestmark = pytest.mark.slow
HEADINGS = re.findall(r"^\*\*`.*", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
MESSAGES = {text: line for line in HEADINGS for text in re.findall(r"`([^`]+)`", line)}

SHARD = "mcm-cache shard {} out"
EXTRACT = "mcm-cache extract dataset new --size 32 --device cpu --teacher {} --weights {}"
CLIP, FILE, VIT = "open_clip:clip", "clip/open_clip_model.safetensors", "timm:test_vit"
PRETRAIN = "mcm-train pretrain pretrain/demo --cache cache --out {} --set schedule.warmup_epochs=0"
PRETRAIN += " --set schedule.epochs={}"
DETECT = "mcm-train finetune finetune/bccd_demo --data boxes --init random --out new --set {}"
PROBE = "mcm-train probe {} --data dataset --workers 0 --input full"
LEARNED = "--set target.projection=learned --set target.norm=none"
FSDP = {"ACCELERATE_USE_FSDP": "true"}
ALONE = {"WORLD_SIZE": "1", "RANK": "0"}

# A part of each message, and the command that prints it.
COMMANDS = [
    ("splits or classes", SHARD.format("mixed")),
    ("as a word of its own", SHARD.format("words")),
    ("one folder of split", SHARD.format("twice")),
    ("FILE.json: expected", SHARD.format("coco-ids")),
    ("annotations.N.bbox", SHARD.format("coco-bbox")),
    ("folder of pictures of split", SHARD.format("coco-nowhere")),
    ("1 box-size", SHARD.format("coco-size")),
    ("1 unreadable", SHARD.format("coco-missing")),
    ("expected at most ... pictures", SHARD.format("texts")),
    ("no labels: found no .cls", SHARD.format("unlabeled-tars")),
    ("no classes.txt", SHARD.format("tars")),
    ("first request of this DATASET", "mcm-cache shard pictures dataset --seed 1"),
    ("one set of weights", EXTRACT.format(CLIP, "two.safetensors")),
    ("one mean and std for all tags", EXTRACT.format("open_clip:ViT-L-14", FILE)),
    ("--teacher-size ...", EXTRACT.format(VIT, "random --teacher-size 100")),
    ("grids differ", EXTRACT.format(CLIP, FILE + " --set patch=16")),
    ("with every token in every block", EXTRACT.format("timm:resnet10t", "random")),
    ("pools before its norm", EXTRACT.format("timm:eva02_tiny_patch14_224", "random")),
    ("or torch's without code", EXTRACT.format(CLIP, "code.pt")),
    ("expected 100 % of the encoder", EXTRACT.format(CLIP, "part.safetensors")),
    ("weights need QuickGELU", EXTRACT.format(CLIP, "openai.safetensors")),
    ("features of the probe pictures", EXTRACT.format(CLIP, FILE).replace("new", "probed")),
    ("finite features that fit", EXTRACT.format(CLIP, "large.safetensors --dtype float16")),
    ("the recorded sha256", "mcm-cache verify damaged"),
    ("expected --processes", "mcm-train doctor pretrain/demo --cache cache --processes 2"),
    ("expected a complete unit", "mcm-train pretrain pretrain/demo --cache unfinished --out new"),
    ("train.global_batch: expected", PRETRAIN.format("new", "1 --set train.global_batch=24")),
    ("too few rows", PRETRAIN.format("new", "1 --set train.global_batch=1024")),
    ("RUN holds another run", PRETRAIN.format("run", 1)),
    ("another process trains", PRETRAIN.format("locked", "1 --overwrite")),
    ("open files", SHARD.format("pictures --workers 99")),
    ("finite loss and gradient", PRETRAIN.format("new", "2 --set optim.lr=1e30")),
    ("has collapsed", PRETRAIN.format("new", f"60 {LEARNED} --set optim.lr=1e-2")),
    ("accelerate launch:", PRETRAIN.format("new", 1)),
    ("detect.size", DETECT.format("detect.size=100")),
    ("detect.window", DETECT.format("detect.window=100")),
    ("detect.global_blocks", DETECT.format("detect.window=4 --set detect.global_blocks=[100]")),
    ("expected masks in split", DETECT.format("detect.masks=true")),
    ("found a detector", PROBE.format("detector")),
    ("does not belong to task", DETECT.format("segment.stride=32")),
    ("plain vision transformer of timm", PROBE.format("timm:test_resnet --weights resnet.safetensors")),
    ("the result is not saved", PROBE.format("unwritable --method knn")),
    ("no linear probe", PROBE.format("run").replace("dataset", "two")),
    ("expected labels for every picture", PROBE.format("run").replace("dataset", "unlabeled")),
    ("expected a RUN or EXPORT", "mcm-train probe cache --corrupt noise:0.1"),
    ("--untrained: expected", PROBE.format("timm:test_vit --untrained")),
    ("expected a class token", "mcm-train probe no-cls --features cls"),
    ("expected a fine-tuned RUN", "mcm-train predict run pictures --out new"),
    ("expected at most ... of ... pictures", "mcm-train predict tuned texts --out new"),
]  # fmt: skip


def end_here(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_memory(*_: object, **__: object) -> None:
    raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


def without_shared_memory() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "get_worker_info", lambda: True)
        patch.setattr(torch.UntypedStorage, "_new_shared", full_memory)
        stream._empty((2, 2), torch.uint8)


def decode_and_die() -> None:
    with DecodePool(1) as pool:
        list(pool.map(misbehave, ["SIGKILL"]))


def train_and_die() -> None:
    with stream.batches(stream.Stream(Order(100, 16, 32, 16), end_here), 0, 6, 1) as items:
        next(items)


# What the system does to a process is asked of the function that meets it.
FUNCTIONS: list[tuple[str, Callable[[], object]]] = [
    ("taken as weights of GELU", lambda: _open_clip_config("ViT-B-32", __file__)[2]),
    ("a decoding process ended", decode_and_die),
    ("a worker process was killed", lambda: run_workers(end_here, [0], "views", "stopped")),
    ("/dev/shm: expected room", without_shared_memory),
    ("expected a live worker", train_and_die),
]


def message(part: str) -> str:
    (found,) = [text for text in MESSAGES if part in text]
    return found


def check(part: str, said: str, code: int | None = None) -> None:
    """The page's message is a part of what was said; the page names the exit codes above 2."""
    pattern = ".*".join(map(re.escape, re.split(r"\.\.\.\.?|FILE|RUN|N(?=\.bbox)", message(part))))
    assert re.search(pattern, said), f"{message(part)}\n{said}"
    named = re.search(r"\(exit (\d)\)$", MESSAGES[message(part)].strip())
    assert code is None or (int(named[1]) == code if named else code in (0, 1, 2)), (code, said)


def test_every_message_of_the_page_is_tried() -> None:
    assert sorted(message(part) for part, _ in [*COMMANDS, *FUNCTIONS]) == sorted(MESSAGES)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def make_tar(path: Path, label: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path.with_name("a.png"), png(scene(0)[0]))
    write(path.with_name(f"a.{label}"), b"1")
    with tarfile.open(path, "w") as tar:
        for name in ("a.png", f"a.{label}"):
            tar.add(path.with_name(name), name)
            path.with_name(name).unlink()


def break_coco(root: Path) -> None:
    """One COCO folder per fault."""
    for name in ("ids", "bbox", "nowhere", "size", "missing"):
        place = make_coco(root / f"coco-{name}", 2, 2)
        file = place / "annotations" / "instances_train2017.json"
        content = json.loads(file.read_text())
        if name == "ids":
            content["images"][1]["id"] = content["images"][0]["id"]
        if name == "bbox":
            content["annotations"][0]["bbox"] = ["a"]
        if name == "size":
            content["images"][0]["width"] += 1
        file.write_text(json.dumps(content))
        if name == "nowhere":
            (place / "train2017").rename(place / "elsewhere")
        if name == "missing":
            next((place / "train2017").iterdir()).unlink()


def break_weights(root: Path) -> None:
    state = load_file(root / FILE)
    save_file({**state, **{f"{key}_ema": value + 1 for key, value in state.items()}}, root / "two.safetensors")
    torch.save({"code": Path}, root / "code.pt")
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), root / "resnet.safetensors")
    save_file({"visual.proj": state["visual.proj"]}, root / "part.safetensors")
    save_file(state | {"input_resolution": torch.tensor(32)}, root / "openai.safetensors")
    save_file(state | {"visual.ln_post.bias": torch.full((32,), 1e6)}, root / "large.safetensors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("place"), 32, 16)
    picture = png(scene(0)[0])
    for name in ("mixed/train/a/1.png", "mixed/cat/1.png", "twice/val/a/1.png", "twice/validation/a/1.png"):
        write(root / name, picture)
    for number in range(40):
        write(root / f"texts/train/a/{number}.png", b"no picture")
    for name in ("words/cocotrain.tar", "words/cocoval.tar", "tars/train.tar", "tars/val.tar"):
        make_tar(root / name, "cls")
    make_tar(root / "unlabeled-tars/train.tar", "odd")
    break_coco(root)
    break_weights(root)
    for file in make_coco(root / "coco", 16, 4).glob("annotations/*.json"):
        content = json.loads(file.read_text())
        for record in content["annotations"]:
            record.update(segmentation=[], iscrowd=0)
        file.write_text(json.dumps(content))
    cache = make_cache(root / "cache", 96, 40, 1).path
    for name in ("damaged", "unfinished", "no-cls"):
        shutil.copytree(cache, root / name)
    (root / "unfinished/train/v0/manifest.json").unlink()
    tar = root / "damaged/train/v0/views/000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe", 1))
    reseal(root / "no-cls/cache.json", lambda record: record.update(has_cls=False))
    make_dataset(root / "unlabeled", 20, 20, unlabeled=True)
    make_dataset(root / "two", 2, 2)
    for name in ("run", "locked", "unwritable"):
        make_run(root / name)
    (root / "unwritable/probe").write_text("")
    probed = make_extracted(root, "probed", views=1)
    write(probed / "probe.npy", encode_npy(np.load(probed / "probe.npy") + 1))
    digest = file_sha256(probed / "probe.npy")
    reseal(probed / "probe.json", lambda record: record.update(features_sha256=digest))
    shutil.rmtree(probed / "train")
    assert run_in(root, "mcm-cache shard coco boxes").exit_code == 0
    settings = ("data.shots=0", "train.global_batch=16", "schedule.epochs=1", "schedule.warmup_epochs=0")
    tune = "mcm-train finetune finetune/demo --data dataset --init random --out tuned"
    assert run_in(root, " --set ".join([tune, *settings])).exit_code == 0
    shutil.copytree(root / "tuned", root / "detector")
    reseal(root / "detector/run.json", lambda record: record["config"].update(task="detect"))
    return root


def run_in(root: Path, line: str, **environment: str) -> Result:
    program, *words = shlex.split(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        app = {"mcm-cache": pipeline.cli.app, "mcm-train": mcm.cli.app}[program]
        return CliRunner().invoke(app, words, env=environment)


@pytest.mark.parametrize(("part", "line"), COMMANDS, ids=[part for part, _ in COMMANDS])
def test_a_command_prints_the_message(part: str, line: str, place: Path) -> None:
    environment = {"accelerate launch:": FSDP, "expected --processes": ALONE}.get(part, {})
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if part == "open files":
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit[1]))
    try:
        with run_lock(place / "locked") if part == "another process trains" else nullcontext():
            done = run_in(place, line, **environment)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        for out in ("out", "new"):
            shutil.rmtree(place / out, ignore_errors=True)
    check(part, done.output, done.exit_code)


@pytest.mark.parametrize(("part", "function"), FUNCTIONS, ids=[part for part, _ in FUNCTIONS])
def test_a_function_raises_the_message(part: str, function: Callable[[], object]) -> None:
    try:
        said = str(function())
    except McmError as error:
        check(part, error_line(error), error.exit_code)
    else:
        check(part, said)
