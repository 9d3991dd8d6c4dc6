"""Whose is it: every field of an identity, changed alone, is refused by its name; a copy elsewhere is no other."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tree_digest
from make_cache import make_cache
from make_dataset import make_dataset
from make_extract import make_extracted, make_place, request
from test_mcm_pretrain import make_config, metrics

import pipeline.extract
from cache_tools.errors import CorruptionError, IdentityError
from cache_tools.records import sha256_hex
from cache_tools.schema import CacheIdentity
from cache_tools.verify import verify
from mcm import checkpoint
from mcm.pretrain import pretrain
from pipeline.extract import extract
from pipeline.teachers import Teacher, load_teacher

OTHER = "0" * 64
# What stands in the place of the true value; a field of one legal value can only differ on disk.
FIELDS: dict[str, Any] = {
    "teacher.name": "open_clip:other",
    "teacher.architecture_sha256": OTHER,
    "teacher.weights_sha256": OTHER,
    "teacher.activation": "quick_gelu",
    "teacher.height": 48,
    "teacher.width": 48,
    "teacher.mean": [0.5, 0.5, 0.0],
    "teacher.std": [0.5, 0.5, 0.5],
    "teacher.projection_sha256": OTHER,
    "teacher.norm": "none",
    "teacher.weights_set": "ema",
    "crop.kind": "center",
    "crop.scale": [0.3, 1.0],
    "crop.ratio": [0.5, 2.0],
    "crop.flip": 0.0,
    "seed": 7,
    "view_height": 64,
    "view_width": 64,
    "view_encoding": "png",
    "picture_rules": 2,
    "dtype": "float16",
    "compress": "zstd",
    "pixels_sha256": OTHER,
    "grid": [2, 8],
    "channels": 64,
    "has_cls": False,
    "rows_per_shard": 48,
    "rows.train": 71,
    "classes": ["odd", "even"],
    "dataset_sha256": OTHER,
    "pictures": False,
}
FIXED: dict[str, Any] = {"format": "other", "teacher.layer": "first", "teacher.kernel": "area"}


def changed(payload: dict[str, Any], field: str, value: Any) -> tuple[dict[str, Any], Any]:
    """(a copy of nested JSON with one field changed, what the field was)."""
    payload = json.loads(json.dumps(payload))
    *parents, name = field.split(".")
    inner = payload
    for parent in parents:
        inner = inner[parent]
    before, inner[name] = inner.get(name), value
    return payload, before


def write_record(path: Path, payload: dict[str, Any]) -> None:
    """A record that is whole, whatever stands in it."""
    dump = lambda values: json.dumps(values, sort_keys=True, separators=(",", ":"))  # noqa: E731
    path.write_text(dump(payload | {"sha256": sha256_hex(dump(payload).encode())}) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_place(tmp_path_factory.mktemp("identity"), rows=72)
    make_extracted(root, "cache")
    return root


@pytest.fixture
def teacher(place: Path, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """The teacher of `place`, which `extract` then gets without loading it again."""
    asked = request(place, place / "cache")
    loaded = load_teacher(asked.config.teacher, asked.config.weights, None, "cpu")
    monkeypatch.setattr(pipeline.extract, "load_teacher", lambda *_: loaded)
    return loaded


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(IdentityError) as caught:
        work()
    assert caught.value.exit_code == 5
    return str(caught.value).partition("(asked != found): ")[2]


@pytest.mark.parametrize("field", FIELDS)
def test_extract_refuses_another_request(place, teacher, monkeypatch, tally, field) -> None:
    cache, cache_identity = place / "cache", pipeline.extract.cache_identity
    before = tree_digest(cache)
    payload = json.loads((cache / "cache.json").read_bytes())
    del payload["sha256"]
    payload, found = changed(payload, field, FIELDS[field])
    other = CacheIdentity.model_validate_json(json.dumps(payload))
    assert cache_identity(request(place, cache), pipeline.extract.open_source(request(place, cache)), teacher) != other
    monkeypatch.setattr(pipeline.extract, "cache_identity", lambda *_: other)
    assert refused(lambda: extract(request(place, cache))) == f"{field}: {FIELDS[field]!r} != {found!r}"
    assert tree_digest(cache) == before
    tally("identity: extract asks for another", fields=1, failures=0)


@pytest.mark.parametrize("field", [*FIELDS, *FIXED])
def test_extract_refuses_another_cache(place, teacher, tmp_path, tally, field) -> None:
    """The same request, but cache.json, whole by its own sha256, is another's."""
    value = (FIELDS | FIXED)[field]
    payload = json.loads((place / "cache" / "cache.json").read_bytes())
    del payload["sha256"]
    payload, asked = changed(payload, field, value)
    (tmp_path / "cache").mkdir()
    write_record(tmp_path / "cache" / "cache.json", payload)
    assert refused(lambda: extract(request(place, tmp_path / "cache"))) == f"{field}: {asked!r} != {value!r}"
    tally("identity: cache.json is another's", fields=1, failures=0)


