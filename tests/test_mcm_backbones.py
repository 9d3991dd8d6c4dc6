"""Encoders from every kind of source: all of their tensors or an error that names what is missing."""

import argparse
import hashlib
import json
import pathlib
import warnings

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from cache_tools.errors import IdentityError, UsageError
from cache_tools.weights import read_weights
from mcm.backbones import load_encoder, model_args, pooled
from mcm.config import SizedStudent
from mcm.model import encode_tokens

STUDENT = SizedStudent(width=32, depth=2, heads=2, size=32, patch=8)


def test_timm_file_loads_whole_and_brings_its_input(shared_data):
    file = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    backbone = load_encoder("timm:deit_tiny_patch16_224", file)
    assert torch.equal(backbone.model.norm.weight, load_file(file)["norm.weight"])
    assert (backbone.size, backbone.interpolation, backbone.crop_pct) == ((224, 224), "bicubic", 0.9)
    assert backbone.weights.startswith("sha256:") and backbone.masked is None


def test_patch_mean_is_timms_own(shared_data):
    file = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    model = load_encoder("timm:deit_tiny_patch16_224", file).model.eval()
    pictures = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.forward_features(pictures)[:, 1:].mean(1)
        assert torch.allclose(pooled(model, encode_tokens(model, pictures)), expected, atol=1e-5)


def test_another_models_weights_are_refused(shared_data):
    file = shared_data / "deit-tiny" / "deit_tiny_openclip_visual.safetensors"  # timm converts the names; no shape fits
    with pytest.raises(IdentityError, match=r"expected 100 % of .* 151 tensors; found 0\.0 %, .* and 147 more"):
        load_encoder("timm:vit_base_patch16_clip_quickgelu_224", file)


@pytest.fixture
def small_file(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", depth=12, num_classes=5)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_a_head_is_left_out(small_file):
    assert load_encoder("timm:vit_tiny_patch16_224", small_file).model.num_classes == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("blocks.3.mlp.fc1.weight"), r"99\.3 %.*blocks\.3\.mlp\.fc1\.weight"),
        (
            lambda state: state.update({"blocks.12.norm1.weight": torch.ones(192)}),
            r"unexpected: blocks\.12\.norm1\.weight",
        ),
        (lambda state: state.update({"norm.weight": torch.ones(7)}), r"another shape: norm\.weight"),
    ],
)
def test_less_than_all_is_an_identity_error(small_file, change, message):
    state = load_file(small_file)
    change(state)
    save_file(state, small_file)
    with pytest.raises(IdentityError, match=message):
        load_encoder("timm:vit_tiny_patch16_224", small_file)


def test_openais_torchscript_archives_give_their_tensors_and_no_other_is_opened(tmp_path, monkeypatch):
    module = torch.nn.Linear(2, 3).half()
    with warnings.catch_warnings(action="ignore"):  # torch's: TorchScript is out of date, but OpenAI's files are not
        torch.jit.script(module).save(str(tmp_path / "ViT-B-16.pt"))
        with pytest.raises(UsageError, match="TorchScript archive that is not one of OpenAI's"):
            read_weights(tmp_path / "ViT-B-16.pt")
        digest = hashlib.sha256((tmp_path / "ViT-B-16.pt").read_bytes()).hexdigest()
        monkeypatch.setattr("cache_tools.weights.OPENAI_SHA256", {digest})
        state, _ = read_weights(tmp_path / "ViT-B-16.pt")
    assert torch.equal(state["weight"], module.weight.float()) and state["bias"].dtype == torch.float32


def test_a_damaged_file_and_a_pickle_with_code_are_refused(small_file, tmp_path):
    small_file.write_bytes(small_file.read_bytes()[:100_000])
    with pytest.raises(UsageError, match="expected weights"):
        load_encoder("timm:vit_tiny_patch16_224", small_file)
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(UsageError, match="expected weights .*; found another kind of file$"):
        load_encoder("timm:vit_tiny_patch16_224", tmp_path / "page.pt")
    for content in ({"model": print}, {"cls_token": 3}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "wrong.pt")
        with pytest.raises(UsageError, match="expected weights"):
            load_encoder("timm:vit_tiny_patch16_224", tmp_path / "wrong.pt")


