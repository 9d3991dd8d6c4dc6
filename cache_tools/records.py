"""Strict records, canonical JSON that contains its own sha256, and TOML configuration."""

import difflib
import hashlib
import json
import os
import stat
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import pydantic
import tomli_w

from .errors import CorruptionError, IdentityError, McmError, UsageError, found_at
from .storage import naming

MAX_RECORD_BYTES = 64 << 20  # more than the manifest of a million shards
MAX_CONFIG_BYTES = 64 << 10  # tomllib takes quadratic time for a dotted key: 2 s at this size
MAX_FIELD_ERRORS = 20  # in one message
MAX_SHOWN = 200  # characters of a value in one message
_PACKAGE = Path(__file__).parent


class Record(pydantic.BaseModel):
    """The base of every record: strict types, no unknown fields, immutable.

    `exclusive` names keys that exclude each other: an override of one clears the others.
    """

    exclusive: ClassVar[tuple[str, ...]] = ()
    model_config = pydantic.ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False
    )


R = TypeVar("R", bound=Record)
T = TypeVar("T")
# A field that is absent while it is None, so that the digest of an older record holds.
Absent = Annotated[T | None, pydantic.Field(exclude_if=lambda value: value is None)]
# The limits of numbers and names in a record. They rule out an overflow of a shape, a division by 0
# and a name that leaves its folder.
Amount = Annotated[int, pydantic.Field(ge=0, le=1 << 40)]
Count = Annotated[int, pydantic.Field(ge=1, le=1 << 40)]
Checksum = Annotated[int, pydantic.Field(ge=0, lt=1 << 32)]
SplitName = Annotated[str, pydantic.Field(pattern="^[A-Za-z0-9_]{1,64}$")]


def printable(text: str) -> str:
    """Return `text` with backslash escapes for the bytes of a file name that are not UTF-8."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def check_utf8(path: str | Path) -> None:
    """Check that `path` is UTF-8, because TensorBoard, safetensors and timm require it.

    Raises: UsageError if it is not.
    """
    if (shown := printable(str(path))) != str(path):
        remedy = "rename it, or use a link to it with a name in UTF-8"
        raise UsageError(f"{shown}: expected a path in UTF-8; found other bytes; {remedy}")


class FileEntry(Record):
    """Size and hash of a committed file."""

    bytes: Amount
    sha256: str


# A name from the file system or the command line.
Text = Annotated[str, pydantic.BeforeValidator(printable)]


def sha256_hex(data: bytes) -> str:
    """Return the hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(payload: dict[str, Any]) -> bytes:
    """Return `payload` as JSON on one line, with sorted keys and no spaces.

    Raises: ValueError for NaN or an infinite number.
    """
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def _sealed(payload: dict[str, Any]) -> bytes:
    return canonical_json(payload | {"sha256": sha256_hex(canonical_json(payload))}) + b"\n"


def record_sha256(record: Record) -> str:
    """Return the sha256 of the record's canonical JSON: the value of its `sha256` key on disk."""
    return sha256_hex(canonical_json(record.model_dump(mode="json")))


def encode_record(record: Record) -> bytes:
    """Return canonical JSON: one line, sorted keys, and the sha256 of the others as `sha256`."""
    return _sealed(record.model_dump(mode="json"))


