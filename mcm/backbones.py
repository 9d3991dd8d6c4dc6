"""Encoders to start from or to probe: a RUN, an exported folder, a timm model, or random weights of a config.

Letters: B batch, N patches, D width, H W pixels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cache_tools.errors import McmError, UsageError, found_at
from cache_tools.records import Record, Text, read_json, read_record
from cache_tools.storage import file_sha256
from cache_tools.weights import PRETRAINED, load_timm, load_whole, read_weights, weights_file
from mcm import checkpoint
from mcm.config import PretrainConfig, SizedStudent
from mcm.model import MaskedChannelModel, build_encoder, encode_tokens
from mcm.run_dir import PretrainRun, recorded, recorded_config

BATCHNORM_EPS = 1e-6  # of a frozen run's head, as MAE
CROP_PCT = 1.0  # a student of ours is evaluated on the whole centre square, as the held-out views are cut
HEADS = ("head",)  # what a headless model leaves out of a file of weights
ANY_VIT = "vit_base_patch16_224"  # the timm entry point whose arguments can say any plain ViT


class FinetuneRun(Record):
    """run.json of a fine-tuning run: what its weights depend on, and how its model is built again."""

    kind: Literal["finetune"] = "finetune"
    version: Literal[1] = 1
    config: dict[str, Any]
    dataset_sha256: str
    classes: tuple[str, ...]
    init: Text
    init_weights: str
    architecture: str
    model_args: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    # What the BatchNorm of a frozen run sees: rows per micro-batch of a rank, and the number of ranks.
    micro_batch: int | None = pydantic.Field(None, exclude_if=lambda value: value is None)
    ranks: int | None = pydantic.Field(None, exclude_if=lambda value: value is None)


@dataclass(frozen=True)
class Backbone:
    """A ViT and what its pictures must look like; `masked` is the whole model of a RUN that was trained with masks."""

    model: VisionTransformer
    source: str
    weights: str  # which weights these are: a step, a sha256, "pretrained" or "random"
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    masked: MaskedChannelModel | None = None


def load_encoder(
    spec: str, weights: Path | None = None, student: SizedStudent | None = None, seed: int = 0, untrained: bool = False,
    head: bool = False,
) -> Backbone:  # fmt: skip
    """The encoder that `spec` names: a RUN folder, an EXPORT folder, `timm:NAME` or `random`.

    `untrained` gives a pre-training RUN's model as it began, `head` a fine-tuned RUN's with its classifier.
    Raises: UsageError for a spec that names nothing; IdentityError when less than all of the encoder would be loaded.
    """
    if weights is not None and not spec.startswith("timm:"):
        raise UsageError(f"--weights goes with timm:NAME; found {spec}; leave it out, {spec} brings its own weights")
    if spec == "random":
        return _from_config(student, seed)
    if spec.startswith("timm:"):
        return _from_timm(spec, weights)
    folder = Path(spec)
    if (folder / "run.json").is_file():
        is_pretrain = recorded(folder).get("kind") == "pretrain"
        return _from_pretraining(folder, untrained) if is_pretrain else _from_finetuning(folder, head)
    if (folder / "config.json").is_file():
        return _from_export(folder)
    expected = "a RUN (run.json), an exported folder (config.json), timm:NAME or random"
    raise UsageError(f"{spec}: expected {expected}; found {found_at(spec)}")


def pooled(model: VisionTransformer, tokens_BND: Tensor, features: str = "mean") -> Tensor:
    """Features [B, D] of tokens after the final norm (behind the pool in some timm models); of "both" [B, 2 D].

    "mean" is the mean of the patch tokens, "cls" the class token, "both" one beside the other. "patch" is every patch
    token [B, N, D].
    """
    patch_BND = tokens_BND[:, model.num_prefix_tokens :]
    parts = {"mean": patch_BND.mean(1), "cls": tokens_BND[:, 0], "patch": patch_BND}
    chosen = ("mean", "cls") if features == "both" else (features,)
    return torch.cat([model.fc_norm(parts[name]) for name in chosen], dim=1)


def _from_config(student: SizedStudent | None, seed: int) -> Backbone:
    if student is None:
        raise UsageError("random: expected a [student] section with width, depth, heads, size and patch; it is missing")
    size = (student.size, student.size)
    model = build_encoder(size, student.patch, student, seed)
    return Backbone(model, "random", "random", size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, "bicubic", CROP_PCT)


def _from_timm(spec: str, weights: Path | None) -> Backbone:
    advice = "or put beside the file its own config.json"
    model, _, chosen = load_timm(spec.removeprefix("timm:"), weights or PRETRAINED, HEADS, advice)
    with _arguments_of(spec), torch.device("meta"):  # as probe, finetune and export use it: timm makes it again
        architecture, arguments = model_args(model)
        twin = timm.create_model(architecture, **arguments)
        pooled(twin, encode_tokens(twin, torch.empty(1, 3, *model.patch_embed.img_size)))
        twin.reset_classifier(2, "avg")
        if twin.state_dict().keys() - model.state_dict().keys() != {"head.weight", "head.bias"}:
            raise TypeError(f"another {type(model).__name__} made of its arguments")
    digest = weights and f"sha256:{file_sha256(weights_file(weights)[0])}{chosen and f'#{chosen}'}"
    return _described(model, spec, digest or PRETRAINED)


def _from_pretraining(folder: Path, untrained: bool) -> Backbone:
    run = read_record(PretrainRun, folder / "run.json")
    with _arguments_of(folder / "run.json"):
        config = recorded_config(PretrainConfig, run.config)
        masked = MaskedChannelModel(config, run.grid, run.patch, run.channels, run.mean, run.std)
    weights = "untrained" if untrained else _load_newest(masked, folder)
    model = masked.encoder
    kept = masked if config.mask.mode != "none" else None
    return Backbone(model, str(folder), weights, run.size, run.mean, run.std, run.interpolation, CROP_PCT, kept)


def _from_finetuning(folder: Path, head: bool) -> Backbone:
    run = read_record(FinetuneRun, folder / "run.json")
    with _arguments_of(folder / "run.json"):
        if not timm.is_model(run.architecture):  # timm would fetch the description of "hf-hub:..."
            raise ValueError(run.architecture)
        model = timm.create_model(run.architecture, pretrained=False, **run.model_args)
    weights = _load_newest(model, folder)
    if not head:
        model.reset_classifier(0)
    return Backbone(model, str(folder), weights, run.size, run.mean, run.std, run.interpolation, run.crop_pct)


def _load_newest(model: nn.Module, folder: Path) -> str:
    found = checkpoint.latest(folder, optimizer=False)
    if found is None:
        raise UsageError(f"{folder}: expected a checkpoint; it has none yet; let it train until it saves one")
    load_whole(model, _plain_head(found.model), str(found.path), HEADS)
    return checkpoint.weights(found.path)


def _plain_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with the BatchNorm of a frozen run's head folded into its linear layer: timm's head holds it."""
    if "head.0.running_mean" not in state:
        return state
    names = ("0.running_mean", "0.running_var", "1.weight", "1.bias")
    mean_D, var_D, weight_KD, bias_K = (state[f"head.{name}"] for name in names)
    weight_KD = weight_KD / (var_D + BATCHNORM_EPS).sqrt()
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    return encoder | {"head.weight": weight_KD, "head.bias": bias_K - weight_KD @ mean_D}


