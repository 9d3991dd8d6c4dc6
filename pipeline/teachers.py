"""Frozen teachers: vision transformers of open_clip and timm, their weights checked, giving patch tokens and CLS.

B batch, N patch tokens, C channels, H W pixels.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cache_tools.errors import IdentityError, McmError, ResourceError, UsageError
from cache_tools.images import RGB, resize_rgb
from cache_tools.records import nearest, read_json, sha256_hex
from cache_tools.rng import uniform
from cache_tools.schema import TeacherIdentity
from cache_tools.weights import (
    RANDOM,
    Preprocessing,
    Triple,
    config_beside,
    load_timm,
    load_whole,
    preprocessing,
    read_weights,
    weights_file,
)

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean and std
ADVICE = "--teacher-mean and --teacher-std, or put beside the file its own"
Precision = Literal["fp32", "fp16", "bf16"]
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class Teacher:
    """A frozen tower: `forward` takes normalised pictures [B, 3, H, W], gives (patch [B, N, C], CLS [B, C] or None)."""

    identity: TeacherIdentity
    tower: nn.Module
    forward: Forward
    grid: tuple[int, int]
    channels: int
    has_cls: bool
    projection: npt.NDArray[np.float32] | None
    device: torch.device
    precision: Precision
    notes: tuple[str, ...]  # for the user: the preprocessing and what states it

    def __post_init__(self) -> None:
        # Made once: a copy from the host per batch would wait for the GPU.
        self._mean, self._std = (
            torch.tensor(value, device=self.device) * 255 for value in (self.identity.mean, self.identity.std)
        )

    @torch.inference_mode()
    def features(self, pictures_BHW3: Tensor, precision: str | None = None) -> tuple[Tensor, Tensor | None]:
        """Float32 (patch [B, N, C], CLS [B, C] or None) of uint8 pictures of the teacher's size, on its device."""
        half = PRECISIONS[precision or self.precision]
        x_BHW3 = (pictures_BHW3.to(self.device, non_blocking=True) - self._mean) / self._std
        x_B3HW = x_BHW3.permute(0, 3, 1, 2)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            patch_BNC, cls_BC = self.forward(x_B3HW)
        return patch_BNC.float(), None if cls_BC is None else cls_BC.float()


