"""An exported folder is timm's: 100 % of the keys, the same features, the student's preprocessing."""

import json

import pytest
import timm
import torch
from make_dataset import make_dataset
from make_run import make_run
from test_mcm_finetune import config

from cache_tools.errors import McmError, UsageError
from mcm import export as module
from mcm.backbones import load_encoder, pooled
from mcm.export import export
from mcm.finetune import finetune
from mcm.probe import probe
from mcm.run_dir import recorded

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


def test_a_fine_tuned_run_keeps_its_head(tmp_path):
    data = make_dataset(tmp_path / "dataset", 32, 16)
    settings = config(schedule={"epochs": 1, "warmup_epochs": 0})
    init = make_run(tmp_path / "run")
    finetune(settings, data.path, str(init), None, tmp_path / "tuned")
    export(tmp_path / "tuned", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    ours = load_encoder(str(tmp_path / "tuned"), head=True).model
    assert torch.allclose(*(outputs(model, lambda m: m(PICTURES)) for model in (loaded, ours)), atol=1e-5)
    assert loaded.num_classes == 2 and load_encoder(str(tmp_path / "tuned")).model.num_classes == 0


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
    run = make_run(tmp_path / "run", "none")
    with pytest.raises(UsageError, match="expected a RUN"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="--folded: .* trained with masks; found S = 0.5"):
        export(run, tmp_path / "out", 0.5)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="expected a new name; found another folder"):
        export(run, tmp_path / "out")


def test_nothing_is_left_when_timm_would_see_other_features(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FEATURE_TOLERANCE", -1.0)
    with pytest.raises(McmError, match="timm's features"):
        export(make_run(tmp_path / "run"), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
