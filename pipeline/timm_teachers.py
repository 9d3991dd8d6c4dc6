"""Load the vision transformers of timm as towers: models that compute the features of a teacher.

B batch, N patch tokens, P prefix tokens, C channels, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cache_tools.errors import UsageError
from cache_tools.weights import Preprocessing, Triple, load_timm

ADVICE = "--teacher-mean and --teacher-std, or put beside the file its"
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Tower:
    """A model with weights and what its library states about it.

    `forward` maps normalized pictures [B, 3, H, W] to (patch [B, N, C], CLS [B, C] or None).
    `architecture` determines the model up to its weights. `projection` maps a token to the space of
    the text. `facts` are fields of TeacherIdentity.
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
    norm = getattr(model, "norm", None)
    if not hasattr(model, "num_prefix_tokens") or isinstance(norm, nn.Identity | None):
        found = type(model).__name__
        expected = "expected a vision transformer with a final norm"
        raise UsageError(f"--teacher timm:{name}: {expected}; found {found}")
    has_class_token = getattr(model, "cls_token", None) is not None

    def forward(x_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        outputs = model.forward_intermediates(
            x_B3HW,
            indices=1,
            norm=True,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        out = outputs[0]
        patch_BNC, prefix_BPC = out if isinstance(out, tuple) else (out, None)
        return patch_BNC, first_token([prefix_BPC] if has_class_token else None)

    modules = model.blocks.named_modules()
    activations = [type(part).__name__.lower() for key, part in modules if key.endswith("act")]
    img_size = list(pair(model.patch_embed.img_size))
    facts = {"weights_set": chosen or None, "activation": activations[0]}
    architecture = {"name": name, "img_size": img_size}
    shape = pair(img_size), patch_of(model)
    return Tower(f"timm:{name}", model, forward, *shape, stated, architecture, facts)


def patch_of(model: Any) -> int:
    """Return the side of a patch in pixels, including the convolutional stem of a hybrid."""
    if hasattr(model, "patch_size"):
        return pair(model.patch_size)[0]
    return int(getattr(model, "trunk", model).patch_embed.feat_ratio())


def pair(size: Any) -> tuple[int, int]:
    """Return (height, width) of a size that is one number or several."""
    height, width = size[:2] if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def first_token(prefix: Any) -> Tensor | None:
    """Return the first of the prefix tokens [B, P, C] of the last block, or None without any."""
    if not prefix or prefix[0] is None or prefix[0].shape[1] == 0:
        return None
    token: Tensor = prefix[0][:, 0]
    return token
