"""Export of a RUN's encoder as a folder that timm and transformers load, with a model card.

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
# The results in a model card, as fractions of 1.
RESULTS = ("top1", "top5", "r2_masked", "r2_full", "knn", "linear", "miou", "pixel_accuracy")
CARD = """A vision transformer trained by Masked Channel Modeling.
FOLDER is the folder of this file.

    timm.create_model("local-dir:FOLDER", pretrained=True)
    transformers.AutoModel.from_pretrained("FOLDER")

The licences of the training pictures and of the teacher apply to these weights too.
Accuracies are fractions of 1.

| trained on and measured | |
| --- | --- |
{table}
```json
{settings}
```
"""


def export(run: Path, out: Path, fold_scale: float | None = None) -> dict[str, Any]:
    """Write the newest encoder of a RUN to `out`, and return its config.json.

    The encoder of a fine-tuned RUN is written with its head. `fold_scale` s folds
    x~ = e + s (x - e), where e is the encoder fill, into the patch embedding.

    Raises: UsageError before anything is written; McmError if timm computes other features.
    """
    if not (run / "run.json").is_file():
        advice = "make one with `mcm-train pretrain`"
        raise UsageError(f"{run}: expected a RUN (run.json); found {found_at(run)}; {advice}")
    if out.exists():
        advice = "remove it or choose another name"
        raise UsageError(f"{out}: expected a new name; found {found_at(out)}; {advice}")
    backbone = load_encoder(str(run), head=True)
    if fold_scale is not None:
        masked = backbone.masked
        if masked is None or not 0 < fold_scale <= 1:
            expected = "expected 0 < S <= 1 and a RUN trained with masks"
            raise UsageError(f"--folded: {expected}; found S = {fold_scale} and {run}")
        folded = folded_state(masked.encoder, masked.encoder_fill, fold_scale)
        backbone.model.load_state_dict(folded)
    config = timm_config(backbone)
    config["mcm"] = {"weights": backbone.weights, "fold_scale": fold_scale}
    if classes := recorded(run).get("classes"):
        config["label_names"] = classes
    state = backbone.model.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with atomic_folder(out) as temp:
        weights = safetensors_bytes(tensors, metadata={"format": "pt"})
        write_atomic(temp / "model.safetensors", weights)
        write_atomic(temp / "config.json", json.dumps(config, indent=2).encode())
        write_atomic(temp / "README.md", model_card(run, config).encode())
        _check_round_trip(temp, backbone.model)
    return config


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


def model_card(run: Path, config: dict[str, Any]) -> str:
    """Return the README.md of an exported folder: how to load it, its training and its results."""
    facts = recorded(run)
    known = (facts.get("cache") or {}) | facts | config["mcm"]
    known.pop("sha256", None)
    rows = {name: value for name, value in known.items() if isinstance(value, str | float)}
    rows |= {f"sha256 of {unit}": digest for unit, digest in facts.get("units", {}).items()}
    rows |= {name: f"{value:.4f}" for name, value in last_eval(run).items() if name in RESULTS}
    for file in sorted([*(run / "probe").glob("*.json"), *(run / "dense").glob("*.json")]):
        found = read_json(file)
        if found["weights"] == config["mcm"]["weights"]:
            of = f"{found['input']} input, DATASET {found['data_sha256'][:12]}"
            names = [name for name in RESULTS if found.get(name) is not None]
            rows |= {f"{name}, {of}": f"{found[name]:.4f}" for name in names}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return CARD.format(table=table, settings=json.dumps(facts["config"], indent=2))


def _check_round_trip(folder: Path, model: VisionTransformer) -> None:
    """Load the folder with timm, which is strict about keys, and compare outputs on fixed noise."""
    models = timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), model.cpu().eval()
    generator = torch.Generator().manual_seed(0)
    pictures_B3HW = torch.randn(2, 3, *model.patch_embed.img_size, generator=generator)
    with torch.inference_mode():
        outputs = [(m.forward_features(pictures_B3HW), m(pictures_B3HW)) for m in models]
    gap = max((found - wanted).abs().max().item() for found, wanted in zip(*outputs, strict=True))
    if not gap <= FEATURE_TOLERANCE:
        expected = f"expected timm's features within {FEATURE_TOLERANCE} of the RUN's"
        raise McmError(f"{folder}: {expected}; found {gap:.2e}")