def _from_export(folder: Path) -> Backbone:
    path = folder / "model.safetensors"
    state, _ = read_weights(path)
    read_json(folder / "config.json", UsageError)  # its size and kind, before timm reads it
    with _arguments_of(folder / "config.json"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
        if not isinstance(model, VisionTransformer):
            raise TypeError(f"a {type(model).__name__}")
        backbone = _described(model, str(folder), f"sha256:{file_sha256(path)}")
    load_whole(model, state, str(path), HEADS)
    return backbone


@contextmanager
def _arguments_of(where: Path | str) -> Iterator[None]:
    """Refuse the arguments of `where` if no model can be made of them inside the block."""
    try:
        yield
    except McmError:
        raise
    except Exception as error:
        raise UsageError(f"{where}: expected a plain vision transformer of timm; found {error!r}") from error


def _described(model: VisionTransformer, source: str, weights: str) -> Backbone:
    data = resolve_model_data_config(model)
    size = (int(data["input_size"][1]), int(data["input_size"][2]))
    mean, std = tuple(data["mean"]), tuple(data["std"])
    return Backbone(model, source, weights, size, mean, std, data["interpolation"], data["crop_pct"])


def model_args(model: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """(architecture, arguments) with which `timm.create_model` builds this model again, its head included."""
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture", ANY_VIT)
    mlp = model.blocks[0].mlp
    args = {
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.blocks[0].attn.num_heads,
        "class_token": model.has_class_token,
        "global_pool": model.global_pool,
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "num_classes": model.num_classes,
    }
    return architecture, args | ({"mlp_ratio": mlp.fc1.out_features / model.embed_dim} if type(mlp) is Mlp else {})