def load_teacher(
    name: str, weights: str, size: int | None = None, device: str | None = None, precision: str | None = None,
    normalisation: tuple[Triple, Triple] | None = None,
) -> Teacher:  # fmt: skip
    """Load the teacher `open_clip:ARCH`, `open_clip:FOLDER` (open_clip_config.json) or `timm:NAME`.

    `weights` is a tag ("openai", or "pretrained" for timm), FILE, FILE#SET, or "random"; `size` in pixels overrides
    its own; `normalisation` is the mean and std of pixels in [0, 1] where the weights' own are not known.

    Raises: UsageError (unknown name, tag, size or normalisation), IdentityError (tensors missing or too many,
    QuickGELU mismatch), ResourceError (a tag that cannot be fetched).
    """
    kind, _, architecture = name.partition(":")
    if kind not in ("open_clip", "timm") or not architecture:
        raise UsageError(f"--teacher {name!r}: expected open_clip:ARCH, open_clip:FOLDER or timm:NAME")
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"--precision {precision!r}: expected {', '.join(PRECISIONS)}")
    if size is not None and size < 1:
        raise UsageError(f"--teacher-size {size}: expected a side in pixels, above 0")
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=where)
        if where.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{where.type} is not served")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(
            f"--device {device}: expected a device of this machine: {str(error).splitlines()[0]}"
        ) from error
    # bf16 autocast costs more than int8 does, so that it is never the default.
    precision = precision or ("fp32" if where.type == "cpu" else "fp16")
    torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions: fp32 must mean it
    load = _load_open_clip if kind == "open_clip" else _load_timm
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the weights of "random"
            teacher = load(architecture, weights, size, normalisation, where, cast(Precision, precision))
    except (McmError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of a name or a configuration that is no vision transformer as this file knows them
        raise UsageError(f"--teacher {name}: expected a vision transformer; {error!r}") from error
    teacher.tower.to(where)
    return teacher


def check_multiple(option: str, size: int, patch: int) -> None:
    """Raises: UsageError unless the patch divides the size (pixels): the last pixels would reach no token."""
    if size <= 0 or size % patch:
        below = size // patch * patch
        fitting = f"{below} or {below + patch}" if below > 0 else f"{patch}"
        raise UsageError(f"{option} {size}: expected a multiple of the patch, {patch} pixels; use {fitting}")


def _load_open_clip(
    name: str, weights: str, size: int | None, given: tuple[Triple, Triple] | None, *place: Any
) -> Teacher:
    import open_clip
    from open_clip.model import VisionTransformer, _build_vision_tower, resize_pos_embed

    config, tag, notes = _open_clip_config(name, weights)
    stated = _open_clip_preprocessing(name, weights, config, tag, given)
    vision, quick_gelu = dict(config["vision_cfg"]), bool(config.get("quick_gelu", False))
    if "timm_model_name" in vision and size not in (None, vision["image_size"]):
        raise UsageError(f"teacher_size {size}: {name} is a timm tower of {vision['image_size']} px; use timm:NAME")
    vision["image_size"] = size or vision.get("image_size", 224)
    tower = _build_vision_tower(config["embed_dim"], vision, quick_gelu)
    module = getattr(tower, "trunk", tower)
    if not isinstance(tower, VisionTransformer) and not hasattr(module, "num_prefix_tokens"):
        raise UsageError(f"--teacher open_clip:{name}: expected a vision transformer; found {type(module).__name__}")
    chosen = ""
    if weights != RANDOM:
        file = weights
        if tag:
            try:
                file = open_clip.download_pretrained(tag)
            except (OSError, RuntimeError, ValueError) as error:
                raise ResourceError(f"--weights {weights}: cannot be fetched: {error}; give a local file") from error
        state, chosen = read_weights(file)
        if "input_resolution" in state and not quick_gelu:
            raise IdentityError(f"{weights}: OpenAI's weights need QuickGELU; found {name}; use {name}-quickgelu")
        resize_pos_embed(state, SimpleNamespace(visual=tower))  # it asks a model for its visual alone
        visual = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        load_whole(tower, visual, weights)
    pooled = getattr(tower, "attn_pool", None) is not None  # CoCa normalises behind the pool, in the pool's width

    def forward(x_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        out = tower.forward_intermediates(
            x_B3HW, indices=[-1], normalize_intermediates=not pooled, output_fmt="NLC",
            output_extra_tokens=True, intermediates_only=True,
        )  # fmt: skip
        return out["image_intermediates"][0], _first_token(out.get("image_intermediates_prefix"))

    described = {k: v for k, v in config.items() if k in ("embed_dim", "quick_gelu")} | {"vision_cfg": vision}
    facts: dict[str, Any] = {
        "activation": "quick_gelu" if quick_gelu else "gelu",
        "norm": "none" if pooled else "final",
    }
    projection = None if pooled else getattr(tower, "proj", None)
    return _describe(
        f"open_clip:{Path(name).name}", weights, tower, forward, vision["image_size"], described, projection, stated,
        notes, *place, weights_set=chosen or None, **facts,
    )  # fmt: skip


def _open_clip_config(name: str, weights: str) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """(model config, the tag's config or nothing, notes), QuickGELU compared with open_clip's tables."""
    import open_clip

    folder = Path(name) / "open_clip_config.json"
    if folder.is_file():
        whole = read_json(folder, UsageError)
        model = whole.get("model_cfg", whole)
        if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict) or "embed_dim" not in model:
            raise UsageError(f"{folder}: expected open_clip's configuration of a model; it does not read")
        if ":" in str(model["vision_cfg"].get("timm_model_name", "")):
            raise UsageError(f"{folder}: expected the name of a model of timm's own; found a place to fetch one from")
        if model["vision_cfg"].get("timm_model_pretrained"):
            model["vision_cfg"]["timm_model_pretrained"] = False  # every tensor comes from --weights
        config: dict[str, Any] | None = model | {"preprocess_cfg": whole.get("preprocess_cfg", {})}
    else:
        config = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        raise UsageError(f"--teacher open_clip:{name}: no such architecture, nor a folder of one{nearest(name, known)}")
    if weights == RANDOM:
        return config, {}, ()
    tag = {} if Path(weights).is_file() else open_clip.get_pretrained_cfg(name, weights)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(name)
        try:
            weights_file(weights)
        except UsageError as error:
            found = f"neither a file nor a tag of {name} ({', '.join(tags)})"
            raise UsageError(f"--weights {weights!r}: {found}{nearest(weights, tags)}") from error
        twin = f"{name}-quickgelu"  # no table knows what a file was trained with
        gelu = f"{weights}: taken for weights of GELU; OpenAI's, DFN's and MetaCLIP's need open_clip:{twin}"
        return config, {}, (gelu,) if twin in open_clip.list_models() else ()
    if bool(tag.get("quick_gelu", False)) != bool(config.get("quick_gelu", False)):
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise IdentityError(f"--weights {weights}: its table and {name} differ in QuickGELU; use open_clip:{other}")
    return config, tag, ()


def _open_clip_preprocessing(
    name: str, weights: str, config: dict[str, Any], tag: dict[str, Any], given: tuple[Triple, Triple] | None
) -> Preprocessing:
    import open_clip

    clip = {"mean": CLIP[0], "std": CLIP[1]}  # of a tag that states none
    own, source = config.get("preprocess_cfg", {}), f"{name}/open_clip_config.json"
    if tag:
        own, source = clip | tag, f"the tag {weights}"
    elif weights != RANDOM:
        beside = config_beside(weights, "open_clip_config.json")
        if beside.get("model_cfg", {}).get("vision_cfg") == config["vision_cfg"]:
            own, source = beside.get("preprocess_cfg", {}), "the open_clip_config.json beside the weights"
    names = open_clip.list_pretrained_tags_by_model(name)
    tags = {one: clip | open_clip.get_pretrained_cfg(name, one) for one in names}
    default, advice = CLIP if weights == RANDOM else None, f"use {ADVICE} open_clip_config.json"
    return preprocessing(f"open_clip:{name}", given, own, source, tags, default, advice)


def _load_timm(name: str, weights: str, size: int | None, given: tuple[Triple, Triple] | None, *place: Any) -> Teacher:
    model, stated, chosen = load_timm(name, weights, ("head", "fc_norm"), f"{ADVICE} config.json", given, size)
    if not hasattr(model, "num_prefix_tokens") or isinstance(getattr(model, "norm", None), nn.Identity | None):
        found = type(model).__name__
        raise UsageError(f"--teacher timm:{name}: expected a vision transformer with a final norm; found {found}")
    has_class_token = getattr(model, "cls_token", None) is not None

    def forward(x_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        out = model.forward_intermediates(
            x_B3HW, indices=1, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )[0]
        patch_BNC, prefix_BPC = out if isinstance(out, tuple) else (out, None)
        return patch_BNC, _first_token([prefix_BPC] if has_class_token else None)

    names = [type(part).__name__.lower() for name, part in model.blocks.named_modules() if name.endswith("act")]
    described = {"name": name, "img_size": list(_pair(model.patch_embed.img_size))}
    return _describe(
        f"timm:{name}", weights, model, forward, described["img_size"], described, None, stated, (), *place,
        weights_set=chosen or None, activation=names[0],
    )  # fmt: skip


def _patch(tower: Any) -> int:
    """Pixels per token of a side; a hybrid has a convolutional stem before its patches."""
    if hasattr(tower, "patch_size"):
        return _pair(tower.patch_size)[0]
    return int(getattr(tower, "trunk", tower).patch_embed.feat_ratio())


def _describe(
    name: str, weights: str, tower: nn.Module, forward: Forward, image_size: Any, architecture: dict[str, Any],
    projection: Tensor | None, stated: Preprocessing, notes: tuple[str, ...], device: torch.device,
    precision: Precision, **facts: Any,
) -> Teacher:  # fmt: skip
    tower.eval().requires_grad_(False)  # in training mode, patch dropout would leave out tokens
    size, patch_size = _pair(image_size), _patch(tower)
    for side in size:
        check_multiple("--teacher-size", side, patch_size)
    with torch.inference_mode():
        patch, cls = forward(torch.zeros(1, 3, *size))
    rows, columns = (side // patch_size for side in size)
    if rows * columns != patch.shape[1]:
        raise UsageError(f"{name}: expected {rows}x{columns} square patches; found {patch.shape[1]} tokens of {size}")
    stored = None if projection is None else np.ascontiguousarray(projection.detach().numpy(), np.float32)
    identity = TeacherIdentity(
        name=f"{name} (random weights)" if weights == RANDOM else name,
        architecture_sha256=sha256_hex(json.dumps(architecture, sort_keys=True).encode()),
        weights_sha256=state_sha256(tower.state_dict()),
        height=size[0],
        width=size[1],
        mean=stated.mean,
        std=stated.std,
        projection_sha256=None if stored is None else sha256_hex(stored.tobytes()),
        **facts,
    )
    resize = "" if stated.interpolation == "bicubic" else "; views are resized by bicubic interpolation all the same"
    notes = (f"teacher {identity.name}: {stated}, from {stated.source}{resize}", *notes)
    channels, has_cls = int(patch.shape[2]), cls is not None
    return Teacher(identity, tower, forward, (rows, columns), channels, has_cls, stored, device, precision, notes)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) else (int(size), int(size))


def _first_token(prefix: Any) -> Tensor | None:
    if not prefix or prefix[0] is None or prefix[0].shape[1] == 0:
        return None
    token: Tensor = prefix[0][:, 0]
    return token


def state_sha256(state: dict[str, Tensor]) -> str:
    """Digest of names, types, shapes and values, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def probe_pictures(height: int, width: int, count: int = 4) -> RGB:
    """Fixed synthetic pictures, uint8 [count, H, W, 3]: smooth colours with grain, the same on every machine."""
    coarse = uniform(0, "probe", np.arange(count * 8 * 8 * 3)).reshape(count, 8, 8, 3)
    grain = uniform(0, "probe-grain", np.arange(count * height * width * 3)).reshape(count, height, width, 3)
    smooth = np.stack([resize_rgb((picture * 255).astype(np.uint8), height, width) for picture in coarse])
    return np.clip(smooth + 32 * (grain - 0.5), 0, 255).astype(np.uint8)
