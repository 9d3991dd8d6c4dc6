"""Export of a RUN's encoder as a folder that other libraries load, with a model card.

B batch, N patches, D width, K classes, H W pixels.
"""

import io
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL.Image import Resampling
from safetensors.torch import save as safetensors_bytes
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cache_tools.errors import McmError, UsageError, found_at
from cache_tools.records import nearest, read_json
from cache_tools.storage import atomic_folder, write_atomic
from mcm.backbones import Backbone, advise_fold, load_encoder, model_args
from mcm.model import folded_state
from mcm.run_dir import last_eval, recorded

ONNX_OPSET = 20
# Patterns in timm's tensor names, and their form in transformers' ViT (version 4's names).
HF_NAMES = {
    "^(cls_token|patch_embed)": r"embeddings.\1",
    "^pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj": "patch_embeddings.projection",
    "^blocks": "encoder.layer",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    r"attn\.proj": "attention.output.dense",
    r"attn\.(query|key|value)": r"attention.attention.\1",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
    "^norm": "layernorm",
    "^head": "classifier",
}
# The results in a model card, as fractions of 1.
RESULTS = ("top1", "top5", "r2_masked", "r2_full", "knn", "linear", "miou", "pixel_accuracy")
CARD = """A vision transformer trained by Masked Channel Modeling.
FOLDER is the folder of this file.

    {usage}

The licenses of the training pictures and of the teacher apply to these weights too.
Accuracies are fractions of 1.

| trained on and measured | |
| --- | --- |
{table}
```json
{settings}
```
"""


def export(
    run: Path, out: Path, fold_scale: float | None = None, kind: str = "timm"
) -> dict[str, Any]:
    """Write the newest encoder of a RUN to `out`, and return its settings.

    A fine-tuned RUN is written with its classifier, a segmentation RUN without its head.
    `fold_scale` s folds x~ = e + s (x - e), where e is the encoder fill, into the patch embedding.
    `kind` is one of FORMATS.

    Raises: UsageError for a wrong request; McmError if the other library computes other features.
    Then `out` does not exist.
    """
    if kind not in FORMATS:
        found = f"found {kind!r}{nearest(kind, FORMATS)}"
        raise UsageError(f"--format: expected {', '.join(FORMATS)}; {found}")
    write, usage, tolerance = FORMATS[kind]
    if not (run / "run.json").is_file():
        advice = "make one with `mcm-train pretrain`"
        raise UsageError(f"{run}: expected a RUN (run.json); found {found_at(run)}; {advice}")
    if out.exists():
        advice = "remove it or choose another name"
        raise UsageError(f"{out}: expected a new name; found {found_at(out)}; {advice}")
    backbone = load_encoder(str(run), head=True)
    if fold_scale is None:
        advise_fold(backbone, run)
    else:
        masked = backbone.masked
        if masked is None or not 0 < fold_scale <= 1:
            expected = "expected 0 < S <= 1 and a pre-training RUN"
            raise UsageError(f"--folded: {expected}; found S = {fold_scale} and {run}")
        folded = folded_state(masked.encoder, masked.encoder_fill, fold_scale)
        backbone.model.load_state_dict(folded)
    config = timm_config(backbone)
    config["mcm"] = {"weights": backbone.weights, "fold_scale": fold_scale}
    if classes := recorded(run).get("classes"):
        if backbone.model.num_classes:
            config["label_names"] = classes
        else:
            config["mcm"]["part"] = "the encoder alone, without the head of its task"
    with atomic_folder(out) as temp, torch.inference_mode():
        try:
            compute = write(temp, backbone, config)
        except ModuleNotFoundError as error:
            missing = f"expected the package {error.name}; found none; install it with pip"
            raise UsageError(f"--format {kind}: {missing}") from error
        write_atomic(temp / "README.md", model_card(run, config, usage).encode())
        _check(temp, Outputs(backbone.model), compute, tolerance)
    return config


class Outputs(nn.Module):
    """The outputs of a ViT: its normalized tokens [B, 1 + N, D], and its logits [B, K].

    A model without a head gives the pooled token [B, D] in place of logits.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model.cpu()
        self.eval()

    def forward(self, pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens and logits."""
        tokens_BND = self.model.forward_features(pictures_B3HW)
        return tokens_BND, self.model.forward_head(tokens_BND)


