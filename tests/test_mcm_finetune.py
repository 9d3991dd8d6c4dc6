"""Fine-tuning on the shared loop: it learns, resumes to the bit, and its RUN can be probed, exported and reported."""

import json
import shutil

import numpy as np
import pytest
import torch
from make_dataset import make_dataset
from safetensors.numpy import load_file
from timm.layers import DropPath
from torch import nn

from cache_tools.errors import IdentityError, Interrupted, UsageError
from mcm import checkpoint
from mcm.augment import eval_transform
from mcm.backbones import load_encoder
from mcm.classifiers import training_rows
from mcm.config import FinetuneConfig
from mcm.engine import engine
from mcm.export import export
from mcm.finetune import finetune, judged, make_classifier
from mcm.loop import STOP, Loop
from mcm.run_dir import last_eval
from mcm.sampler import EvalOrder, Order
from mcm.stream import DatasetSource, Stream, batches


def config(**changes):
    payload = {
        "student": {"width": 32, "depth": 2, "heads": 2, "size": 32, "patch": 8},
        "optim": {"lr": 3e-3, "layer_decay": 0.75},
        "schedule": {"epochs": 4, "warmup_epochs": 1},
        "train": {"global_batch": 32, "micro_batch": 16, "precision": "fp32", "workers": 0, "log_steps": 2},
        "augment": {"mixup": 0.2, "cutmix": 0.2, "smoothing": 0.1, "erasing": 0.1, "scale_min": 0.5},
        "drop_path": 0.1,
    }
    for section, values in changes.items():
        payload[section] = {**payload.get(section, {}), **values} if isinstance(values, dict) else values
    return FinetuneConfig.model_validate_json(json.dumps(payload))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def tuned(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "tuned"
    return run, finetune(config(), data.path, "random", None, run)


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line.get("loss"), line.get("eval")) for line in lines]


def end_of_both(settings, data, straight, stopped, step, monkeypatch):
    """Stop a run after `step` and resume it: it ends as the run `straight` did. Return that end."""
    with monkeypatch.context() as patch:
        real = Loop.step
        patch.setattr(Loop, "step", lambda loop, number, *rest: real(loop, number, *rest) or STOP * (number == step))
        with pytest.raises(Interrupted):
            finetune(settings, data.path, "random", None, stopped)
    finetune(settings, data.path, "random", None, stopped)
    assert losses(stopped) == losses(straight)
    ends = [checkpoint.latest(run) for run in (straight, stopped)]
    for tensors in ("model", "optimizer"):
        one, other = (getattr(end, tensors) for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return ends[0]


def test_it_learns_and_says_what_it_is(tuned):
    run, top1 = tuned
    identity = json.loads((run / "run.json").read_bytes())
    assert top1 > 0.7
    assert (identity["kind"], identity["init"], identity["classes"]) == ("finetune", "random", ["even", "odd"])
    assert json.loads((run / "exit.json").read_bytes())["code"] == 0


def test_the_last_evaluation_is_kept_for_the_report(tuned, data):
    run, top1 = tuned
    shown = load_file(run / "shown.safetensors")
    true, predicted, count = shown["confusion"].T
    assert count.sum() == data.rows("val") and count[true == predicted].sum() / count.sum() == pytest.approx(top1)
    assert np.bincount(true, count).tolist() == np.bincount(data.labels("val")).tolist()
    views = DatasetSource(data, "val", eval_transform(load_encoder(str(run))), 0)
    pictures = views(0, views.rows, len(views.rows))["pictures"].permute(0, 2, 3, 1).numpy()
    for name in ("right", "wrong"):
        facts = shown[f"{name}_facts"]
        assert ((facts[:, 0] == facts[:, 1]) == (name == "right")).all() and (np.diff(facts[:, 2]) <= 0).all()
        for picture, (label, _, _) in zip(shown[name], facts, strict=True):
            (row,) = np.flatnonzero((pictures == picture).all((1, 2, 3)))
            assert data.labels("val")[row] == label


def test_a_complete_run_that_lost_the_tail_of_its_log_is_evaluated_again(tuned, data, tmp_path):
    (run, top1), wanted = tuned, losses(tuned[0])
    shutil.copytree(run, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if "eval" not in line))
    assert finetune(config(), data.path, "random", None, tmp_path / "run") == top1
    assert losses(tmp_path / "run")[-1] == wanted[-1]


