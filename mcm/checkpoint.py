"""Checkpoints: the model and optimizer state by name, in safetensors with sha256, without pickle.

A checkpoint is written to a temporary folder, hashed and renamed; then older ones are rotated.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from cache_tools.errors import CorruptionError, IdentityError
from cache_tools.records import FileEntry, Record, encode_record, read_record, sha256_hex
from cache_tools.remote import read_at
from cache_tools.storage import atomic_folder, remove, remove_tree, write_atomic

_NAME = re.compile(r"step_\d{9}")
_TEMPORARY = re.compile(r"\.step_\d{9}\.[0-9a-f]+\.partial")  # a name of `atomic_folder`
Tensors = dict[str, Tensor]


class State(Record):
    """state.json: the size and sha256 of the tensor files; `meta` does not depend on the ranks."""

    format: Literal["mcm-checkpoint"] = "mcm-checkpoint"
    version: Literal[1] = 1
    step: int
    files: dict[str, FileEntry]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory; `optimizer` is empty if it was not loaded."""

    path: Path
    step: int
    model_sha256: str
    model: Tensors
    optimizer: Tensors
    meta: dict[str, Any]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the optimizer state by `parameter name/slot`; names are of the unwrapped model."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{slot}"] = value
    return tensors


def on_host(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return copies of the tensors in host memory."""
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint into the unwrapped model and its optimizer, on each parameter's device.

    Raises: IdentityError if the tensor names differ from the names in the model.
    """
    parameters, state = dict(model.named_parameters()), model.state_dict()
    slots = {name.rpartition("/")[0] for name in checkpoint.optimizer}
    differ = sorted(state.keys() ^ checkpoint.model.keys()) + sorted(slots - parameters.keys())
    if differ:
        expected = f"expected the tensors of this model; {differ[0]} differs"
        raise IdentityError(f"{checkpoint.path}: {expected}; use another RUN")
    model.load_state_dict(checkpoint.model)
    optimizer.state.clear()
    for name, value in checkpoint.optimizer.items():
        owner, _, slot = name.rpartition("/")
        # Fused Adam keeps its step on the device of the parameter.
        optimizer.state[parameters[owner]][slot] = value.to(parameters[owner].device)


def folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the checkpoint of `step`."""
    return run_dir / "checkpoints" / f"step_{step:09d}"


def save(
    run_dir: Path, step: int, model: Tensors, optimizer: Tensors, meta: dict[str, Any]
) -> Path:
    """Write RUN/checkpoints/step_000001234 with {model,optimizer}.safetensors and state.json.

    The folder is renamed into place: if the process dies, it is complete or absent.

    Raises: OSError, also for an error of safetensors that states an error number.
    """
    final, files = folder(run_dir, step), {}
    with atomic_folder(final) as temp:
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            path = temp / name
            try:
                # `save_file` holds the GIL for at most 5 ms; `save` holds it for 0.9 s per GB.
                save_file(tensors, path)
                # safetensors sets mode 0600; the folder has the mode that the umask gives.
                os.chmod(path, path.parent.stat().st_mode & 0o666)
            except SafetensorError as error:
                # safetensors 0.5 writes "code: 28".
                if (number := re.search(r"(?:os error |code: )(\d+)", str(error))) is None:
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[name] = FileEntry(bytes=file.tell(), sha256=digest)
        write_atomic(temp / "state.json", encode_record(State(step=step, files=files, meta=meta)))
        remove_tree(final)  # it can only be damaged: the run resumes from a valid one
    return final


def complete(run_dir: Path) -> list[Path]:
    """Return the folders of complete checkpoints, oldest first.

    A folder without state.json is left over from rotation.
    """
    paths = (run_dir / "checkpoints").glob("step_*")
    named = (path for path in paths if _NAME.fullmatch(path.name))
    return sorted(path for path in named if (path / "state.json").is_file())


def rotate(run_dir: Path, previous: int, step: int, keep_last: int) -> None:
    """Remove old checkpoints after `save` of `step`.

    It keeps `step` and the newest ones up to `previous`, `keep_last` in total. Other checkpoints
    are old, damaged, or left over from killed processes. Files, links and other folders stay.
    """
    older = [path for path in complete(run_dir) if int(path.name.removeprefix("step_")) <= previous]
    keep = [*older[max(0, len(older) + 1 - keep_last) :], folder(run_dir, step)]
    for path in list((run_dir / "checkpoints").iterdir()):
        is_ours = _NAME.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name)
        if is_ours and path not in keep and path.is_dir() and not path.is_symlink():
            remove(path / "state.json")  # first: a partly removed folder is not a checkpoint
            remove_tree(path)


def load(path: Path, optimizer: bool = True) -> Checkpoint:
    """Return a checkpoint after checking the sha256 of every file read.

    Raises: CorruptionError that names the damaged file.
    """
    file = path / "state.json"
    state = read_record(State, file)
    if folder(path.parent.parent, state.step).name != path.name:
        found = f"found {state.step}; restore it"
        raise CorruptionError(f"{file}: expected the step of its folder; {found}")
    names = ["model.safetensors", "optimizer.safetensors"][: 1 + optimizer]
    if missing := [name for name in names if name not in state.files]:
        found = f"found {sorted(state.files)}"
        raise CorruptionError(f"{file}: expected the file {missing[0]}; {found}")
    tensors = [_read_tensors(path / name, state.files[name]) for name in names]
    digest = state.files["model.safetensors"].sha256
    model, slots = tensors[0], tensors[1] if optimizer else {}
    return Checkpoint(path, state.step, digest, model, slots, state.meta)


def _read_tensors(path: Path, entry: FileEntry) -> Tensors:
    size = path.stat().st_size if path.is_file() else 0
    data = read_at(path, 0, entry.bytes) if size == entry.bytes else b""
    if sha256_hex(data) != entry.sha256:
        expected = f"expected {entry.bytes} bytes of sha256 {entry.sha256[:12]}"
        raise CorruptionError(f"{path}: {expected}; found {size} other bytes")
    try:
        return parse_safetensors(data)
    except (SafetensorError, ValueError, LookupError) as error:
        raise CorruptionError(f"{path}: expected safetensors; found: {error}") from error


def weights(path: Path) -> str:
    """Return the name of a checkpoint's weights for other records: its step and model sha256.

    Raises: CorruptionError if state.json is damaged.
    """
    entry = read_record(State, path / "state.json").files.get("model.safetensors")
    return f"{path.name} sha256:{entry.sha256[:12] if entry else 'none'}"


def latest(run_dir: Path, optimizer: bool = True) -> Checkpoint | None:
    """Return the newest valid checkpoint, or None if there is none; warn about damaged ones.

    Raises: CorruptionError if every checkpoint is damaged.
    """
    problem = None
    for path in reversed(complete(run_dir)):
        try:
            return load(path, optimizer)
        except CorruptionError as error:
            problem = error
            print(f"warning: {error}; trying the previous checkpoint", flush=True)
    if problem is not None:
        advice = f"restore it or remove {run_dir}/checkpoints"
        raise CorruptionError(f"{problem}; no other checkpoint is valid; {advice}")
    return None


def shared(checkpoint: Checkpoint | None, group: Any) -> Checkpoint | None:
    """Broadcast the checkpoint of rank 0 to every rank of a gloo group; other ranks pass None.

    One rank reads and verifies the files. Otherwise each rank would read and hash 3.8 GB (ViT-L).
    """
    header: list[Any] = [None]
    if checkpoint is not None:
        states = [checkpoint.model, checkpoint.optimizer]
        shapes = [{name: (x.shape, x.dtype) for name, x in state.items()} for state in states]
        record = (checkpoint.path, checkpoint.step, checkpoint.model_sha256, checkpoint.meta)
        header = [(*record, shapes)]
    torch.distributed.broadcast_object_list(header, src=0, group=group)
    if header[0] is None:
        return None
    path, step, digest, meta, shapes = header[0]
    if checkpoint is None:
        states = [{n: torch.empty(s, dtype=d) for n, (s, d) in each.items()} for each in shapes]
    for state, names in zip(states, shapes, strict=True):
        for name in names:
            torch.distributed.broadcast(state[name], src=0, group=group)
    return Checkpoint(path, step, digest, states[0], states[1], meta)
