"""FSDP2, experimental: what a launch may ask of it, and tensors whole or split as its parameters are."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cache_tools.errors import UsageError

LAUNCH = "accelerate launch --use_fsdp"
# Accelerate recomputes a block without its generator's state: other paths would be dropped than the first time.
# Parameters that lie on the host were never tried.
REFUSED = ("ACTIVATION_CHECKPOINTING", "OFFLOAD_PARAMS")


def requested(precision: str) -> Any:
    """Accelerate's plugin for FSDP2 where the launcher's environment asks for it, else None.

    Raises: UsageError for version 1, and for what this software does not serve.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return None
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UsageError(f"{LAUNCH}: expected --fsdp_version 2; found {version}")
    for name in REFUSED:
        if (value := os.environ.get(f"FSDP_{name}", "false")).lower() != "false":
            raise UsageError(f"{LAUNCH}: expected --fsdp_{name.lower()} false; found {value}; leave it out")
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Accelerate's own policy would sum the gradients in bf16.
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP"),
        transformer_cls_names_to_wrap=os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "Block").split(","),
        cpu_ram_efficient_loading=False,  # every process has the same first weights, by the seed
        mixed_precision_policy=bf16 if precision == "bf16" else None,
    )


def check(model: nn.Module) -> None:
    """Raise UsageError where a parameter is not split, whatever was asked for."""
    if odd := [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]:
        raise UsageError(f"{LAUNCH}: expected every parameter to be split; {odd[0]} is whole")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered on its device where it is split: then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_host(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The tensors, split ones whole and on the host: together they could be too much for a GPU.

    With FSDP2 every process must call it; those that do not `keep` them get none.
    """
    found = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if keep:
            found[name] = gathered.cpu() if isinstance(tensor, DTensor) else tensor
    return found


def split_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as `like` is; with FSDP2 every process must call it. Itself where `like` is not split."""
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
