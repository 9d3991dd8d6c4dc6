"""Teachers: the right tensors, all of them, or an error that names what is wrong before any work."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from make_teacher import make_teacher
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos

from cache_tools.errors import IdentityError, UsageError
from pipeline.teachers import load_teacher, probe_pictures
from pipeline.timm_teachers import token_features


def test_features_are_open_clips_own(tmp_path: Path) -> None:
    import open_clip

    name, weights = make_teacher(tmp_path / "clip")
    teacher = load_teacher(name, weights, device="cpu")
    assert (teacher.grid, teacher.channels, teacher.has_cls) == ((4, 4), 32, True)
    pictures = torch.from_numpy(probe_pictures(32, 32))
    patch, cls = teacher.features(pictures)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}").eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (teacher.identity.mean, teacher.identity.std))
    with torch.no_grad():
        model.visual.output_tokens = True
        x = (pictures.permute(0, 3, 1, 2) / 255 - mean) / std
        pooled, tokens = model.visual(x)
    assert torch.allclose(patch, tokens, atol=1e-4)
    assert torch.allclose(cls @ torch.from_numpy(teacher.projection), pooled, atol=1e-4)


def test_a_timm_vit_and_its_own_features() -> None:
    state = torch.get_rng_state()
    teacher = load_teacher("timm:vit_tiny_patch16_224", "random", 64, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)  # of the host process
    assert (teacher.grid, teacher.channels, teacher.has_cls) == ((4, 4), 192, True)
    assert teacher.identity.name.endswith("(random weights)")
    pictures = torch.from_numpy(probe_pictures(64, 64))
    patch, cls = teacher.features(pictures)
    mean, std = (torch.tensor(v)[:, None, None] for v in (teacher.identity.mean, teacher.identity.std))
    with torch.no_grad():
        tokens = teacher.tower.forward_features((pictures.permute(0, 3, 1, 2) / 255 - mean) / std)
    assert torch.allclose(cls, tokens[:, 0], atol=1e-4) and torch.allclose(patch, tokens[:, 1:], atol=1e-4)


def test_features_copy_nothing_but_pictures_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(*make_teacher(tmp_path / "clip"), device="cpu")
    monkeypatch.delattr(torch, "tensor")
    assert teacher.features(torch.from_numpy(probe_pictures(32, 32)))[0].shape == (4, 16, 32)


def test_a_smaller_teacher_size_gives_a_smaller_grid(tmp_path: Path) -> None:
    name, weights = make_teacher(tmp_path / "clip")
    teacher = load_teacher(name, weights, 24, device="cpu")
    assert teacher.grid == (3, 3) and teacher.features(torch.from_numpy(probe_pictures(24, 24)))[0].shape == (4, 9, 32)


def test_the_grid_of_a_teacher_with_patch_dropout_is_that_of_its_features(tmp_path: Path) -> None:
    name, weights = make_teacher(tmp_path / "clip", patch_dropout=0.75)
    teacher = load_teacher(name, weights, device="cpu")
    assert teacher.grid == (4, 4) and teacher.features(torch.from_numpy(probe_pictures(32, 32)))[0].shape == (4, 16, 32)


@pytest.mark.parametrize(
    ("size", "clip", "timm_vit"),
    [(0, "above 0", "above 0"), (20, "use 16 or 24", "use 16 or 32"), (36, "use 32 or 40", "use 32 or 48")],
)
def test_a_size_that_the_patch_does_not_divide(size: int, clip: str, timm_vit: str, tmp_path: Path) -> None:
    for name, weights, said in ((*make_teacher(tmp_path / "clip"), clip), ("timm:test_vit", "random", timm_vit)):
        with pytest.raises(UsageError, match=f"--teacher-size {size}: expected .*{said}"):
            load_teacher(name, weights, size, device="cpu")


TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
VIT = TINY | {"img_size": 32, "patch_size": 8}


def naflex(**cfg: Any) -> Any:
    return NaFlexVit(NaFlexVitCfg(patch_size=8, embed_dim=32, depth=2, num_heads=2, **cfg), num_classes=0)


@pytest.mark.parametrize(
    ("build", "has_cls", "norm"),
    [
        (lambda: VisionTransformer(**VIT, reg_tokens=4), True, "final"),
        (lambda: VisionTransformer(**VIT, class_token=False, global_pool="avg", fc_norm=False), False, "final"),
        (lambda: VisionTransformer(**VIT, class_token=False, reg_tokens=2, global_pool="map"), False, "final"),
        (lambda: VisionTransformer(**VIT, class_token=False, global_pool="map", final_norm=False), False, "none"),
        (lambda: VisionTransformerDistilled(**VIT), True, "final"),
        (lambda: VisionTransformerRelPos(**VIT, class_token=True, global_pool="token"), True, "final"),
        (lambda: Beit(**VIT, global_pool="token"), True, "final"),
        (lambda: Eva(**VIT, num_reg_tokens=4, global_pool="token", use_rot_pos_emb=True), True, "final"),
        (lambda: Eva(**VIT, class_token=False, num_reg_tokens=2, global_pool="map"), False, "final"),
        (lambda: Eva(**VIT, class_token=False, global_pool="map"), False, "final"),
        (lambda: naflex(class_token=True, reg_tokens=7, global_pool="token", final_norm=False), True, "none"),
        (lambda: naflex(class_token=False, reg_tokens=1, global_pool="map"), False, "final"),
        (lambda: naflex(class_token=False, global_pool="map"), False, "final"),
    ],
)  # fmt: skip
def test_tokens_of_every_kind_of_vit(build: Callable[[], Any], has_cls: bool, norm: str) -> None:
    """The features are timm's own tokens after the norm. The CLS is the class token, never a register."""
    model, pictures = build().eval().requires_grad_(False), torch.rand(2, 3, 32, 32)
    forward, patch_size, facts = token_features("timm:x", model)
    assert (patch_size, facts) == (8, {"activation": "gelu", "norm": norm})
    tokens, (patch, cls) = model.forward_features(pictures), forward(pictures)
    assert torch.equal(patch, tokens[:, -16:]) and (cls is not None) == has_cls
    for block in model.blocks:  # attention would mix the tokens
        block.forward = lambda x, **_: x
    changed = {}
    for name, token in model.named_parameters():
        if name.endswith("_token"):
            before = forward(pictures)[1]
            token.normal_()
            changed[name.split(".")[-1]] = has_cls and not torch.equal(before, forward(pictures)[1])
    assert changed == {name: name == "cls_token" for name in changed} and ("cls_token" in changed) == has_cls


