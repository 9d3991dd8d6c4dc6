"""Load frozen teachers, the vision transformers of open_clip and timm, and compute their features.

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

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean and std
ADVICE = "--teacher-mean and --teacher-std, or put beside the file its"
Precision = Literal["fp32", "fp16", "bf16"]
Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class Teacher:
    """A frozen tower and what is known of it.

    `forward` maps normalized pictures [B, 3, H, W] to (patch [B, N, C], CLS [B, C] or None).
    """

    identity: TeacherIdentity
    tower: nn.Module
    forward: Forward
    grid: tuple[int, int]
    channels: int
    has_cls: bool
    projection: npt.NDArray[np.float32] | None
    device: torch.device
    precision: Precision
    notes: tuple[str, ...]  # for the user: the preprocessing and its source

    def __post_init__(self) -> None:
        # Copied once, because a copy from the host per batch would wait for the GPU.
        self._mean, self._std = (
            torch.tensor(value, device=self.device) * 255
            for value in (self.identity.mean, self.identity.std)
        )

    @torch.inference_mode()
    def features(
        self, pictures_BHW3: Tensor, precision: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return float32 features (patch [B, N, C], CLS [B, C] or None) on the teacher's device.

        The pictures are uint8 and have the teacher's size.
        """
        half = PRECISIONS[precision or self.precision]
        x_BHW3 = (pictures_BHW3.to(self.device, non_blocking=True) - self._mean) / self._std
        x_B3HW = x_BHW3.permute(0, 3, 1, 2)
        with torch.autocast(self.device.type, half, enabled=half is not None):
            patch_BNC, cls_BC = self.forward(x_B3HW)
        return patch_BNC.float(), None if cls_BC is None else cls_BC.float()


