"""recompute: rows computed again are the stored ones; swapped rows and another teacher are told."""

import json
from pathlib import Path

import open_clip.model
import pytest
from conftest import run
from make_extract import make_extracted, make_place
from make_teacher import make_teacher

from cache_tools.cache import Cache
from cache_tools.errors import IdentityError, UsageError
from cache_tools.verify import verify
from pipeline.config import ExtractConfig
from pipeline.extract import Request, extract
from pipeline.extractor import Extractor
from pipeline.recompute import Recomputed, recompute
from pipeline.shard import shard
from pipeline.worker import WorkerInfo

ALL_ROWS = 2 * 72 + 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("recompute"))
    make_extracted(root, "int8")
    return root


def again(place: Path, cache: Path, rows: int = ALL_ROWS, **options: object) -> Recomputed:
    weights = str(place / "clip" / "open_clip_model.safetensors")
    return recompute(cache, rows, f"open_clip:{place / 'clip'}", weights, "cpu", **options)  # type: ignore[arg-type]


def test_stored_features_are_what_the_teacher_computes(place: Path) -> None:
    found = again(place, place / "int8")
    assert not found.problems and found.rows == ALL_ROWS and 0.9999 < found.lowest_cosine < 1
    few = [again(place, place / "int8", rows=5, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2] and few[0].rows == 5
    found = again(place, make_extracted(place, "float16", dtype="float16", views=1))
    assert not found.problems and found.lowest_cosine > 0.999999


@pytest.mark.slow
def test_features_of_another_row_are_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 4 and 5 of one shard in each other's place before anything was hashed: every sum agrees."""
    forward = Extractor._forward

    def swapped(self: Extractor, encoder, inputs) -> None:
        first = encoder.seen == 0 and encoder.writer.shard == 1 and encoder.writer.unit.view == 1
        inputs = [*inputs[:4], inputs[5], inputs[4], *inputs[6:]] if first else inputs
        forward(self, encoder, inputs)

    monkeypatch.setattr(Extractor, "_forward", swapped)
    cache = make_extracted(place, str(tmp_path / "cache"))
    assert not verify(cache, quiet=True).problems
    one, two = again(place, cache).problems
    for problem, row in ((one, 36), (two, 37)):
        assert (problem.unit, problem.shard, problem.what) == ("train/v1", 1, "features")
        assert f"features.zarr/patch/c.1.0.0: row {row}: expected a cosine above 0.999" in problem.text
    options = ["--teacher", f"open_clip:{place / 'clip'}", "--weights", place / "clip" / "open_clip_model.safetensors"]
    said = run(
        "mcm-cache", "verify", cache, "--quick", "--recompute", ALL_ROWS, *options, "--repair", "--json", expect=4
    )
    known = json.loads(said[: said.rindex("}") + 1])
    assert "train/v1/commits/000001.json" in known["repair"]["moved"] and known["recomputed"]["rows"] == ALL_ROWS
    assert 1 not in Cache(cache).units("train")[1].committed()


def test_another_activation_under_the_same_names(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a library changes: it cannot be told which of the two is wrong, so that nothing is moved."""
    monkeypatch.setattr(open_clip.model.nn, "GELU", open_clip.model.QuickGELU)
    with pytest.raises(IdentityError, match="features of the probe pictures differ"):
        again(place, place / "int8")


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    teacher, weights = make_teacher(tmp_path / "quick" / "clip", quick_gelu=True)
    with pytest.raises(IdentityError, match=r"activation: 'quick_gelu' != 'gelu'"):
        recompute(place / "int8", 4, teacher, weights, "cpu")
    with pytest.raises(IdentityError, match="weights_sha256"):
        recompute(place / "int8", 4, f"open_clip:{place / 'clip'}", "random", "cpu")
    line = ["verify", place / "int8", "--quick", "--recompute", 4]
    assert "--teacher and --weights" in run("mcm-cache", *line, expect=2)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "cache.json").write_bytes((place / "int8" / "cache.json").read_bytes())
    with pytest.raises(UsageError, match="expected a committed shard; found none"):
        again(place, tmp_path / "none")


def test_real_features(shared_data: Path, tmp_path: Path) -> None:
    """DeiT-tiny on photographs: the rows come out again, in the precision that filled the cache."""
    pictures = sorted((shared_data / "photos").rglob("*.JPEG"))[:16]
    for path in pictures:
        target = tmp_path / "pictures" / path.parent.name / path.name
        target.parent.mkdir(parents=True)
        target.write_bytes(path.read_bytes())
    shard(str(tmp_path / "pictures"), tmp_path / "dataset")
    teacher, weights = (
        "timm:deit_tiny_patch16_224",
        str(shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"),
    )
    for precision in ("fp32", "bf16"):
        cache = tmp_path / precision
        config = ExtractConfig(teacher=teacher, weights=weights, views=1, batch=16, precision=precision)
        extract(Request(str(tmp_path / "dataset"), cache, config, WorkerInfo(device="cpu")))
        found = recompute(cache, 4, teacher, weights, "cpu")
        assert not found.problems and found.rows == 4 and found.lowest_cosine > 0.9999
