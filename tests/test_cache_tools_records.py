"""Records: canonical, self-checking, strict; configuration errors name the key and the nearest one."""

from pathlib import Path

import pytest

from cache_tools.errors import CorruptionError, IdentityError, UsageError
from cache_tools.records import (
    Record,
    config_file,
    decode_record,
    differences,
    encode_record,
    load_toml,
    nearest,
    record_sha256,
    write_toml,
)


class Inner(Record):
    lr: float = 0.1
    names: tuple[str, ...] = ("a",)


class Outer(Record):
    version: int = 1
    inner: Inner = Inner()
    steps: int


def test_round_trip_and_own_digest() -> None:
    record = Outer(steps=3, inner=Inner(lr=1e-4, names=("é", "b")))
    data = encode_record(record)
    assert decode_record(Outer, data, "here") == record
    assert record_sha256(record).encode() in data and data.endswith(b"\n") and data.isascii()


def test_every_flipped_bit_is_found() -> None:
    data = encode_record(Outer(steps=3))
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptionError, IdentityError)):
            decode_record(Outer, bytes(damaged), "here")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"null", b"\xff", b'{"sha256": 3}', b"[" * 100_000])
def test_what_is_no_record(data: bytes) -> None:
    with pytest.raises(CorruptionError, match="here"):
        decode_record(Outer, data, "here")


def test_another_format_version() -> None:
    with pytest.raises(IdentityError, match="expected format version 1; found 2"):
        decode_record(Outer, encode_record(Outer(version=2, steps=1)), "cache.json")


def test_differences_name_leaves() -> None:
    assert differences(Outer(steps=1), Outer(steps=1, inner=Inner(lr=0.2))) == ["inner.lr: 0.1 != 0.2"]


def test_toml_overrides_and_back(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("steps = 3\n[inner]\nlr = 1e-4\n")
    config = load_toml(Outer, path, ["inner.lr=0.5", "inner.names=['x', 'y']"])
    assert config.inner.lr == 0.5 and config.inner.names == ("x", "y")
    (tmp_path / "d.toml").write_text(write_toml(config))
    assert load_toml(Outer, tmp_path / "d.toml") == config


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("steps = 3\n[inner]\nlrr = 1\n", [], "unknown key 'inner.lrr'; did you mean 'inner.lr'"),
        ("step = 3\n", [], "did you mean 'steps'"),
        ("", [], "missing key 'steps'"),
        ("steps = 3\nsteps = 4\n", [], "expected valid TOML"),
        ("steps = 'three'\n", [], "steps: .* found 'three'"),
        ("steps = 3\n", ["inner.lr"], "expected key=value"),
        ("steps = 3\n", ["steps.x=1"], "expected a section; found the value 'steps'"),
    ],
)
def test_configuration_errors(tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        load_toml(Outer, tmp_path / "c.toml", overrides)


def test_shipped_configs_are_found_by_name() -> None:
    assert config_file("pretrain/demo").is_file()
    with pytest.raises(UsageError, match="did you mean 'pretrain/demo'"):
        config_file("pretrain/dmo")


def test_nearest_says_nothing_when_nothing_is_near() -> None:
    assert nearest("zzz", ["lr", "steps"]) == ""
