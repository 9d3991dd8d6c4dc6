"""Which parameters decay, how fast each layer learns, and the learning rate at every step."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from mcm.config import Decoder, FinetuneOptim, Mask, Optim, PretrainConfig, Schedule, Student, Train
from mcm.model import MaskedChannelModel
from mcm.optim import build_adamw, build_optimizer, learning_rate, param_groups, peak_lr, swap_ema


def tiny_model():
    cfg = PretrainConfig(
        student=Student(width=16, depth=1, heads=2),
        decoder=Decoder(depth=1),
        mask=Mask(pool=8),
        optim=Optim(lr=1e-3),
        schedule=Schedule(epochs=2),
        train=Train(global_batch=16, micro_batch=16),
    )
    return MaskedChannelModel(cfg, (2, 2), 4, 8)


def test_only_matrices_decay_and_every_trainable_parameter_is_in_one_group():
    model = tiny_model()
    groups = {g["weight_decay"]: {name for name, _ in g["params"]} for g in param_groups(model, 0.05)}
    block = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"{part}.blocks.0.{layer}.weight" for part in ("encoder", "decoder") for layer in block}
    assert groups[0.05] == matrices | {"encoder.patch_embed.proj.weight", "decoder.linear.weight"}
    assert {"encoder_fill", "decoder_fill", "encoder.cls_token", "encoder.norm.weight"} <= groups[0.0]
    assert groups[0.0] | groups[0.05] == {n for n, p in model.named_parameters() if p.requires_grad}
    assert "encoder.pos_embed" not in groups[0.0]  # frozen


def test_learned_positions_of_a_timm_model_do_not_decay():
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    decayed = {name for g in param_groups(model, 0.1) if g["weight_decay"] for name, _ in g["params"]}
    assert {"pos_embed", "cls_token"}.isdisjoint(decayed) and "head.weight" in decayed


def test_layer_decay_scales_by_the_layers_above():
    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, pre_norm=True, global_pool="avg"
    )
    scales = {name: g["lr_scale"] for g in param_groups(model, 0.05, 0.5) for name, _ in g["params"]}
    assert set(scales) == {name for name, _ in model.named_parameters()}
    for name, expected in {
        "pos_embed": 0.125,
        "patch_embed.proj.weight": 0.125,
        "norm_pre.weight": 0.125,
        "blocks.0.attn.qkv.weight": 0.25,
        "fc_norm.weight": 1.0,
        "head.weight": 1.0,
    }.items():
        assert scales[name] == expected, name


def test_adamw_takes_the_settings_and_knows_names():
    model = tiny_model()
    optimizer = build_adamw(model, Optim(lr=1e-3, beta1=0.8, beta2=0.9, weight_decay=0.3))
    names = dict(model.named_parameters())
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.9) and group["lr"] == 0.0 and group["lr_scale"] == 1.0
        assert all(names[n] is p for n, p in zip(group["param_names"], group["params"], strict=True))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    scales = {g["lr_scale"] for g in build_adamw(vit, FinetuneOptim(lr=1e-3, layer_decay=0.5)).param_groups}
    assert scales == {0.125, 0.25, 0.5, 1.0}


def steps_by_hand(weight, bias, gradients, lr):
    """MAE's LARS without decay: the matrix by its trust ratio, the bias by plain momentum."""
    seen, momenta = [], [np.zeros_like(weight), np.zeros_like(bias)]
    for gradient_w, gradient_b in gradients:
        ratio = 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradient_w)
        momenta = [0.9 * momenta[0] + ratio * gradient_w, 0.9 * momenta[1] + gradient_b]
        weight, bias = weight - lr * momenta[0], bias - lr * momenta[1]
        seen.append((weight, bias))
    return seen


def test_lars_is_maes_and_the_average_is_what_it_says():
    draw = np.random.default_rng(0)
    layer = torch.nn.Linear(5, 3)
    begin = [parameter.detach().numpy().copy() for parameter in (layer.weight, layer.bias)]
    gradients = [(draw.standard_normal((3, 5)), draw.standard_normal(3)) for _ in range(4)]
    optimizer = build_optimizer(layer, FinetuneOptim(lr=1.0, name="lars", weight_decay=0.0, ema=0.75))
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for gradient_w, gradient_b in gradients:
        layer.weight.grad, layer.bias.grad = (torch.tensor(x, dtype=torch.float32) for x in (gradient_w, gradient_b))
        optimizer.step()
    seen = steps_by_hand(*begin, gradients, 0.5)
    average = seen[0]
    for after in seen[1:]:
        average = [0.75 * old + 0.25 * new for old, new in zip(average, after, strict=True)]
    for expected in (seen[-1], average, seen[-1]):
        for parameter, value in zip((layer.weight, layer.bias), expected, strict=True):
            assert np.allclose(parameter.detach().numpy(), value, atol=1e-6)
        swap_ema(optimizer)


def test_peak_is_lr_or_blr_scaled_from_256():
    assert peak_lr(Optim(lr=3e-4), 4096) == 3e-4
    assert peak_lr(Optim(blr=1.5e-4), 4096) == pytest.approx(2.4e-3)


def test_learning_rate_warms_up_and_follows_the_cosine():
    rates = [learning_rate(step, 111, 10, 1.0, 0.1) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False)) and rates[-1] == 0.1
    assert learning_rate(0, 10, 0, 1.0, 0.0) == 1.0 and learning_rate(9, 10, 9, 1.0, 0.0) == 1.0


def test_the_other_shapes_are_a_line_and_two_steps():
    line, steps = ([learning_rate(k, 270, 10, 1.0, 0.0, shape) for k in range(270)] for shape in ("linear", "step"))
    assert line[10] == 1.0 and line[269] == 0.0 and np.allclose(np.diff(line[10:]), -1 / 259)
    assert {*steps[10:240]} == {1.0} and steps[240:260] == pytest.approx([0.1] * 20)
    assert steps[260:] == pytest.approx([0.01] * 10) and steps[:10] == line[:10]
