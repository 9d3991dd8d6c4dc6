"""Strict records, canonical JSON with its own sha256, and TOML configuration."""

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

MAX_RECORD_BYTES = 64 << 20  # the manifest of a million shards is smaller
MAX_CONFIG_BYTES = 64 << 10  # tomllib needs the square of a dotted key: 2 s here
MAX_MISFITS = 20  # fields in a message
MAX_SHOWN = 200  # characters of a value in a message
_PACKAGE = Path(__file__).parent


class Record(pydantic.BaseModel):
    """Base of every record: typed strictly, closed to unknown fields, immutable.

    `exclusive` names keys of which one is given: an override of one clears the others.
    """

    exclusive: ClassVar[tuple[str, ...]] = ()
    model_config = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


R = TypeVar("R", bound=Record)
# What numbers and names in a record may be: no shape overflows, nothing is divided by 0, no name leaves its folder.
Amount = Annotated[int, pydantic.Field(ge=0, le=1 << 40)]
Count = Annotated[int, pydantic.Field(ge=1, le=1 << 40)]
Checksum = Annotated[int, pydantic.Field(ge=0, lt=1 << 32)]
SplitName = Annotated[str, pydantic.Field(pattern="^[A-Za-z0-9_]{1,64}$")]


def printable(text: str) -> str:
    """`text` in characters that UTF-8 has: bytes of a file name that are not UTF-8 become backslash escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def check_utf8(path: str | Path) -> None:
    """Raises: UsageError if `path` is not UTF-8: TensorBoard, safetensors and timm open no other."""
    if (shown := printable(str(path))) != str(path):
        raise UsageError(f"{shown}: expected a path in UTF-8; rename it, or give a link to it by another name")


Text = Annotated[str, pydantic.BeforeValidator(printable)]  # a name from the file system or the command line


def sha256_hex(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def _canonical(payload: dict[str, Any]) -> bytes:
    return json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _sealed(payload: dict[str, Any]) -> bytes:
    return _canonical(payload | {"sha256": sha256_hex(_canonical(payload))}) + b"\n"


def record_sha256(record: Record) -> str:
    """Digest of the record's canonical JSON: the value of its own `sha256` key on disk."""
    return sha256_hex(_canonical(record.model_dump(mode="json")))


def encode_record(record: Record) -> bytes:
    """Canonical JSON: sorted keys, one line, with the sha256 of all the rest under "sha256"."""
    return _sealed(record.model_dump(mode="json"))


def decode_record(cls: type[R], data: bytes, where: str | Path) -> R:
    """The record in `data`.

    Raises: CorruptionError when the bytes are not canonical JSON that agrees with its own sha256; IdentityError for
    another format version and for fields that do not fit: a record that is whole is not damaged but foreign.
    """
    try:
        payload = json.loads(data)
        del payload["sha256"]
        whole = _sealed(payload)
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorruptionError(f"{where}: expected a JSON record with its sha256; found {error!r}") from error
    if whole != data:
        raise CorruptionError(f"{where}: expected bytes that agree with the sha256 inside; they do not; restore it")
    version = cls.model_fields.get("version")
    if version and payload.get("version") != version.default:
        found = f"expected format version {version.default}; found {payload.get('version')}"
        raise IdentityError(f"{where}: {found}; use the software of that version")
    try:
        record = cls.model_validate_json(_canonical(payload))
    except pydantic.ValidationError as error:
        odd = "; ".join(map(_misfit, error.errors()[:MAX_MISFITS]))
        raise IdentityError(f"{where}: not a {cls.__name__} of this software (asked != found): {odd}") from error
    if encode_record(record) != data:  # true for 1, 1 for 1.0: what we hold would have another digest
        raise IdentityError(f"{where}: not a {cls.__name__} as this software writes it: a value is of another type")
    return record


def _misfit(detail: Any) -> str:
    """`field: asked != found` of one of pydantic's errors."""
    asked = detail.get("ctx", {}).get("expected", detail["msg"])
    found = {"missing": "nothing"}.get(detail["type"], f"{detail['input']!r:.200}")
    return f"{_location(detail['loc'])}: {asked} != {found}"


def read_record(cls: type[R], path: Path) -> R:
    """`decode_record` of a file; a missing one raises FileNotFoundError."""
    return decode_record(cls, read_capped(path), path)


def read_capped(path: Path, limit: int = MAX_RECORD_BYTES, error: type[McmError] = CorruptionError) -> bytes:
    """The bytes of a file that somebody else may have made: nothing is read of a FIFO, or of more than `limit` bytes.

    Raises: `error` for those; FileNotFoundError.
    """
    with naming(path), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise error(f"{path}: expected a file of at most {limit} bytes; found {status.st_size}, or no regular file")
        return file.read(status.st_size)


