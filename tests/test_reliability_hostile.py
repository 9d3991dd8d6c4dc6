"""Hostile files through our real entry points under an audit hook: declared errors, bounded memory, nothing else."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from make_cache import make_cache, reseal
from make_dataset import make_dataset
from make_run import make_run
from make_teacher import make_teacher
from safetensors.torch import save as safetensors_bytes
from test_house import FILES
from test_pipeline_shard import picture
from test_reliability_sources import BAD_TARS, BIG, END, bombs, member

from cache_tools.cache import Cache
from cache_tools.records import sha256_hex
from cache_tools.tars import INDEX_DTYPE, encode_npy
from cache_tools.zarr_shards import array_json

Hostile = Iterator[tuple[str, str, Path]]  # name, entry point of open_hostile.py, path
GROWN_MIB = 200


class Payload:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def copies(good: Path, box: Path, changes: dict[str, Callable[[Path], object]]) -> Iterator[tuple[str, Path]]:
    for number, (name, change) in enumerate(changes.items()):
        folder = box / f"{good.name}-{number}"
        shutil.copytree(good, folder)
        change(folder)
        yield f"{good.name}: {name}", folder


# What any file that holds text or a record may be instead.
NO_TEXT: dict[str, bytes] = {
    "empty": b"",
    "no text": b"\xff\xfe\x00\xd8",
    "a list": b"[1, 2]\n",
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "NaN": b'{"sha256": "", "x": NaN}\n',
    "a number of 5,000 digits": b'{"sha256": ' + b"9" * 5000 + b"}",
    "half a surrogate": b'{"sha256": "\\ud800"}\n',
    "a pickle": pickle.dumps({"a": 1}),
}


def no_text(path: Path, label: str, box: Path, kind: str) -> Hostile:
    """`path`, inside a good folder, replaced by each of NO_TEXT, by a terabyte of nothing and by a folder."""
    good = path.parent if path.parent != box else path
    for number, (name, data) in enumerate(NO_TEXT.items()):
        folder = box / f"{label}-text-{number}"
        shutil.copytree(good, folder)
        (folder / path.name).write_bytes(data)
        yield f"{label}: {name}", kind, folder
    folder = box / f"{label}-terabyte"
    shutil.copytree(good, folder)
    os.truncate(folder / path.name, 1 << 40)
    yield f"{label}: a terabyte", kind, folder


def tars(box: Path) -> Hostile:
    links = {tarfile.SYMTYPE: "a.jpg", tarfile.LNKTYPE: "b.jpg", tarfile.FIFOTYPE: "c.jpg", tarfile.CHRTYPE: "d.jpg"}
    png = member("good.png", picture(0))
    files = {name: data + END for name, (data, _) in BAD_TARS.items()}
    files |= {
        "links and devices": png + b"".join(member(name, kind=kind) for kind, name in links.items()) + END,
        "names that leave": png + member("../../../up.jpg", b"x") + member("/abs.jpg", b"x") + END,
        "a hidden pickle": png + member("good.cls", pickle.dumps(3)) + END,
    }
    for number, (name, data) in enumerate(files.items()):
        path = box / f"{number}.tar"
        path.write_bytes(data)
        yield f"tar: {name}", "shard", path
    with open(box / "sparse.tar", "wb") as file:
        file.write(png + member("big.jpg", size=BIG))
        file.truncate(BIG + 4096)
    yield "tar: a member of 8 GiB", "shard", box / "sparse.tar"
    (box / "pictures" / "a").mkdir(parents=True)
    bombs(box / "pictures" / "a")
    yield "bombs", "shard", box / "pictures"


def datasets(box: Path) -> Hostile:
    good = make_dataset(box / "dataset", rows=20, val_rows=4).path

    def record(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        return lambda folder: reseal(folder / "dataset.json", change)

    def index(data: bytes) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            (folder / "train/000000.index.npy").write_bytes(data)
            shard = lambda payload: payload["splits"]["train"]["shards"][0]  # noqa: E731
            reseal(folder / "dataset.json", lambda payload: shard(payload).update(index_sha256=sha256_hex(data)))

        return change

    def place(**fields: int) -> bytes:
        array = np.load(good / "train/000000.index.npy").copy()
        for name, value in fields.items():
            array[name] = value
        return encode_npy(array)

    objects = io.BytesIO()
    np.save(objects, np.array([Payload(box / "canary")], object), allow_pickle=True)
    npy = encode_npy(np.zeros(20, INDEX_DTYPE))
    arrays = {
        "objects": objects.getvalue(),
        "10^12 rows": npy.replace(b"(20,), }         ", b"(1000000000000,), }"[:18] + b"  "),
        "another shape": encode_npy(np.zeros((4, 5), INDEX_DTYPE)),
        "another type": encode_npy(np.zeros(20, np.float32)),
        "too few rows": encode_npy(np.zeros(3, INDEX_DTYPE)),
        "a header that is code": npy.replace(b"'<u8'", b"exit("),
        "deep parentheses": b"\x93NUMPY\1\0\xf6\x03" + b"(" * 1014,
        "a place behind the end": place(offset=1 << 63),
        "4 GiB": place(size=0xFFFFFFFF),
    }
    changes = {f"index, {name}": index(data) for name, data in arrays.items()} | {
        "a split that leaves": record(lambda p: p["splits"].update({"../../../evil": p["splits"].pop("train")})),
        "an absolute split": record(lambda p: p["splits"].update({"/tmp/evil": p["splits"].pop("train")})),
        "10^12 rows": record(lambda p: p["splits"]["train"].update(rows=10**12)),
        "10^15 rows": record(lambda p: p["splits"]["train"].update(rows=10**15)),
        "-1 rows": record(lambda p: p["splits"]["train"].update(rows=-1)),
        "no shard": record(lambda p: p["splits"]["train"].update(shards=[])),
        "shards of 0 rows": record(lambda p: p.update(rows_per_shard=0)),
        "shards of 17 rows": record(lambda p: p.update(rows_per_shard=17)),
        "another version": record(lambda p: p.update(version=2)),
        "version true": record(lambda p: p.update(version=True)),
        "another format": record(lambda p: p.update(format="mcm-cache")),
        "an unknown key": record(lambda p: p.update(run="os.system")),
    }
    for name, folder in copies(good, box, changes):
        yield name, "dataset", folder
        yield f"{name} (verify)", "verify", folder
    yield from no_text(good / "dataset.json", "dataset.json", box, "dataset")


def caches(box: Path) -> Hostile:
    good = make_cache(box / "cache", rows=20, val_rows=0, views=1).path
    unit = Cache(good).all_units()[0]
    patch = "train/v0/features.zarr/patch/zarr.json"
    zarr = json.loads(array_json(unit.specs["patch"]))

    def identity(**fields: Any) -> Callable[[Path], object]:
        return lambda folder: reseal(folder / "cache.json", lambda payload: payload.update(fields))

    def commit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        def resealed(folder: Path) -> None:
            reseal(folder / "train/v0/commits/000000.json", change)
            digest = json.loads((folder / "train/v0/commits/000000.json").read_bytes())["sha256"]
            reseal(folder / "train/v0/manifest.json", lambda payload: payload.update(commits=[digest]))

        return resealed

    def described(**fields: Any) -> Callable[[Path], object]:
        return lambda folder: (folder / patch).write_text(json.dumps(zarr | fields))

    changes = {
        "a grid of 10^10": identity(grid=[10**5, 10**5]),
        "a grid of 0": identity(grid=[0, 4]),
        "a grid of -4": identity(grid=[-4, -4]),
        "10^12 channels": identity(channels=10**12),
        "10^12 rows": identity(rows={"train": 10**12}),
        "shards of 0 rows": identity(rows_per_shard=0),
        "views of 10^6 pixels a side": identity(view_height=10**6, view_width=10**6),
        "a split that leaves": identity(rows={"../../evil": 20}),
        "objects": identity(dtype="object"),
        "an encoding": identity(view_encoding="jpeg:95:444;touch x"),
        "another codec": identity(compress="pickle"),
        "a dtype that was removed": identity(dtype="int4"),
        "no classes": identity(classes=[]),
        "zarr.json of 10^12 rows": described(shape=[10**12, 16, 16]),
        "zarr.json with pickle": described(codecs=[{"name": "numcodecs.pickle", "configuration": {}}]),
        "zarr.json of a terabyte": lambda folder: os.truncate(folder / patch, 1 << 40),
        "zarr.json, deep": lambda folder: (folder / patch).write_bytes(b"[" * 10**6),
        "a FIFO for zarr.json": lambda folder: ((folder / patch).unlink(), os.mkfifo(folder / patch)),
        "no checksums": commit(lambda p: p.update(chunk_crc32c={})),
        "too few checksums": commit(lambda p: p["chunk_crc32c"].update(patch=[1])),
        "negative checksums": commit(lambda p: p["chunk_crc32c"].update(patch=[-1, -1])),
        "huge checksums": commit(lambda p: p["chunk_crc32c"].update(patch=[10**30, 0])),
        "statistics of 1 channel": commit(lambda p: p.update(channel_mean=[0.0])),
        "files that leave": commit(lambda p: p["files"].update({"../../../../etc/passwd": p["files"].popitem()[1]})),
        "a file of 10^18 bytes": commit(lambda p: [entry.update(bytes=10**18) for entry in p["files"].values()]),
        "another shard": commit(lambda p: p.update(shard=10**9)),
        "no commit in the manifest": lambda f: reseal(f / "train/v0/manifest.json", lambda p: p.update(commits=[])),
        "a manifest of another split": lambda f: reseal(f / "train/v0/manifest.json", lambda p: p.update(split="val")),
    }
    for name, folder in copies(good, box, changes):
        yield name, "cache", folder
        yield f"{name} (verify)", "verify", folder
    for number, (name, data) in enumerate(NO_TEXT.items()):
        for file in ("cache.json", "train/v0/commits/000000.json", "train/v0/manifest.json", patch):
            folder = box / f"cache-text-{number}-{Path(file).name}-{len(file)}"
            shutil.copytree(good, folder)
            (folder / file).write_bytes(data)
            yield f"{file}: {name}", "cache", folder


def configs(box: Path) -> Hostile:
    texts: dict[str, bytes] = {name: data for name, data in NO_TEXT.items() if data} | {
        "deep": b"a = " + b"[" * 50_000,
        "deep tables": b"[" + b"a." * 20_000 + b"a]",
        "a date": b"[optim]\nlr = 1979-05-27\n",
        "infinity": b"[optim]\nlr = inf\n",
        "twice": b"[optim]\nlr = 1.0\nlr = 2.0\n",
        "a long key": b"a" * 60_000 + b" = 1\n",
        "a long value": b"[optim]\nlr = '" + b"x" * 60_000 + b"'\n",
        "2 MiB": b"#" * (2 << 20),
        "code": b"[optim]\nlr = \"${oc.env:HOME}\"\n\"__import__('os').system('x')\" = 1\n",
        "10^300 epochs": b"[schedule]\nepochs = 1" + b"0" * 300 + b"\n",
    }
    for number, (name, data) in enumerate(texts.items()):
        (box / f"{number}.toml").write_bytes(data)
        yield f"toml: {name}", "config", box / f"{number}.toml"


def torch_zip(path: Path, data: bytes) -> None:
    """A torch.save file whose pickle is `data`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def weights(box: Path) -> Hostile:
    box.mkdir(exist_ok=True)
    code = pickle.dumps(Payload(box.parent / "canary"), protocol=2)
    allocate = b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R."
    (box / "reduce.pt").write_bytes(code)
    torch_zip(box / "reduce-zip.pt", code)
    torch_zip(box / "allocate.pt", allocate)
    torch_zip(box / "nothing.pt", b"")
    torch.save({"a": torch.zeros(1)}, box / "legacy.pt", _use_new_zipfile_serialization=False)
    legacy = (box / "legacy.pt").read_bytes()
    (box / "legacy.pt").write_bytes(legacy[: len(legacy) // 2] + code)
    with zipfile.ZipFile(box / "constants.pt", "w") as archive:
        archive.writestr("x/constants.pkl", code)
        archive.writestr("x/data.pkl", code)
    whole = (box / "constants.pt").read_bytes()
    (box / "directory.pt").write_bytes(whole[:-40] + b"\xff" * 18 + whole[-22:])
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(box / "script.pt"))

    def tensors(header: bytes | dict[str, Any], length: int | None = None, data: bytes = b"\0" * 8) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    files = {
        "a header of 2^63 bytes": tensors(b"{}", 1 << 63),
        "a header of 1 GiB": tensors(b"{}", 1 << 30),
        "a deep header": tensors(b"[" * 100_000),
        "offsets behind the end": tensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 40]}}),
        "a huge shape": tensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}),
        "an unknown type": tensors({"a": {"dtype": "PY", "shape": [2], "data_offsets": [0, 8]}}),
        "overlap": tensors({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}),
        "negative offsets": tensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}),
        "a pickle": code,
        "nothing": b"",
    }
    for number, data in enumerate(files.values()):
        (box / f"{number}.safetensors").write_bytes(data)
    names = dict(zip((box / f"{number}.safetensors" for number in range(len(files))), files, strict=True))
    for path in sorted(box.iterdir()):
        yield f"weights: {names.get(path, path.name)}", "weights", path


