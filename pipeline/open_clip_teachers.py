"""Load the image towers of open_clip: configuration, preprocessing and checked weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from cache_tools.errors import IdentityError, ResourceError, UsageError
from cache_tools.records import nearest, read_json
from cache_tools.weights import (
    RANDOM,
    Preprocessing,
    Triple,
    config_beside,
    load_whole,
    preprocessing,
    read_weights,
    weights_file,
)

from .timm_teachers import ADVICE, Forward, Tower, check_multiple, pair, token_features

CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean and std


def load_open_clip_tower(
    name: str, weights: str, size: int | None, given: tuple[Triple, Triple] | None
) -> Tower:
    """Return the image tower of ARCH or of FOLDER; the arguments are those of `load_teacher`."""
    import open_clip
    from open_clip.model import _build_vision_tower, resize_pos_embed

    config, tag, notes = _open_clip_config(name, weights)
    stated = _open_clip_preprocessing(name, weights, config, tag, given)
    vision, quick_gelu = dict(config["vision_cfg"]), bool(config.get("quick_gelu", False))
    vision["image_size"] = size or vision.get("image_size", 224)
    tower = _build_vision_tower(config["embed_dim"], vision, quick_gelu)
    forward, patch, facts = _features(f"open_clip:{name}", tower)
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
    if size and hasattr(tower, "trunk"):  # open_clip builds a model of timm at timm's size
        check_multiple("--teacher-size", size, patch)
        tower.set_input_size(size)
    activation = "quick_gelu" if quick_gelu else "gelu"
    architecture = {key: config[key] for key in config if key in ("embed_dim", "quick_gelu")}
    return Tower(
        name=f"open_clip:{Path(name).name}",
        model=tower,
        forward=forward,
        size=pair(vision["image_size"]),
        patch=patch,
        preprocessing=stated,
        architecture=architecture | {"vision_cfg": vision},
        facts=facts | {"activation": activation, "weights_set": chosen or None},
        projection=getattr(tower, "proj", None) if facts["norm"] == "final" else None,
        notes=notes,
    )


def _features(name: str, tower: Any) -> tuple[Forward, int, dict[str, Any]]:
    """Return the forward of a tower, its patch in pixels, and its norm: see `token_features`."""
    from open_clip.model import VisionTransformer

    if not isinstance(tower, VisionTransformer):
        return token_features(name, getattr(tower, "trunk", tower))
    # CoCa normalizes after its attention pool, in the pool's width.
    normalized = tower.attn_pool is None

    def forward(x_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        out = tower.forward_intermediates(
            x_B3HW,
            indices=[-1],
            normalize_intermediates=normalized,
            output_fmt="NLC",
            output_extra_tokens=True,
            intermediates_only=True,
        )
        return out["image_intermediates"][0], out["image_intermediates_prefix"][0][:, 0]

    return forward, pair(tower.patch_size)[0], {"norm": "final" if normalized else "none"}


def _open_clip_config(
    name: str, weights: str
) -> tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """Return (configuration of the model, configuration of the tag or {}, notes).

    Raises: UsageError for an unknown name or tag; IdentityError if the configurations of the model
    and of the tag differ in QuickGELU.
    """
    import open_clip

    file = Path(name) / "open_clip_config.json"
    if file.is_file():
        content = read_json(file, UsageError)
        model = content.get("model_cfg", content)
        vision = model.get("vision_cfg") if isinstance(model, dict) else None
        if not isinstance(vision, dict) or "embed_dim" not in model:
            raise UsageError(f"{file}: expected model_cfg with vision_cfg and embed_dim")
        if ":" in str(vision.get("timm_model_name", "")):
            raise UsageError(f"{file}: expected a model name of timm; found a place to fetch one")
        if vision.get("timm_model_pretrained"):
            vision["timm_model_pretrained"] = False  # every tensor comes from --weights
        preprocess_cfg = content.get("preprocess_cfg", {})
        config: dict[str, Any] | None = model | {"preprocess_cfg": preprocess_cfg}
    else:
        config = open_clip.get_model_config(name)
    if config is None:
        close = nearest(name, open_clip.list_models())
        expected = "expected an architecture of open_clip or a folder of one"
        raise UsageError(f"--teacher open_clip:{name}: {expected}; found neither{close}")
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
    if bool(tag.get("quick_gelu")) != (quick_gelu := bool(config.get("quick_gelu"))):
        other = name.removesuffix("-quickgelu") if quick_gelu else f"{name}-quickgelu"
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
            own = beside.get("preprocess_cfg", {})
            source = "the open_clip_config.json beside the weights"
    names = open_clip.list_pretrained_tags_by_model(name)
    tags = {each: clip | open_clip.get_pretrained_cfg(name, each) for each in names}
    default, advice = CLIP if weights == RANDOM else None, f"use {ADVICE} open_clip_config.json"
    return preprocessing(f"open_clip:{name}", given, own, source, tags, default, advice)
