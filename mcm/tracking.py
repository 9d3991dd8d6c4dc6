"""Trackers of Accelerate (wandb, MLflow, trackio): a resumed RUN continues the same tracked run."""

import os
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

from accelerate import Accelerator

from cache_tools.console import error_line
from cache_tools.errors import ResourceError, missing_package
from cache_tools.records import Record, canonical_json, leaves, read_json
from cache_tools.storage import write_atomic

PROJECT = "masked-channel-modeling"


def check_tracker(track: str | None) -> None:
    """Raises: UsageError that names the extra if the library is not installed."""
    if track is not None and find_spec(track) is None:
        raise missing_package(f'train.track = "{track}"', track, "track")


def start_tracker(
    accelerator: Accelerator, track: str | None, run_dir: Path, config: Record
) -> None:
    """Start the tracked run, or continue the run with the id in RUN/tracker.json.

    The project is that of the library's own variable, such as WANDB_PROJECT, or PROJECT. The
    configuration is sent once, because MLflow refuses a changed parameter.

    Raises: ResourceError if the library cannot start the run.
    """
    if track is None:
        return
    path = run_dir / "tracker.json"
    ids = read_json(path) if path.is_file() else {}
    known = ids.get(track)
    if track == "mlflow":  # it makes the id; its thread sends, so a slow server delays no step
        os.environ.setdefault("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
        options = {"run_id": known, "run_name": run_dir.name}
    else:
        ids[track] = known or f"{run_dir.name}-{uuid4().hex[:8]}"
        options = {"name": ids[track], "resume": "allow"}
        options |= {"id": ids[track], "dir": str(run_dir)} if track == "wandb" else {}
    keys = {name: str(value) for name, value in leaves(config.model_dump(mode="json"))}
    project = os.environ.get(f"{track.upper()}_PROJECT", PROJECT)
    try:
        accelerator.init_trackers(project, None if known else keys, {track: options})
    except Exception as error:
        advice = "--set train.track= trains without it"
        raise ResourceError(f'train.track = "{track}": {error_line(error)}; {advice}') from error
    if accelerator.is_main_process:
        if track == "mlflow":
            ids[track] = accelerator.get_tracker(track, unwrap=True).info.run_id
        write_atomic(path, canonical_json(ids))