@pytest.mark.parametrize("changes", [{}, {"frozen": True}], ids=["all layers", "frozen"])
def test_a_run_resumes_wherever_its_init_lies_and_with_no_other_weights(changes, tuned, data, tmp_path, monkeypatch):
    run = tuned[0]
    settings = config(student=None, schedule={"epochs": 2}, train={"checkpoint_steps": 2}, **changes)
    top1 = finetune(settings, data.path, str(run), None, tmp_path / "out")
    kept = (tmp_path / "out" / "run.json").read_bytes()
    shutil.copytree(run, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for init in ("moved", "gone"):
        shutil.rmtree(checkpoint.complete(tmp_path / "out")[-1])
        assert finetune(settings, data.path, init, None, tmp_path / "out") == top1
        assert (tmp_path / "out" / "run.json").read_bytes() == kept
    with pytest.raises(IdentityError, match=r"init_weights: 'step_[0-9]+ sha256:"):
        finetune(settings, data.path, "out", None, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(UsageError, match="gone: expected a RUN"):
        finetune(settings, data.path, "gone", None, tmp_path / "out")


LINEAR = {"frozen": True, "optim": {"lr": 10.0, "name": "lars", "weight_decay": 0.0, "layer_decay": 1.0}}
AVERAGED = {"optim": {"lr": 3e-3, "ema": 0.8}, "drop_path": 0.2}


@pytest.mark.parametrize("changes", [LINEAR, AVERAGED], ids=["frozen", "averaged"])
def test_a_stopped_run_goes_on_to_the_bit_and_what_is_saved_is_what_was_evaluated(changes, data, tmp_path, monkeypatch):
    settings = config(**changes, train={"checkpoint_steps": 2})
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    finetune(settings, data.path, "random", None, straight)
    end_of_both(settings, data, straight, stopped, 6, monkeypatch)
    tuned = load_encoder(str(straight), head=True)
    tuned.model.eval()
    held = DatasetSource(data, "val", eval_transform(tuned), 0)
    stream = Stream(EvalOrder(len(held.rows), 1, 16), held)
    with engine("fp32") as accelerator, batches(stream, 0, len(stream.order), 0) as items:
        rows, labels, predicted, _, top5, loss = judged(tuned, items, accelerator).T
    assert rows.tolist() == held.rows.tolist()
    found = {"top1": (labels == predicted).double().mean(), "top5": top5.mean(), "loss": loss.mean()}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(last_eval(straight), rel=1e-5)


def test_the_average_leaves_training_alone(data, tmp_path):
    changes = {"train": {"checkpoint_steps": 2}, "drop_path": 0.2}
    finetune(config(**changes, optim={"ema": 0.8}), data.path, "random", None, tmp_path / "averaged")
    finetune(config(**changes), data.path, "random", None, tmp_path / "plain")
    averaged, plain = losses(tmp_path / "averaged"), losses(tmp_path / "plain")
    assert [line[:2] for line in averaged] == [line[:2] for line in plain] and averaged != plain


def test_a_frozen_encoder_does_not_move_and_its_head_learns(data, tmp_path):
    settings = config(**LINEAR, schedule={"epochs": 20}, pool="token")
    begin = load_encoder("random", student=settings.student).model.state_dict()
    run = tmp_path / "run"
    assert finetune(settings, data.path, "random", None, run) > 0.7
    found = checkpoint.latest(run)
    assert all(torch.equal(found.model[name], tensor) for name, tensor in begin.items())
    assert {name.partition("/")[0] for name in found.optimizer} == {"head.1.weight", "head.1.bias"}
    assert all(torch.equal(load_encoder(str(run)).model.state_dict()[name], tensor) for name, tensor in begin.items())
    assert export(run, tmp_path / "out")["num_classes"] == 2  # it compares timm's outputs with the run's


def test_a_frozen_run_keeps_its_micro_batch_and_ranks(data, tmp_path, monkeypatch):
    finetune(config(**LINEAR), data.path, "random", None, tmp_path)
    kept = (tmp_path / "run.json").read_bytes()
    finetune(config(**LINEAR, train={"micro_batch": 31}), data.path, "random", None, tmp_path)  # the same 16 rows
    with monkeypatch.context() as patch:
        patch.setattr("mcm.finetune.Order", lambda rows, chunk, batch, micro, world, *rest: Order(rows, 1, 64, 32, 2))
        with pytest.raises(IdentityError, match="micro_batch: 32 != 16; ranks: 2 != 1"):
            finetune(config(**LINEAR), data.path, "random", None, tmp_path)
    assert (tmp_path / "run.json").read_bytes() == kept


def test_a_frozen_encoder_stays_in_evaluation_when_the_loop_trains():
    model = load_encoder("random", student=config().student).model
    for block in model.blocks:
        block.drop_path1 = DropPath(0.9)
    model = make_classifier(model, 7, "avg", 0.0, seed=0, frozen=True).train()
    assert model.head[0].training and not any(module.training for module in model.blocks.modules())
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "head.1.weight",
        "head.1.bias",
    ]
    assert 0.005 < model.head[1].weight.std() < 0.015


def test_another_run_in_the_folder_is_refused_with_the_difference(tuned, data):
    run, _ = tuned
    with pytest.raises(IdentityError, match=r"optim\.lr: 0\.001 != 0\.003"):
        finetune(config(optim={"lr": 1e-3}), data.path, "random", None, run)


def test_shots_are_a_number_of_labels_a_class(data):
    labels = data.labels("train")
    rows = training_rows(labels, data.classes, 10, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 10]
    assert rows.tolist() != training_rows(labels, data.classes, 10, seed=1).tolist()
    with pytest.raises(UsageError, match="class 'even' has 48"):
        training_rows(labels, data.classes, 49, seed=0)


def test_copies_between_the_splits_are_told(tmp_path, capsys):
    copied = make_dataset(tmp_path / "copied", 64, 16, copies=2)
    with pytest.raises(StopIteration):  # at the first step
        finetune(config(), copied.path, "random", None, tmp_path / "run", train=lambda *_: next(iter(())))
    assert "2 of 16 pictures of 'val' are also in 'train', byte for byte, such as row 0" in capsys.readouterr().out


def test_bad_requests_stop_before_the_first_step(data, tmp_path):
    blind = make_dataset(tmp_path / "blind", 20, 20, unlabeled=True)
    with pytest.raises(UsageError, match="expected labels for every picture of 'train'"):
        finetune(config(), blind.path, "random", None, tmp_path / "a")
    with pytest.raises(UsageError, match="too few rows for one global batch"):
        finetune(config(data={"shots": 4}), data.path, "random", None, tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_the_head_begins_near_zero_and_the_norm_keeps_its_weights(pool):
    model = load_encoder("random", student=config().student).model
    nn.init.constant_(model.norm.weight, 1.5)
    model = make_classifier(model, 7, pool, 0.1, seed=0).eval()
    logits = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 7) and logits.abs().max() < 1e-2
    used, idle = (model.fc_norm, model.norm) if pool == "avg" else (model.norm, model.fc_norm)
    assert (used.weight == 1.5).all() and isinstance(idle, nn.Identity)
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)
    assert all(parameter.requires_grad for parameter in model.parameters())
