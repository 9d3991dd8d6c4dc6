"""Load encoders: from a RUN, an exported folder or timm, or with random weights.

B batch, N patches, D width, H W pixels.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_model_data_config
from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cache_tools.errors import McmError, UsageError, found_at
from cache_tools.records import Absent, Record, Text, read_json, read_record
from cache_tools.storage import file_sha256
from cache_tools.weights import PRETRAINED, load_timm, load_whole, read_weights, weights_file
from mcm import checkpoint
from mcm.config import PretrainConfig, SizedStudent
from mcm.model import MaskedChannelModel, build_encoder, encode_tokens
from mcm.run_dir import PretrainRun, recorded, recorded_config

BATCHNORM_EPS = 1e-6  # in the head of a frozen run, as in MAE
# A student of this project is evaluated on the whole center square, like the views of "val".
CROP_PCT = 1.0
HEADS = ("head",)  # tensors with these names are not loaded into a model without a head
ANY_VIT = "vit_base_patch16_224"  # with other arguments, this timm model is any plain ViT


class FinetuneRun(Record):
    """run.json of a fine-tuning run: what its weights depend on, and the arguments of its model."""

    kind: Literal["finetune"] = "finetune"
    version: Literal[1] = 1
    config: dict[str, Any]
    dataset_sha256: str
    classes: tuple[str, ...]
    # The COCO category id of each class of a detector.
    category_ids: Absent[tuple[int, ...]] = None
    init: Text
    init_weights: str
    architecture: str
    model_args: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    # The batch that a BatchNorm sees: rows per micro-batch and rank, and ranks.
    micro_batch: Absent[int] = None
    ranks: Absent[int] = None


@dataclass(frozen=True)
class Backbone:
    """A ViT and the preprocessing of its pictures.

    `masked` is the whole model of a pre-training RUN.
    """

    model: VisionTransformer
    weights: str  # the name of the weights: a step, a sha256, "pretrained" or "random"
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    masked: MaskedChannelModel | None = None

    def normalized(self, pictures_B3HW: Tensor) -> Tensor:
        """Return uint8 pictures as normalized float32; no mean or std is copied to the device."""
        x_B3HW = pictures_B3HW.float() / 255
        for color, (mean, std) in enumerate(zip(self.mean, self.std, strict=True)):
            x_B3HW[:, color].sub_(mean).div_(std)
        return x_B3HW


class PictureModel(nn.Module):
    """A model with an `encoder` that normalizes uint8 pictures like `backbone`."""

    encoder: Any

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block of the encoder; the heads of a detector have other shapes per step."""
        for block in self.encoder.blocks:
            block.compile(*args, **kwargs)

    def load_newest(self, run: Path) -> Self:
        """Load the newest weights of a RUN, for evaluation."""
        saved = newest(run)
        load_whole(self, saved.model, str(saved.path))
        return self.eval()


def advise_fold(backbone: Backbone, spec: object) -> None:
    """Advise a fold of the encoder of a RUN that was trained with masks and is used without one."""
    if backbone.masked is not None and backbone.masked.hides:
        remedy = f"`mcm-train export {spec} FOLDER --folded probed` folds its fill"
        print(f"advice: {spec} was trained with masks; {remedy}", file=sys.stderr, flush=True)


def freeze(module: nn.Module) -> None:
    """Freeze a module in eval mode, and disable `train()`, which would enable its drop paths."""
    frozen = module.requires_grad_(False).eval()
    frozen.train = lambda mode=True: module  # type: ignore[method-assign]


