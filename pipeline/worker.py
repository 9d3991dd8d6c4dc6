"""Find which worker this process is: by flags, torchrun, accelerate, srun or a SLURM array."""

import os
from typing import NamedTuple

from cache_tools.errors import UsageError


class WorkerInfo(NamedTuple):
    """The number of this worker, the number of workers, the device, and the rendering threads.

    A device of None means CUDA where it is available, else the CPU.
    """

    worker: int = 0
    workers: int = 1
    device: str | None = None
    threads: int = 1


def worker_info(
    worker: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> WorkerInfo:
    """Return the worker that the flags describe, else the launcher, else a single worker.

    Workers of one node share its cores, and several workers may share a GPU.

    Raises: UsageError when only one of `worker` and `workers` is given, or when `worker` is out of
    range.
    """
    rank, size, local_rank, cores = _launcher()
    if (worker is None) != (workers is None):
        raise UsageError("--worker and --workers: expected both or neither")
    if worker is not None and workers is not None:
        rank, size = worker, workers
    if not 0 <= rank < size:
        expected = "a worker from 0 to one below the number of workers"
        raise UsageError(f"expected {expected}; found {rank} of {size}")
    if device is None and local_rank is not None:
        import torch

        count = torch.cuda.device_count()
        device = f"cuda:{local_rank % count}" if count else "cpu"
    return WorkerInfo(rank, size, device, threads or max(1, cores))


def _launcher() -> tuple[int, int, int | None, int]:
    """Return (rank, world size, local rank, cores of this worker) from torchrun or SLURM variables.

    In a job array of SLURM steps (`srun`), the ranks continue from one array task to the next.
    """
    numbers = {name: text for name, text in os.environ.items() if text.isdecimal()}
    env = {name: int(text) for name, text in numbers.items() if len(text) < 10}
    cores = len(os.sched_getaffinity(0))
    if env.keys() >= {"RANK", "WORLD_SIZE"}:
        cores //= env.get("LOCAL_WORLD_SIZE", 1)
        return env["RANK"], env["WORLD_SIZE"], env.get("LOCAL_RANK"), cores
    rank, tasks, local_rank = 0, 1, env.get("SLURM_LOCALID")
    if env.keys() >= {"SLURM_PROCID", "SLURM_NTASKS"}:
        rank, tasks = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    cores = env.get("SLURM_CPUS_PER_TASK", cores // -(-tasks // env.get("SLURM_NNODES", 1)))
    if "SLURM_ARRAY_TASK_ID" not in env:
        return rank, tasks, local_rank, cores
    task, first, last = (env[f"SLURM_ARRAY_TASK_{end}"] for end in ("ID", "MIN", "MAX"))
    step = env.get("SLURM_ARRAY_TASK_STEP", 1)
    index, count = (task - first) // step, (last - first) // step + 1
    return index * tasks + rank, count * tasks, local_rank, cores