Compute = Callable[[Tensor], Iterable[Tensor]]  # another library computes the outputs of pictures


def _write_timm(folder: Path, backbone: Backbone, config: dict[str, Any]) -> Compute:
    _write_tensors(folder, backbone.model.state_dict(), config)
    return Outputs(timm.create_model(f"local-dir:{folder}", pretrained=True))


def _write_mae(folder: Path, backbone: Backbone, config: dict[str, Any]) -> Compute:
    """Write {"model": tensors}, whose names are those of MAE and timm."""
    buffer, path = io.BytesIO(), folder / "encoder.pth"
    content = {"model": backbone.model.state_dict()}
    torch.save(content, buffer)
    write_atomic(path, buffer.getbuffer())
    _write_json(folder / "config.json", config)
    architecture, args = model_args(backbone.model)
    return Outputs(timm.create_model(architecture, checkpoint_path=str(path), **args))


def _write_onnx(folder: Path, backbone: Backbone, config: dict[str, Any]) -> Compute:
    """Write a graph for any batch size; onnx's own evaluator checks it."""
    from onnx.reference import ReferenceEvaluator

    path = folder / "model.onnx"
    program = torch.onnx.export(
        Outputs(backbone.model),
        (torch.zeros(2, 3, *backbone.model.patch_embed.img_size),),
        dynamo=True,
        opset_version=ONNX_OPSET,
        input_names=["pictures"],
        output_names=["tokens", "logits" if backbone.model.num_classes else "pooled"],
        # torch 2.7 refuses a dimension without a largest size
        dynamic_shapes={"pictures_B3HW": {0: torch.export.Dim("batch", max=1 << 30)}},
        verbose=False,
    )
    assert program is not None  # dynamo returns one
    program.save(path)  # above 2 GB, the weights are in a second file
    for file in folder.iterdir():
        with open(file, "rb") as written:
            os.fsync(written.fileno())
    _write_json(folder / "config.json", config)
    reference = ReferenceEvaluator(str(path))
    return lambda x_B3HW: map(torch.from_numpy, reference.run(None, {"pictures": x_B3HW.numpy()}))


def _write_hf(folder: Path, backbone: Backbone, config: dict[str, Any]) -> Compute:
    """Write transformers' ViT.

    Raises: UsageError for a model that its ViT does not describe.
    """
    import transformers

    model, tensors = backbone.model, dict[str, Tensor]()
    if model.num_classes and model.global_pool != "token":
        found = f'found pool = "{model.global_pool}"; use --format timm, which transformers loads'
        raise UsageError(f'--format hf: expected a classifier with pool = "token"; {found}')
    prefix = "vit." if model.num_classes else ""
    for name, tensor in model.state_dict().items():
        layers = ("query", "key", "value") if ".attn.qkv." in name else ("qkv",)
        for layer, part in zip(layers, tensor.chunk(len(layers)), strict=True):
            hf_name = name.replace("qkv", layer)
            for pattern, replacement in HF_NAMES.items():
                hf_name = re.sub(pattern, replacement, hf_name)
            tensors[hf_name if name.startswith("head.") else prefix + hf_name] = part
    _write_tensors(folder, tensors, _hf_config(backbone, config))
    _write_json(folder / "preprocessor_config.json", _hf_preprocessing(backbone))
    cls = transformers.ViTForImageClassification if prefix else transformers.ViTModel
    pooler = {} if prefix else {"add_pooling_layer": False}
    loaded, report = cls.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **pooler
    )
    if mismatched := sorted(str(name) for names in report.values() for name in names):
        found = f"found {', '.join(mismatched[:3])}; use --format timm, which transformers loads"
        raise UsageError(f"--format hf: expected the tensors of transformers' ViT; {found}")

    def compute(pictures_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        tokens_BND = (loaded.vit if prefix else loaded)(pictures_B3HW).last_hidden_state
        return tokens_BND, loaded(pictures_B3HW).logits if prefix else tokens_BND[:, 0]

    return compute


def _hf_config(backbone: Backbone, config: dict[str, Any]) -> dict[str, Any]:
    model, names = backbone.model, config.get("label_names", ())
    height, width = model.patch_embed.img_size
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if model.num_classes else "ViTModel"],
        "image_size": height if height == width else [height, width],
        "patch_size": model.patch_embed.patch_size[0],
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "intermediate_size": model.blocks[0].mlp.fc1.out_features,
        "layer_norm_eps": model.blocks[0].norm1.eps,
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
        "mcm": config["mcm"],
    }