def read_json(path: Path, error: type[McmError] = CorruptionError) -> dict[str, Any]:
    """A JSON object that is no record of ours; Raises: `error`."""
    try:
        found = json.loads(read_capped(path, error=error))
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: expected a JSON object; it does not read: {problem}") from problem
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object; found {type(found).__name__}")
    return found


def nearest(word: str, words: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `words`, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def differences(ours: Record, theirs: Record) -> list[str]:
    """`field: ours != theirs` for every leaf that differs."""
    ours_flat, theirs_flat = dict(_leaves(ours.model_dump(mode="json"))), dict(_leaves(theirs.model_dump(mode="json")))
    keys = sorted(ours_flat.keys() | theirs_flat.keys())
    pairs = ((key, ours_flat.get(key), theirs_flat.get(key)) for key in keys)
    return [f"{key}: {left!r} != {right!r}" for key, left, right in pairs if left != right]


def _leaves(payload: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(payload, dict):
        for key, value in payload.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, payload


def config_file(name: str) -> Path:
    """The TOML file called `name`: a path, or the name of a shipped one such as "pretrain/demo".

    Shipped files lie inside the installed wheel, or in configs/ of a checkout (known by its pyproject.toml).
    """
    if Path(name).is_file():
        return Path(name)
    roots = [_PACKAGE / "configs"]
    if (_PACKAGE.parent / "pyproject.toml").is_file():
        roots.append(_PACKAGE.parent / "configs")
    for root in roots:
        if (root / f"{name}.toml").is_file():
            return root / f"{name}.toml"
    names = {path.relative_to(root).with_suffix("").as_posix() for root in roots for path in root.rglob("*.toml")}
    shipped = f"{', '.join(sorted(names))}{nearest(name, names)}"
    raise UsageError(f"config {name!r}: expected a TOML file or one of {shipped}; found {found_at(name)}")


def load_toml(
    cls: type[R], path: Path | None, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> R:
    """The configuration in `path` with `section.key=value` overrides (values in TOML syntax; bare words are strings).

    An empty value is None where the key is optional.

    `flags` are values of keys that the command line names by options of its own; `path` may be None with them.

    Raises: UsageError naming the key, what was expected and the nearest known key.
    """
    try:
        payload = tomllib.loads(read_capped(path, MAX_CONFIG_BYTES, UsageError).decode()) if path else {}
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UsageError(f"{path}: not valid TOML: {error}") from error
    payload |= flags or {}
    where = path or "the command line"
    for override in overrides:
        _override(cls, payload, override)
    try:
        for value in payload.values():
            check_utf8(str(value))
        return cls.model_validate_json(json.dumps(payload, default=str))  # a date of TOML's is then no number either
    except RecursionError as error:
        raise UsageError(f"{where}: expected sections of values; found tables in tables in tables") from error
    except pydantic.ValidationError as error:
        # A misspelled key shows as one unknown and one missing: the unknown one tells more.
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
            raise UsageError(f"--set {override!r}: {section!r} is a value, not a section")
    try:
        payload[key] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        payload[key] = text or (None if type(None) in _kinds(cls, key) else "")
    for other in set(cls.exclusive) - {key} if key in cls.exclusive else ():
        payload.pop(other, None)


def _kinds(cls: type[Record], key: str) -> tuple[Any, ...]:
    """The type of a field, and the types that it is made of."""
    field = cls.model_fields.get(key)
    return (field.annotation, *get_args(field.annotation)) if field else ()


def _section(cls: type[Record], key: str) -> type[Record]:
    """The record that a section holds; Record itself, which has no keys, where it holds none."""
    kinds = (kind for kind in _kinds(cls, key) if isinstance(kind, type) and issubclass(kind, Record))
    return next(kinds, Record)


def _known_keys(cls: type[Record], prefix: str = "") -> list[str]:
    keys = []
    for name in cls.model_fields:
        keys += [prefix + name, *_known_keys(_section(cls, name), f"{prefix}{name}.")]
    return keys


def _location(loc: Sequence[int | str]) -> str:
    return ".".join(map(str, loc)) or "the whole"


def _explain(cls: type[Record], detail: Any) -> str:
    where, message = _location(detail["loc"]), str(detail["msg"]).removeprefix("Value error, ")
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{where}'{nearest(where, _known_keys(cls))}"
        case "missing":
            return f"missing key '{where}'"
        case "value_error":  # a rule of ours: it names keys and values itself
            return message
    return f"{where}: {message}; found {repr(detail['input'])[:MAX_SHOWN]}"


def write_toml(record: Record) -> str:
    """The record as TOML text that `load_toml` reads back; keys that are None are left out."""
    return tomli_w.dumps(record.model_dump(mode="json", exclude_none=True))