def load_encoder(
    spec: str,
    weights: Path | None = None,
    student: SizedStudent | None = None,
    seed: int = 0,
    untrained: bool = False,
    head: bool = False,
) -> Backbone:
    """Return the encoder that `spec` names: a RUN, an EXPORT folder, `timm:NAME` or `random`.

    `untrained` loads the initial weights of a pre-training RUN.
    `head` keeps the classifier of a fine-tuned RUN.

    Raises: UsageError for an unknown spec; IdentityError if a tensor of the encoder is missing.
    """
    if weights is not None and not spec.startswith("timm:"):
        expected = "expected timm:NAME with --weights"
        raise UsageError(f"{expected}; found {spec}, which has its own weights; omit --weights")
    if untrained and recorded(Path(spec)).get("kind") != "pretrain":
        expected = "expected a pre-training RUN"
        raise UsageError(f"--untrained: {expected}; found {spec}; omit --untrained")
    if spec == "random":
        return _from_config(student, seed)
    if spec.startswith("timm:"):
        return _from_timm(spec, weights)
    folder = Path(spec)
    if (folder / "run.json").is_file():
        if recorded(folder).get("kind") == "pretrain":
            return _from_pretraining(folder, untrained)
        return _from_finetuning(folder, head)
    if (folder / "config.json").is_file():
        return _from_export(folder)
    expected = "a RUN (run.json), an exported folder (config.json), timm:NAME or random"
    raise UsageError(f"{spec}: expected {expected}; found {found_at(spec)}")


def set_drop_path(model: VisionTransformer, rate: float) -> None:
    """Set the drop path of all blocks; it rises linearly from 0 to `rate` at the last block."""
    rates = torch.linspace(0, rate, len(model.blocks)).tolist()
    for block, share in zip(model.blocks, rates, strict=True):
        paths = (DropPath(share) if share else nn.Identity() for _ in range(2))
        block.drop_path1, block.drop_path2 = paths


def pooled(model: VisionTransformer, tokens_BND: Tensor, features: str = "mean") -> Tensor:
    """Pool normalized tokens to features [B, D]; some timm models normalize after the pool.

    "mean" is the mean of the patch tokens and "cls" the class token. "both" concatenates the two
    to [B, 2 D]. "patch" returns every patch token [B, N, D].
    """
    patch_BND = tokens_BND[:, model.num_prefix_tokens :]
    parts = {"mean": patch_BND.mean(1), "cls": tokens_BND[:, 0], "patch": patch_BND}
    chosen = ("mean", "cls") if features == "both" else (features,)
    return torch.cat([model.fc_norm(parts[name]) for name in chosen], dim=1)


def _from_config(student: SizedStudent | None, seed: int) -> Backbone:
    if student is None:
        expected = "a [student] section with width, depth, heads, size and patch"
        raise UsageError(f"random: expected {expected} in the configuration; found none; add one")
    size = (student.size, student.size)
    model = build_encoder(size, student.patch, student, seed)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return Backbone(model, "random", size, mean, std, "bicubic", CROP_PCT)


def _from_timm(spec: str, weights: Path | None) -> Backbone:
    advice = "or put the model's config.json beside the file"
    model, _, chosen = load_timm(spec.removeprefix("timm:"), weights or PRETRAINED, HEADS, advice)
    # probe, finetune and export rebuild the model from its arguments; check that timm can.
    with _model_errors(spec), torch.device("meta"):
        if not isinstance(model, VisionTransformer):
            raise TypeError(f"a {type(model).__name__}")
        architecture, arguments = model_args(model)
        rebuilt = timm.create_model(architecture, **arguments)
        pooled(rebuilt, encode_tokens(rebuilt, torch.empty(1, 3, *model.patch_embed.img_size)))
        rebuilt.reset_classifier(2, "avg")
        if rebuilt.state_dict().keys() - model.state_dict().keys() != {"head.weight", "head.bias"}:
            raise TypeError(f"a {type(model).__name__} that its arguments do not rebuild")
    digest = weights and f"sha256:{file_sha256(weights_file(weights)[0])}{chosen and f'#{chosen}'}"
    return _with_data_config(model, digest or PRETRAINED)


