"""An exported folder is timm's: 100 % of the keys, the same features, the student's preprocessing."""

import io
import json
import sys

import numpy as np
import pytest
import timm
import torch
from make_dataset import make_dataset
from make_run import CONFIG, make_run
from make_scenes import make_masks
from PIL import Image
from test_mcm_finetune import config

from cache_tools.errors import McmError, UsageError
from mcm import checkpoint
from mcm import export as module
from mcm.augment import eval_transform
from mcm.backbones import Backbone, load_encoder, pooled
from mcm.config import FinetuneConfig
from mcm.export import export
from mcm.finetune import finetune
from mcm.probe import probe
from mcm.run_dir import recorded
from pipeline.shard import shard

PICTURES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def outputs(model, function):
    with torch.inference_mode():
        return function(model.eval())


def test_timm_alone_loads_it_with_the_same_features(tmp_path):
    run = make_run(tmp_path / "run")
    export(run, tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    ours = load_encoder(str(run)).model
    assert loaded.state_dict().keys() == ours.state_dict().keys()
    expected, found = (outputs(model, lambda m: m.forward_features(PICTURES)) for model in (ours, loaded))
    assert torch.allclose(expected, found, atol=1e-5)
    data = timm.data.resolve_model_data_config(loaded)
    assert [list(data[name]) for name in ("mean", "std", "input_size")] == [[0.5] * 3, [0.25] * 3, [3, 32, 32]]
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 1.0)


def test_an_export_is_a_source_of_its_own(tmp_path):
    run = make_run(tmp_path / "run")
    export(run, tmp_path / "out")
    from_run, from_export = load_encoder(str(run)), load_encoder(str(tmp_path / "out"))
    same = [outputs(b.model, lambda m: pooled(m, m.forward_features(PICTURES))) for b in (from_run, from_export)]
    assert torch.allclose(*same, atol=1e-5)
    assert (from_export.size, from_export.mean, from_export.std) == (from_run.size, from_run.mean, from_run.std)


def test_folding_is_in_the_weights_and_recorded(tmp_path):
    run = make_run(tmp_path / "run")
    export(run, tmp_path / "out", fold_scale=0.5)
    backbone = load_encoder(str(run))
    plain, folded = backbone.model.state_dict(), load_encoder(str(tmp_path / "out")).model.state_dict()
    fill = backbone.masked.encoder_fill.detach()
    assert torch.allclose(folded["patch_embed.proj.weight"], 0.5 * plain["patch_embed.proj.weight"])
    assert torch.allclose(folded["patch_embed.proj.bias"], 0.5 * plain["patch_embed.proj.bias"] + 0.5 * fill)
    note = json.loads((tmp_path / "out" / "config.json").read_bytes())["mcm"]
    assert note == {"fold_scale": 0.5, "weights": backbone.weights}


def theirs(kind, folder, tuned):
    """(keys that are missing or left over, the outputs of PICTURES) by the library that reads the format."""
    if kind == "timm":
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return [], [model.forward_features(PICTURES), model(PICTURES)]
    if kind == "mae":
        state = torch.load(folder / "encoder.pth", weights_only=True)["model"]
        names = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        pool = "avg" if "fc_norm.weight" in state else "token"
        model = timm.models.VisionTransformer(**names, global_pool=pool, num_classes=2 * tuned).eval()
        return model.load_state_dict(state), [model.forward_features(PICTURES), model(PICTURES)]
    if kind == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(folder / "model.onnx"))
        assert [out.name for out in session.get_outputs()] == ["tokens", "logits" if tuned else "pooled"]
        each = [session.run(None, {"pictures": PICTURES[rows].numpy()}) for rows in (slice(1), slice(1, None))]
        return [], [torch.cat([torch.tensor(part) for part in parts]) for parts in zip(*each, strict=True)]
    transformers = pytest.importorskip("transformers")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    backbone, encoded = load_encoder(str(folder.parent / "run")), io.BytesIO()
    picture.save(encoded, "PNG")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"][0]
    ours = backbone.normalized(eval_transform(backbone)(0, encoded.getvalue())[None])[0]
    assert (pixels - ours).abs().max() < 4 / 255 / 0.25  # rounded twice
    auto = transformers.AutoModelForImageClassification if tuned else transformers.AutoModel
    options = {} if tuned else {"add_pooling_layer": False}
    model, report = auto.from_pretrained(folder, output_loading_info=True, **options)
    assert not tuned or model.config.id2label == {0: "even", 1: "odd"}
    tokens = (model.vit if tuned else model)(PICTURES).last_hidden_state
    return [name for names in report.values() for name in names], [tokens, model(PICTURES).logits if tuned else None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(module.FORMATS))
