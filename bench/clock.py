"""Timing and memory for the benches on a GPU or a CPU: alternating variants, medians, peaks."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import peak_megabytes


def describe(device: torch.device) -> dict[str, Any]:
    """What a figure of this device depends on."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory_gb = round(properties.total_memory / 2**30)
        return {"device": properties.name, "memory_gb": memory_gb, "cuda": torch.version.cuda}
    return {"device": "cpu", "threads": torch.get_num_threads()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one call, from `repeats` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def in_turns(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int = 3,
    repeats: int = 1,
) -> dict[str, float]:
    """Return the median seconds per call of each work, after one warm-up call.

    The works alternate, because the load of a shared machine changes.
    """
    for work in works.values():
        work()
    found = [
        {name: seconds(work, device, repeats) for name, work in works.items()}
        for _ in range(rounds)
    ]
    return {name: median(one[name] for one in found) for name in works}


def reset_peak(device: torch.device) -> None:
    """Count the peak from here: of the GPU, or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Most megabytes since `reset_peak`: allocated on the GPU, or resident (VmHWM) on a CPU."""
    return round(
        torch.cuda.max_memory_allocated(device) / 2**20
        if device.type == "cuda"
        else peak_megabytes()
    )
