"""What a model costs: its multiply-adds, and an estimate of the GPU memory that it needs."""

from itertools import compress
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mcm.config import Optim

STATES = {"adamw": 2, "lars": 1}  # float32 values of optimizer state per trained parameter


def state_bytes(model: nn.Module, optim: Optim | None = None) -> int:
    """Return the bytes of the parameters and buffers and, with `optim`, of the training state.

    Training adds a gradient, the optimizer state and the EMA for each trained parameter.
    """
    weights = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    copies = 1 + STATES[getattr(optim, "name", "adamw")] + bool(getattr(optim, "ema", 0))
    trained = sum(x.nbytes for x in model.parameters() if x.requires_grad)
    return weights + copies * trained * (optim is not None)


def activation_bytes(model: nn.Module, rows: int, bytes_each: int, train: bool = True) -> int:
    """Return an estimate of the bytes of the activations of the ViTs in `model`, for `rows` rows.

    A block of width D with M hidden units keeps 8 D + 2 M values per token for the backward pass:
    the inputs of its norms and linear layers, queries, keys, values and hidden units. Blocks that
    are not trained free them, so only the largest block counts. Heads are left out.
    """
    encoder: Any = next(module for module in model.modules() if hasattr(module, "patch_embed"))
    tokens: int = encoder.patch_embed.num_patches + getattr(encoder, "num_prefix_tokens", 0)
    blocks = [module for module in model.modules() if isinstance(module, Mlp)]
    values = [8 * block.fc1.in_features + 2 * block.fc1.out_features for block in blocks]
    trained = [block.fc1.weight.requires_grad and train for block in blocks]
    return rows * tokens * bytes_each * (sum(compress(values, trained)) or max(values, default=0))


def forward_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Return the multiply-adds of the matrix products of a forward, with those of attention."""
    # Below autocast and torch.compile, which would hide the operations.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        type(model).forward(model, *inputs)
    return int(counter.get_total_flops()) // 2


def print_estimate(state: int, activations: int, other: int = 0) -> None:
    """Print the estimate if there is a GPU; parts are in bytes."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        parts = f"weights and optimizer {state / 1e9:.1f}"
        parts += f", activations of the ViT {activations / 1e9:.1f}"
        parts += f", patch tokens {other / 1e9:.1f}" * bool(other)
        total = f"{(state + activations + other) / 1e9:.1f} of {memory / 1e9:.1f} GB"
        print(f"GPU memory: about {total} (an estimate: {parts})", flush=True)
