"""Which worker this process is: by flags, `torchrun`, `accelerate launch`, `srun` or a SLURM array."""

import os
from typing import NamedTuple

from cache_tools.errors import UsageError


class Place(NamedTuple):
    """This worker's number, how many there are, its device (None: the best there is) and its rendering threads."""

    worker: int = 0
    workers: int = 1
    device: str | None = None
    threads: int = 1


def launched(
    worker: int | None = None, workers: int | None = None, device: str | None = None, threads: int | None = None
) -> Place:
    """The flags first, then what the launcher set; one worker where neither says otherwise.

    Workers of one node share its cores; several workers may share a GPU.

    Raises: UsageError when only one of `worker` and `workers` is given, or `worker` is out of range.
    """
    rank, size, local_rank, cores = _launcher()
    if (worker is None) != (workers is None):
        raise UsageError("--worker and --workers: expected both or neither")
    if worker is not None and workers is not None:
        rank, size = worker, workers
    if not 0 <= rank < size:
        raise UsageError(f"expected a worker from 0 to one below the number of workers; found {rank} of {size}")
    if device is None and local_rank is not None:
        import torch

        count = torch.cuda.device_count()
        device = f"cuda:{local_rank % count}" if count else "cpu"
    return Place(rank, size, device, threads or max(1, cores))


def _launcher() -> tuple[int, int, int | None, int]:
    """(rank, world size, local rank, cores of this worker), by the variables of torchrun or SLURM.

    The tasks of a step (`srun`) in a job array count on through the array.
    """
    env = {name: int(value) for name, value in os.environ.items() if value.isdecimal() and len(value) < 10}
    cores = len(os.sched_getaffinity(0))
    if env.keys() >= {"RANK", "WORLD_SIZE"}:
        return env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK"), cores // env.get("LOCAL_WORLD_SIZE", 1)
    rank, tasks, local_rank = 0, 1, env.get("SLURM_LOCALID")
    if env.keys() >= {"SLURM_PROCID", "SLURM_NTASKS"}:
        rank, tasks = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    cores = env.get("SLURM_CPUS_PER_TASK", cores // -(-tasks // env.get("SLURM_NNODES", 1)))
    if "SLURM_ARRAY_TASK_ID" not in env:
        return rank, tasks, local_rank, cores
    task, first, last = (env[f"SLURM_ARRAY_TASK_{end}"] for end in ("ID", "MIN", "MAX"))
    step = env.get("SLURM_ARRAY_TASK_STEP", 1)
    return (task - first) // step * tasks + rank, ((last - first) // step + 1) * tasks, local_rank, cores