NAMES = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.norm1.bias")


def tensors(value=0.0, prefix="", suffix=""):
    return {f"{prefix}{name}{suffix}": torch.full((1,), value) for name in NAMES}


@pytest.mark.parametrize(
    ("content", "sets"),
    [
        ({"state_dict": tensors(0), "state_dict_ema": tensors(1), "arch": "x"}, ("state_dict", "state_dict_ema")),
        ({"model": tensors(0), "model_ema": tensors(1), "scaler": {"scale": 2.0}}, ("model", "model_ema")),
        ({"model": tensors(0), "model_ema": {"module": tensors(1), "decay": 0.9}}, ("model", "model_ema.module")),
        ({"state_dict": tensors(0) | tensors(1, suffix="_ema")}, ("state_dict.model", "state_dict.ema")),
        (tensors(0, "visual.") | tensors(1, "visual.", "_ema"), ("model", "ema")),
        ({"state_dict": tensors(0, "model.") | tensors(1, "ema_model.")}, ("state_dict.model", "state_dict.ema_model")),
        (tensors(0) | tensors(1, "ema."), ("model", "ema")),
        (
            {
                "student": tensors(0, "module.backbone."),
                "teacher": tensors(1, "backbone."),
                "dino_loss": {"center": NAMES},
            },
            ("student", "teacher"),
        ),
        (
            {"state_dict": tensors(0, "module.base_encoder.") | tensors(1, "module.momentum_encoder.")},
            ("state_dict.base_encoder", "state_dict.momentum_encoder"),
        ),
        (tensors(0, "online_encoder.") | tensors(1, "target_encoder."), ("online_encoder", "target_encoder")),
        (tensors(0, "backbone.") | tensors(1, "backbone_momentum."), ("model", "backbone_momentum")),
        (tensors(0, "student_backbone.") | tensors(1, "teacher_backbone."), ("student_backbone", "teacher_backbone")),
    ],
)
def test_two_sets_of_weights_are_a_question(content, sets, tmp_path):
    file = tmp_path / "checkpoint.pt"
    torch.save(content, file)
    with pytest.raises(UsageError) as asked:
        read_weights(file)
    shown = ("model", "ema") if "ema" in sets[1] else sets
    assert f"found {', '.join(sets)}; use --weights {file}#{shown[0]} or --weights {file}#{shown[1]}" in str(
        asked.value
    )
    for value, name in enumerate(sets):
        state, chosen = read_weights(f"{file}#{name}")
        assert chosen == name and {name.removeprefix("visual.") for name in state} == set(NAMES)
        assert all(tensor == value for tensor in state.values())
        assert read_weights(f"{file}#{name.rpartition('.')[2]}")[1] == name
    if "ema" in sets[1]:
        assert [read_weights(f"{file}#{name}")[1] for name in ("model", "ema")] == list(sets)
    with pytest.raises(UsageError, match="expected one set"):
        read_weights(f"{file}#nowhere")


