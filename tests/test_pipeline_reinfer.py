"""reinfer: rows computed again are the stored ones; swapped rows, another activation, another teacher are told."""

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
from pipeline.extract import Request, extract
from pipeline.reinfer import Reinferred, reinfer
from pipeline.shard import shard
from pipeline.shard_features import Extractor

ALL_ROWS = 2 * 72 + 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("reinfer"))
    make_extracted(root, "int8")
    return root


def again(place: Path, cache: Path, rows: int = ALL_ROWS, **options: object) -> Reinferred:
    weights = str(place / "clip" / "open_clip_model.safetensors")
    return reinfer(cache, rows, f"open_clip:{place / 'clip'}", weights, "cpu", **options)  # type: ignore[arg-type]


def test_stored_features_are_what_the_teacher_computes(place: Path) -> None:
    found = again(place, place / "int8")
    assert not found.problems and found.probe_mse < 1e-10
    assert [(shard.unit, shard.shard, shard.rows) for shard in found.shards] == [
        *((f"train/v{view}", number, rows) for view in (0, 1) for number, rows in ((0, 32), (1, 32), (2, 8))),
        ("val/v0", 0, 16),
    ]
    assert all(shard.cosine > 0.9999 and shard.relative_mse < shard.allowed < 1e-3 for shard in found.shards)
    few = [again(place, place / "int8", rows=5, seed=seed).shards for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2] and sum(shard.rows for shard in few[0]) == 5


def test_float16_is_held_to_float16(place: Path) -> None:
    found = again(place, make_extracted(place, "float16", dtype="float16", views=1))
    assert not found.problems and all(shard.allowed < 1e-6 for shard in found.shards)


def test_features_of_another_row_are_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 4 and 5 of one shard in each other's place before anything was hashed: every sum agrees."""
    forward = Extractor._forward

    def swapped(self: Extractor, encoder, inputs) -> None:
        first = encoder.seen == 0 and encoder.writer.shard == 1 and encoder.writer.unit.view == 1
        inputs = [*inputs[:4], inputs[5], inputs[4], *inputs[6:]] if first else inputs
        forward(self, encoder, inputs)

    monkeypatch.setattr(Extractor, "_forward", swapped)
    cache = make_extracted(place, str(tmp_path / "cache"))
    assert not verify(cache, full=True, quiet=True).problems
    (problem,) = again(place, cache).problems
    assert (problem.unit, problem.shard, problem.what) == ("train/v1", 1, "features")
    assert "train/v1 shard 1: 32 rows, cosine 0.9" in problem.text
    options = ["--teacher", f"open_clip:{place / 'clip'}", "--weights", place / "clip" / "open_clip_model.safetensors"]
    said = run("mcm-cache", "verify", cache, "--quick", "--reinfer", ALL_ROWS, *options, "--repair", "--json", expect=4)
    known = json.loads(said[: said.rindex("}") + 1])
    assert "train/v1/commits/000001.json" in known["repair"]["moved"] and len(known["reinferred"]) == 7
    assert 1 not in Cache(cache).units("train")[1].committed()


def test_another_activation_under_the_same_names(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a library changes: in what filled the cache, or here. Nothing is moved, as it may be here."""
    with monkeypatch.context() as patched:
        patched.setattr(open_clip.model.nn, "GELU", open_clip.model.QuickGELU)
        cache = make_extracted(place, str(tmp_path / "cache"), views=1)
        here = again(place, place / "int8")
    for found in (again(place, cache), here):
        assert {problem.what for problem in found.problems} == {"features", "teacher"}
        assert any("train/v0 shard 0" in problem.text for problem in found.problems)
    options = ["--teacher", f"open_clip:{place / 'clip'}", "--weights", place / "clip" / "open_clip_model.safetensors"]
    said = run("mcm-cache", "verify", cache, "--reinfer", 20, *options, "--repair", expect=4)
    assert "is not what name and weights say" in said and not (tmp_path / "cache.run" / "quarantine").exists()


def test_another_precision_is_allowed_its_error(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_extracted(place, str(tmp_path / "cache"), dtype="float16", views=1)
    same, other = again(place, cache).shards[0], again(place, cache, precision="bf16")
    assert not other.problems and other.shards[0].relative_mse > same.allowed


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    teacher, weights = make_teacher(tmp_path / "quick" / "clip", quick_gelu=True)
    with pytest.raises(IdentityError, match=r"activation: 'quick_gelu' != 'gelu'"):
        reinfer(place / "int8", 4, teacher, weights, "cpu")
    with pytest.raises(IdentityError, match="weights_sha256"):
        reinfer(place / "int8", 4, f"open_clip:{place / 'clip'}", "random", "cpu")
    line = ["verify", place / "int8", "--quick", "--reinfer", 4]
    assert "--teacher and --weights" in run("mcm-cache", *line, expect=2)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "cache.json").write_bytes((place / "int8" / "cache.json").read_bytes())
    with pytest.raises(UsageError, match="a cache with a committed shard"):
        again(place, tmp_path / "none")


def test_real_features(shared_data: Path, tmp_path: Path) -> None:
    """DeiT-tiny on photographs: the error that the scales stand for is the measured one, and rows come out again."""
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
    cache = tmp_path / "cache"
    extract(Request(str(tmp_path / "dataset"), cache, teacher, weights, views=1, batch=16, device="cpu"))
    assert not verify(cache, full=True, quiet=True).problems
    found = reinfer(cache, 2, teacher, weights, "cpu")
    assert not found.problems and found.shards[0].relative_mse > found.shards[0].allowed / 1.5
