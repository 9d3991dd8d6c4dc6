"""The origin of a figure: each bench writes its table with date, command, hardware and versions."""

import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # a GPU machine needs not all of them
        return None


def peak_megabytes() -> float:
    """Return the peak resident memory of this process; getrusage would include its parent's."""
    return _status_megabytes("VmHWM:")


def resident_megabytes() -> float:
    """Resident memory of this process now."""
    return _status_megabytes("VmRSS:")


def _status_megabytes(name: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) / 1024


def write_results(out: Path | None, table: Any) -> None:
    """Write `table` as JSON to `out`, if one was asked for."""
    if out is None:
        return
    words = [word if word.startswith("bench/") else Path(word).name for word in sys.argv]
    names = (
        "torch",
        "timm",
        "open_clip_torch",
        "zarr",
        "numcodecs",
        "numpy",
        "pillow",
        "simplejpeg",
    )
    result = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *words]),
        "hardware": f"{len(os.sched_getaffinity(0))} cores of {_processor()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "table": table,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
