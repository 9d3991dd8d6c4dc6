"""Golden figures: losses and weights of short runs, and the bytes of a small DATASET and CACHE, kept in tests/data.

`python tests/test_golden.py` computes them anew, prints what changed, and stores them.
"""

import hashlib
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from conftest import tree_digest  # before torch is imported: it sets the number of threads

# isort: split
import pytest
import torch
from make_cache import make_cache
from make_dataset import make_dataset
from make_extract import make_extracted, make_place
from test_mcm_finetune import config as finetune_config
from test_mcm_pretrain import make_config

from mcm import checkpoint
from mcm.finetune import finetune
from mcm.pretrain import pretrain

STORED = Path(__file__).parent / "data" / "golden.json"
SCHEDULE = {"epochs": 5, "warmup_epochs": 1}  # of 4 steps each
TRAIN = {"micro_batch": 32, "log_steps": 1, "eval_epochs": 0, "checkpoint_steps": 0}
PRETRAIN = {mode: {"mask": {"mode": mode}} for mode in ("channel", "dropout", "patch", "none")}
PRETRAIN["accumulated"] = {"train": TRAIN | {"micro_batch": 16}}
RUNS, FILES = [*PRETRAIN, "finetune"], ["dataset", "int8", "float16"]


def here() -> dict[str, str]:
    """What the last bits depend on besides this code."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = ("torch", "timm", "open_clip_torch", "numpy", "pillow", "simplejpeg")
    return {name: version(name) for name in names} | {
        "cpu": next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def train(name: str, folder: Path) -> dict[str, object]:
    """The losses of 20 steps and of the last evaluation, and the final weights by their digest and mean magnitude."""
    if name == "finetune":
        config = finetune_config(schedule=SCHEDULE, train=TRAIN)
        finetune(config, make_dataset(folder / "data", 128).path, "random", None, folder / "run")
    else:
        config = make_config(**{"schedule": SCHEDULE, "train": TRAIN} | PRETRAIN[name])
        pretrain(config, make_cache(folder / "cache", 128).path, folder / "run")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = lines[-1]["eval"]
    losses = [line["loss"] for line in lines[:-1]] + [evaluated.get("loss_full", evaluated.get("loss"))]
    model = sorted(checkpoint.latest(folder / "run", optimizer=False).model.items())
    data = b"".join(tensor.numpy().tobytes() for _, tensor in model)
    magnitude = torch.cat([tensor.double().abs().flatten() for _, tensor in model]).mean()
    return {"numbers": [float(x).hex() for x in (*losses, magnitude)], "weights": hashlib.sha256(data).hexdigest()}


def files(folder: Path) -> dict[str, dict[str, str]]:
    """sha256 of every file of a DATASET and of two CACHEs, written by the commands."""
    place = make_place(folder)
    make_extracted(place, "int8")
    make_extracted(place, "float16", dtype="float16")
    for name in FILES[1:]:
        (place / name / "extract.toml").unlink()  # it names this folder
    return {name: tree_digest(place / name) for name in FILES}


@pytest.fixture(scope="module")
def stored() -> dict[str, object]:
    return json.loads(STORED.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_weights_are_the_stored_ones(name, stored, tmp_path):
    found, expected = train(name, tmp_path), stored["runs"][name]
    if stored["here"] == here():
        assert found == expected
    else:  # another CPU or library rounds the last bits differently
        numbers = [[float.fromhex(x) for x in figures["numbers"]] for figures in (found, expected)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def test_bytes_of_files_are_the_stored_ones(stored, tmp_path):
    if stored["here"] != here():
        pytest.skip("the stored digests are those of another CPU or of other libraries")
    assert files(tmp_path) == stored["files"]


def flat(value: object, place: str = "") -> dict[str, object]:
    """The leaves of nested dicts and lists by their place."""
    if not isinstance(value, dict | list):
        return {place: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {at: leaf for key, part in items for at, leaf in flat(part, f"{place}/{key}").items()}


def regenerate() -> None:
    """Store the figures of this code and print what changed."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "here": here(),
            "files": files(Path(folder, "files")),
            "runs": {name: train(name, Path(folder, name)) for name in RUNS},
        }
    old, new = flat(json.loads(STORED.read_text())), flat(found)
    for place in sorted(old.keys() | new.keys()):
        if old.get(place) != new.get(place):
            print(f"{place}: {old.get(place)} -> {new.get(place)}", file=sys.stderr)
    STORED.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    regenerate()
