"""Find which worker this process is: by flags, torchrun, accelerate, srun or a SLURM array."""

import os
from typing import NamedTuple

import torch

from cache_tools.errors import UsageError

MAX_PROCESSES = 14  # by default on a GPU; each holds its own copy of the teacher


class WorkerInfo(NamedTuple):
    """The number of this worker, the number of workers, the device, and the rendering threads.

    A device of None means CUDA where it is available, else the CPU. A worker of several processes
    splits into as many workers on the same device.
    """

    worker: int = 0
    workers: int = 1
    device: str | None = None
    threads: int = 1
    processes: int = 1

    def split(self) -> list["WorkerInfo"]:
        """Return one worker per process."""
        count = self.processes
        workers, first = self.workers * count, self.worker * count
        return [self._replace(worker=first + i, workers=workers) for i in range(count)]


def worker_info(
    worker: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    processes: int | None = None,
) -> WorkerInfo:
    """Return the worker that the flags describe, else the launcher, else a single worker.

    Workers of one node share its cores, and several workers may share a GPU. By default, a worker
    has one process on a CPU, and on a GPU one per core except for two.

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
    gpus = torch.cuda.device_count()
    if device is None and local_rank is not None:
        device = f"cuda:{local_rank % gpus}" if gpus else "cpu"
    if processes is None:
        on_gpu = gpus and not (device or "cuda").startswith("cpu")
        processes = processes_per_gpu(cores) if on_gpu else 1
    return WorkerInfo(rank, size, device, threads or max(1, cores // processes), processes)


def processes_per_gpu(cores: int) -> int:
    """Return the default number of processes that share a GPU."""
    return max(1, min(cores - 2, MAX_PROCESSES))


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
