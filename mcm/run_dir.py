"""The small files of a RUN folder: its identity, configuration and environment, its log, how the last command ended."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch.distributed import DistError

from cache_tools.console import StopFlag, error_line, exit_code
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import CorruptionError, IdentityError, Interrupted, ResourceError, UsageError
from cache_tools.processes import stop_with_launcher
from cache_tools.records import R, Record, check_utf8, differences, encode_record, read_json, read_record, write_toml
from cache_tools.schema import CacheIdentity
from cache_tools.storage import append_line, keep_lines, publish, settle, try_lock, work_dir, write_atomic

# What may change between two commands on one run: no picture, mask or learning rate depends on it.
ENGINE_FIELDS = {
    "micro_batch", "compile", "workers", "log_steps", "checkpoint_minutes", "checkpoint_steps", "keep_last",
    "eval_epochs", "knn_epochs",
}  # fmt: skip


class PretrainRun(Record):
    """run.json of a pre-training run: what its weights depend on, and what the student's pictures must be.

    `cache` names the field that differs where `cache_sha256` differs; older runs lack it. `data_sha256` is the DATASET
    of the k-NN probe; a run without one lacks it.
    """

    kind: Literal["pretrain"] = "pretrain"
    version: Literal[1] = 1
    config: dict[str, Any]
    cache_sha256: str
    units: dict[str, str]  # "train/v0" to the sha256 of its manifest
    teacher: str
    size: tuple[int, int]
    patch: int
    grid: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    cache: CacheIdentity | None = pydantic.Field(None, exclude_if=lambda value: value is None)
    data_sha256: str | None = pydantic.Field(None, exclude_if=lambda value: value is None)


class ExitRecord(Record):
    """exit.json: how the last command on this folder ended; a launcher turns every code into 1.

    The code is None while the command runs, and stays None when the system kills it.
    """

    code: int | None
    message: str


def identity_config(config: Record) -> dict[str, Any]:
    """A config without the fields that may change while a run goes on."""
    return config.model_dump(mode="json", exclude={"train": ENGINE_FIELDS})


def recorded_config(cls: type[R], config: dict[str, Any]) -> R:
    """The config of a run.json, whose engine fields have their defaults.

    Raises: ValueError or LookupError when it is no such config.
    """
    payload = config | {"train": config["train"] | {"micro_batch": CHUNK_ROWS}}  # it has no default
    return cls.model_validate_json(json.dumps(payload))


def claim(run_dir: Path, run: Any, cls: type[Record]) -> None:
    """Publish run.json, or check that the folder holds this very run.

    The digest in `init_weights` identifies the weights, wherever `init` lies. A command may leave out `data`.
    A run of an older version may lack keys of `cls`, the configuration: they have their defaults.
    Raises: IdentityError with every field that differs when the folder holds another run.
    """
    path = run_dir / "run.json"
    if not path.is_file():
        return publish(path, encode_record(run))
    kind, found = recorded(run_dir).get("kind"), []
    if kind != run.kind:
        found = [f"kind: {run.kind!r} != {kind!r}"]
    else:
        there = read_record(type(run), path)
        same = {"init"} if "sha256:" in getattr(run, "init_weights", "") else set()
        same |= {name for name, value in run if None in (value, getattr(there, name))}
        with suppress(ValueError, LookupError, TypeError):  # else it differs, and is shown as it is
            there = there.model_copy(update={"config": identity_config(recorded_config(cls, there.config))})
        found = differences(run.model_copy(update={name: getattr(there, name) for name in same}), there)
    if found:
        raise IdentityError(f"{run_dir} holds another run (asked != found): {'; '.join(found)}; use another --out")


def recorded(run_dir: Path) -> dict[str, Any]:
    """The fields of run.json, of either kind and not checked; empty where there is no run.

    Raises: CorruptionError when it does not read.
    """
    path = run_dir / "run.json"
    return read_json(path) if path.is_file() else {}


def versions(*packages: str) -> dict[str, str]:
    """The versions of the packages that are installed; a checkout runs without its own metadata and without zarr's."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def software() -> str:
    """The version of this package, and the commit where it lies in a git checkout."""
    found = versions("masked-channel-modeling").get("masked-channel-modeling", "not installed")
    root = Path(__file__).parents[1]
    if not (root / ".git").exists() or not (git := shutil.which("git")):
        return found
    command = [git, "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{found} git {commit}" if commit else found


def write_environment(run_dir: Path, config: Record, **facts: Any) -> None:
    """Write config.toml, the resolved configuration, and env.json: versions, device and `facts`."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    ours = {"software": software(), "python": platform.python_version(), "device": device}
    # Not the wheel's where LD_LIBRARY_PATH has another.
    ours["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    env = ours | versions("torch", "timm", "accelerate", "numpy", "zarr") | facts
    write_atomic(run_dir / "config.toml", write_toml(config).encode())
    write_atomic(run_dir / "env.json", json.dumps(env, indent=2, sort_keys=True).encode())


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the RUN's lock.

    Raises: UsageError while another process trains in this RUN.
    """
    lock = work_dir(run_dir) / "lock"
    with try_lock(lock) as ours:
        if not ours:
            raise UsageError(f"{lock}: another process trains in {run_dir}; wait until it ends")
        yield


@contextmanager
def recorded_exit(run_dir: Path, main: bool) -> Iterator[StopFlag]:
    """Keep exit.json: "running" at first, then success by the main process, or the first error of any process.

    The main process holds the RUN's lock, removes what killed ones left, and then writes. SIGTERM sets the flag
    until exit.json is written: a launcher sends it 0.1 s after a rank has died, and the others must still say why.
    Raises: UsageError while another process trains in this RUN; ResourceError where the connection to a rank is lost.
    """
    check_utf8(run_dir)
    path = run_dir / "exit.json"

    def write(code: int | None, message: str) -> None:
        write_atomic(path, encode_record(ExitRecord(code=code, message=message)))

    then = "this step is finished and saved" if main else ""
    with held(run_dir) if main else nullcontext(), StopFlag(then) as stop:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # of torchrun and accelerate launch, which start several ranks
            stop_with_launcher()
        if main:
            settle(run_dir)
            write(None, "running")
        try:
            with _lost_rank():
                yield stop
        except BaseException as error:
            with suppress(OSError):  # a full disk must not hide the error
                first = read_record(ExitRecord, path).code is None
                if first and (main or not isinstance(error, Interrupted)):
                    write(exit_code(error), f"{type(error).__name__}: {error_line(error)}")
            raise
        if main:
            write(0, "complete")


@contextmanager
def _lost_rank() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, DistError) and "gloo" not in str(error):  # gloo raises a plain RuntimeError
            raise
        message = f"lost the connection to another rank ({error}); the launcher names the rank that ended first"
        raise ResourceError(f"{message}; the same command resumes") from error


