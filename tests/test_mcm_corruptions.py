"""Corruptions: each kind does what it says, by row and seed alone, and `probe` measures val with it."""

import numpy as np
import pytest
import torch
from make_dataset import make_dataset
from make_run import make_run

from cache_tools.errors import UsageError
from cache_tools.records import read_record
from mcm.corruptions import DEFAULTS, Corruption
from mcm.probe import ProbeResult, probe

ROWS = np.array([3, 8, 5])


def pictures():
    draw = torch.Generator().manual_seed(0)
    return torch.randint(60, 196, (3, 3, 32, 32), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_row_is_corrupted_alike_in_every_batch_and_differently_by_strength(kind):
    x, corruption = pictures(), Corruption.parse(kind)
    found = corruption(x, ROWS, 0, 8)
    assert found.dtype == torch.uint8 and found.shape == x.shape and not torch.equal(found, x)
    assert torch.equal(corruption(x[1:], ROWS[1:], 0, 8), found[1:])
    assert not torch.equal(Corruption(kind, corruption.strength * 0.6)(x, ROWS, 0, 8), found)
    assert Corruption.parse(str(corruption)) == corruption


def test_each_kind_has_its_strength():
    x = pictures()
    noise = Corruption.parse("noise:0.1")(x, ROWS, 0, 8).float() - x
    assert noise.std() / 255 == pytest.approx(0.1, rel=0.05) and abs(noise.mean()) < 1
    contrast = Corruption.parse("contrast:0.5")(x, ROWS, 0, 8).float()
    assert contrast.std() == pytest.approx(x.float().std().item() / 2, rel=0.02)
    blur = [Corruption("blur", sigma)(x, ROWS, 0, 8).float().std() for sigma in (0.5, 2.0)]
    assert x.float().std() > blur[0] > blur[1]
    black = Corruption.parse("patches:0.25")(x, ROWS, 0, 8).view(3, 3, 4, 8, 4, 8).amax((1, 3, 5)) == 0
    assert (black.sum((1, 2)) == 4).all() and not torch.equal(black[0], black[1])
    assert not torch.equal(Corruption("noise", 0.1)(x, ROWS, 1, 8), Corruption("noise", 0.1)(x, ROWS, 0, 8))


def test_probe_measures_val_clean_and_corrupted_on_the_same_training_rows(tmp_path):
    data, run = make_dataset(tmp_path / "data"), make_run(tmp_path / "run")
    kinds = ["noise:1000", "contrast:1"]
    results = probe(str(run), data.path, inputs=["full"], quiet=True, workers=0, corruptions=kinds)
    assert [result.label for result in results] == ["full", "full-noise:1000", "full-contrast:1"]
    clean, noise, same = results
    assert clean == probe(str(run), data.path, inputs=["full"], quiet=True, workers=0)[0]
    assert (same.knn, same.linear) == (clean.knn, clean.linear) and noise.knn < clean.knn
    stored = run / "probe" / f"full-noise-1000-{data.sha256[:12]}.json"
    assert read_record(ProbeResult, stored) == noise


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("noize", "expected noise, blur, .*; found 'noize'; did you mean 'noise'"),
        ("noise:loud", "expected KIND:STRENGTH with 0 < STRENGTH <= 1000; found 'loud'"),
        ("patches:1.5", "0 < STRENGTH <= 1; found '1.5'"),
        ("jpeg:nan", "found 'nan'"),
    ],
)
def test_a_wrong_request_is_one_line(text, said):
    with pytest.raises(UsageError, match=f"--corrupt {text}: .*{said}"):
        Corruption.parse(text)
