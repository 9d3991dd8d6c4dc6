"""The small files of a RUN: run.json, config.toml, env.json, exit.json and metrics.jsonl."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed import DistError

from cache_tools import storage
from cache_tools.console import StopFlag, error_line, exit_code
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import (
    CorruptionError,
    IdentityError,
    Interrupted,
    ResourceError,
    UsageError,
    check_output,
)
from cache_tools.processes import stop_with_launcher
from cache_tools.program import LAUNCHER
from cache_tools.records import (
    Absent,
    R,
    Record,
    check_utf8,
    differences,
    encode_record,
    read_json,
    read_record,
    write_toml,
)
from cache_tools.schema import CacheIdentity, installed_versions

# Fields that may change when a run is resumed: no picture, mask or learning rate depends on them.
ENGINE_FIELDS = {
    "micro_batch", "compile", "workers", "log_steps", "checkpoint_minutes", "checkpoint_steps",
    "keep_last", "eval_epochs", "knn_epochs", "track",
}  # fmt: skip


class PretrainRun(Record):
    """run.json of a pre-training run: its identity, and the format of the student's pictures.

    If `cache_sha256` differs, `cache` shows which field differs; early runs lack it. `data_sha256`
    identifies the DATASET of the k-NN evaluation; a run without a DATASET lacks it.
    """

    kind: Literal["pretrain"] = "pretrain"
    version: Literal[1] = 1
    config: dict[str, Any]
    cache_sha256: str
    units: dict[str, str]  # the sha256 of the manifest by unit, such as "train/v0"
    teacher: str
    size: tuple[int, int]
    patch: int
    grid: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    cache: Absent[CacheIdentity] = None
    data_sha256: Absent[str] = None


class ExitRecord(Record):
    """exit.json: the exit code of the last command, because a launcher replaces every code by 1.

    The code is None while the command runs, and stays None if the system kills the command.
    """

    code: int | None
    message: str


def identity_config(config: Record) -> dict[str, Any]:
    """Return a config without ENGINE_FIELDS."""
    return config.model_dump(mode="json", exclude={"train": ENGINE_FIELDS})


def recorded_config(cls: type[R], config: dict[str, Any]) -> R:
    """Return the config of a run.json, with the defaults of ENGINE_FIELDS.

    Raises: ValueError or LookupError if `config` is not a valid `cls`.
    """
    train = config["train"] | {"micro_batch": CHUNK_ROWS}  # which has no default
    return cls.model_validate_json(json.dumps(config | {"train": train}))


def claim(run_dir: Path, run: Any, cls: type[Record]) -> None:
    """Publish run.json, or check that the folder holds the same run.

    `init` may have moved, because the digest in `init_weights` identifies the weights. A command
    may omit `data`. Configuration keys that an early run lacks have the defaults of `cls`.

    Raises: IdentityError with every field that differs if the folder holds another run.
    """
    path = run_dir / "run.json"
    if not path.is_file():
        return storage.publish(path, encode_record(run))
    kind = recorded(run_dir).get("kind")
    if kind != run.kind:
        different = [f"kind: {run.kind!r} != {kind!r}"]
    else:
        stored = read_record(type(run), path)
        ignored = {"init"} if "sha256:" in getattr(run, "init_weights", "") else set()
        ignored |= {name for name, value in run if None in (value, getattr(stored, name))}
        with suppress(ValueError, LookupError, TypeError):  # an invalid config is shown unchanged
            config = identity_config(recorded_config(cls, stored.config))
            stored = stored.model_copy(update={"config": config})
        asked = run.model_copy(update={name: getattr(stored, name) for name in ignored})
        different = differences(asked, stored)
    if different:
        fields = f"(asked != found): {'; '.join(different)}"
        raise IdentityError(f"{run_dir} holds another run {fields}; use another --out")


def recorded(run_dir: Path) -> dict[str, Any]:
    """Return the unchecked fields of a run.json of any kind, or {} if there is no run.

    Raises: CorruptionError if run.json is not valid JSON.
    """
    path = run_dir / "run.json"
    return read_json(path) if path.is_file() else {}


def software() -> str:
    """Return the version of this package and, in a git checkout, the commit."""
    name = "masked-channel-modeling"
    version = installed_versions(name).get(name, "not installed")
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not (git := shutil.which("git")):
        return version
    command = [git, "--no-optional-locks", "-C", str(root), "describe"]
    command += ["--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{version} git {commit}" if commit else version


def write_environment(run_dir: Path, config: Record, **facts: Any) -> None:
    """Write config.toml (the resolved configuration) and env.json (versions, device, `facts`)."""
    device = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    env = {"software": software(), "python": platform.python_version(), "device": device}
    # The loaded cuDNN: LD_LIBRARY_PATH may replace the one of the wheel.
    env["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    env |= installed_versions("torch", "timm", "accelerate", "numpy", "zarr") | facts
    storage.write_atomic(run_dir / "config.toml", write_toml(config).encode())
    storage.write_atomic(run_dir / "env.json", json.dumps(env, indent=2, sort_keys=True).encode())


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of the RUN; print a warning if its file system has no locks.

    Raises: UsageError if another process trains in this RUN.
    """
    lock = storage.work_dir(run_dir) / "lock"
    with storage.try_lock(lock) as locked:
        if not locked:
            raise UsageError(f"{lock}: another process trains in {run_dir}; wait until it ends")
        if not storage.locks_work(lock.parent):
            print(f"warning: {run_dir} has no locks; do not train twice in this folder", flush=True)
        yield


