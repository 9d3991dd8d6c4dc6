"""Probes: k-NN and linear agree with plain references, every input is named, results are stored."""

import numpy as np
import pytest
import torch
from make_cache import make_cache
from make_dataset import make_dataset
from make_run import make_run

from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.records import read_record
from mcm.backbones import load_encoder, patch_mean
from mcm.masking import mask_picks, mask_pool
from mcm.probe import Prober, ProbeResult, probe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset").path


def test_a_run_names_its_inputs_and_stores_them(data, tmp_path):
    run = make_run(tmp_path / "run")
    results = probe(str(run), data, quiet=True)
    assert [result.input for result in results] == ["full", "folded"]
    assert results[1].fold_scale in (1.0, 0.5, 0.25) and results[0].fold_scale is None
    assert results[0].weights.startswith("step_000000003 sha256:") and (results[0].train_rows, results[0].val_rows) == (
        96,
        40,
    )
    assert read_record(ProbeResult, run / "probe" / "folded.json") == results[1]


def test_methods_asked_for_one_by_one_end_in_one_file(data, tmp_path):
    run = make_run(tmp_path / "run")
    probe(str(run), data, ["knn"], ["full"], quiet=True)
    probe(str(run), data, ["linear"], ["full"], quiet=True)
    both = read_record(ProbeResult, run / "probe" / "full.json")
    assert both == probe(str(run), data, inputs=["full"], quiet=True)[0]
    probe(str(run), data, ["knn"], ["full"], seed=1, quiet=True)  # other draws: the old number is not carried over
    assert read_record(ProbeResult, run / "probe" / "full.json").linear is None


def test_untrained_is_the_model_as_it_began(data, tmp_path):
    run = make_run(tmp_path / "run")
    result = probe(str(run), data, ["knn"], ["full"], untrained=True, quiet=True)[0]
    assert result.weights == "untrained" and (run / "probe" / "untrained-full.json").is_file()
    assert not (run / "probe" / "full.json").exists()


def test_folded_and_masked_features_are_what_they_say(data, tmp_path):
    backbone = load_encoder(str(make_run(tmp_path / "run")))
    prober = Prober(backbone, Dataset(data), 0, 0, True)
    pictures, rows = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), np.array([5, 9])
    model, fill = backbone.masked, backbone.masked.encoder_fill
    with torch.inference_mode():
        hidden = model.tokens(pictures, torch.ones(1, 1, 32, dtype=torch.bool))[:, 1:].mean(1)
        assert torch.allclose(prober.folded(1e-6)(pictures, rows), hidden, atol=1e-4)  # s -> 0: nothing but the fill
        assert torch.allclose(prober.folded(1.0)(pictures, rows), patch_mean(backbone.model, pictures), atol=1e-6)
        pool = torch.from_numpy(mask_pool(0, 0, 4096, 32, 0.75))
        picks = [torch.from_numpy(mask_picks(0, k, rows, 16, 4096)) for k in range(3)]
        expected = sum(model.encode(pictures, (pool, pick)).mean(1) for pick in picks) / 3
        assert torch.allclose(prober.masked(3)(pictures, rows), expected, atol=1e-6)
        assert fill.abs().sum() > 0


def test_a_patch_run_can_be_probed_masked_and_one_without_masks_cannot(data, tmp_path):
    patch = make_run(tmp_path / "patch", "patch")
    assert [r.input for r in probe(str(patch), data, ["knn"], ["masked:2"], quiet=True)] == ["full", "masked:2"]
    assert (patch / "probe" / "masked-2.json").is_file()
    plain = make_run(tmp_path / "none", "none")
    assert [result.input for result in probe(str(plain), data, ["knn"], quiet=True)] == ["full"]
    with pytest.raises(UsageError, match="--input folded: expected a RUN trained with masks"):
        probe(str(plain), data, inputs=["folded"], quiet=True)


def test_a_caches_teacher_is_probed_on_its_own_features(tmp_path):
    cache = make_cache(tmp_path / "cache")
    result = probe(str(cache.path), None, quiet=True)[0]
    assert (result.subject, result.train_rows, result.val_rows) == ("test:linear", 100, 40)
    assert result.data_sha256 == cache.sha256 and result.knn > 0.7  # the tint tells the classes apart
    assert read_record(ProbeResult, tmp_path / "cache.run" / "probe.json") == result


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["kn"]}, "did you mean 'knn'"),
        ({"inputs": ["masked:0"]}, "masked:K with K > 0"),
        ({"inputs": ["half"]}, "expected full, folded or masked:K"),
        ({"data": None}, "expected --data DATASET"),
    ],
)
def test_bad_requests(arguments, message, data, tmp_path):
    with pytest.raises(UsageError, match=message):
        probe(str(make_run(tmp_path / "run")), **({"data": data} | arguments))


def test_unlabelled_pictures_are_refused(tmp_path):
    blind = make_dataset(tmp_path / "blind", 20, 20, unlabelled=True)
    with pytest.raises(UsageError, match="labels for every picture of 'train'"):
        probe(str(make_run(tmp_path / "run")), blind.path)


def test_labels_of_many_batches_are_those_of_their_rows(tmp_path, monkeypatch):
    """A batch's memory is used again; what a probe keeps of it must not be."""
    monkeypatch.setattr("mcm.probe.BATCH_ROWS", 16)
    data = make_dataset(tmp_path / "data", rows=96)
    prober = Prober(load_encoder(str(make_run(tmp_path / "run"))), data, 0, 0, True)
    rows = np.argsort(data.labels("train"), kind="stable")  # all of one class, then all of the other
    found = prober.features("train", prober.full(), rows)
    assert found.y.tolist() == data.labels("train")[rows].tolist()
    assert torch.equal(found.x[80:], prober.features("train", prober.full(), rows[80:]).x)
