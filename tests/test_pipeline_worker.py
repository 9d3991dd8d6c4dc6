"""Which worker: flags, then torchrun and accelerate, then SLURM's steps and arrays, else one worker."""

import os

import pytest
import torch

from cache_tools.errors import UsageError
from pipeline.worker import WorkerInfo, worker_info

ALONE = (None, None, None)
STEP = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "5"}


@pytest.fixture(autouse=True)
def eight_cores_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if "RANK" in name or name.startswith(("SLURM_", "WORLD_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, ALONE, (0, 1, None, 1, 6)),  # two cores are left for the system and the parent
        ({}, (*ALONE, None, 3), (0, 1, None, 2, 3)),
        ({}, (2, 5, "cpu"), (2, 5, "cpu", 8, 1)),
        ({}, (2, 5, "cuda:1", 7), (2, 5, "cuda:1", 7, 6)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (*ALONE, 8, 1), (3, 8, None, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, ALONE, (3, 8, "cuda:1", 2, 2)),
        (
            {"RANK": "3", "WORLD_SIZE": "32", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "32"},
            ALONE,
            (3, 32, "cuda:1", 1, 1),
        ),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, (0, 2, "cpu"), (0, 2, "cpu", 8, 1)),
        (ARRAY, ALONE, (2, 5, None, 1, 6)),
        (STEP, ALONE, (5, 8, "cuda:1", 2, 1)),
        (STEP | {"SLURM_LOCALID": "3", "SLURM_CPUS_PER_TASK": "6"}, ALONE, (5, 8, "cuda:1", 1, 4)),
        (STEP | ARRAY, ALONE, (21, 40, "cuda:1", 2, 1)),
        ({"SLURM_NTASKS": "8"}, ALONE, (0, 1, None, 1, 6)),  # a shell of salloc, where no step runs
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: tuple, expected: tuple) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)  # `mcm-train doctor` sets the last one in its process
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert worker_info(*flags) == expected


def test_on_a_cpu_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert worker_info() == (0, 1, None, 8, 1)


def test_processes_are_workers_of_their_own() -> None:
    parts = [WorkerInfo(rank, 2, "cuda:1", 4, 3).split() for rank in range(2)]
    assert [(one.worker, one.workers) for one in sum(parts, [])] == [(k, 6) for k in range(6)]
    assert {one[2:4] for one in sum(parts, [])} == {("cuda:1", 4)}


@pytest.mark.parametrize(("worker", "workers", "said"), [(1, None, "both or neither"), (2, 2, "found 2 of 2")])
def test_odd_flags_are_refused(worker: int, workers: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        worker_info(worker, workers)