def _from_pretraining(folder: Path, untrained: bool) -> Backbone:
    run = read_record(PretrainRun, folder / "run.json")
    with _model_errors(folder / "run.json"):
        config = recorded_config(PretrainConfig, run.config)
        masked = MaskedChannelModel(config, run.grid, run.patch, run.channels, run.mean, run.std)
    weights = "untrained"
    if not untrained:
        saved = newest(folder)
        load_whole(masked, saved.model, str(saved.path), HEADS)
        weights = checkpoint.weights(saved.path)
    data = (run.size, run.mean, run.std, run.interpolation, CROP_PCT)
    return Backbone(masked.encoder, weights, *data, masked)


def recorded_backbone(folder: Path) -> tuple[FinetuneRun, Backbone]:
    """Return the record of a fine-tuned RUN, and its ViT without trained weights."""
    run = read_record(FinetuneRun, folder / "run.json")
    with _model_errors(folder / "run.json"):
        if not timm.is_model(run.architecture):  # timm would download the config of "hf-hub:..."
            raise ValueError(run.architecture)
        model = timm.create_model(run.architecture, pretrained=False, **run.model_args)
    data = (run.size, run.mean, run.std, run.interpolation, run.crop_pct)
    return run, Backbone(model, "untrained", *data)


def _from_finetuning(folder: Path, head: bool) -> Backbone:
    run, backbone = recorded_backbone(folder)
    if run.config.get("task") == "detect":
        found = "found a detector, whose encoder has windows and relative positions"
        advice = f"use the weights that it began with ({run.init})"
        raise UsageError(f"{folder}: expected a RUN with a plain ViT; {found}; {advice}")
    saved, prefix = newest(folder), "encoder."  # of a segmentation RUN
    encoder = {k.removeprefix(prefix): x for k, x in saved.model.items() if k.startswith(prefix)}
    load_whole(backbone.model, _plain_head(encoder or saved.model), str(saved.path), HEADS)
    if not head:
        backbone.model.reset_classifier(0)
    return replace(backbone, weights=checkpoint.weights(saved.path))


def newest(folder: Path) -> checkpoint.Checkpoint:
    """Return the newest checkpoint of a RUN.

    Raises: UsageError if there is none yet.
    """
    saved = checkpoint.latest(folder, optimizer=False)
    if saved is None:
        advice = "continue the training until it saves one"
        raise UsageError(f"{folder}: expected a checkpoint; found none yet; {advice}")
    return saved


def _plain_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the BatchNorm of a frozen run's head into its linear layer; timm's head has no norm."""
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
    read_json(folder / "config.json", UsageError)  # checks its size and type before timm reads it
    with _model_errors(folder / "config.json"):
        model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0)
        if not isinstance(model, VisionTransformer):
            raise TypeError(f"a {type(model).__name__}")
        backbone = _with_data_config(model, f"sha256:{file_sha256(path)}")
    load_whole(model, state, str(path), HEADS)
    return backbone


@contextmanager
def _model_errors(where: Path | str) -> Iterator[None]:
    """Raise a UsageError that names `where` if the block cannot build a model."""
    try:
        yield
    except McmError:
        raise
    except Exception as error:
        expected = "expected a plain vision transformer of timm"
        raise UsageError(f"{where}: {expected}; found {error!r}") from error


def _with_data_config(model: VisionTransformer, weights: str) -> Backbone:
    data = resolve_model_data_config(model)
    size = (int(data["input_size"][1]), int(data["input_size"][2]))
    mean, std = tuple(data["mean"]), tuple(data["std"])
    interpolation, crop_pct = data["interpolation"], data["crop_pct"]
    return Backbone(model, weights, size, mean, std, interpolation, crop_pct)


def model_args(model: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """Return (architecture, arguments) from which `timm.create_model` rebuilds model and head."""
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
    if type(mlp) is Mlp:
        args["mlp_ratio"] = mlp.fc1.out_features / model.embed_dim
    return architecture, args