def test_every_field_has_its_turn() -> None:
    leaves = {name for name in CacheIdentity.model_fields if name not in ("teacher", "crop", "rows", "version")}
    for part in ("teacher", "crop"):
        leaves |= {f"{part}.{name}" for name in CacheIdentity.model_fields[part].annotation.model_fields}
    assert leaves | {"rows.train"} == FIELDS.keys() | FIXED.keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/cache, ROOT/data and ROOT/run, trained for one epoch."""
    root = tmp_path_factory.mktemp("trained")
    make_cache(root / "cache"), make_dataset(root / "data")
    pretrain(make_config(**ONE_EPOCH), root / "cache", root / "run", root / "data")
    return root


ONE_EPOCH = {"schedule": {"epochs": 1, "warmup_epochs": 0}}


@pytest.mark.parametrize("field", [*FIELDS, *FIXED])
def test_pretrain_refuses_another_cache(trained, tmp_path, tally, field) -> None:
    """The run in the folder began with a cache that differs in one field."""
    payload = json.loads((trained / "run" / "run.json").read_bytes())
    del payload["sha256"]
    value = (FIELDS | FIXED)[field]
    payload, ours = changed(payload, f"cache.{field}", value)
    payload["cache_sha256"] = OTHER
    (tmp_path / "run").mkdir()
    write_record(tmp_path / "run" / "run.json", payload)
    said = refused(lambda: pretrain(make_config(**ONE_EPOCH), trained / "cache", tmp_path / "run"))
    told = [part for part in said.removesuffix("; use another --out").split("; ") if "cache_sha256" not in part]
    assert told == [f"cache.{field}: {ours!r} != {value!r}"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    tally("identity: a run on another cache", fields=1, failures=0)


def test_pretrain_refuses_other_data_and_a_damaged_record(trained, tmp_path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    ours, theirs = make_dataset(tmp_path / "data", rows=64).sha256, make_dataset(tmp_path / "same").sha256
    assert refused(lambda: pretrain(make_config(**ONE_EPOCH), trained / "cache", run, tmp_path / "data")).startswith(
        f"data_sha256: {ours!r} != {theirs!r}"
    )
    seed9 = make_cache(tmp_path / "seed9", seed=9).path
    assert "cache.seed: 9 != 0; " in refused(lambda: pretrain(make_config(**ONE_EPOCH), seed9, run))
    for data in (b"", b"[1]", b'{"kind', (run / "run.json").read_bytes().replace(b'"channels":16', b'"channels":17')):
        (run / "run.json").write_bytes(data)
        with pytest.raises(CorruptionError, match=str(run / "run.json")):
            pretrain(make_config(**ONE_EPOCH), trained / "cache", run)


def test_copies_elsewhere_are_the_same(place, trained, teacher, tmp_path) -> None:
    """No false alarm: path, host and order of commands enter no identity."""
    root = Path(shutil.copytree(place, tmp_path / "moved" / "place"))
    (root / "cache" / "train" / "v1" / "manifest.json").unlink()
    (root / "cache" / "train" / "v1" / "commits" / "000001.json").unlink()
    extract(request(root, root / "cache", views=3))
    assert tree_digest(place / "cache").items() <= tree_digest(root / "cache").items()
    for path in (root / "cache", root / "dataset"):
        assert not verify(path, quiet=True).problems
    moved = Path(shutil.copytree(trained, tmp_path / "moved" / "trained"))
    shutil.rmtree(checkpoint.folder(moved / "run", 3))
    pretrain(make_config(**ONE_EPOCH), moved / "cache", moved / "run", moved / "data")
    assert metrics(moved / "run") == metrics(trained / "run")
    one, other = (checkpoint.latest(path / "run") for path in (trained, moved))
    assert one and other and all(torch.equal(one.model[name], other.model[name]) for name in one.model)


def test_a_command_may_leave_out_the_data_of_the_probe(trained, tmp_path) -> None:
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    pretrain(make_config(**ONE_EPOCH), trained / "cache", run)
    pretrain(make_config(**ONE_EPOCH), trained / "cache", tmp_path / "plain")
    pretrain(make_config(**ONE_EPOCH), trained / "cache", tmp_path / "plain", trained / "data")


def wrong_layer(teacher: Teacher, index: int, normalized: bool) -> None:
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = teacher.tower.forward_intermediates(
            x, indices=[index], normalize_intermediates=normalized, output_fmt="NLC", output_extra_tokens=True,
            intermediates_only=True,
        )  # fmt: skip
        return out["image_intermediates"][0], out["image_intermediates_prefix"][0][:, 0]

    teacher.forward = forward


@pytest.mark.parametrize("fault", ["before the final norm", "the block before the last", "other weights", "none"])
def test_probe_features_tell_what_no_field_does(place, teacher, tmp_path, monkeypatch, fault) -> None:
    """Every field of the identity is the same; only what the tower computes differs."""
    asked = request(place, place / "cache")
    wrong = load_teacher(asked.config.teacher, asked.config.weights, None, "cpu")
    if fault == "other weights":
        wrong.tower.load_state_dict({name: value * 1.01 for name, value in wrong.tower.state_dict().items()})
    else:
        wrong_layer(wrong, -2 if "block" in fault else -1, fault != "before the final norm")
    wrong = dataclasses.replace(wrong, identity=teacher.identity, projection=teacher.projection)
    monkeypatch.setattr(pipeline.extract, "load_teacher", lambda *_: wrong)
    if fault == "none":  # so it is not the stand-in that is refused
        return extract(asked)
    with pytest.raises(IdentityError, match="probe.npy: expected the teacher .* of the probe pictures differ"):
        extract(asked)