def test_a_timm_tower_of_open_clip_has_the_features_of_timm_at_every_size(tmp_path: Path) -> None:
    """open_clip builds the tower at timm's size, here 160 pixels."""
    vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token", "image_size": 160}
    model = {"embed_dim": 16, "vision_cfg": vision | {"timm_proj": "linear"}, "text_cfg": {}}
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    head = {"visual.head.proj.weight": torch.zeros(16, 64)}
    save_file(state, tmp_path / "timm.safetensors")
    save_file({f"visual.trunk.{key}": x for key, x in state.items()} | head, tmp_path / "open_clip.safetensors")
    for size, grid in ((None, (10, 10)), (64, (4, 4))):
        given = ((0.5,) * 3, (0.5,) * 3)
        ours = load_teacher("timm:test_vit", f"{tmp_path}/timm.safetensors", size, "cpu", None, given)
        theirs = load_teacher(f"open_clip:{tmp_path}", f"{tmp_path}/open_clip.safetensors", size, "cpu")
        pictures = torch.from_numpy(probe_pictures(ours.identity.height, ours.identity.width))
        assert ours.grid == theirs.grid == grid
        assert all(torch.equal(a, b) for a, b in zip(ours.features(pictures), theirs.features(pictures), strict=True))
    with pytest.raises(UsageError, match="--teacher-size 8: expected a multiple of the patch, 16 pixels; use 16"):
        load_teacher(f"open_clip:{tmp_path}", "random", 8, device="cpu")


NOT_PLAIN, POOLED = "expected a plain vision transformer, with", "expected a vision transformer with a final norm"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        *((f"timm:{name}", found) for name, found in (
            ("test_vit", (10, True)), ("test_vit3", (10, False)), ("vit_tiny_patch16_dinov3_qkvb", (16, True)),
            ("deit_tiny_distilled_patch16_224", (14, True)), ("vit_tiny_r_s16_p8_224", (7, True)),
            ("test_vit.nope", "expected a tag of test_vit: r160_in1k"),
        )),
        *((f"timm:{name}", POOLED) for name in ("test_vit2", "test_vit4", "test_vit_relpos", "eva02_tiny_patch14_224")),
        *((f"timm:{name}", NOT_PLAIN) for name in (
            "xcit_nano_12_p16_224", "cait_xxs24_224", "mvitv2_tiny", "pit_ti_224", "test_convnext", "test_maxvit",
            "test_resnet", "test_efficientnet", "test_nfnet", "test_mambaout", "test_byobnet", "test_coatnet",
        )),
        ("open_clip:ViTamin-S", POOLED),
    ],
)  # fmt: skip
def test_every_name_gives_features_or_one_line(name: str, found: object) -> None:
    if name.startswith("timm:") and not timm.is_model(name[5:].split(".")[0]):
        pytest.skip(f"timm {timm.__version__} has no {name[5:]}")
    assert outcome(name, r".*") == found if isinstance(found, tuple) else outcome(name, str(found)) is None


