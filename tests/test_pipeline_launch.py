"""Which worker: flags, then torchrun and accelerate, then a SLURM array, else alone."""

import pytest

from cache_tools.errors import UsageError
from pipeline.launch import launched

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, (None, None, None), (0, 1, None)),
        ({}, (2, 5, "cpu"), (2, 5, "cpu")),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (None, None, None), (3, 8, None)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}, (None, None, "cpu"), (3, 8, "cpu")),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (0, 2, None), (0, 2, None)),
        (dict(zip(NAMES[3:], "315", strict=True)), (None, None, None), (2, 5, None)),
    ],
)
def test_place(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], flags: tuple, expected: tuple) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched(*flags) == expected


def test_one_flag_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="both or neither"):
        launched(1, None, None)
