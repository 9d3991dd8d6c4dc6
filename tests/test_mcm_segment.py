"""Segmentation: UPerNet is transformers', windows are exact, a run learns, resumes to the bit and is evaluated once."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from make_scenes import CLASSES, make_ade, make_masks
from test_mcm_finetune import end_of_both
from torch import nn
from torch.nn import functional

from cache_tools.dataset import Dataset
from cache_tools.errors import IdentityError, UsageError
from cache_tools.records import encode_record
from mcm.backbones import load_encoder
from mcm.config import FinetuneConfig
from mcm.engine import engine
from mcm.export import export
from mcm.finetune import finetune
from mcm.model import encode_tokens
from mcm.report import report
from mcm.run_dir import last_eval
from mcm.sampler import EvalOrder
from mcm.scenes import SceneSource
from mcm.segment import Segmentation, Segmenter, UPerNet, pixel_loss, slide, starts
from mcm.stream import Stream, batches
from pipeline.shard import shard

UPERNET = {"head": "upernet", "channels": 8, "blocks": [1, 2, 3, 4]}


def config(segment=None, **changes):
    payload = {
        "task": "segment",
        "student": {"width": 32, "depth": 4, "heads": 2, "size": 16, "patch": 8},
        "segment": {"head": "linear", "crop": 32, "stride": 16, "scale": [0.8, 1.5]} | (segment or {}),
        "optim": {"lr": 3e-3, "layer_decay": 0.75},
        "schedule": {"epochs": 3, "warmup_steps": 2, "shape": "linear"},
        "train": {"global_batch": 4, "micro_batch": 2, "precision": "fp32", "workers": 0, "log_steps": 2},
        "drop_path": 0.1,
    }
    for section, values in changes.items():
        payload[section] = {**payload.get(section, {}), **values} if isinstance(values, dict) else values
    return FinetuneConfig.model_validate_json(json.dumps(payload))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    shard(make_masks(folder / "source", 16, 7), folder / "data")
    return Dataset(folder / "data")


def task(data, segment=None, **changes):
    settings = config(segment, **changes)
    return Segmentation(settings, data, load_encoder("random", student=settings.student))


@pytest.mark.slow
def test_upernet_equals_transformers_with_its_weights():
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    theirs = UperNetHead(transformers.UperNetConfig(hidden_size=12, num_labels=5), [16] * 4).eval()
    torch.manual_seed(0)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "var" in name else torch.randn_like(tensor) / 4)
    names = {r"psp_modules\.(\d)": r"pools.\1", "lateral_convs": "laterals", "fpn_convs": "smooths"}
    names |= {"fpn_bottleneck": "fuse", "^classifier": "classifier.1", r"\.conv\.": ".0.", "batch_norm": "1"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for theirs_name, ours in names.items():
            name = re.sub(theirs_name, ours, name)
        state[name] = tensor
    ours = UPerNet(16, 12, 5).eval()
    ours.load_state_dict(state)
    maps = [torch.randn(2, 16, side, side) for side in (28, 14, 7, 3)]
    assert torch.equal(ours(maps), theirs(maps))


@pytest.mark.parametrize("length", [32, 33, 48, 49, 100])
def test_windows_cover_every_pixel_once_or_more_and_end_at_the_border(length):
    found = starts(length, 32, 16)
    assert found[0] == 0 and found[-1] == length - 32 and len(set(found)) == len(found)
    assert max(np.diff(found), default=0) <= 16


@pytest.mark.parametrize("segment", [{}, UPERNET], ids=["linear", "upernet"])
def test_one_window_is_one_forward_and_overlaps_are_the_mean(segment, data):
    model = task(data, segment).model.eval()
    picture = torch.randint(0, 256, (80, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def logits(y, x):
        (found,) = model(picture[None, y : y + 32, x : x + 32])
        return functional.interpolate(found, (32, 32), mode="bilinear")[0]

    with torch.inference_mode():
        assert torch.equal(slide(model, picture[:32, :32], 32, 16), logits(0, 0))
        sums, counts = torch.zeros(3, 80, 50), torch.zeros(80, 50)
        for y in (0, 16, 32, 48):
            for x in (0, 16, 18):
                sums[:, y : y + 32, x : x + 32] += logits(y, x)
                counts[y : y + 32, x : x + 32] += 1
    assert torch.allclose(slide(model, picture, 32, 16), sums / counts, atol=1e-5)


def test_the_encoder_keeps_its_features_at_another_size(data):
    settings = config()
    vit = load_encoder("random", student=settings.student).model
    model = Segmenter(load_encoder("random", student=settings.student), 3, config({"crop": 16, "stride": 16}).segment)
    assert all(torch.equal(x, model.encoder.state_dict()[name]) for name, x in vit.state_dict().items())
    pixels = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    model.head = nn.Identity()
    normalized = model.backbone.normalized(pixels.permute(0, 3, 1, 2))
    expected = encode_tokens(vit.eval(), normalized)[:, 1:].transpose(1, 2).reshape(1, 32, 2, 2)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(pixels)[0], expected, atol=1e-6)
    assert task(data).model.encoder.patch_embed.img_size == (32, 32)


def test_an_ignored_pixel_adds_nothing_and_a_mask_without_labels_has_no_nan():
    logits, masks = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randint(0, 4, (2, 10, 10))
    masks[1] = 255
    whole = functional.interpolate(logits, (10, 10), mode="bilinear")
    expected = functional.cross_entropy(whole[:1], masks[:1]) / 2
    assert pixel_loss(logits, masks.byte()).item() == pytest.approx(expected.item(), rel=1e-6)
    pixel_loss(logits, torch.full_like(masks, 255)).backward()
    assert not logits.grad.any() and pixel_loss(logits, torch.full_like(masks, 255)) == 0


def test_scenes_are_a_function_of_the_seed_and_masks_move_with_pictures(data):
    source = SceneSource(data, "train", config().segment, (0.5,) * 3, 0, training=True)
    one, again, later = (source(epoch, np.arange(16), 16) for epoch in (3, 3, 4))
    assert torch.equal(one["pictures"], again["pictures"]) and torch.equal(one["masks"], again["masks"])
    assert not torch.equal(one["masks"], later["masks"])
    known, bright = one["masks"] != 255, one["pictures"].amax(-1) > 110
    agree = (bright == (one["masks"] > 0))[known].float().mean()
    assert known.float().mean() > 0.6 and agree > 0.97
    alone = source.augmented(np.zeros((9, 400, 3), np.uint8), np.zeros((9, 400), np.uint8), 1)
    assert alone[0].shape == (32, 32, 3) and alone[1].shape == (32, 32)


CASES = [{"segment": UPERNET}, pytest.param({}, marks=pytest.mark.slow)]
CASES += [pytest.param({"frozen": True}, marks=pytest.mark.slow)]


@pytest.mark.parametrize("changes", CASES, ids=["upernet", "linear", "frozen"])
def test_a_stopped_run_goes_on_to_the_bit(changes, data, tmp_path, monkeypatch):
    settings = config(**changes, train={"checkpoint_steps": 2})
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    miou = finetune(settings, data.path, "random", None, straight)
    assert miou == last_eval(straight)["miou"] and json.loads((straight / "run.json").read_bytes())["micro_batch"] == 2
    end = end_of_both(settings, data, straight, stopped, 4, monkeypatch)
    tuned = load_encoder(str(straight)).model
    assert all(torch.equal(x, end.model[f"encoder.{name}"]) for name, x in tuned.state_dict().items())
    if "frozen" in changes:
        begin = task(data).model.encoder.state_dict()
        assert all(torch.equal(x, end.model[f"encoder.{name}"]) for name, x in begin.items())


def test_it_learns_and_its_run_is_reported_exported_and_resumed_with_its_classes_only(data, tmp_path, capsys):
    run, settings = tmp_path / "run", config(schedule={"epochs": 25}, train={"eval_epochs": 0})
    miou = finetune(settings, data.path, "random", None, run)
    assert miou > 0.75 and f"miou {100 * miou:.2f} % on 7 pictures of 'val'" in capsys.readouterr().out
    table = json.loads((run / "classes.json").read_bytes())
    assert table["class"] == list(CLASSES) and miou == pytest.approx(np.mean(table["iou"]))
    table["iou"][1] = None
    (run / "classes.json").write_text(json.dumps(table))
    (cells,) = report([run], tmp_path / "report.html").values()
    assert list(cells.values()) == [{"fine-tuned, mIoU": miou}]
    html = (tmp_path / "report.html").read_text()
    assert (
        re.search(r"<tr style=\"[^\"]*rgb\([^\"]*\"><td>left</td><td>-</td></tr>", html)
        and html.count("data:image/png") == 14
    )
    assert export(run, tmp_path / "export")["num_classes"] == 0
    shutil.copytree(data.path, tmp_path / "data")
    renamed = data.record.model_copy(update={"classes": ("ground", "port", "right")})
    (tmp_path / "data" / "dataset.json").write_bytes(encode_record(renamed))
    with pytest.raises(IdentityError, match=r"classes: .*'port'.* != .*'left'"):
        finetune(settings, tmp_path / "data", "random", None, run)


@pytest.mark.parametrize(
    ("segment", "changes", "message"),
    [
        ({"crop": 36}, {}, r"segment\.crop: expected a multiple of the patch of 8x8 pixels; found 36"),
        ({"blocks": [1, 2, 3, 5], "head": "upernet"}, {}, r"segment\.blocks: expected blocks from 1 to 4"),
        ({"head": "upernet", "blocks": [1, 2, 3, 4]}, {"train": {"micro_batch": 1}}, "expected a multiple of 2 rows"),
        ({}, {"train": {"global_batch": 32}}, "too few rows for one global batch"),
    ],
)
def test_a_run_that_does_not_fit_stops_before_its_first_step(segment, changes, message, data, tmp_path):
    with pytest.raises(UsageError, match=message):
        finetune(config(segment, **changes), data.path, "random", None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("segment", "changes", "message"),
    [
        ({"crop": 5000}, {}, "less than or equal to 4096"),
        ({"stride": 33}, {}, r"segment\.stride = 33 must not exceed crop"),
        ({"blocks": [2, 2, 3, 4]}, {}, "must be four, and rise"),
        ({"scale": [2, 1]}, {}, r"segment\.scale = \[2\.0, 1\.0\] must rise"),
        ({}, {"task": "classify"}, 'segment does not belong to task = "classify"'),
        ({}, {"augment": {"mixup": 0.5}}, 'augment does not belong to task = "segment"'),
    ],
)
def test_a_section_that_does_not_fit_is_refused(segment, changes, message):
    with pytest.raises(ValueError, match=message):
        config(segment, **changes)


def test_the_tasks_of_the_dataset_and_the_configuration_agree(data, tmp_path):
    settings = config().model_copy(update={"task": "classify", "segment": None})
    with pytest.raises(UsageError, match="expected a DATASET for task = 'classify'.*found a DATASET for 'segment'"):
        finetune(settings, data.path, "random", None, tmp_path / "run")


def test_held_out_masks_without_labels_are_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Dataset, "mask", lambda *_: np.full((40, 32), 255, np.uint8))
    with pytest.raises(UsageError, match="expected labeled pixels in split 'val'"):
        finetune(config(schedule={"epochs": 1, "warmup_steps": 0}), data.path, "random", None, tmp_path / "run")


SCRIPT = """
import json, os, sys
from pathlib import Path
assert os.environ["WORLD_SIZE"] == "2"
sys.path[:0] = {path}
from test_mcm_segment import evaluated
from cache_tools.dataset import Dataset
if __name__ == "__main__":
    found = evaluated(Dataset(Path({data!r})))
    if found[0]:
        Path({out!r}).write_text(json.dumps(found[1:]))