def outcome(name: str, said: str) -> tuple[int, bool] | None:
    """(rows of the grid, whether there is a CLS) of a teacher, or None if it is refused in a line that matches."""
    try:
        teacher = load_teacher(name, "random", device="cpu")
    except UsageError as error:
        assert re.fullmatch(f"(--teacher )?{name}: {said}[^\n]*", str(error)), error
        assert error.__cause__ is None  # no error of timm or open_clip in disguise
        return None
    rows, columns = teacher.grid
    assert rows == columns == teacher.identity.height // (teacher.identity.height // rows)
    return rows, teacher.has_cls


# The modules of timm whose model with the shortest name serves; those that pool before their norm are refused.
DENSE = {"deepseek_vit", "deit", "gemma4_vit", "qwen3_vit", "tnt", "vision_transformer", "vision_transformer_hybrid"}
TOWERS = {"ViT-B-32": True, "coca_ViT-B-32": True, "ViT-B-16-SigLIP": False, "PE-Core-T-16-384": True,
          "EVA02-B-16": True, "vit_medium_patch16_gap_256": False, "vit_relpos_medium_patch16_cls_224": True,
          "RN50": None, "convnext_base": None, "swin_base_patch4_window7_224": None, "MobileCLIP-S1": None}  # fmt: skip


@pytest.mark.slow
def test_every_module_of_timm_and_every_kind_of_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on the meta device compute shapes and have no values."""
    monkeypatch.setattr("pipeline.teachers.state_sha256", lambda _: "")
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, _: self)
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: np.zeros(self.shape))
    names = {module: min(timm.list_models(module=module), key=len) for module in timm.list_modules()}
    with torch.device("meta"):
        assert {module for module, name in names.items() if outcome(f"timm:{name}", f"({NOT_PLAIN}|{POOLED})")} == DENSE
        found = {name: outcome(f"open_clip:{name}", NOT_PLAIN) for name in TOWERS}
    assert {name: tower and tower[1] for name, tower in found.items()} == TOWERS


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of weights of an architecture that open_clip knows by name, without a configuration beside it."""
    import open_clip

    make_teacher(tmp_path / "clip")
    (tmp_path / "models").mkdir()
    config = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())
    (tmp_path / "models" / "tiny.json").write_text(json.dumps(config["model_cfg"]))
    open_clip.add_model_config(tmp_path / "models")
    return shutil.move(tmp_path / "clip" / "open_clip_model.safetensors", tmp_path / "weights.safetensors")


