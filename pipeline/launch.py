"""Which worker this process is: by flags, `accelerate launch`, `torchrun` or a SLURM array."""

import os
from typing import NamedTuple

from cache_tools.errors import UsageError


class Place(NamedTuple):
    """This worker's number, how many there are, and its device (None: the best there is)."""

    worker: int
    workers: int
    device: str | None


def launched(worker: int | None, workers: int | None, device: str | None) -> Place:
    """Flags first, then RANK and WORLD_SIZE, then SLURM_ARRAY_TASK_*; alone otherwise.

    Raises: UsageError when only one of the flags is given.
    """
    if (worker is None) != (workers is None):
        raise UsageError("--worker and --workers: expected both or neither")
    if device is None and "LOCAL_RANK" in os.environ:
        import torch

        device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    if worker is not None and workers is not None:
        return Place(worker, workers, device)
    if "WORLD_SIZE" in os.environ:
        return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        first, last = (int(os.environ[f"SLURM_ARRAY_TASK_{end}"]) for end in ("MIN", "MAX"))
        step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        task = int(os.environ["SLURM_ARRAY_TASK_ID"])
        return Place((task - first) // step, (last - first) // step + 1, device)
    return Place(0, 1, device)