def models(box: Path) -> Hostile:
    """Folders that describe a model: timm's, open_clip's and ours."""
    sound = safetensors_bytes({"a": torch.zeros(1)})
    vit, cfg = {"architecture": "vit_tiny_patch16_224"}, {"pretrained_cfg": {"input_size": [3, 32, 32]}}
    exports: dict[str, Any] = {
        "no model": {},
        "a module": {"architecture": "os.system"},
        "a place": {"architecture": "hf-hub:evil/model"},
        "a path": {"architecture": "local-dir:/etc"},
        "no ViT": {"architecture": "resnet18"},
        "unknown arguments": vit | cfg | {"model_args": {"cmd": "touch x"}},
        "wrong arguments": vit | cfg | {"model_args": {"embed_dim": "x", "img_size": []}},
        "a width of 10^9": vit | cfg | {"model_args": {"embed_dim": 10**9}},
        "wrong preprocessing": vit | {"pretrained_cfg": {"input_size": "x", "mean": 7}},
        "a loader": vit | {"pretrained_cfg": {"custom_load": True, "url": "file:///etc/passwd", "file": "/etc/passwd"}},
        "arguments that are a list": vit | {"model_args": [1]},
    }
    for number, (name, config) in enumerate(exports.items()):
        folder = box / f"export-{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors").write_bytes(sound)
        yield f"timm: {name}", "encoder", folder
    yield from no_text(box / "export-1" / "config.json", "config.json", box, "encoder")
    make_teacher(box / "clip")
    whole = json.loads((box / "clip/open_clip_config.json").read_text())["model_cfg"]
    towers: dict[str, Any] = {
        "a text": {"vision_cfg": "x"},
        "no width": {"vision_cfg": {"width": None}},
        "unknown": {"vision_cfg": {"cmd": "x"}},
        "a timm place": {"vision_cfg": {"timm_model_name": "hf-hub:evil/model", "image_size": 32}},
        "a timm download": {
            "vision_cfg": {"timm_model_name": "vit_x", "timm_model_pretrained": True, "image_size": 32}
        },
        "a patch of 0": {"vision_cfg": whole["vision_cfg"] | {"patch_size": 0}},
        "a width of 10^9": {"vision_cfg": whole["vision_cfg"] | {"width": 10**9}},
        "text for a width": {"embed_dim": "16"},
        "wrong mean": {"preprocess_cfg": {"mean": "x"}},
    }
    for number, (name, change) in enumerate(towers.items()):
        folder = box / f"clip-{number}"
        folder.mkdir()
        payload = {"model_cfg": whole | change, "preprocess_cfg": change.get("preprocess_cfg", {})}
        (folder / "open_clip_config.json").write_text(json.dumps(payload))
        yield f"open_clip: {name}", "teacher", folder
    yield from no_text(box / "clip" / "open_clip_config.json", "open_clip_config.json", box, "teacher")


