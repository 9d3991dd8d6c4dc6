"""A RUN folder with one checkpoint, written as pre-training writes it, of a model that has not trained."""

import json
from pathlib import Path

import torch
from make_cache import make_identity

from cache_tools.records import encode_record
from cache_tools.storage import write_atomic
from mcm import checkpoint
from mcm.config import PretrainConfig
from mcm.model import MaskedChannelModel
from mcm.run_dir import PretrainRun, identity_config, write_environment

CONFIG = {
    "student": {"width": 32, "depth": 2, "heads": 2},
    "optim": {"lr": 1e-3},
    "schedule": {"epochs": 1},
    "train": {"global_batch": 16, "micro_batch": 16, "precision": "fp32"},
}


def make_run(path: Path, mode: str = "channel", step: int = 3) -> Path:
    """Its encoder fill is not what it began with, so that folding shows."""
    config = PretrainConfig.model_validate_json(json.dumps(CONFIG | {"mask": {"mode": mode}}))
    run = PretrainRun(
        config=identity_config(config), cache_sha256="0" * 64, units={}, teacher="test", size=(32, 32), patch=8,
        cache=make_identity({}), grid=(4, 4), channels=16, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bicubic",
    )  # fmt: skip
    model = MaskedChannelModel(config, (4, 4), 8, 16)
    if mode == "channel":
        torch.nn.init.normal_(model.encoder_fill, generator=torch.Generator().manual_seed(0))
    write_atomic(path / "run.json", encode_record(run))
    write_environment(path, config, cache="CACHE")
    checkpoint.save(path, step, model.state_dict(), {}, {})
    return path