def decode_record(cls: type[R], data: bytes, where: str | Path) -> R:
    """Return the record in `data`; `where` names its file in errors.

    Raises: CorruptionError if `data` is not canonical JSON that matches its own sha256.
    IdentityError if the format version or a field is not that of this software. Such a record is
    not damaged, because its sha256 matches; other software wrote it.
    """
    try:
        payload = json.loads(data)
        del payload["sha256"]
        canonical = _sealed(payload)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        message = f"{where}: expected a JSON record with its sha256; found {error!r}"
        raise CorruptionError(message) from error
    if canonical != data:
        expected = "expected bytes that match their own sha256"
        raise CorruptionError(f"{where}: {expected}; found other bytes; restore the file")
    version = cls.model_fields.get("version")
    if version and payload.get("version") != version.default:
        found = f"expected format version {version.default}; found {payload.get('version')}"
        raise IdentityError(f"{where}: {found}; use the software that wrote it")
    try:
        record = cls.model_validate_json(canonical_json(payload))
    except pydantic.ValidationError as error:
        fields = "; ".join(map(_field_error, error.errors()[:MAX_FIELD_ERRORS]))
        expected = f"expected a {cls.__name__} of this software (asked != found)"
        raise IdentityError(f"{where}: {expected}: {fields}") from error
    if encode_record(record) != data:  # true for 1, or 1 for 1.0: the digests would differ
        expected = f"expected a {cls.__name__} as this software writes it"
        raise IdentityError(f"{where}: {expected}; found a value of another type")
    return record


def _field_error(detail: Any) -> str:
    """Return `field: asked != found` for one error of pydantic."""
    asked = detail.get("ctx", {}).get("expected", detail["msg"])
    found = {"missing": "nothing"}.get(detail["type"], f"{detail['input']!r:.200}")
    return f"{_location(detail['loc'])}: {asked} != {found}"


def read_record(cls: type[R], path: Path) -> R:
    """Return the record in the file `path`.

    Raises: FileNotFoundError, and the errors of `decode_record`.
    """
    return decode_record(cls, read_capped(path), path)


def read_capped(
    path: Path, limit: int = MAX_RECORD_BYTES, error: type[McmError] = CorruptionError
) -> bytes:
    """Return the bytes of an untrusted file.

    Raises: `error` if the file is not a regular file or has more than `limit` bytes, before it is
    read; FileNotFoundError.
    """
    with naming(path), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            found = f"found {status.st_size} bytes or a special file"
            raise error(f"{path}: expected a regular file of at most {limit} bytes; {found}")
        return file.read(status.st_size)


def read_json(path: Path, error: type[McmError] = CorruptionError) -> dict[str, Any]:
    """Return the JSON object in a file that is not a record.

    Raises: `error` if the file holds anything else; FileNotFoundError.
    """
    try:
        found = json.loads(read_capped(path, error=error))
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: expected a JSON object; it cannot be parsed: {problem}") from problem
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object; found {type(found).__name__}")
    return found