@pytest.mark.parametrize(
    "content",
    [
        tensors(0, "module._orig_mod."),
        {"state_dict": tensors(0, "_orig_mod."), "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}, "lr": 1e-3}},
        {"model": tensors(0), "args": argparse.Namespace(lr=1e-3), "epoch": 3},
        {"backbone": tensors(0), "head": {"weight": torch.zeros(1), "bias": torch.zeros(1)}},
    ],
)
def test_one_set_of_weights_is_read_without_wrappers(content, tmp_path):
    file = tmp_path / "checkpoint#1.pt"  # no name of a set
    torch.save(content, file)
    assert read_weights(file) == (tensors(0), "")


def test_the_towers_of_one_clip_are_one_set(tmp_path):
    content = tensors(0, "visual.") | tensors(0, "text.") | tensors(0, "text_decoder.")
    torch.save(content, tmp_path / "clip.pt")
    assert read_weights(tmp_path / "clip.pt")[0].keys() == content.keys()


def test_a_foreign_object_is_named_without_the_advice_of_torch(tmp_path):
    torch.save({"model": tensors(), "best": pathlib.PurePosixPath("x")}, tmp_path / "wrong.pt")
    with pytest.raises(UsageError, match="found an object of pathlib.PurePosixPath$"):
        read_weights(tmp_path / "wrong.pt")


def test_the_record_names_the_set(small_file, tmp_path):
    state = load_file(small_file)
    torch.save({"model": state, "model_ema": {name: value + 1 for name, value in state.items()}}, tmp_path / "two.pt")
    found = [load_encoder("timm:vit_tiny_patch16_224", f"{tmp_path / 'two.pt'}#{name}") for name in ("model", "ema")]
    digest = f"sha256:{hashlib.sha256((tmp_path / 'two.pt').read_bytes()).hexdigest()}"
    assert [one.weights for one in found] == [f"{digest}#model", f"{digest}#model_ema"]
    assert torch.equal(found[1].model.norm.bias, state["norm.bias"] + 1)


def test_the_mean_of_a_file_is_that_of_its_tag_or_its_config(tmp_path):
    """The tags of vit_small_patch16_224 differ; a config.json of another model beside the file counts nothing."""
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    with pytest.raises(UsageError, match=r"mean 0.5,0.5,0.5 .* of augreg.*; mean 0.485.* of dino; use timm:NAME.TAG"):
        load_encoder("timm:vit_small_patch16_224", tmp_path / "vit.safetensors")
    assert load_encoder("timm:vit_small_patch16_224.dino", tmp_path / "vit.safetensors").mean[0] == 0.485
    for architecture, mean in (("vit_small_patch16_224", 0.25), ("vit_tiny_patch16_224", None)):
        config = {"architecture": architecture, "pretrained_cfg": {"mean": [0.25] * 3, "std": [0.5] * 3}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if mean:
            assert load_encoder("timm:vit_small_patch16_224", tmp_path / "vit.safetensors").mean[0] == mean
            assert load_encoder("timm:vit_small_patch16_224.dino", tmp_path / "vit.safetensors").mean[0] == 0.485
    with pytest.raises(UsageError, match=r"use timm:NAME.TAG"):
        load_encoder("timm:vit_small_patch16_224", tmp_path / "vit.safetensors")


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_distilled_patch16_224", "test_efficientnet", "pit_ti_224", "cait_xxs24_224", "levit_128s",
     "vit_pwee_patch16_reg1_gap_256", "eva02_tiny_patch14_224", "vit_relpos_small_patch16_224"],
)  # fmt: skip
def test_what_is_no_plain_vit_is_refused_in_one_line(name, tmp_path):
    save_file(timm.create_model(name, num_classes=0).state_dict(), tmp_path / "weights.safetensors")
    reason = r"(TypeError\('a |AssertionError\('The distilled head|AttributeError\(\"'Parallel)"
    with pytest.raises(UsageError, match=f"timm:{name}: expected a plain vision transformer of timm; found {reason}"):
        load_encoder(f"timm:{name}", tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("timm:vit_tinny_patch16_224", None, "did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224", "missing.safetensors", "expected a file"),
        ("timm:vit_tiny_patch16_224.nope", None, "expected a tag of vit_tiny_patch16_224: augreg_in21k_ft_in1k"),
        ("timm:vit_small_patch16_36x1_224", None, "expected pretrained weights; timm has none; give a file"),
        ("nowhere", None, "found nothing there"),
        ("random", None, r"\[student\]"),
        ("random", "x", "expected timm:NAME with --weights"),
    ],
)
def test_bad_requests(spec, weights, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load_encoder(spec, weights and tmp_path / weights)


def test_random_is_the_same_for_the_same_seed_and_timm_rebuilds_it():
    one, two = (load_encoder("random", student=STUDENT, seed=3).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    architecture, args = model_args(one)
    timm.create_model(architecture, **args).load_state_dict(one.state_dict())