@pytest.mark.parametrize("changes", [None, {}, {"pool": "token", "frozen": True}, {"pool": "token"}])
def test_the_other_library_computes_the_same(tmp_path, kind, changes):
    pytest.importorskip({"hf": "transformers", "onnx": "onnxruntime"}.get(kind, "timm"))
    run = make_run(tmp_path / "run")
    if changes is not None:
        data = make_dataset(tmp_path / "dataset", 32, 16)
        ema = {"optim": {"lr": 1e-3, "ema": 0.0 if "frozen" in changes else 0.9}}
        settings = config(schedule={"epochs": 1, "warmup_epochs": 0}, **changes, **ema)
        finetune(settings, data.path, str(run), None, tmp_path / "tuned")
        run = tmp_path / "tuned"
    if kind == "hf" and changes == {}:
        with pytest.raises(UsageError, match=r'expected a classifier with pool = "token"; .* use --format timm'):
            export(run, tmp_path / "out", kind=kind)
        return
    export(run, tmp_path / "out", kind=kind)
    ours = load_encoder(str(run), head=True).model.eval()
    with torch.inference_mode():
        unlike, found = theirs(kind, tmp_path / "out", changes is not None)
        wanted = [ours.forward_features(PICTURES), ours(PICTURES)]
    assert not any(unlike)
    for one, other in zip(found, wanted, strict=True):
        assert one is None or torch.allclose(one, other, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
def test_transformers_loads_the_same_folder(tmp_path, tuned):
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path / "run")
    if tuned:
        data = make_dataset(tmp_path / "dataset", 32, 16)
        finetune(config(schedule={"epochs": 1, "warmup_epochs": 0}), data.path, str(run), None, tmp_path / "tuned")
        run = tmp_path / "tuned"
    export(run, tmp_path / "out")
    ours = load_encoder(str(run), head=True).model
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert {name.split(".")[-2] for name in info["unexpected_keys"]} <= {"head"}
    expected = outputs(ours, lambda m: m.forward_features(PICTURES))
    assert torch.allclose(expected, outputs(loaded, lambda m: m(PICTURES).last_hidden_state), atol=1e-5)
    if tuned:
        whole = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
        assert torch.allclose(
            outputs(ours, lambda m: m(PICTURES)), outputs(whole, lambda m: m(PICTURES).logits), atol=1e-5
        )
        assert whole.config.id2label == {0: "even", 1: "odd"}


@pytest.mark.slow
def test_of_a_segmentation_run_the_encoder_is_exported(tmp_path):
    shard(make_masks(tmp_path / "source", 4, 2), tmp_path / "data", workers=1)
    settings = {name: part for name, part in CONFIG.items() if name != "student"} | {"task": "segment"}
    settings["train"] = CONFIG["train"] | {"workers": 0, "global_batch": 2, "micro_batch": 2}
    settings["segment"] = {"head": "linear", "crop": 48, "stride": 48}
    run, tuned = make_run(tmp_path / "run"), FinetuneConfig.model_validate_json(json.dumps(settings))
    finetune(tuned, tmp_path / "data", str(run), None, tmp_path / "tuned")
    found = export(tmp_path / "tuned", tmp_path / "out")
    assert found["mcm"]["part"].startswith("the encoder alone") and "label_names" not in found
    assert found["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert "| part | the encoder alone" in (tmp_path / "out" / "README.md").read_text()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    assert loaded["pos_embed"].shape == (1, 1 + 6 * 6, 32)  # of the crop
    state = checkpoint.latest(tmp_path / "tuned", optimizer=False).model
    assert all(torch.equal(state[f"encoder.{name}"], tensor) for name, tensor in loaded.items())


def test_the_model_card_says_what_it_is_and_what_was_measured(tmp_path):
    run, data = make_run(tmp_path / "run"), make_dataset(tmp_path / "dataset", 32, 16)
    (result,) = probe(str(run), data.path, ["knn"], ["full"], quiet=True)
    probe(str(run), data.path, ["knn"], ["full"], untrained=True, quiet=True)  # other weights: not in the card
    export(run, tmp_path / "out", 0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| knn, full input, DATASET {data.sha256[:12]} | {result.knn:.4f} |" in card and card.count("| knn") == 1
    assert "| teacher | test |" in card and f"| cache_sha256 | {result.cache_sha256} |" in card
    assert "| fold_scale | 0.5 |" in card and json.dumps(recorded(run)["config"], indent=2) in card
    assert "num_classes" not in json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]


def test_bad_requests_and_another_folder_in_the_way(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="expected a RUN"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="--format: expected timm, hf, mae, onnx; found 'onx'; did you mean"):
        export(run, tmp_path / "out", kind="onx")
    with pytest.raises(UsageError, match="--folded: expected 0 < S <= 1 and .*; found S = 1.5"):
        export(run, tmp_path / "out", 1.5)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="expected a new name; found another folder"):
        export(run, tmp_path / "out")


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setitem(module.FORMATS, "mae", module.FORMATS["mae"]._replace(tolerance=-1.0))
    with pytest.raises(McmError, match="expected the other library's features within -1.0"):
        export(run, tmp_path / "out", kind="mae")
    for package, kind in ("transformers", "hf"), ("onnx.reference", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UsageError, match=f"--format {kind}: expected the package {package}; found none"):
            export(run, tmp_path / "out", kind=kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_clip_224", "vit_small_patch14_dinov2"])
def test_hf_refuses_a_vit_that_transformers_does_not_describe(tmp_path, name):
    pytest.importorskip("transformers")
    options = {"class_token": False} if "tiny" in name else {}
    small = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model(name, **small, **options, global_pool="avg" if options else "token")
    backbone = Backbone(model, "random", (28, 28), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="expected the tensors of transformers' ViT; found .*; use --format timm"):
        module.FORMATS["hf"][0](tmp_path / "out", backbone, {"mcm": {}})