def runs(box: Path) -> Hostile:
    good = make_run(box / "run")
    step = "checkpoints/step_000000003"

    def state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        return lambda folder: reseal(folder / step / "state.json", change)

    def model(data: bytes) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            (folder / step / "model.safetensors").write_bytes(data)
            entry = {"bytes": len(data), "sha256": sha256_hex(data)}
            reseal(folder / step / "state.json", lambda payload: payload["files"].update({"model.safetensors": entry}))

        return change

    changes = {
        "no files": state(lambda p: p.update(files={})),
        "another step": state(lambda p: p.update(step=-3)),
        "a file of 10^18 bytes": state(lambda p: p["files"]["model.safetensors"].update(bytes=10**18)),
        "a pickle for tensors": model(pickle.dumps(Payload(box / "canary"))),
        "a hostile header": model(struct.pack("<Q", 1 << 62) + b"{}"),
        "other tensors": model(safetensors_bytes({"a": torch.zeros(1)})),
        "no state": lambda folder: (folder / step / "state.json").write_bytes(b"[" * 10**5),
        "a pickle for run.json": lambda folder: (folder / "run.json").write_bytes(pickle.dumps(1)),
        "a list for run.json": lambda folder: (folder / "run.json").write_bytes(b"[]"),
        "another kind": lambda folder: reseal(folder / "run.json", lambda p: p.update(kind="finetune")),
        "no config": lambda folder: reseal(folder / "run.json", lambda p: p.update(config={"train": {}})),
        "a config that is no table": lambda folder: reseal(
            folder / "run.json", lambda p: p.update(config={"train": 1})
        ),
        "10^12 channels": lambda folder: reseal(folder / "run.json", lambda p: p.update(channels=10**12)),
    }
    for name, folder in copies(good, box, changes):
        yield name, "checkpoint", folder
        yield f"{name} (encoder)", "encoder", folder


