"""Checkpoints: full state by name in safetensors, hashed, written beside, renamed, and only then rotated. No pickle."""

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
from cache_tools.records import Record, encode_record, read_record, sha256_hex
from cache_tools.schema import FileEntry
from cache_tools.storage import atomic_folder, read_at, remove, remove_tree, write_atomic

_NAME = re.compile(r"step_(\d{9})")
Tensors = dict[str, Tensor]


class State(Record):
    """state.json: vouches for the tensor files; `meta` is the run's own, free of ranks and worlds."""

    format: Literal["mcm-checkpoint"] = "mcm-checkpoint"
    version: Literal[1] = 1
    step: int
    files: dict[str, FileEntry]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory; `optimizer` is empty where it was not asked for."""

    path: Path
    step: int
    model_sha256: str
    model: Tensors
    optimizer: Tensors
    meta: dict[str, Any]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state as `parameter name/slot`; names are those of the unwrapped model."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{slot}"] = value
    return tensors


def on_host(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies of the tensors in the host's memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into the unwrapped model and its optimizer, on the device of each parameter.

    Raises: IdentityError when the names differ from the model's.
    """
    parameters, state = dict(model.named_parameters()), model.state_dict()
    slots = {name.rpartition("/")[0] for name in checkpoint.optimizer}
    odd = sorted(state.keys() ^ checkpoint.model.keys()) + sorted(slots - parameters.keys())
    if odd:
        raise IdentityError(f"{checkpoint.path}: expected the tensors of this model; {odd[0]} differs; use another RUN")
    model.load_state_dict(checkpoint.model)
    optimizer.state.clear()
    for name, value in checkpoint.optimizer.items():
        owner, _, slot = name.rpartition("/")
        # Fused Adam keeps its step beside the parameter.
        optimizer.state[parameters[owner]][slot] = value.to(parameters[owner].device)


def folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_dir / "checkpoints" / f"step_{step:09d}"


def save(run_dir: Path, step: int, model: Tensors, optimizer: Tensors, meta: dict[str, Any]) -> Path:
    """Write RUN/checkpoints/step_000001234/{model,optimizer}.safetensors and state.json, and rename them into place.

    Whenever the process dies, the folder is there whole or not at all.
    Raises: OSError, for a full disk too: safetensors gives its number in the message alone.
    """
    final, files = folder(run_dir, step), {}
    with atomic_folder(final) as temp:
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            path = temp / name
            try:
                save_file(tensors, path)  # holds Python's lock for at most 5 ms; its `save` for 0.9 s per GB
                os.chmod(path, path.parent.stat().st_mode & 0o666)  # as the umask says; safetensors makes it 0600
            except SafetensorError as error:
                if (number := re.search(r"(?:os error |code: )(\d+)", str(error))) is None:  # 0.5: "code: 28"
                    raise
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[name] = FileEntry(bytes=file.tell(), sha256=digest)
        write_atomic(temp / "state.json", encode_record(State(step=step, files=files, meta=meta)))
        remove_tree(final)  # only a damaged one can be in the way: a sound one would have been resumed from
    return final


def complete(run_dir: Path) -> list[Path]:
    """Folders of checkpoints, oldest first; one without state.json is a leftover of rotation."""
    found = (path for path in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name))
    return sorted(path for path in found if (path / "state.json").is_file())


def rotate(run_dir: Path, previous: int, step: int, keep_last: int) -> None:
    """After `save` of `step`: keep it and the newest up to the `previous` one, `keep_last` in all.

    The others are damaged, or what killed processes left.
    """
    older = [path for path in complete(run_dir) if int(path.name.removeprefix("step_")) <= previous]
    keep = [*older[max(0, len(older) + 1 - keep_last) :], folder(run_dir, step)]
    for path in [path for path in (run_dir / "checkpoints").iterdir() if path not in keep]:
        remove(path / "state.json")  # first, so that half a folder is never taken for a checkpoint
        remove_tree(path)


def load(path: Path, optimizer: bool = True) -> Checkpoint:
    """A checkpoint, every byte that is read checked against state.json.

    Raises: CorruptionError naming the file that is damaged.
    """
    state = read_record(State, path / "state.json")
    if folder(path.parent.parent, state.step).name != path.name:
        raise CorruptionError(f"{path}/state.json: expected the step of its folder; found {state.step}; restore it")
    names = ["model.safetensors", "optimizer.safetensors"][: 1 + optimizer]
    if missing := [name for name in names if name not in state.files]:
        raise CorruptionError(f"{path}/state.json: expected the file {missing[0]}; it names {sorted(state.files)}")
    tensors = [_read_tensors(path / name, state.files[name]) for name in names]
    digest = state.files["model.safetensors"].sha256
    return Checkpoint(path, state.step, digest, tensors[0], tensors[1] if optimizer else {}, state.meta)


def _read_tensors(path: Path, digest: FileEntry) -> Tensors:
    size = path.stat().st_size if path.is_file() else 0
    data = read_at(path, 0, digest.bytes) if size == digest.bytes else b""
    if sha256_hex(data) != digest.sha256:
        raise CorruptionError(
            f"{path}: expected {digest.bytes} bytes of sha256 {digest.sha256[:12]}; found {size} others"
        )
    try:
        return parse_safetensors(data)
    except (SafetensorError, ValueError, LookupError) as error:
        raise CorruptionError(f"{path}: expected safetensors; its header does not read: {error}") from error


def weights(path: Path) -> str:
    """Return the name of a checkpoint's weights in other records: the step and the sha256 of the model.

    Raises: CorruptionError where state.json is damaged.
    """
    entry = read_record(State, path / "state.json").files.get("model.safetensors")
    return f"{path.name} sha256:{entry.sha256[:12] if entry else 'none'}"


def latest(run_dir: Path, optimizer: bool = True) -> Checkpoint | None:
    """The newest checkpoint that verifies, None when there is none; a damaged one is named and the one before is used.

    Raises: CorruptionError when there are some and all are damaged.
    """
    problem = None
    for path in reversed(complete(run_dir)):
        try:
            return load(path, optimizer)
        except CorruptionError as error:
            problem = error
            print(f"warning: {error}; trying the checkpoint before", flush=True)
    if problem is not None:
        raise CorruptionError(f"{problem}; no other checkpoint is whole; restore it or remove {run_dir}/checkpoints")
    return None


def shared(found: Checkpoint | None, group: Any) -> Checkpoint | None:
    """Return the checkpoint of rank 0 on every rank of a gloo group; the other ranks give None.

    One rank reads the files and verifies them, so that 8 ranks do not read and hash 3.8 GB (ViT-L) each.
    """
    heads: list[Any] = [None]
    if found is not None:
        tensors = [{n: (x.shape, x.dtype) for n, x in part.items()} for part in (found.model, found.optimizer)]
        heads = [(found.path, found.step, found.model_sha256, found.meta, tensors)]
    torch.distributed.broadcast_object_list(heads, src=0, group=group)
    if heads[0] is None:
        return None
    path, step, digest, meta, tensors = heads[0]
    parts = [{n: torch.empty(shape, dtype=dtype) for n, (shape, dtype) in part.items()} for part in tensors]
    if found is not None:
        parts = [found.model, found.optimizer]
    for part, names in zip(parts, tensors, strict=True):
        for name in names:
            torch.distributed.broadcast(part[name], src=0, group=group)
    return Checkpoint(path, step, digest, parts[0], parts[1], meta)
