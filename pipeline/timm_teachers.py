"""Load the vision transformers of timm as towers: models that compute the features of a teacher.

B batch, N patch tokens, P prefix tokens, C channels, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from cache_tools.errors import UsageError
from cache_tools.weights import Preprocessing, Triple, load_timm

ADVICE = "--teacher-mean and --teacher-std, or put beside the file its"
CHOICE = "choose a teacher of docs/teachers.md"
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Tower:
    """A model with weights, and what its library states about it.

    `forward` maps normalized pictures [B, 3, H, W] to (patch [B, N, C], CLS [B, C] or None).
    `architecture` determines the model except for its weights. `projection` maps a token to the
    joint space with text. `facts` are fields of TeacherIdentity.
    """

    name: str
    model: nn.Module
    forward: Forward
    size: tuple[int, int]
    patch: int
    preprocessing: Preprocessing
    architecture: dict[str, Any]
    facts: dict[str, Any]
    projection: Tensor | None = None
    notes: tuple[str, ...] = ()


def load_timm_tower(
    name: str, weights: str, size: int | None, given: tuple[Triple, Triple] | None
) -> Tower:
    """Return the model NAME or NAME.TAG of timm; the arguments are those of `load_teacher`."""
    unused, advice = ("head", "fc_norm"), f"{ADVICE} config.json"
    model, stated, chosen = load_timm(name, weights, unused, advice, given, size)
    forward, patch, facts = token_features(f"timm:{name}", model)
    input_size = (size, size) if size else model.pretrained_cfg["input_size"][1:]
    img_size = pair(getattr(getattr(model, "patch_embed", None), "img_size", None) or input_size)
    facts["weights_set"] = chosen or None
    architecture = {"name": name, "img_size": list(img_size)}
    return Tower(f"timm:{name}", model, forward, img_size, patch, stated, architecture, facts)


def token_features(name: str, model: Any) -> tuple[Forward, int, dict[str, Any]]:
    """Return the forward of a vision transformer, its patch in pixels, and its activation and norm.

    The norm is "none" for a model that returns its tokens without one.

    Raises: UsageError if the model does not return patch and prefix tokens, or pools them before
    its norm.
    """
    model = getattr(model, "encoder", model)  # of a classifier of Gemma, Qwen or DeepSeek
    kind, method = type(model).__name__, getattr(model, "forward_intermediates", None)
    arguments = signature(method).parameters.keys() if method else set[str]()
    prefix = {"return_prefix_tokens": True} if getattr(model, "num_prefix_tokens", 1) else {}
    if not {"norm", "output_fmt", *prefix} <= arguments or not hasattr(model, "blocks"):
        expected = "expected a plain vision transformer, with every token in every block"
        raise UsageError(f"--teacher {name}: {expected}; found {kind}; {CHOICE}")
    if not isinstance(getattr(model, "fc_norm", None), nn.Identity | None):
        expected = "expected a vision transformer with a final norm of its tokens"
        found = f"{kind}, which pools before its norm"
        raise UsageError(f"--teacher {name}: {expected}; found {found}; {CHOICE}")
    # Prefix tokens are the class token, registers, or the class token and then registers.
    class_token = any(key.endswith("cls_token") for key, _ in model.named_parameters())

    def forward(x_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        (out,) = model.forward_intermediates(
            x_B3HW, indices=1, norm=True, output_fmt="NLC", intermediates_only=True, **prefix
        )
        patch_BNC, *prefix_BPC = out if prefix else (out,)
        return patch_BNC, prefix_BPC[0][:, 0] if class_token else None

    modules = model.blocks.named_modules()
    activations = [type(module).__name__.lower() for key, module in modules if key.endswith("act")]
    no_norm = isinstance(getattr(model, "norm", None), nn.Identity | None)
    facts = {"activation": activations[-1], "norm": "none" if no_norm else "final"}
    return forward, int(model.feature_info[-1]["reduction"]), facts


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size that is one number or several."""
    height, width = size[:2] if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def check_multiple(option: str, size: int, patch: int) -> None:
    """Raise UsageError unless `size` is a multiple of `patch`: other pixels would have no token."""
    if size <= 0 or size % patch:
        below = size // patch * patch
        fitting = f"{below} or {below + patch}" if below > 0 else f"{patch}"
        expected = f"expected a multiple of the patch, {patch} pixels"
        raise UsageError(f"{option} {size}: {expected}; use {fitting}")