# What an input that is not refused may say for itself: it is what it seems, or its lie is only found by reading it.
SOUND = re.compile(
    r"tar: (links and devices|names that leave|a member of 8 GiB)|bombs|\(verify\)$|cache: (no classes|.*encoding)"
    r"|run: (a pickle for run|a list for run|another kind|no config|a config that|10\^12 channels|other tensors)[^(]*$"
    r"|cache: files that leave|cache: a file of 10|timm: a loader|weights: legacy.pt"
)


@pytest.mark.slow
def test_nothing_hostile_runs_writes_or_grows(tmp_path, tally):
    inputs = []
    for make in (tars, datasets, caches, configs, weights, models, runs):
        box = tmp_path / "in" / make.__name__
        box.mkdir(parents=True)
        inputs += [(name, kind, str(path)) for name, kind, path in make(box)]
    sound = tmp_path / "in"
    good = [("dataset", sound / "datasets/dataset"), ("cache", sound / "caches/cache"), ("encoder", sound / "runs/run")]
    good += [("verify", sound / "datasets/dataset"), ("verify", sound / "caches/cache")]
    good += [("teacher", sound / "models/clip"), ("checkpoint", sound / "runs/run")]
    good += [("shard", sound / "good"), ("weights", sound / "good.pt"), ("config", sound / "good.toml")]
    (sound / "good/a").mkdir(parents=True)
    for number in range(3):
        (sound / f"good/a/{number}.img").write_bytes(picture(number))
    torch.save({"a": torch.zeros(1)}, sound / "good.pt")
    shutil.copy(ROOT / "configs/pretrain/demo.toml", sound / "good.toml")
    todo = {"sound": [(kind, kind, str(path)) for kind, path in good], "hostile": inputs}
    (tmp_path / "todo.json").write_text(json.dumps(todo))
    (tmp_path / "out").mkdir()
    script = ROOT / "tests" / "helpers" / "open_hostile.py"
    command = [sys.executable, str(script), str(tmp_path / "todo.json"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    ended = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(ended) == len(inputs) >= 200, done.stderr[-3000:]
    bad = [each for each in ended if each["seen"] or "UNDECLARED" in each["end"] or each["grown_mib"] > GROWN_MIB]
    bad += [each for each in ended if each["end"] == "nothing" and not SOUND.search(each["name"])]
    assert not bad, "\n".join(map(str, bad))
    assert not list(tmp_path.rglob("canary")) and len(list(tmp_path.iterdir())) == 3  # in, out, todo.json
    tally("hostile inputs", inputs=len(inputs), failures=0)


WRONG = re.compile(
    r"^import pickle|pickle\.(?:load|dump)|(?<!\.)\b(?:eval|exec)\(|extractall|shell=True|os\.system"
    r"|np\.load\(|import yaml|\byaml\."
    r"|torch\.(?:save|hub)\b|torch\.load\((?!.*weights_only=True)|trust_remote_code|\bsubprocess\b|marshal|shelve",
    re.MULTILINE,
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_of_ours_loads_code(path):
    # Two programs are started, by a list of arguments without a shell: git names our commit, and mcm-train trains.
    known = {"run_dir.py": ["subprocess"] * 2, "ablate.py": ["subprocess"] * 3}
    known["export.py"] = ["torch.save"]  # MAE's format is a pickle of tensors; it is written and never read
    assert WRONG.findall(path.read_text()) == known.get(path.name, [])
    scripts = path.read_text().count("torch.jit.load(")
    assert scripts == path.read_text().count("if is_torchscript(path):")  # the one guard before the one door


def test_the_pattern_for_code_finds_it():
    for text in ("import pickle", "torch.load(path)", "eval(x)", "tar.extractall(x)", "subprocess.run([])"):
        assert WRONG.search(text)


def test_openais_archives_are_those_of_open_clips_table():
    import open_clip

    from cache_tools.weights import OPENAI_SHA256

    table = [open_clip.get_pretrained_cfg(name, "openai").get("url", "") for name in open_clip.list_models()]
    known = {part for url in table if "/ViT-" in url for part in url.split("/") if len(part) == 64}
    assert known == OPENAI_SHA256
