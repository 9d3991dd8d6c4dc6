"""The estimate of GPU memory: its exact part equals the bytes of real tensors, and it is printed where a GPU is."""

import json
from types import SimpleNamespace

import pytest
import torch
from make_run import CONFIG

from mcm.config import FinetuneOptim, PretrainConfig, Student
from mcm.finetune import make_classifier
from mcm.memory import activation_bytes, print_estimate, state_bytes
from mcm.model import MaskedChannelModel, build_encoder
from mcm.optim import build_adamw, build_optimizer

STUDENT = Student(width=32, depth=3, heads=2)


def real_bytes(model, optimizer, pictures):
    """Parameters, buffers, gradients and the state of the optimizer (without its counters) after a step."""
    model(pictures)[0].sum().backward()
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.numel() > 1]
    held = [*model.parameters(), *model.buffers(), *states]
    return sum(x.nbytes for x in held) + sum(x.grad.nbytes for x in model.parameters() if x.grad is not None)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"name": "lars", "clip_norm": 1.0}])
def test_the_bytes_of_weights_and_optimizer_are_those_of_the_tensors(frozen, options):
    optim = FinetuneOptim(lr=1e-3, **options)
    model = make_classifier(build_encoder((32, 32), 8, STUDENT), 3, "avg", 0.0, 0, frozen)
    optimizer, pictures = build_optimizer(model, optim), torch.randn(2, 3, 32, 32)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    assert real_bytes(model, optimizer, pictures) == state_bytes(model, optim)


def test_the_estimate_of_pretraining_counts_both_parts_of_the_model():
    config = PretrainConfig.model_validate_json(json.dumps(CONFIG))
    model = MaskedChannelModel(config, (4, 4), 8, 16)
    real = real_bytes(model, build_adamw(model, config.optim), torch.randn(2, 3, 32, 32))
    unused = (model.encoder_fill, model.decoder_fill)  # full inputs: no gradient, no state
    assert real == state_bytes(model, config.optim) - sum(3 * fill.nbytes for fill in unused if fill is not None)
    assert activation_bytes(model, 2, 4) > activation_bytes(model.encoder, 2, 4) > 0


def test_activations_grow_with_rows_and_bytes_and_a_frozen_encoder_keeps_one_block():
    model = build_encoder((32, 32), 8, STUDENT)
    assert activation_bytes(model, 4, 2) == 4 * 17 * 2 * 3 * (8 * 32 + 2 * 128)
    assert activation_bytes(model, 4, 2, train=False) == activation_bytes(model, 4, 2) / 3
    assert activation_bytes(model.requires_grad_(False), 4, 2) == activation_bytes(model, 4, 2, train=False)


def test_it_is_printed_where_a_gpu_is(monkeypatch, capsys):
    print_estimate(10**9, 10**9)
    assert not capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    print_estimate(10**9, 2 * 10**9, 10**9)
    wanted = (
        "about 4.0 of 80.0 GB (an estimate: weights and optimizer 1.0, activations of the ViT 2.0, patch tokens 1.0)"
    )
    assert wanted in capsys.readouterr().out
