"""Weights from elsewhere: which files torch may open, their tensors, and a model that takes all of them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

from .errors import IdentityError, UsageError
from .storage import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

# OpenAI's ViT-B/32, B/16, L/14 and L/14 at 336 px, as open_clip's table of downloads has them.
OPENAI_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
STATE_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")  # of a checkpoint, first choice first
SHOWN_NAMES = 4  # tensors named in a message


def is_torchscript(path: Path) -> bool:
    """Whether a file is one of OpenAI's TorchScript archives; any other file is safetensors or torch's own.

    TorchScript holds programs, which torch runs while it loads them, and they can write files. OpenAI's are known.

    Raises: UsageError for another TorchScript archive, and for a zip that does not read.
    """
    try:
        scripted = is_zipfile(path) and any(name.endswith("constants.pkl") for name in ZipFile(path).namelist())
    except Exception as error:
        raise UsageError(f"{path}: expected weights; it is a zip that does not read: {error}") from error
    if scripted and file_sha256(path) not in OPENAI_SHA256:
        raise UsageError(
            f"{path}: expected weights without code; found a TorchScript archive that is none of OpenAI's; "
            f"save its state_dict() as safetensors"
        )
    return scripted


def read_weights(path: Path) -> "dict[str, Tensor]":
    """The tensors of a .safetensors file, a torch checkpoint (its EMA, if it has one) or OpenAI's TorchScript.

    Half-precision tensors of TorchScript are returned in float32. A pickle may hold only weights.

    Raises: UsageError if the file does not contain weights.
    """
    import torch
    from safetensors.torch import load_file

    if is_torchscript(path):
        scripted = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        return {name: value.float() if value.is_floating_point() else value for name, value in scripted.items()}
    try:
        safe = path.suffix == ".safetensors"
        state: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        state = next((state[key] for key in STATE_KEYS if state.get(key) is not None), state)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("found values that are not tensors")
        # DDP and torch.compile put prefixes before the names.
        return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    except Exception as error:
        raise UsageError(f"{path}: expected weights (safetensors, or torch's without code); {error}") from error


def load_whole(model: "nn.Module", state: "dict[str, Tensor]", where: str, heads: tuple[str, ...] = ()) -> None:
    """Load `state` into a model. Tensors that begin with one of `heads` and that the model lacks are left out.

    Raises: IdentityError if a tensor of the model is missing or of another shape, or if a tensor is left over.
    """
    own = model.state_dict()
    missing = sorted(name for name in own if name not in state or state[name].shape != own[name].shape)
    unexpected = sorted(name for name in state if name not in own and not name.startswith(heads))
    if missing or unexpected:
        share = 100 * (1 - len(missing) / len(own))
        raise IdentityError(
            f"{where}: expected 100 % of the encoder's {len(own)} tensors; found {share:.1f} %, missing or of another "
            f"shape: {_names(missing)}; unexpected: {_names(unexpected)}; give the weights of this architecture"
        )
    model.load_state_dict({name: state[name] for name in own})


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more if names else "none"