class Log:
    """metrics.jsonl and TensorBoard, continued after `step` (-1: from nothing); what came later is written again.

    `evaluated` tells whether the evaluation at `step` itself is done. Silent where it is not the main process.
    """

    def __init__(self, run_dir: Path, step: int, evaluated: bool, main: bool, steps_per_epoch: int) -> None:
        self.path, self.main, self.steps_per_epoch = run_dir / "metrics.jsonl", main, steps_per_epoch
        if main:
            from torch.utils.tensorboard import SummaryWriter

            keep_lines(self.path, lambda line: _is_kept(line, step, evaluated))
            self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, fields: dict[str, Any]) -> None:
        """One JSON line, and the same numbers on the board; where they cannot be written, a warning."""
        if not self.main:
            return
        epoch = round(step / self.steps_per_epoch, 4)
        try:
            append_line(self.path, json.dumps({"step": step, "epoch": epoch} | fields))
            for name, value in fields.get("eval", fields).items():
                self.board.add_scalar(f"{'eval' if 'eval' in fields else 'train'}/{name}", value, step)
            self.board.flush()
        except OSError as error:  # a full disk is no reason to lose what was trained
            print(f"warning: step {step} is not logged: {error_line(error)}; training goes on", flush=True)

    def close(self) -> None:
        """Close the board's file and its thread."""
        if self.main:
            self.board.close()


def _entry(line: str) -> dict[str, Any] | None:
    """A line of the log; None where it is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _is_kept(line: str, step: int, evaluated: bool) -> bool:
    if (entry := _entry(line)) is None:  # torn when the machine went down
        print("warning: a line of metrics.jsonl does not read; it is left out", flush=True)
        return False
    return bool(entry["step"] < step or (entry["step"] == step and (evaluated or "eval" not in entry)))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Lines of RUN/metrics.jsonl, without an incomplete last one, which a run may be writing.

    Raises: CorruptionError naming the file and line.
    """
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = [_entry(line) for line in text.split("\n")[:-1]]
    if None in found:
        raise CorruptionError(f"{path}: line {found.index(None) + 1}: expected a JSON object with a step; remove it")
    return [entry for entry in found if entry is not None]


def last_eval(run: Path) -> dict[str, float]:
    """The newest evaluation of a run; empty when there is none."""
    evaluations: list[dict[str, float]] = [line["eval"] for line in read_metrics(run) if "eval" in line]
    return evaluations[-1] if evaluations else {}
