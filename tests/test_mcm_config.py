"""Every shipped TOML is one complete run that builds, and every wrong setting is named as the user typed it."""

from pathlib import Path

import pytest
import torch

from cache_tools.errors import UsageError
from cache_tools.records import config_file, load_toml, write_toml
from mcm.ablate import Plan
from mcm.config import FinetuneConfig, PretrainConfig, Train
from mcm.model import MaskedChannelModel, build_encoder

CONFIGS = Path(__file__).parents[1] / "configs"
KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "ablate": Plan}
PRETRAIN, FINETUNE, PLANS = (sorted((CONFIGS / kind).glob("*.toml")) for kind in KINDS)
DEMO = CONFIGS / "pretrain/demo.toml"


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_pretrain_config_builds_on_meta(path):
    cfg = load_toml(PretrainConfig, path, ["train.residual=fp32"])  # autocast does not know the device "meta"
    grid, patch = ((4, 4), 8) if path.stem == "demo" else ((14, 14), 16)
    channels = 1024 if "clipl14" in path.stem else 768
    with torch.device("meta"):
        model = MaskedChannelModel(cfg, grid, patch, channels)
        masks = torch.empty(8, cfg.student.width, dtype=torch.bool), torch.empty(2, grid[0] * grid[1], dtype=torch.int)
        y_BNC = model(torch.empty(2, 3, grid[0] * patch, grid[1] * patch), masks)
    assert y_BNC.shape == (2, grid[0] * grid[1], channels)


@pytest.mark.parametrize("path", FINETUNE, ids=lambda path: path.stem)
def test_finetune_config_builds_on_meta(path):
    cfg = load_toml(FinetuneConfig, path)
    if cfg.student is not None:
        with torch.device("meta"):
            build_encoder((cfg.student.size, cfg.student.size), cfg.student.patch, cfg.student)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_row_of_a_plan_is_a_configuration(path):
    plan = load_toml(Plan, path)
    for row in plan.all_rows().values():
        if not row.init:
            load_toml(PretrainConfig, config_file(plan.base), row.set)
        if name := row.finetune:
            config = load_toml(FinetuneConfig, config_file(name))
            assert row.init != "random" or config.student is not None


@pytest.mark.parametrize("path", PRETRAIN + FINETUNE + PLANS, ids=lambda path: f"{path.parent.stem}/{path.stem}")
def test_header_says_how_to_run_it_and_the_resolved_config_reads_back(path, tmp_path):
    header, kind = path.read_text(encoding="ascii").partition("\n\n")[0], path.parent.stem
    assert all(line.startswith("#") for line in header.splitlines())
    for words in (f"mcm-train {kind} {kind}/{path.stem} ", "Command:", "Hardware:", "Hours:", "Expect:"):
        assert words in header, words
    cls = KINDS[kind]
    cfg = load_toml(cls, path)
    (tmp_path / "config.toml").write_text(write_toml(cfg))
    assert load_toml(cls, tmp_path / "config.toml") == cfg


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optim.lr=", "exactly one of optim.lr and optim.blr"),
        ("optim={lr=1e-3, blr=1e-4}", "exactly one of optim.lr and optim.blr"),
        ("train.seed=", "train.seed"),
        ("optim.rl=1e-4", "optim.lr"),
        ("optim.lr='high'", "optim.lr"),
        (f"student.width={10**400}", "student.width"),  # was an OverflowError
        ("student.heads=3", "student.heads = 3 must divide student.width = 128"),
        ("mask.ratio=1.0", "mask.ratio"),
        ("mask.ratio=0.001", "mask.ratio = 0.001 hides 0 of 128 channels"),
        ("mask.mode=channels", "'channel', 'dropout', 'patch', 'none', 'gaussian' or 'pixels'"),
        ("schedule.warmup_epochs=45", "schedule.warmup_epochs = 45"),
        ("train.workers=-1", "train.workers"),
        ("mask.final_ratio=1.0", "mask.final_ratio"),
        ("mask.final_ratio=0.999", "mask.final_ratio = 0.999 hides 128 of 128 channels"),
        ("mask={mode='dropout', final_ratio=0.999}", "mask.final_ratio = 0.999 hides 128 of 128 channels"),
        ("target.features=pixel", "'patch', 'joint' or 'pixels'"),
        ("target={features='pixels', norm='channel'}", 'target.norm = "channel" needs target.features = "patch"'),
    ],
)
def test_wrong_setting_is_named(override, named):
    with pytest.raises(UsageError) as caught:
        load_toml(PretrainConfig, DEMO, [override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", PRETRAIN + FINETUNE, ids=lambda path: f"{path.parent.stem}/{path.stem}")
def test_either_learning_rate_replaces_the_other(path):
    for key, other in (("lr", "blr"), ("blr", "lr")):
        optim = load_toml(KINDS[path.parent.stem], path, [f"optim.{other}=1", f"optim.{key}=0.5"]).optim
        assert (getattr(optim, key), getattr(optim, other)) == (0.5, None)


def test_an_empty_value_is_none_where_the_key_is_optional():
    assert load_toml(PretrainConfig, DEMO, ["mask.final_ratio=0.9", "mask.final_ratio="]).mask.final_ratio is None
    assert load_toml(FinetuneConfig, CONFIGS / "finetune/demo.toml", ["student=", "augment.recipe="]).student is None


def test_patch_must_tile_the_picture():
    with pytest.raises(UsageError, match="student.patch = 7 must divide student.size = 32"):
        load_toml(FinetuneConfig, CONFIGS / "finetune/demo.toml", ["student.patch=7"])


def test_workers_are_the_cores_of_the_rank_but_one(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    for ranks, workers in (("1", 8), ("2", 7), ("16", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert Train(global_batch=16, micro_batch=16).workers == workers
