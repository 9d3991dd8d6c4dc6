"""Encoders from every kind of source: all of their tensors or an error that names what is missing."""

import hashlib
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
        with pytest.raises(UsageError, match="TorchScript archive that is none of OpenAI's"):
            read_weights(tmp_path / "ViT-B-16.pt")
        digest = hashlib.sha256((tmp_path / "ViT-B-16.pt").read_bytes()).hexdigest()
        monkeypatch.setattr("cache_tools.weights.OPENAI_SHA256", {digest})
        state = read_weights(tmp_path / "ViT-B-16.pt")
    assert torch.equal(state["weight"], module.weight.float()) and state["bias"].dtype == torch.float32


def test_a_damaged_file_and_a_pickle_with_code_are_refused(small_file, tmp_path):
    small_file.write_bytes(small_file.read_bytes()[:100_000])
    with pytest.raises(UsageError, match="expected weights"):
        load_encoder("timm:vit_tiny_patch16_224", small_file)
    for content in ({"model": print}, {"cls_token": 3}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "wrong.pt")
        with pytest.raises(UsageError, match="expected weights"):
            load_encoder("timm:vit_tiny_patch16_224", tmp_path / "wrong.pt")


def test_a_checkpoint_gives_its_ema_without_the_prefixes_of_wrappers(tmp_path):
    state, ema = ({f"module._orig_mod.{name}": torch.full((1,), value) for name in "ab"} for value in (0.0, 1.0))
    for checkpoint, expected in (({"model": state, "model_ema": ema}, 1), ({"state_dict": state}, 0), (ema, 1)):
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        assert read_weights(tmp_path / "checkpoint.pt") == {
            "a": torch.tensor([expected]),
            "b": torch.tensor([expected]),
        }


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("timm:vit_tinny_patch16_224", None, "did you mean 'vit_tiny_patch16_224'"),
        ("timm:vit_tiny_patch16_224", "missing.safetensors", "expected a file"),
        ("timm:resnet18", "pyproject.toml", "expected a plain vision transformer"),
        ("nowhere", None, "found nothing there"),
        ("random", None, r"\[student\]"),
        ("random", "x", "--weights goes with timm:NAME"),
    ],
)
def test_bad_requests(spec, weights, message, tmp_path):
    weights = weights and (tmp_path / weights)
    if weights and weights.name == "pyproject.toml":
        weights.write_text("")
    with pytest.raises(UsageError, match=message):
        load_encoder(spec, weights)


def test_random_is_the_same_for_the_same_seed_and_timm_rebuilds_it():
    one, two = (load_encoder("random", student=STUDENT, seed=3).model for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    architecture, args = model_args(one)
    timm.create_model(architecture, **args).load_state_dict(one.state_dict())