def _hf_preprocessing(backbone: Backbone) -> dict[str, Any]:
    height, width = backbone.size
    return {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": int(min(height, width) / backbone.crop_pct)},
        "crop_size": {"height": height, "width": width},
        "resample": Resampling[backbone.interpolation.upper()].value,
        "image_mean": backbone.mean,
        "image_std": backbone.std,
    }


class Format(NamedTuple):
    """How a format is written, how it is loaded, and the largest difference of its outputs."""

    write: Callable[[Path, Backbone, dict[str, Any]], Compute]
    usage: str
    tolerance: float = 1e-5


FORMATS = {
    "timm": Format(
        _write_timm,
        'timm.create_model("local-dir:FOLDER", pretrained=True)\n    '
        'transformers.AutoModel.from_pretrained("FOLDER")',
    ),
    "hf": Format(
        _write_hf, 'transformers.AutoModel.from_pretrained("FOLDER", add_pooling_layer=False)'
    ),
    "mae": Format(_write_mae, 'torch.load("FOLDER/encoder.pth", weights_only=True)["model"]'),
    "onnx": Format(
        _write_onnx,
        'onnxruntime.InferenceSession("FOLDER/model.onnx").run(["tokens"], {"pictures": x})',
        1e-4,  # other kernels: tokens of DeiT-tiny differ by 3e-5
    ),
}


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """Return the config.json of timm's hub layout: architecture, arguments and preprocessing."""
    model = backbone.model
    architecture, args = model_args(model)
    del args["num_classes"]  # timm reads the top-level key; transformers refuses both
    return {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": args,
        "pretrained_cfg": {
            "tag": "mcm",
            "custom_load": False,
            "input_size": [3, *backbone.size],
            "fixed_input_size": True,
            "interpolation": backbone.interpolation,
            "crop_pct": backbone.crop_pct,
            "crop_mode": "center",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "num_classes": model.num_classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def model_card(run: Path, config: dict[str, Any], usage: str) -> str:
    """Return the README.md of an exported folder: its `usage`, its training and its results."""
    facts = recorded(run)
    fields = (facts.get("cache") or {}) | facts | config["mcm"]
    fields.pop("sha256", None)
    rows = {name: value for name, value in fields.items() if isinstance(value, str | float)}
    rows |= {f"sha256 of {unit}": digest for unit, digest in facts.get("units", {}).items()}
    rows |= {name: f"{value:.4f}" for name, value in last_eval(run).items() if name in RESULTS}
    for file in sorted([*(run / "probe").glob("*.json"), *(run / "dense").glob("*.json")]):
        result = read_json(file)
        if result["weights"] == config["mcm"]["weights"]:
            source = f"{result['input']} input, DATASET {result['data_sha256'][:12]}"
            names = [name for name in RESULTS if result.get(name) is not None]
            rows |= {f"{name}, {source}": f"{result[name]:.4f}" for name in names}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return CARD.format(usage=usage, table=table, settings=json.dumps(facts["config"], indent=2))


def _write_tensors(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    weights = safetensors_bytes(tensors, metadata={"format": "pt"})
    write_atomic(folder / "model.safetensors", weights)
    _write_json(folder / "config.json", config)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(content, indent=2).encode())


def _check(folder: Path, encoder: Outputs, compute: Compute, tolerance: float) -> None:
    """Compare the outputs of another library, which loaded the folder, on fixed noise.

    Raises: McmError if they differ by more than `tolerance`.
    """
    generator = torch.Generator().manual_seed(0)
    size = encoder.model.patch_embed.img_size
    pictures_B3HW = torch.randn(3, 3, *size, generator=generator)
    outputs = zip(encoder(pictures_B3HW), compute(pictures_B3HW), strict=True)
    difference = max((expected - found).abs().max().item() for expected, found in outputs)
    if not difference <= tolerance:
        within = f"expected the other library's features within {tolerance} of the RUN's"
        raise McmError(f"{folder}: {within}; found {difference:.2e}")