def prepare(run_dir: Path, overwrite: bool) -> None:
    """Check that `run_dir` can hold a RUN; with `overwrite`, remove the RUN in it."""
    check_output(run_dir, "a RUN")
    if overwrite and run_dir.exists():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            advice = f"remove {run_dir} before you launch them"
            raise UsageError(f"--overwrite: expected one process; found several; {advice}")
        if not (run_dir / "run.json").is_file():
            found = f"found none in {run_dir}; remove it by hand"
            raise UsageError(f"--overwrite: expected a RUN (run.json); {found}")
        with run_lock(run_dir):
            storage.remove_tree(run_dir)


@contextmanager
def recorded_exit(run_dir: Path, main: bool) -> Iterator[StopFlag]:
    """Record in exit.json how the command ends: running, success, or the first error of any rank.

    The main rank holds the lock of the RUN and removes the files of killed processes. SIGTERM only
    sets the flag until exit.json is written: a launcher sends it 0.1 s after a rank has died, and
    the other ranks must still record their error.

    Raises: UsageError if another process trains in this RUN; ResourceError if the connection to a
    rank is lost.
    """
    check_utf8(run_dir)
    path = run_dir / "exit.json"

    def write(code: int | None, message: str) -> None:
        storage.write_atomic(path, encode_record(ExitRecord(code=code, message=message)))

    then = "this step is finished and saved" if main else ""
    with run_lock(run_dir) if main else nullcontext(), StopFlag(then) as stop:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # set by torchrun and accelerate launch
            stop_with_launcher(LAUNCHER)
        if main:
            storage.settle(run_dir)
            write(None, "running")
        try:
            with _lost_rank():
                yield stop
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide the error
                is_first = read_record(ExitRecord, path).code is None
                if is_first and (main or not isinstance(error, Interrupted)):
                    write(exit_code(error), f"{type(error).__name__}: {error_line(error)}")
            raise
        if main:
            write(0, "complete")


@contextmanager
def _lost_rank() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError.
        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        raise ResourceError(
            f"lost the connection to another rank ({error});"
            " the launcher names the rank that ended first; the same command resumes"
        ) from error


class Log:
    """The log of the main rank, continued after `step` (-1: from the start).

    It writes to metrics.jsonl, to TensorBoard and, by `track(values, step=step)`, to a tracker.
    Lines of later steps are removed, because these steps are repeated. `evaluated` states whether
    the evaluation at `step` is done.
    """

    def __init__(
        self, run_dir: Path, step: int, evaluated: bool, main: bool, steps_per_epoch: int,
        track: Callable[..., None],
    ) -> None:  # fmt: skip
        self.path = run_dir / "metrics.jsonl"
        self.main, self.steps_per_epoch, self.track = main, steps_per_epoch, track
        if main:
            from torch.utils.tensorboard import SummaryWriter

            self._keep_lines(step, evaluated)
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def _keep_lines(self, step: int, evaluated: bool) -> None:
        """Rewrite the log without the lines of later steps and damaged or incomplete ones."""
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(True)
            kept = [x for x in lines if x.endswith("\n") and _is_kept(x, step, evaluated)]
            storage.write_atomic(self.path, "".join(kept).encode())

    def write(self, step: int, fields: dict[str, Any]) -> None:
        """Write the fields as one JSON line, to TensorBoard and the tracker; warn of an OSError."""
        if not self.main:
            return
        epoch = round(step / self.steps_per_epoch, 4)
        try:
            storage.append_line(self.path, json.dumps({"step": step, "epoch": epoch} | fields))
            group = "eval" if "eval" in fields else "train"
            values = {f"{group}/{k}": value for k, value in fields.get("eval", fields).items()}
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
            self.track(values, step=step)
        except OSError as error:  # training continues on a full disk
            cause = error_line(error)
            print(f"warning: step {step} is not logged: {cause}; training goes on", flush=True)

    def close(self) -> None:
        """Close the TensorBoard file and its thread."""
        if self.main:
            self.board.close()


def _entry(line: str) -> dict[str, Any] | None:
    """Return a line of the log, or None if it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _is_kept(line: str, step: int, evaluated: bool) -> bool:
    if (entry := _entry(line)) is None:  # after a crash of the machine, a line may be incomplete
        print("warning: a line of metrics.jsonl is damaged; it is left out", flush=True)
        return False
    at_step = entry["step"] == step and (evaluated or "eval" not in entry)
    return bool(entry["step"] < step or at_step)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of RUN/metrics.jsonl, without an unfinished last line of a running command.

    Raises: CorruptionError that names the file and line.
    """
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    entries = [_entry(line) for line in text.split("\n")[:-1]]
    if None in entries:
        line = f"line {entries.index(None) + 1}"
        raise CorruptionError(f"{path}: {line}: expected a JSON object with a step; remove it")
    return [entry for entry in entries if entry is not None]


def last_eval(run: Path) -> dict[str, float]:
    """Return the metrics of the newest evaluation of a run, or {} if there is none."""
    evals: list[dict[str, float]] = [line["eval"] for line in read_metrics(run) if "eval" in line]
    return evals[-1] if evals else {}
