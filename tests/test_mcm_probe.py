"""Probes: k-NN and linear agree with plain references, every input is named, results are stored."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from make_cache import make_cache
from make_dataset import make_dataset
from make_run import make_run
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

from cache_tools.cache import Unit
from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import encode_record, read_record
from cache_tools.storage import file_sha256, write_atomic
from mcm.backbones import load_encoder
from mcm.classifiers import Features, training_rows
from mcm.cli import app
from mcm.export import export
from mcm.features import FOLDS, Featurizer
from mcm.masking import mask_picks, mask_pool
from mcm.probe import ProbeResult, _fitted, _score, packed, probe, record_name, unpacked
from mcm.scorecard import odd_channels


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset").path


def name(result, untrained=False):
    return record_name(result.label, result.data_sha256, result.seed, untrained)


def test_a_run_names_its_inputs_and_stores_them(data, tmp_path):
    run = make_run(tmp_path / "run")
    results = probe(str(run), data, quiet=True)
    assert [result.input for result in results] == ["full", "folded"]
    assert results[1].fold_scale in FOLDS and results[0].fold_scale is None
    assert results[0].weights.startswith("step_000000003 sha256:") and (results[0].train_rows, results[0].val_rows) == (
        96,
        40,
    )
    assert read_record(ProbeResult, run / "probe" / name(results[1])) == results[1]
    for one in results:
        for accuracy, hits in ((one.knn, one.knn_hits), (one.linear, one.linear_hits)):
            assert unpacked(hits, one.val_rows).mean() == pytest.approx(accuracy)


def test_hits_are_bits_of_rows_in_order():
    hits = np.arange(11) % 3 == 0
    assert packed(hits) == "9240" and unpacked("9240", 11).tolist() == hits.tolist()


def test_methods_asked_for_one_by_one_end_in_one_file(data, tmp_path):
    run = make_run(tmp_path / "run")
    probe(str(run), data, ["knn"], ["full"], quiet=True)
    (linear,) = probe(str(run), data, ["linear"], ["full"], quiet=True)
    both = read_record(ProbeResult, run / "probe" / name(linear))
    assert both == linear == probe(str(run), data, inputs=["full"], quiet=True)[0]


def test_another_seed_or_dataset_takes_no_records_place(data, tmp_path):
    run, other = make_run(tmp_path / "run"), make_dataset(tmp_path / "other", 48, 16).path
    asked = ((data, 0), (data, 1), (other, 0))
    results = [probe(str(run), source, ["knn"], ["full"], seed=seed, quiet=True)[0] for source, seed in asked]
    assert len(list((run / "probe").iterdir())) == 3
    assert [read_record(ProbeResult, run / "probe" / name(result)) for result in results] == results
    cache = make_cache(tmp_path / "cache")
    for seed in (0, 1):
        probe(str(cache.path), None, ["knn"], quiet=True, features=["mean"], seed=seed)
    assert {file.name for file in (cache.path / ".run").glob("*.json")} == {"teacher.json", "teacher-seed-1.json"}


@pytest.mark.parametrize("obstacle", ["a file for the folder", "a damaged record"])
def test_a_result_that_cannot_be_kept_is_given_with_a_warning(obstacle, data, tmp_path, capsys):
    run, args = make_run(tmp_path / "run"), ["probe", str(tmp_path / "run"), "--data", str(data), "--method", "knn"]
    (kept,) = probe(str(run), data, ["knn"], ["full"], quiet=True)
    if obstacle == "a damaged record":
        (run / "probe" / name(kept)).write_bytes(b"{}")
    else:
        shutil.rmtree(run / "probe")
        (run / "probe").write_text("")
    found = CliRunner().invoke(app, [*args, "--input", "full", "--workers", "0", "--json"])
    assert found.exit_code == 0 and json.loads(found.stdout)[0]["knn"] == kept.knn
    assert f"warning: the result is not saved: {run / 'probe'}" in found.stderr


def test_classes_of_one_row_leave_knn_alone(tmp_path, capsys):
    cache = make_cache(tmp_path / "cache")
    (result,) = probe(str(cache.path), None, ["knn", "linear"], quiet=True, features=["mean"])
    assert result.linear is not None
    train, val = (Features(torch.randn(2, 4), torch.arange(2)) for _ in range(2))
    facts = {"subject": "x", "weights": "x", "input": "full", "seed": 0, "data_sha256": "0", "versions": {}}
    result = _score(train, val, ["linear"], _fitted(train, ["linear"], 0), **facts)
    assert result.linear is None and result.knn is not None
    assert "no linear probe: expected two classes or more, one of them with two" in capsys.readouterr().err


def test_untrained_is_the_model_as_it_began(data, tmp_path):
    run = make_run(tmp_path / "run")
    result = probe(str(run), data, ["knn"], ["full"], untrained=True, quiet=True)[0]
    assert result.weights == "untrained" and (run / "probe" / name(result, True)).is_file()
    assert not (run / "probe" / name(result)).exists()


def test_folded_and_masked_features_are_what_they_say(data, tmp_path):
    backbone = load_encoder(str(make_run(tmp_path / "run")))
    featurizer = Featurizer(backbone, Dataset(data), 0, 0, True)
    pictures, rows = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), np.array([5, 9])
    model, fill = backbone.masked, backbone.masked.encoder_fill
    with torch.inference_mode():
        hidden = model.tokens(pictures, torch.ones(1, 1, 32, dtype=torch.bool))[:, 1:].mean(1)
        assert torch.allclose(
            featurizer.folded(1e-6)(pictures, rows), hidden, atol=1e-4
        )  # s -> 0: nothing but the fill
        assert torch.allclose(featurizer.folded(1.0)(pictures, rows), featurizer.full()(pictures, rows), atol=1e-6)
        pool = torch.from_numpy(mask_pool(0, 0, 4096, 32, 0.75))
        picks = [torch.from_numpy(mask_picks(0, k, rows, 16, 4096)) for k in range(3)]
        expected = sum(model.tokens(pictures, model.mask((pool, pick)))[:, 1:].mean(1) for pick in picks) / 3
        assert torch.allclose(featurizer.masked(3)(pictures, rows), expected, atol=1e-6)
        assert fill.abs().sum() > 0


def test_a_patch_run_can_be_probed_masked_and_one_without_masks_cannot(data, tmp_path):
    patch = make_run(tmp_path / "patch", "patch")
    results = probe(str(patch), data, ["knn"], ["masked:2"], quiet=True)
    assert [result.input for result in results] == ["full", "masked:2"]
    assert (patch / "probe" / f"masked-2-{Dataset(data).sha256[:12]}.json").is_file()
    plain = make_run(tmp_path / "none", "none")
    folded = probe(str(plain), data, ["knn"], quiet=True)[1]
    assert folded.input == "folded" and folded.fold_scale in FOLDS
    with pytest.raises(UsageError, match="--input masked:2: expected a RUN trained with masks"):
        probe(str(plain), data, inputs=["masked:2"], quiet=True)
    export(plain, tmp_path / "out")
    with pytest.raises(UsageError, match="--input folded: expected a pre-training RUN"):
        probe(str(tmp_path / "out"), data, inputs=["folded"], quiet=True)
    with pytest.raises(UsageError, match="--untrained: expected a pre-training RUN; found .*out; omit --untrained"):
        probe(str(tmp_path / "out"), data, untrained=True, quiet=True)


def test_a_caches_teacher_is_probed_on_its_own_features(tmp_path):
    cache = make_cache(tmp_path / "cache")
    results = probe(str(cache.path), None, quiet=True)
    with pytest.raises(UsageError, match="--data, --untrained: expected a RUN or EXPORT; found .*cache, a CACHE"):
        probe(str(cache.path), tmp_path / "data", untrained=True, quiet=True)
    result = results[0]
    assert (result.subject, result.train_rows, result.val_rows) == ("test:linear", 100, 40)
    assert result.data_sha256 == cache.sha256 and result.knn > 0.7  # the tint tells the classes apart
    assert read_record(ProbeResult, tmp_path / "cache" / ".run" / "teacher.json") == result
    assert [one.label for one in results] == ["full", "full-cls", "full-both"]
    assert results[1].knn == pytest.approx(result.knn, abs=0.05)  # its CLS is the mean patch token, in float16
    files = [tmp_path / "cache" / ".run" / name for name in ("teacher-cls.json", "teacher-both.json")]
    assert [read_record(ProbeResult, file) for file in files] == results[1:]
    facts = result.teacher
    assert (facts.dead, facts.outliers, facts.relative_mse, facts.cosine) == ((), (), 0.0, 1.0)
    flat = np.concatenate([chunk.features() for chunk in chunks(cache)]).reshape(-1, 16)
    share = np.linalg.svd(flat, compute_uv=False)
    share /= share.sum()
    assert facts.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


def test_a_cache_of_pictures_without_labels_is_one_line(tmp_path, monkeypatch):
    cache, index = make_cache(tmp_path / "cache"), Unit.index

    def unlabeled(unit, shard):
        records = index(unit, shard).copy()
        records["label"] = -1
        return records

    monkeypatch.setattr(Unit, "index", unlabeled)
    with pytest.raises(UsageError, match="expected a label for every picture of 'train'; found pictures without"):
        probe(str(cache.path), None, quiet=True)


def chunks(cache):
    (unit,) = cache.complete_units("val")
    return [unit.chunk(number) for number in range(unit.num_chunks)]


def test_odd_channels_are_named_by_number():
    std, mean = np.ones(8), np.zeros(8)
    std[1], std[2], std[3], mean[4], mean[5] = 5e-4, 2e-3, 11.0, -10.5, 9.0
    assert odd_channels(mean, std) == ((1,), (3, 4))


def test_features_are_the_tokens_they_name(data, tmp_path):
    backbone = load_encoder(str(make_run(tmp_path / "run")))
    pictures, rows = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), np.array([5, 9])
    featurizers = {
        tokens: Featurizer(backbone, Dataset(data), 0, 0, True, tokens) for tokens in ("mean", "cls", "both")
    }
    with torch.inference_mode():
        full = {tokens: featurizer.full()(pictures, rows) for tokens, featurizer in featurizers.items()}
        masked = {tokens: featurizer.masked(3)(pictures, rows) for tokens, featurizer in featurizers.items()}
        assert torch.allclose(full["cls"], backbone.model.forward_features(pictures)[:, 0], atol=1e-6)
        pool = torch.from_numpy(mask_pool(0, 0, 4096, 32, 0.75))
        picks = [torch.from_numpy(mask_picks(0, k, rows, 16, 4096)) for k in range(3)]
        expected = sum(backbone.masked.tokens(pictures, backbone.masked.mask((pool, pick)))[:, 0] for pick in picks)
        assert torch.allclose(masked["cls"], expected / 3, atol=1e-6)
    for found in (full, masked):
        assert torch.equal(found["both"], torch.cat([found["mean"], found["cls"]], dim=1))


def test_few_labels_and_other_features_have_files_of_their_own(data, tmp_path):
    run = make_run(tmp_path / "run")
    results = probe(str(run), data, inputs=["full"], quiet=True, features=["mean", "both"], shots=6)
    assert [(one.label, one.train_rows) for one in results] == [("full-shots-6", 12), ("full-both-shots-6", 12)]
    assert {path.name for path in (run / "probe").iterdir()} == set(map(name, results))
    dataset, featurizer = Dataset(data), Featurizer(load_encoder(str(run)), Dataset(data), 0, 0, True, shots=6)
    rows = training_rows(dataset.labels("train"), dataset.classes, 6, 0)
    assert featurizer.rows().tolist() == rows.tolist()
    cache = make_cache(tmp_path / "cache")
    assert probe(str(cache.path), None, ["knn"], quiet=True, features=["cls"], shots=3)[0].train_rows == 6
    assert [file.name for file in (tmp_path / "cache" / ".run").glob("*.json")] == ["teacher-cls-shots-3.json"]


def test_a_result_says_what_made_it_and_results_of_before_are_still_read(tmp_path, capsys):
    run, data = make_run(tmp_path / "run"), make_dataset(tmp_path / "data", 32, 16, copies=2).path
    result = probe(str(run), data, ["knn"], ["full"])[0]
    assert (result.val_in_train, result.features, result.shots) == (2, "mean", 0)
    assert "2 of 16 pictures of 'val' are also in 'train', byte for byte, such as row 0" in capsys.readouterr().out
    assert result.run_sha256 == file_sha256(run / "run.json") and result.cache_sha256 == "0" * 64
    assert result.software.startswith(version("masked-channel-modeling"))
    assert probe(str(run), data, ["knn"], ["full"], quiet=True)[0].val_in_train == 2 and not capsys.readouterr().out
    later = ("val_in_train", "features", "shots", "run_sha256", "cache_sha256", "software")
    before = result.model_copy(update=dict.fromkeys(later))
    write_atomic(tmp_path / "before.json", encode_record(before))
    assert not any(name in (tmp_path / "before.json").read_text() for name in later)
    assert read_record(ProbeResult, tmp_path / "before.json") == before and before.label == "full"


def test_one_decode_of_the_pictures_serves_all_inputs_and_features(data, tmp_path, monkeypatch):
    run, decoded, picture = make_run(tmp_path / "run"), [], Dataset.picture
    monkeypatch.setattr(Dataset, "picture", lambda *at: decoded.append(at[1:]) or picture(*at))
    asked = {"inputs": ["full", "folded", "masked:2"], "features": ["mean", "cls", "both"], "quiet": True}
    results = probe(str(run), data, ["knn"], **asked)
    assert len(decoded) == len(set(decoded)) == 96 + 40 and len(results) == 9
    for one in results:
        alone = probe(str(run), data, ["knn"], [one.input], features=[one.features], quiet=True)
        assert one in alone
    decoded.clear()
    monkeypatch.setattr("mcm.classifiers.CHOICE_ROWS", 48)  # s is chosen before all rows are encoded
    again = probe(str(run), data, ["knn"], **asked)
    assert len(decoded) == 48 + 96 + 40
    assert [one.knn for one in again if one.input != "folded"] == [one.knn for one in results if one.input != "folded"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["kn"]}, "did you mean 'knn'"),
        ({"inputs": ["masked:0"]}, "masked:K with K > 0"),
        ({"inputs": ["half"]}, "expected full, folded or masked:K"),
        ({"data": None}, "expected --data DATASET"),
        ({"features": ["clss"]}, "did you mean 'cls'"),
        ({"shots": 2}, "--shots: expected 5 or more for the linear probe; found 2"),
        ({"shots": 90, "methods": ["knn"]}, "expected 90 labels per class; class 'even' has 48"),
    ],
)
def test_bad_requests(arguments, message, data, tmp_path):
    with pytest.raises(UsageError, match=message):
        probe(str(make_run(tmp_path / "run")), **({"data": data} | arguments))


def test_what_has_no_class_token_has_no_features_of_it(data, tmp_path, monkeypatch):
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool="avg"
    )
    backbone = replace(load_encoder(str(make_run(tmp_path / "run"))), model=model, masked=None)
    monkeypatch.setattr("mcm.probe.load_encoder", lambda *_, **__: backbone)
    with pytest.raises(UsageError, match="--features both: expected a class token; found none in timm:x; use mean"):
        probe("timm:x", data, features=["both"])


def test_unlabeled_pictures_are_refused(tmp_path):
    blind = make_dataset(tmp_path / "blind", 20, 20, unlabeled=True)
    with pytest.raises(UsageError, match="'train'.*; found 2 classes, 20 of 20 without a label"):
        probe(str(make_run(tmp_path / "run")), blind.path)


def test_labels_of_many_batches_are_those_of_their_rows(tmp_path, monkeypatch):
    """A batch's memory is used again; what a probe keeps of it must not be."""
    monkeypatch.setattr("mcm.features.BATCH_ROWS", 16)
    data = make_dataset(tmp_path / "data", rows=96)
    featurizer = Featurizer(load_encoder(str(make_run(tmp_path / "run"))), data, 0, 0, True)
    rows = np.argsort(data.labels("train"), kind="stable")  # all of one class, then all of the other
    found = featurizer.features("train", [featurizer.full()], rows)[0]
    assert found.y.tolist() == data.labels("train")[rows].tolist()
    assert torch.equal(found.x[80:], featurizer.features("train", [featurizer.full()], rows[80:])[0].x)