"""


def evaluated(data):
    """Whether this is the main rank, and the metrics of an untrained model."""
    segmentation = task(data)
    segmentation.model.eval()
    with engine("fp32") as accelerator:
        order = EvalOrder(data.rows("val"), 1, 2, accelerator.num_processes, accelerator.process_index)
        with batches(Stream(order, segmentation.val), 0, len(order), 0) as items:
            found = segmentation.evaluate(items, accelerator)
        return [accelerator.is_main_process, *found]


@pytest.mark.slow
def test_two_ranks_evaluate_as_one_and_each_row_once(data, tmp_path):
    script, out = tmp_path / "ranks.py", tmp_path / "found.json"
    script.write_text(SCRIPT.format(path=sys.path, data=str(data.path), out=str(out)))
    command = [
        os.path.join(os.path.dirname(sys.executable), "accelerate"),
        "launch",
        "--multi_gpu",
        "--num_processes=2",
    ]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert json.loads(out.read_text()) == evaluated(data)[1:]


@pytest.mark.slow
def test_the_command_trains_on_ade20ks_layout(tmp_path):
    shard(make_ade(tmp_path / "ade", 8, 3), tmp_path / "data")
    sets = ["segment.crop=32", "segment.stride=21", "segment.channels=8", "student.depth=4", "student.width=32"]
    sets += ["student.heads=2", "student.size=32", "student.patch=8", "segment.blocks=[1,2,3,4]", "schedule.epochs=1"]
    sets += ["schedule.warmup_steps=1", "train.global_batch=4", "train.precision=fp32", "train.workers=0"]
    sets += ["train.compile=false"]
    command = [sys.executable, "-m", "mcm.cli", "finetune", "finetune/ade20k_vitb16", "--data", str(tmp_path / "data")]
    command += ["--init", "random", "--out", str(tmp_path / "run"), *(x for s in sets for x in ("--set", s))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "miou" in done.stdout and last_eval(tmp_path / "run").keys() == {"miou", "mean_accuracy", "pixel_accuracy"}