def test_the_mean_of_a_file_is_what_states_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def mean(given: tuple[tuple[float, ...], tuple[float, ...]] | None = None, weights: str = str(tiny)) -> float:
        return load_teacher("open_clip:tiny", weights, None, "cpu", None, given).identity.mean[0]

    tags = {"a": {"mean": (0.5,) * 3, "std": (0.5,) * 3}}
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: list(tags))
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _, tag: tags.get(tag, {}))
    assert mean() == 0.5  # every tag
    tags["b"] = {"mean": (0.25,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    for weights, known in ((str(tiny), tags), (str(tiny), {})):
        monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _, known=known: list(known))
        with pytest.raises(UsageError, match=r"found (mean .* of a; .*bilinear of b|no tags); use --teacher-mean and"):
            mean(None, weights)
    assert mean(((0.125,) * 3, (0.5,) * 3)) == 0.125  # the options
    assert mean(None, "random") > 0.48
    own = json.loads((tiny.parent / "clip" / "open_clip_config.json").read_text())
    own["preprocess_cfg"]["mean"] = [0.75] * 3
    (tiny.parent / "open_clip_config.json").write_text(json.dumps(own))
    assert mean() == 0.75  # the configuration beside the file
    own["model_cfg"]["vision_cfg"]["layers"] = 3  # of another model
    (tiny.parent / "open_clip_config.json").write_text(json.dumps(own))
    with pytest.raises(UsageError, match="found no tags"):
        mean()


def test_a_set_of_weights_is_in_the_identity(tmp_path: Path) -> None:
    name, weights = make_teacher(tmp_path / "clip")
    plain, state = load_teacher(name, weights, device="cpu").identity, load_file(weights)
    assert (
        "weights_set" not in plain.model_dump() and "from the open_clip_config" in load_teacher(name, weights).notes[0]
    )
    ema = {f"{key}_ema": value + 1 for key, value in state.items()}
    save_file(state | ema, tmp_path / "two.safetensors")
    with pytest.raises(UsageError, match=r"two.safetensors#model or .*two.safetensors#ema"):
        load_teacher(name, str(tmp_path / "two.safetensors"), device="cpu")
    found = [load_teacher(name, f"{tmp_path}/two.safetensors#{one}", device="cpu").identity for one in ("model", "ema")]
    assert [one.weights_set for one in found] == ["model", "ema"]
    assert found[0].weights_sha256 == plain.weights_sha256 != found[1].weights_sha256


@pytest.mark.parametrize(
    ("teacher", "weights", "error", "said"),
    [
        ("ViT-B-16", "openai", UsageError, "expected open_clip:ARCH"),
        ("open_clip:ViT-B-61", "openai", UsageError, "did you mean 'ViT-B-16'"),
        ("open_clip:ViT-B-16", "opanai", UsageError, "did you mean 'openai'"),
        ("open_clip:ViT-B-16", "openai", IdentityError, "use open_clip:ViT-B-16-quickgelu"),
        ("open_clip:ViT-B-16-quickgelu", "laion2b_s34b_b88k", UsageError, "neither a file nor a tag"),
        ("timm:vit_tinny_patch16_224", "random", UsageError, "did you mean 'vit_tiny_patch16_224'"),
        ("open_clip:ViT-B-32", "openai#ema", UsageError, "neither a file nor a tag"),
    ],
)
def test_wrong_requests(teacher: str, weights: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        load_teacher(teacher, weights, device="cpu")


def test_wrong_weight_files(tmp_path: Path) -> None:
    name, weights = make_teacher(tmp_path / "clip")
    state = load_file(weights)
    shapes = state | {"visual.class_embedding": torch.zeros(48)}
    for change, said in (
        ({k: v for k, v in state.items() if "ln_post" not in k}, "shape: ln_post.bias, ln_post.weight; unexp"),
        (state | {"visual.extra": torch.zeros(1)}, "unexpected: extra;"),
        (shapes, "another shape: class_embedding;"),
    ):
        save_file(change, tmp_path / "wrong.safetensors")
        with pytest.raises(IdentityError, match=said):
            load_teacher(name, str(tmp_path / "wrong.safetensors"), device="cpu")
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    for value, key in ((torch.nan, "visual.conv1.weight"), (torch.inf, "visual.proj")):
        save_file(state | {key: state[key] * value}, tmp_path / f"{value}.safetensors")
    for file, said in (("junk", "weights"), ("nan", "finite .* in conv1.weight"), ("inf", "finite .* in proj")):
        with pytest.raises(UsageError, match=f"expected {said}"):
            load_teacher(name, str(tmp_path / f"{file}.safetensors"), device="cpu")


def test_openai_weights_without_quickgelu_are_refused(tmp_path: Path) -> None:
    """OpenAI's own files carry "input_resolution"; open_clip warns of nothing where weights come from a path."""
    name, weights = make_teacher(tmp_path / "clip")
    state = load_file(weights) | {"input_resolution": torch.tensor(32)}
    save_file(state, tmp_path / "openai.safetensors")
    with pytest.raises(IdentityError, match="need QuickGELU"):
        load_teacher(name, str(tmp_path / "openai.safetensors"), device="cpu")


def test_probe_pictures_are_fixed() -> None:
    pictures = probe_pictures(32, 48)
    assert pictures.shape == (4, 32, 48, 3) and (pictures == probe_pictures(32, 48)).all()
    assert pictures.std() > 40 and len(np.unique(pictures)) > 200


def test_deit_through_timm_and_through_open_clip_agree(shared_data: Path, tmp_path: Path) -> None:
    vision = {"image_size": 224, "layers": 12, "width": 192, "head_width": 64, "patch_size": 16, "no_ln_pre": True}
    config = {"embed_dim": 192, "vision_cfg": vision | {"norm_kwargs": {"eps": 1e-6}}, "text_cfg": {}}
    imagenet = {"mean": timm.data.IMAGENET_DEFAULT_MEAN, "std": timm.data.IMAGENET_DEFAULT_STD}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": imagenet}))
    files = [shared_data / "deit-tiny" / f"deit_tiny_{end}.safetensors" for end in ("patch16_224", "openclip_visual")]
    ours = load_teacher("timm:deit_tiny_patch16_224", str(files[0]), device="cpu")
    theirs = load_teacher(f"open_clip:{tmp_path}", str(files[1]), device="cpu")
    pictures = torch.from_numpy(probe_pictures(224, 224, 2))
    for a, b in zip(ours.features(pictures), theirs.features(pictures), strict=True):
        assert (a - b).abs().max() < 1e-3
