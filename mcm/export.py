"""A RUN's encoder as a folder that timm and transformers load by themselves, with a model card.

Letters: B batch, H W pixels.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save as safetensors_bytes
from timm.models.vision_transformer import VisionTransformer

from cache_tools.errors import McmError, UsageError, found_at
from cache_tools.records import read_json
from cache_tools.storage import atomic_folder, write_atomic
from mcm.backbones import Backbone, load_encoder, model_args
from mcm.model import folded_state
from mcm.run_dir import last_eval, recorded

FEATURE_TOLERANCE = 1e-5
FIGURES = ("top1", "top5", "r2_masked", "r2_full", "knn", "linear", "miou", "pixel_accuracy")  # fractions of 1
CARD = """A vision transformer trained by Masked Channel Modeling; FOLDER is the folder of this file.

    timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers.AutoModel.from_pretrained("FOLDER")

The licences of the training pictures and of the teacher apply to these weights too. Accuracies are fractions of 1.

| trained on and measured | |
| --- | --- |
{table}
```json
{settings}
```
"""


def export(run: Path, out: Path, fold_scale: float | None = None) -> dict[str, Any]:
    """Write RUN's newest encoder (a fine-tuned RUN's with its head) to `out`; returns its config.json.

    `fold_scale` s folds x~ = e + s (x - e), e the encoder fill, into the patch embedding.
    Raises: UsageError before anything is written; McmError when timm's features are not the RUN's.
    """
    if not (run / "run.json").is_file():
        raise UsageError(f"{run}: expected a RUN (run.json); found {found_at(run)}; make one with `mcm-train pretrain`")
    if out.exists():
        raise UsageError(f"{out}: expected a new name; found {found_at(out)}; remove it or choose another name")
    backbone = load_encoder(str(run), head=True)
    if fold_scale is not None:
        if backbone.masked is None or not 0 < fold_scale <= 1:
            raise UsageError(f"--folded {fold_scale}: expected 0 < S <= 1 and a RUN that was trained with masks; {run}")
        masked = backbone.masked
        backbone.model.load_state_dict(folded_state(masked.encoder, masked.encoder_fill, fold_scale))
    config = timm_config(backbone) | {"mcm": {"weights": backbone.weights, "fold_scale": fold_scale}}
    if classes := recorded(run).get("classes"):
        config["label_names"] = classes
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    with atomic_folder(out) as temp:
        write_atomic(temp / "model.safetensors", safetensors_bytes(tensors, metadata={"format": "pt"}))
        write_atomic(temp / "config.json", json.dumps(config, indent=2).encode())
        write_atomic(temp / "README.md", model_card(run, config).encode())
        _check_round_trip(temp, backbone.model)
    return config


def timm_config(backbone: Backbone) -> dict[str, Any]:
    """config.json as timm's hub layout has it: architecture, how it differs from it, and what its pictures must be."""
    model = backbone.model
    architecture, args = model_args(model)
    del args["num_classes"]  # timm takes it from the top level, and transformers refuses it twice
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


def model_card(run: Path, config: dict[str, Any]) -> str:
    """README.md of an exported folder: how to load it, what it was trained on, what was measured, its configuration."""
    facts = recorded(run)
    told = (facts.get("cache") or {}) | facts | config["mcm"]
    rows = {name: value for name, value in told.items() if isinstance(value, str | float) and name != "sha256"}
    rows |= {f"sha256 of {unit}": digest for unit, digest in facts.get("units", {}).items()}
    rows |= {name: f"{value:.4f}" for name, value in last_eval(run).items() if name in FIGURES}
    for file in sorted([*(run / "probe").glob("*.json"), *(run / "dense").glob("*.json")]):
        found = read_json(file)
        if found["weights"] == config["mcm"]["weights"]:
            of = f"{found['input']} input, DATASET {found['data_sha256'][:12]}"
            rows |= {f"{name}, {of}": f"{found[name]:.4f}" for name in FIGURES if found.get(name) is not None}
    settings = json.dumps(facts["config"], indent=2)
    return CARD.format(table="".join(f"| {name} | {value} |\n" for name, value in rows.items()), settings=settings)


def _check_round_trip(folder: Path, model: VisionTransformer) -> None:
    """Load the folder as a stranger would (timm is strict: all keys) and compare outputs on fixed noise."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    pictures_B3HW = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = [(m.forward_features(pictures_B3HW), m(pictures_B3HW)) for m in (loaded, model.cpu().eval())]
    gap = max((found - wanted).abs().max().item() for found, wanted in zip(*outputs, strict=True))
    if not gap <= FEATURE_TOLERANCE:
        raise McmError(f"{folder}: expected timm's features within {FEATURE_TOLERANCE} of the RUN's; found {gap:.2e}")
