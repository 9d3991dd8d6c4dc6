"""The public API: exact names, a dataset for other trainers, masks of any tensor, and the examples."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_cache import features, make_cache
from torch.utils.data import DataLoader

import masked_channel_modeling
import mcm
import pipeline
from cache_tools.errors import CorruptionError, UsageError
from mcm.sampler import Order

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
API = {
    "cache_tools": ["Cache", "Dataset"],
    "mcm": ["CacheDataset", "MaskedChannelModel", "PretrainConfig", "mask_channels"],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("made") / "cache").path


@pytest.mark.parametrize("name", API)
def test_all_is_exact_and_each_name_has_a_docstring(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__all__ == API[name] and not hasattr(pipeline, "__all__")
    for public in API[name]:
        assert getattr(package, public).__name__ == public and getattr(package, public).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018
    assert all(getattr(masked_channel_modeling, each) is getattr(package, each) for each in API[name])


@pytest.mark.parametrize(("hidden", "by"), [("pipeline", "pipeline/__init__.py"), ("mcm", "mcm.py")])
def test_a_package_of_the_user_that_hides_ours_is_named_in_one_line(tmp_path: Path, hidden: str, by: str) -> None:
    (tmp_path / by).parent.mkdir(exist_ok=True)
    (tmp_path / by).write_text("raise SystemExit('the code of the user ran')")
    code = "import sys; from masked_channel_modeling import {0} as program; sys.argv[0] = '{0}'; program()"
    for program, place, paths in (("mcm_cache", tmp_path, [ROOT]), ("mcm_train", Path("/"), [tmp_path, ROOT])):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        line = [sys.executable, "-c", code.format(program), "--help"]
        done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True)
        found = f"package {hidden}: expected {ROOT / hidden}; found {tmp_path / by}; "
        assert done.returncode == 2 and done.stderr.startswith(f"error: {found}"), done.stderr
        assert len(done.stderr.splitlines()) == 1
    (tmp_path / by).rename(tmp_path / "renamed.py")  # a folder without __init__.py hides nothing
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Usage: mcm_train" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("shape", "ratio", "hidden"),
    [
        ((5, 7, 768), 0.75, 576),
        ((64,), 0.5, 32),
        ((3, 10), 0.94, 9),
        ((2, 0, 8), 0.5, 4),
        ((4, 8), 0, 0),
        ((4, 8), 1, 8),
    ],
)
def test_mask_channels_hides_the_exact_count_of_every_vector(shape: tuple[int, ...], ratio: float, hidden: int) -> None:
    x, seeded = torch.zeros(shape, dtype=torch.float16), torch.Generator().manual_seed(3)
    mask = mcm.mask_channels(x, ratio, seeded)
    assert mask.dtype == torch.bool and mask.shape == shape and (mask.sum(-1) == hidden).all()
    assert torch.equal(mask, mcm.mask_channels(x, ratio, torch.Generator().manual_seed(3)))
    if len(shape) == 3 and mask.numel():
        assert len(mask.flatten(0, 1).unique(dim=0)) == 35  # every vector has its own
    with pytest.raises(ValueError, match="from 0 to 1; found 75"):
        mcm.mask_channels(x, 75)


def test_a_cache_dataset_gives_the_training_order_with_decoded_features(cache: Path) -> None:
    data = mcm.CacheDataset(cache, batch=32, epochs=2, seed=1)
    order = Order(rows=100, rows_per_chunk=16, global_batch=32, micro_batch=32, seed=1)
    assert len(data) == 6 == len(list(data))
    batches = list(DataLoader(data, batch_size=None))
    for step, batch in enumerate(batches):
        chunks = order.slice(step)[1]
        assert batch["rows"].tolist() == [16 * chunk + i for chunk in chunks for i in range(16)]
        assert (batch["labels"] == batch["rows"] % 2).all() and batch["cls"].shape == (32, 16)
        assert batch["pictures"].dtype == torch.uint8 and batch["features"].dtype == torch.float32
        assert np.abs(batch["features"].numpy() - features(batch["pictures"].numpy())).max() < 0.2
    by_row = [{int(r): p for b in part for r, p in zip(b["rows"], b["pictures"], strict=True)}
              for part in (batches[:3], batches[3:])]  # fmt: skip
    both = by_row[0].keys() & by_row[1].keys()
    assert both and not any(torch.equal(by_row[0][row], by_row[1][row]) for row in both)  # the other view
    ranks = [mcm.CacheDataset(cache, 32, 2, seed=1, world=2, rank=rank)[4]["rows"] for rank in (0, 1)]
    assert torch.equal(torch.cat(ranks), batches[4]["rows"])


def test_a_cache_dataset_raises_what_is_wrong(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", views=1)
    with pytest.raises(UsageError, match="expected a complete unit; found no test/v0"):
        mcm.CacheDataset(cache.path, 32, split="test")
    with pytest.raises(UsageError, match="multiple of 16 rows x 1"):
        mcm.CacheDataset(cache.path, 40)
    for world, rank in ((2, 2), (2, -1), (0, 0)):  # of padding only, or an error of a division
        with pytest.raises(UsageError, match=f"0 to world - 1 = {world - 1}; found {rank}"):
            mcm.CacheDataset(cache.path, 32, world=world, rank=rank)
    unit = cache.unit("train")
    for chunk in (-1, unit.num_chunks):
        with pytest.raises(IndexError, match="expected a chunk below 7"):
            unit.chunk(chunk)
    data = mcm.CacheDataset(cache.path, 96)
    tar = cache.units("train")[0].tar(0)
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"\xff\xd8\xfe", 1))
    with pytest.raises(CorruptionError, match=r"000000\.tar"):
        data[0]
    with pytest.raises(IndexError):
        data[1]


def test_the_examples_train_and_are_short(cache: Path) -> None:  # tests/test_arms.py runs the third
    assert {path.stem: len(path.read_text().splitlines()) <= 40 for path in EXAMPLES.glob("*.py")} == {
        "own_training_loop": True, "read_cache": True, "synthetic_spectra": True
    }  # fmt: skip
    torch.manual_seed(0)
    losses = runpy.run_path(str(EXAMPLES / "own_training_loop.py"))["main"](str(cache), 60)
    assert len(losses) == 60 and np.mean(losses[-5:]) < 0.8 * losses[0]
    assert runpy.run_path(str(EXAMPLES / "synthetic_spectra.py"))["main"](100) > 0.4
