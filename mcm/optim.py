"""Optimizers, parameter groups, the learning rate schedule and the EMA of the weights."""

import math
import re
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from mcm.config import FinetuneOptim, Optim

NOT_DECAYED = ("cls_token", "reg_token", "pos_embed", "encoder_fill", "decoder_fill")
STEM = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices and kernels, except for NOT_DECAYED."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in NOT_DECAYED


def layer_of(name: str, num_blocks: int) -> int:
    """Return the layer of a timm ViT's parameter; in a larger model, the ViT is `encoder`.

    0 is the stem, i + 1 is block i, and num_blocks + 1 is the final norm and the head.
    """
    name = name.removeprefix("encoder.")
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block.group(1)) + 1
    return 0 if name.startswith(STEM) else num_blocks + 1


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups by layer and weight decay.

    Each group has params (name, parameter), weight_decay, lr_scale and always_adapt. The loop sets
    its lr to learning_rate(step) * lr_scale. LARS adapts the rate only of groups with matrices
    (MAE's rule). `layer_decay` requires a timm ViT.
    """
    named = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    blocks = (re.match(r"(?:encoder\.)?blocks\.(\d+)\.", name) for name, _ in named)
    top = 1 + max((int(block.group(1)) + 1 for block in blocks if block), default=0)
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in named:
        scale = 1.0 if layer_decay is None else layer_decay ** (top - layer_of(name, top - 1))
        groups[scale, decays(name, parameter)].append((name, parameter))
    return [
        {"params": params, "weight_decay": weight_decay * matrices,
         "lr_scale": scale, "always_adapt": matrices}
        for (scale, matrices), params in groups.items()
    ]  # fmt: skip


def build_adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; each group has `params` and `param_names`.

    The lr is 0 until the loop sets it.
    """
    layer_decay = optim.layer_decay if isinstance(optim, FinetuneOptim) else None
    groups = param_groups(model, optim.weight_decay, layer_decay)
    # Per step of the demo's student on 2 cores (65 ms): 6.6 ms unfused, 2.1 ms fused.
    return torch.optim.AdamW(groups, lr=0.0, betas=(optim.beta1, optim.beta2), fused=True)


def build_optimizer(model: nn.Module, optim: FinetuneOptim) -> torch.optim.Optimizer:
    """Return the optimizer that `optim` names.

    With `ema`, the state "ema" of each parameter holds its EMA, so checkpoints save and restore it.
    The EMA starts from the weights after the first step.
    """
    optimizer: torch.optim.Optimizer = build_adamw(model, optim)
    if optim.name == "lars":
        groups = param_groups(model, optim.weight_decay, optim.layer_decay)
        optimizer = Lars(groups, lr=0.0, momentum=optim.beta1)
    if optim.ema:
        optimizer.register_step_post_hook(partial(_update_ema, optim.ema))
    return optimizer


@torch.no_grad()
def _update_ema(decay: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    averaged = [(state["ema"], x) for x, state in optimizer.state.items() if "ema" in state]
    for parameter, state in optimizer.state.items():
        if "ema" not in state:
            state["ema"] = parameter.clone()
    if averaged:  # one call for all tensors, of which a ViT-B has 150
        averages, parameters = (list(tensors) for tensors in zip(*averaged, strict=True))
        torch._foreach_lerp_(averages, parameters, 1.0 - decay)


@torch.no_grad()
def swap_ema(optimizer: torch.optim.Optimizer) -> None:
    """Swap the weights and their EMA, if there is one; a second call swaps them back."""
    for parameter, state in optimizer.state.items():
        if "ema" in state:
            weights = parameter.clone()
            parameter.copy_(state["ema"])
            state["ema"].copy_(weights)


def peak_lr(optim: Optim, global_batch: int) -> float:
    """Return `optim.lr`, or `optim.blr` scaled linearly from a batch of 256 (MAE's rule)."""
    if optim.lr is not None:
        return optim.lr
    assert optim.blr is not None  # the config has exactly one of the two
    return optim.blr * global_batch / 256


def learning_rate(
    step: int, total_steps: int, warmup_steps: int, base_lr: float, min_lr: float,
    shape: str = "cosine",
) -> float:  # fmt: skip
    """Return the learning rate of a step, counted from 0.

    A linear warm-up reaches base_lr at its last step; a half cosine or a line then reaches min_lr
    at the last step of the run. With the shape "step", the rate falls to a tenth at 8/9 of the run
    and to a hundredth at 26/27.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    decays_done = sum(step >= total_steps * share for share in (8 / 9, 26 / 27))
    factors = {"cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "linear": 1.0 - progress}
    return min_lr + (base_lr - min_lr) * factors.get(shape, 0.1**decays_done)
