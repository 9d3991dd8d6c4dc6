"""The dense probe: scores equal scikit-learn's, the fit is its own optimum, memory is bounded, real data separates."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from conftest import run as run_command
from make_run import make_run
from make_scenes import CLASSES, make_ade
from safetensors.torch import save_file
from sklearn.metrics import confusion_matrix, jaccard_score
from test_mcm_finetune import config
from torch.nn import functional

from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import read_record
from mcm import dense
from mcm import dense_probe as module
from mcm.dense import confusion, most_probable, scores
from mcm.dense_probe import (
    DenseResult,
    Patches,
    choose_l2,
    collect,
    dense_probe,
    label_shares,
)
from mcm.features import FOLDS
from mcm.finetune import finetune
from mcm.report import report
from pipeline.shard import shard

K, GRID = 6, (4, 5)


def masks(count: int, size=(37, 23), seed=0, absent=()):
    draw = np.random.default_rng(seed)
    known = [k for k in range(K) if k not in absent]
    return [draw.choice([*known, 255], size).astype(np.uint8) for _ in range(count)]


@pytest.mark.parametrize("absent", [(), (2,), (0, 5)])
def test_scores_equal_scikit_learns_with_ignored_pixels_and_absent_classes(absent):
    truth, guess = masks(3, absent=absent), masks(3, seed=1, absent=absent)
    guess = [np.where(mask == 255, 1, mask) for mask in guess]
    found = sum(confusion(t, torch.from_numpy(g).long(), K) for t, g in zip(truth, guess, strict=True))
    t, g = np.stack(truth).ravel(), np.stack(guess).ravel()
    t, g = t[t != 255], g[t != 255]
    assert found.dtype == torch.int64 and found.tolist() == confusion_matrix(t, g, labels=range(K)).tolist()
    present = [k for k in range(K) if k not in absent]
    expected, result = jaccard_score(t, g, average=None, labels=present), scores(found)
    assert [result["iou"][k] for k in present] == pytest.approx(expected.tolist(), abs=1e-12)
    assert all(result["iou"][k] is None for k in absent)
    assert result["miou"] == pytest.approx(expected.mean(), abs=1e-12)
    assert result["pixel_accuracy"] == pytest.approx((t == g).mean(), abs=1e-12)
    assert result["mean_accuracy"] == pytest.approx(np.mean([(g[t == k] == k).mean() for k in present]), abs=1e-12)


@pytest.mark.parametrize("size", [(37, 23), (8, 10), (3, 2)])
def test_label_shares_are_a_histogram_of_each_patch(size):
    (mask,), (h, w) = masks(1, size), GRID
    expected = np.zeros((h * w, K))
    pixels = np.zeros(h * w)
    for i in range(size[0]):
        for j in range(size[1]):
            patch = i * h // size[0] * w + j * w // size[1]
            pixels[patch] += 1
            if mask[i, j] != 255:
                expected[patch, mask[i, j]] += 1
    shares = label_shares(mask, GRID, K)
    assert np.allclose(shares, expected / np.maximum(pixels, 1)[:, None], atol=1e-6)


def test_predict_is_torchs_bilinear_in_strips(monkeypatch):
    logits = torch.randn(K, *GRID, generator=torch.Generator().manual_seed(0))
    whole = functional.interpolate(logits[None], (37, 23), mode="bilinear")[0].argmax(0)
    monkeypatch.setattr(dense, "PIXEL_LOGITS", 5 * K * 23)
    assert (most_probable(logits, (37, 23)) == whole).float().mean() > 0.999


def blobs(pictures=20, patches=9, width=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (pictures * patches,), generator=draw)
    x = torch.randn(len(labels), width, generator=draw) + 0.7 * functional.one_hot(labels, width)
    return Patches(x, functional.one_hot(labels, 3).float(), torch.arange(pictures).repeat_interleave(patches))


def test_l2_is_chosen_on_other_pictures():
    l2, miou = choose_l2(blobs(), 0)
    assert l2 in module.L2_GRID and 0.3 < miou < 1


def scenes(count, patches=20, width=4):
    draw = torch.Generator().manual_seed(1)
    return [(row, torch.randn(patches, width, generator=draw), mask) for row, mask in enumerate(masks(count))]


def test_memory_is_bounded_by_random_patches_drawn_by_hash(monkeypatch):
    whole = collect(scenes(3), 3, GRID, K, 0)
    assert len(whole.x) == 60
    monkeypatch.setattr(module, "MAX_VALUES", 3 * 4 * 7)  # seven patches per picture
    some = collect(scenes(3), 3, GRID, K, 0)
    assert some.rows.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    positions = [(whole.x == x).all(1).nonzero().item() for x in some.x]
    assert positions == sorted(positions) and [position // 20 for position in positions] == some.rows.tolist()
    assert torch.equal(some.y, whole.y[positions])
    assert not torch.equal(collect(scenes(3), 3, GRID, K, 1).x, some.x)
    monkeypatch.setattr(module, "RANDOM_PATCHES", 5)
    assert collect(scenes(3), 3, GRID, K, 0).rows.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    monkeypatch.setattr(module, "MAX_VALUES", 1)
    assert collect(scenes(3), 3, GRID, K, 0).rows.tolist() == [0, 1, 2]


def test_a_mask_of_ignored_pixels_adds_no_patch_and_two_pictures_need_labels():
    made = [(row, tokens, np.full_like(mask, 255) if row == 1 else mask) for row, tokens, mask in scenes(3)]
    assert collect(made, 3, GRID, K, 0).rows.unique().tolist() == [0, 2]
    for few in (made[:2], made[1:2]):
        with pytest.raises(UsageError, match="expected two training pictures or more with labeled pixels"):
            collect(few, 3, GRID, K, 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    shard(make_ade(root / "ade"), root / "dataset", workers=1)
    return root / "dataset"


def test_a_run_names_its_inputs_and_keeps_them(data, tmp_path):
    run = make_run(tmp_path / "run")
    results = dense_probe(str(run), data, ["full", "folded", "masked:2"], workers=0, quiet=True)
    assert [result.input for result in results] == ["full", "folded", "masked:2"]
    assert results[1].fold_scale in FOLDS and results[0].fold_scale is None
    full = results[0]
    assert (full.train_rows, full.val_rows, full.patches, full.classes) == (20, 6, 20 * 16, CLASSES)
    assert full.weights.startswith("step_000000003 sha256:") and full.data_sha256 == Dataset(data).sha256
    kept = {record.input: record for record in (read_record(DenseResult, file) for file in (run / "dense").iterdir())}
    assert kept == {result.input: result for result in results}
    assert dense_probe(str(run), data, ["full"], workers=0, quiet=True)[0] == full  # the same bits again
    tables = report([run], tmp_path / "report.html")
    columns = {f"mIoU {one.input}": one.miou for one in results}
    assert tables == {full.data_sha256: {"run": columns}} and "mIoU masked:2" in (tmp_path / "report.html").read_text()
    untrained = dense_probe(str(run), data, ["full"], untrained=True, workers=0, quiet=True)[0]
    assert untrained.weights == "untrained" and len(list((run / "dense").iterdir())) == 4


def test_the_picture_is_told_apart_where_its_pixels_tell(data, tmp_path, capsys):
    run = make_run(tmp_path / "run", "none")
    (run / "dense").write_bytes(b"no folder")
    result, _ = dense_probe(str(run), data, workers=0, quiet=True)
    assert "warning: the result is not saved" in capsys.readouterr().err
    assert result.pixel_accuracy > 0.8 and result.miou > 0.5 and result.converged
    lines = result.model_copy(update={"iou": (0.5, None, 1.0)}).text()
    assert lines.endswith("IoU: ground 50.0  left -  right 100.0") and f"mIoU {100 * result.miou:.1f} %" in lines


def test_a_val_split_of_ignored_pixels_is_one_line(data, tmp_path, monkeypatch):
    mask = Dataset.mask
    monkeypatch.setattr(Dataset, "mask", lambda self, split, row: mask(self, split, row) | 255 * (split == "val"))
    with pytest.raises(UsageError, match="expected labeled pixels in split 'val'"):
        dense_probe(str(make_run(tmp_path / "run", "none")), data, workers=0, quiet=True)


@pytest.mark.slow
def test_the_command_prints_json_and_refuses_what_needs_labels(data, tmp_path):
    run = make_run(tmp_path / "run", "none")
    command = ["mcm-train", "probe", run, "--data", data, "--workers", "0"]
    printed, _ = json.loads(run_command(*command, "--json"))
    assert printed["miou"] > 0.5 and len(printed["iou"]) == 3
    assert "dense linear (LBFGS) mIoU" in run_command(*command)
    assert "omit these options" in run_command(*command, "--shots", "5", expect=2)
    assert "expected a RUN trained with masks" in run_command(*command, "--input", "masked:2", expect=2)


def test_a_dataset_of_the_other_task_is_one_line(data, tmp_path):
    with pytest.raises(UsageError, match="expected a DATASET for task = 'classify'.*found a DATASET for 'segment'"):
        finetune(config(), data, str(make_run(tmp_path / "run")), None, tmp_path / "out")


@pytest.mark.slow
def test_a_real_vit_knows_pets_and_a_random_one_does_not(shared_data, tmp_path):
    shard(shared_data / "downstream" / "pets-160", tmp_path / "pets")
    weights = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    (trained,) = dense_probe("timm:deit_tiny_patch16_224", tmp_path / "pets", (), weights, workers=0, quiet=True)
    torch.manual_seed(0)
    save_file(timm.create_model("deit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "random.safetensors")
    (drawn,) = dense_probe(
        "timm:deit_tiny_patch16_224", tmp_path / "pets", (), tmp_path / "random.safetensors", workers=0, quiet=True
    )
    assert trained.miou >= 0.70 and drawn.miou <= 0.30


@pytest.mark.slow
def test_real_ade_pictures_end_to_end(shared_data, tmp_path):
    root = shutil.copytree(shared_data / "downstream" / "ade20k-sample", tmp_path / "ade")
    for folder in ("images", "annotations"):
        shutil.copytree(root / folder / "validation", root / folder / "training")
    shard(root, tmp_path / "dataset", workers=1)
    result = dense_probe(str(make_run(tmp_path / "run", "none")), tmp_path / "dataset", workers=0, quiet=True)[0]
    assert len(result.classes) == 150 and result.classes[:2] == ("wall", "building, edifice")
    assert result.iou.count(None) > 100 and 0 < result.miou < 1
