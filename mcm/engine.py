"""The Accelerator of a command, the device, and the copies of batches to it."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor

from cache_tools.errors import UsageError
from mcm.stream import Batch
from mcm.tracking import check_tracker

MODES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
TIMEOUT = timedelta(minutes=10)  # of collectives; ranks wait this long for the main rank's save


def device() -> torch.device:
    """Return the GPU, or the CPU without a GPU; disable TF32 convolutions."""
    torch.backends.cudnn.allow_tf32 = False  # cuDNN's default is TF32, not float32
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def engine(precision: str, track: str | None = None) -> Iterator[Accelerator]:
    """Yield an Accelerator: on the GPU if there is one, otherwise on the CPU.

    The process group ends with the block, and so does the run that `track` logs.

    Raises: UsageError if `track` is not installed, for a launcher mode other than one process or
    DDP, and for a precision that the device does not support.
    """
    check_tracker(track)
    _check_launcher()
    # timm.optim raises the limit to 1,000,000. With torch's 8, a recompile loop is reported.
    torch._dynamo.config.recompile_limit = 8
    cuda = device().type == "cuda"
    _check_precision(precision, cuda)
    mixed = "no" if precision == "fp32" else precision
    # The gradients are views of DDP's buckets, which saves a copy of each gradient.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    handlers = [InitProcessGroupKwargs(timeout=TIMEOUT), ddp]
    accelerator = Accelerator(
        mixed_precision=mixed, cpu=not cuda, log_with=track, kwargs_handlers=handlers
    )
    try:
        if (kind := accelerator.distributed_type) not in MODES:
            raise UsageError(f"accelerate launch: expected one process or DDP; found {kind}")
        yield accelerator
    finally:
        accelerator.end_training()


def _check_precision(precision: str, cuda: bool) -> None:
    """Raise UsageError, with a precision that the device supports, unless it supports this one."""
    if precision == "fp16" and not cuda:
        other, found = "bf16", "the CPU"
    elif precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(False):
        other, found = "fp16", torch.cuda.get_device_name()
    else:
        return
    raise UsageError(
        f'train.precision = "{precision}": expected a GPU that computes in {precision};'
        f" found {found}; use --set train.precision={other}"
    )


def _check_launcher() -> None:
    """Check the environment of the launcher.

    On a CPU, Accelerate silently replaces FSDP and DeepSpeed with DDP.

    Raises: UsageError that names the option to leave out.
    """
    for name in ("USE_FSDP", "USE_DEEPSPEED", "DYNAMO_BACKEND"):
        if (value := os.environ.get(f"ACCELERATE_{name}", "no").lower()) not in ("no", "false"):
            option = f"--{name.lower()}" + f" {value}" * (value != "true")
            raise UsageError(
                f"accelerate launch: expected one process or DDP; found {option}; leave it out"
                " (train.compile = true compiles the model)"
            )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on the device; row numbers stay on the host."""
    stays = {k for k, v in batch.items() if not isinstance(v, Tensor) or k == "rows"}
    return {k: v if k in stays else v.to(device, non_blocking=True) for k, v in batch.items()}


def on_device(items: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the device; on a GPU, a side stream copies the next batch meanwhile."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in items)
        return
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    previous = None
    for batch in items:
        with torch.cuda.stream(side):
            on_gpu = to_device(batch, device)
            copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(side)
        if previous is not None:
            yield _ready(*previous)
        previous = on_gpu, copied
    if previous is not None:
        yield _ready(*previous)


def _ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """Wait for the copy of a batch; keep its memory until the current stream has read it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for x in batch.values():
        if isinstance(x, Tensor) and x.is_cuda:
            x.record_stream(stream)
    return batch
