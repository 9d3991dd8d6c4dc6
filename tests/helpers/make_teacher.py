"""A tiny open_clip image tower on disk, with seeded weights: 32 px, patch 8, 4x4 tokens of 32 channels."""

import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
PREPROCESS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def make_teacher(folder: Path, quick_gelu: bool = False, seed: int = 0, **vision: object) -> tuple[str, str]:
    """Write FOLDER; returns (--teacher, --weights)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"embed_dim": 16, "vision_cfg": VISION | vision, "text_cfg": TEXT, "quick_gelu": quick_gelu}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        state = CLIP(**config).state_dict()
    # Seeded weights are too small for an activation to matter; trained ones are not.
    scaled = {name: (3 * value if value.ndim == 2 else value).contiguous() for name, value in state.items()}
    save_file(scaled, folder / "open_clip_model.safetensors")
    return f"open_clip:{folder}", str(folder / "open_clip_model.safetensors")