def load_teacher(
    name: str,
    weights: str,
    size: int | None = None,
    device: str | None = None,
    precision: str | None = None,
    normalisation: tuple[Triple, Triple] | None = None,
) -> Teacher:
    """Load the teacher `open_clip:ARCH`, `open_clip:FOLDER` (open_clip_config.json) or `timm:NAME`.

    `weights` is a tag ("openai", or "pretrained" for timm), FILE, FILE#SET, or "random". `size` in
    pixels overrides the teacher's own size. `normalisation` is the mean and std of pixels in
    [0, 1], for weights that do not state them.

    Raises: UsageError (unknown name, tag, size or normalisation), IdentityError (missing or extra
    tensors, QuickGELU mismatch), ResourceError (a tag that cannot be fetched).
    """
    kind, _, architecture = name.partition(":")
    if kind not in ("open_clip", "timm") or not architecture:
        raise UsageError(
            f"--teacher {name!r}: expected open_clip:ARCH, open_clip:FOLDER or timm:NAME"
        )
    if precision not in (None, *PRECISIONS):
        raise UsageError(f"--precision {precision!r}: expected {', '.join(PRECISIONS)}")
    if size is not None and size < 1:
        raise UsageError(f"--teacher-size {size}: expected a side in pixels, above 0")
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=where)
        if where.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{where.type} is not supported")
    except (RuntimeError, AssertionError, ImportError) as error:
        found = str(error).splitlines()[0]
        expected = "expected a device of this machine"
        raise UsageError(f"--device {device}: {expected}: {found}") from error
    # bf16 is never the default, because bf16 autocast loses more precision than int8 codes do.
    precision = precision or ("fp32" if where.type == "cpu" else "fp16")
    # By default, cuDNN convolutions in fp32 use TF32.
    torch.backends.cudnn.allow_tf32 = False
    load = _load_open_clip if kind == "open_clip" else _load_timm
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the weights of "random"
            teacher = load(
                architecture, weights, size, normalisation, where, cast(Precision, precision)
            )
    except (McmError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # open_clip and timm raise many kinds of errors on other models
        raise UsageError(f"--teacher {name}: expected a vision transformer; {error!r}") from error
    teacher.tower.to(where)
    return teacher


def check_multiple(option: str, size: int, patch: int) -> None:
    """Raise UsageError unless the patch divides the size in pixels; else some reach no token."""
    if size <= 0 or size % patch:
        below = size // patch * patch
        fitting = f"{below} or {below + patch}" if below > 0 else f"{patch}"
        expected = f"expected a multiple of the patch, {patch} pixels"
        raise UsageError(f"{option} {size}: {expected}; use {fitting}")


def _load_open_clip(
    name: str, weights: str, size: int | None, given: tuple[Triple, Triple] | None, *place: Any
) -> Teacher:
    import open_clip
    from open_clip.model import VisionTransformer, _build_vision_tower, resize_pos_embed

    config, tag, notes = _open_clip_config(name, weights)
    stated = _open_clip_preprocessing(name, weights, config, tag, given)
    vision, quick_gelu = dict(config["vision_cfg"]), bool(config.get("quick_gelu", False))
    if "timm_model_name" in vision and size not in (None, vision["image_size"]):
        own = vision["image_size"]
        raise UsageError(f"teacher_size {size}: {name} is a timm tower of {own} px; use timm:NAME")
    vision["image_size"] = size or vision.get("image_size", 224)
    tower = _build_vision_tower(config["embed_dim"], vision, quick_gelu)
    module = getattr(tower, "trunk", tower)
    if not isinstance(tower, VisionTransformer) and not hasattr(module, "num_prefix_tokens"):
        found = type(module).__name__
        expected = "expected a vision transformer"
        raise UsageError(f"--teacher open_clip:{name}: {expected}; found {found}")
    chosen = ""
    if weights != RANDOM:
        file = weights
        if tag:
            try:
                file = open_clip.download_pretrained(tag)
            except (OSError, RuntimeError, ValueError) as error:
                found = f"cannot be fetched: {error}; give a local file"
                raise ResourceError(f"--weights {weights}: {found}") from error
        state, chosen = read_weights(file)
        if "input_resolution" in state and not quick_gelu:
            needed = f"OpenAI's weights need QuickGELU; found {name}; use {name}-quickgelu"
            raise IdentityError(f"{weights}: {needed}")
        resize_pos_embed(state, SimpleNamespace(visual=tower))  # reads only `model.visual`
        keys = [key for key in state if key.startswith("visual.")]
        load_whole(tower, {key.removeprefix("visual."): state[key] for key in keys}, weights)
    # CoCa normalizes after its attention pool, in the pool's width.
    pooled = getattr(tower, "attn_pool", None) is not None

    def forward(x_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        out = tower.forward_intermediates(
            x_B3HW,
            indices=[-1],
            normalize_intermediates=not pooled,
            output_fmt="NLC",
            output_extra_tokens=True,
            intermediates_only=True,
        )
        return out["image_intermediates"][0], _first_token(out.get("image_intermediates_prefix"))

    described = {key: config[key] for key in config if key in ("embed_dim", "quick_gelu")}
    described["vision_cfg"] = vision
    facts: dict[str, Any] = {
        "activation": "quick_gelu" if quick_gelu else "gelu",
        "norm": "none" if pooled else "final",
    }
    projection = None if pooled else getattr(tower, "proj", None)
    facts["weights_set"] = chosen or None
    model = (f"open_clip:{Path(name).name}", weights, tower, forward, vision["image_size"])
    return _teacher(*model, described, projection, stated, notes, *place, **facts)


def _open_clip_config(
    name: str, weights: str
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Return (configuration of the model, configuration of the tag or {}, notes).

    Raises: UsageError for an unknown name or tag; IdentityError when the model and open_clip's
    table of the tag differ in QuickGELU.
    """
    import open_clip

    folder = Path(name) / "open_clip_config.json"
    if folder.is_file():
        whole = read_json(folder, UsageError)
        model = whole.get("model_cfg", whole)
        if (
            not isinstance(model, dict)
            or not isinstance(model.get("vision_cfg"), dict)
            or "embed_dim" not in model
        ):
            raise UsageError(f"{folder}: expected model_cfg with vision_cfg and embed_dim")
        if ":" in str(model["vision_cfg"].get("timm_model_name", "")):
            raise UsageError(f"{folder}: expected a model name of timm; found a place to fetch one")
        if model["vision_cfg"].get("timm_model_pretrained"):
            model["vision_cfg"]["timm_model_pretrained"] = (
                False  # every tensor comes from --weights
            )
        config: dict[str, Any] | None = model | {"preprocess_cfg": whole.get("preprocess_cfg", {})}
    else:
        config = open_clip.get_model_config(name)
    if config is None:
        known = open_clip.list_models()
        expected = "expected an architecture of open_clip or a folder of one"
        raise UsageError(
            f"--teacher open_clip:{name}: {expected}; found neither{nearest(name, known)}"
        )
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
        twin = f"{name}-quickgelu"  # a file does not state the activation of its training
        needed = f"OpenAI's, DFN's and MetaCLIP's need open_clip:{twin}"
        gelu = f"{weights}: taken as weights of GELU; {needed}"
        return config, {}, (gelu,) if twin in open_clip.list_models() else ()
    if bool(tag.get("quick_gelu", False)) != bool(config.get("quick_gelu", False)):
        quick = config.get("quick_gelu")
        other = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
        found = f"its table and {name} differ in QuickGELU"
        raise IdentityError(f"--weights {weights}: {found}; use open_clip:{other}")
    return config, tag, ()


def _open_clip_preprocessing(
    name: str,
    weights: str,
    config: dict[str, Any],
    tag: dict[str, Any],
    given: tuple[Triple, Triple] | None,
) -> Preprocessing:
    import open_clip

    clip = {"mean": CLIP[0], "std": CLIP[1]}  # for a tag that states none
    own, source = config.get("preprocess_cfg", {}), f"{name}/open_clip_config.json"
    if tag:
        own, source = clip | tag, f"the tag {weights}"
    elif weights != RANDOM:
        beside = config_beside(weights, "open_clip_config.json")
        if beside.get("model_cfg", {}).get("vision_cfg") == config["vision_cfg"]:
            own, source = (
                beside.get("preprocess_cfg", {}),
                "the open_clip_config.json beside the weights",
            )
    names = open_clip.list_pretrained_tags_by_model(name)
    tags = {one: clip | open_clip.get_pretrained_cfg(name, one) for one in names}
    default, advice = CLIP if weights == RANDOM else None, f"use {ADVICE} open_clip_config.json"
    return preprocessing(f"open_clip:{name}", given, own, source, tags, default, advice)


def _load_timm(
    name: str, weights: str, size: int | None, given: tuple[Triple, Triple] | None, *place: Any
) -> Teacher:
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
        return patch_BNC, _first_token([prefix_BPC] if has_class_token else None)

    modules = model.blocks.named_modules()
    activations = [type(part).__name__.lower() for key, part in modules if key.endswith("act")]
    img_size = list(_pair(model.patch_embed.img_size))
    facts: dict[str, Any] = {"weights_set": chosen or None, "activation": activations[0]}
    described = {"name": name, "img_size": img_size}
    tower = (f"timm:{name}", weights, model, forward, img_size)
    return _teacher(*tower, described, None, stated, (), *place, **facts)


def _patch(tower: Any) -> int:
    """Return the side of a patch in pixels, including the convolutional stem of a hybrid."""
    if hasattr(tower, "patch_size"):
        return _pair(tower.patch_size)[0]
    return int(getattr(tower, "trunk", tower).patch_embed.feat_ratio())


def _teacher(
    name: str,
    weights: str,
    tower: nn.Module,
    forward: Forward,
    image_size: Any,
    architecture: dict[str, Any],
    projection: Tensor | None,
    stated: Preprocessing,
    notes: tuple[str, ...],
    device: torch.device,
    precision: Precision,
    **facts: Any,
) -> Teacher:
    tower.eval().requires_grad_(False)  # in training mode, patch dropout would drop tokens
    size, patch_size = _pair(image_size), _patch(tower)
    for side in size:
        check_multiple("--teacher-size", side, patch_size)
    with torch.inference_mode():
        patch, cls = forward(torch.zeros(1, 3, *size))
    rows, columns = (side // patch_size for side in size)
    if rows * columns != patch.shape[1]:
        found = f"{patch.shape[1]} tokens of {size}"
        raise UsageError(f"{name}: expected {rows}x{columns} square patches; found {found}")
    matrix = None if projection is None else projection.detach().numpy()
    stored = None if matrix is None else np.ascontiguousarray(matrix, np.float32)
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
    bicubic = stated.interpolation == "bicubic"
    resize = "" if bicubic else "; views are nevertheless resized by bicubic interpolation"
    notes = (f"teacher {identity.name}: {stated}, from {stated.source}{resize}", *notes)
    grid, channels, has_cls = (rows, columns), int(patch.shape[2]), cls is not None
    model = (identity, tower, forward, grid, channels, has_cls, stored)
    return Teacher(*model, device, precision, notes)


def _pair(size: Any) -> tuple[int, int]:
    height, width = size[:2] if isinstance(size, (tuple, list)) else (size, size)
    return int(height), int(width)


def _first_token(prefix: Any) -> Tensor | None:
    if not prefix or prefix[0] is None or prefix[0].shape[1] == 0:
        return None
    token: Tensor = prefix[0][:, 0]
    return token


def state_sha256(state: dict[str, Tensor]) -> str:
    """Return the digest of names, types, shapes and values, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def probe_pictures(height: int, width: int, count: int = 4) -> RGB:
    """Return fixed synthetic pictures, uint8 [count, H, W, 3]: smooth colors with grain.

    They are the same on every machine.
    """
    shape = (count, height, width, 3)
    coarse = uniform(0, "probe", np.arange(count * 8 * 8 * 3)).reshape(count, 8, 8, 3)
    grain = uniform(0, "probe-grain", np.arange(count * height * width * 3)).reshape(shape)
    pictures = (coarse * 255).astype(np.uint8)
    smooth = np.stack([resize_rgb(picture_HW3, height, width) for picture_HW3 in pictures])
    return np.clip(smooth + 32 * (grain - 0.5), 0, 255).astype(np.uint8)