def nearest(word: str, words: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the closest of `words`, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def differences(ours: Record, theirs: Record) -> list[str]:
    """Return `field: ours != theirs` for each leaf that differs."""
    left, right = (dict(leaves(record.model_dump(mode="json"))) for record in (ours, theirs))
    pairs = ((key, left.get(key), right.get(key)) for key in sorted(left.keys() | right.keys()))
    return [f"{key}: {one!r} != {other!r}" for key, one, other in pairs if one != other]


def leaves(payload: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the name, such as "optim.lr", and the value of every leaf of nested dictionaries."""
    if isinstance(payload, dict):
        for key, value in payload.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, payload


def config_file(name: str) -> Path:
    """Return the TOML file called `name`: a path, or the name of a shipped file ("pretrain/demo").

    The shipped files are in the installed wheel, or in configs/ of a checkout, which has a
    pyproject.toml.

    Raises: UsageError if there is no such file.
    """
    if Path(name).is_file():
        return Path(name)
    roots = [_PACKAGE / "configs"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        roots.append(_PACKAGE.parent / "configs")
    for root in roots:
        if (root / f"{name}.toml").is_file():
            return root / f"{name}.toml"
    files = [path.relative_to(root) for root in roots for path in root.rglob("*.toml")]
    names = {file.with_suffix("").as_posix() for file in files}
    shipped = f"{', '.join(sorted(names))}{nearest(name, names)}"
    expected = f"expected a TOML file or one of {shipped}"
    raise UsageError(f"config {name!r}: {expected}; found {found_at(name)}")


def load_toml(
    cls: type[R],
    path: Path | None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> R:
    """Return the configuration in `path`, with `flags` and then `overrides` applied.

    `flags` maps keys to the values of command line options; with them, `path` may be None.
    An override is `section.key=value`. The value has TOML syntax, but a bare word is a string, and
    an empty value of an optional key is None.

    Raises: UsageError with the key, the expected value and the nearest known key.
    """
    try:
        data = read_capped(path, MAX_CONFIG_BYTES, UsageError) if path else b""
        payload = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # errors of TOML and UTF-8 are ValueErrors
        raise UsageError(f"{path}: expected valid TOML; it cannot be parsed: {error}") from error
    payload |= flags or {}
    where = path or "the command line"
    for override in overrides:
        _override(cls, payload, override)
    try:
        for value in payload.values():
            check_utf8(str(value))
        # As a string, a TOML date is not valid as a number.
        return cls.model_validate_json(json.dumps(payload, default=str))
    except RecursionError as error:
        message = f"{where}: expected sections with values; found tables that are nested too deeply"
        raise UsageError(message) from error
    except pydantic.ValidationError as error:
        # A misspelled key gives an unknown key and a missing key: report the unknown one.
        first = min(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise UsageError(f"{where}: {_explain(cls, first)}") from error


def _override(cls: type[Record], payload: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"--set {override!r}: expected key=value, such as optim.lr=1e-3")
    *sections, key = dotted.strip().split(".")
    for section in sections:
        payload, cls = payload.setdefault(section, {}), _section(cls, section)
        if not isinstance(payload, dict):
            raise UsageError(f"--set {override!r}: expected a section; found the value {section!r}")
    try:
        payload[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        payload[key] = text or (None if type(None) in _kinds(cls, key) else "")
    for other in set(cls.exclusive) - {key} if key in cls.exclusive else ():
        payload.pop(other, None)


def _kinds(cls: type[Record], key: str) -> tuple[Any, ...]:
    """Return the type of a field and its type arguments, or () for an unknown field."""
    field = cls.model_fields.get(key)
    return (field.annotation, *get_args(field.annotation)) if field else ()


def _section(cls: type[Record], key: str) -> type[Record]:
    """Return the record class of a section, or Record, which has no keys, if there is none."""
    kinds = (kind for kind in _kinds(cls, key) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, Record)), Record)


def _known_keys(cls: type[Record], prefix: str = "") -> list[str]:
    keys = []
    for name in cls.model_fields:
        keys += [prefix + name, *_known_keys(_section(cls, name), f"{prefix}{name}.")]
    return keys


def _nearest_key(cls: type[Record], unknown: str) -> str:
    """Return the key that an unknown key may stand for, or else the keys of its section."""
    section, _, name = unknown.rpartition(".")
    split = [key.rpartition(".")[::2] for key in _known_keys(cls)]
    keys = [key for parent, key in split if parent == section]
    near = [".".join(parts).strip(".") for parts in split if parts[1] == name]
    cutoff = 0.7 if len(name) > 3 else 0.5  # "rl" and "lr" have one of two letters in order
    close = difflib.get_close_matches(name, keys, 1, cutoff)
    near += [f"{section}.{key}".strip(".") for key in close]
    return f"; did you mean '{near[0]}'?" if near else f"; expected one of {', '.join(keys)}"


def _location(loc: Sequence[int | str]) -> str:
    return ".".join(map(str, loc)) or "top level"


def _explain(cls: type[Record], detail: Any) -> str:
    where, message = _location(detail["loc"]), str(detail["msg"]).removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{where}'{_nearest_key(cls, where)}"
        case "missing":
            return f"missing key '{where}'"
        case "value_error":  # a validator of this software; its message names the keys and values
            return message
    return f"{where}: {message}; found {repr(detail['input'])[:MAX_SHOWN]}"


def write_toml(record: Record) -> str:
    """Return the record as TOML text that `load_toml` reads; keys that are None are left out."""
    return tomli_w.dumps(record.model_dump(mode="json", exclude_none=True))
