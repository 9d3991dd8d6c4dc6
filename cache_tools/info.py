"""`mcm-cache info`: what a DATASET or CACHE is and what of it is done. It takes no locks."""

import tomllib
from pathlib import Path
from typing import Any

from .cache import Cache, Unit
from .dataset import Dataset
from .errors import UsageError, found_at
from .records import read_capped


def info(path: Path) -> dict[str, Any]:
    """A description that prints as JSON.

    Raises: UsageError when the folder is neither DATASET nor CACHE.
    """
    if (path / "cache.json").is_file():
        return _cache_info(Cache(path))
    if (path / "dataset.json").is_file():
        dataset = Dataset(path)
        splits = {
            name: {"rows": split.rows, "shards": len(split.shards), "refused": split.refused}
            for name, split in dataset.record.splits.items()
        }
        known = {"kind": "dataset", "path": str(path), "sha256": dataset.sha256, "splits": splits}
        tar_bytes = sum(shard.tar_bytes for split in dataset.record.splits.values() for shard in split.shards)
        return known | {"classes": len(dataset.classes), "seed": dataset.record.seed, "bytes": tar_bytes}
    raise UsageError(f"{path}: expected a DATASET (dataset.json) or a CACHE (cache.json); found {found_at(path)}")


def guessed(path: Path) -> str:
    """A warning where the teacher's mean and std were guessed: a file's, before extract.toml recorded their values."""
    request = path / "extract.toml"
    try:
        asked = tomllib.loads(read_capped(request, error=UsageError).decode()) if request.is_file() else {}
    except (ValueError, UsageError) as error:  # a note, which no feature depends on
        return f"{request}: expected TOML; it does not read: {error}"
    teacher, weights = str(asked.get("teacher")), str(asked.get("weights"))
    folder = "/" in teacher or teacher.startswith("timm:") and "." in teacher  # it states them
    if "teacher_mean" in asked or folder or not {"/", "."} & set(weights):
        return ""
    return f"{path}: the teacher's mean and std were guessed, as {weights} states none; compare them with its source"


def _cache_info(cache: Cache) -> dict[str, Any]:
    return {
        "kind": "cache",
        "path": str(cache.path),
        "sha256": cache.sha256,
        "warning": guessed(cache.path),
        "identity": cache.identity.model_dump(mode="json", exclude={"classes"}),
        "units": {str(unit): _unit_info(unit) for unit in cache.all_units()},
    }


def _unit_info(unit: Unit) -> dict[str, Any]:
    shards = unit.committed()
    known: dict[str, Any] = {"complete": unit.complete, "shards": len(shards), "of": unit.num_shards, "rows": unit.rows}
    if not shards:
        return known
    times_s = sorted(unit.commit_file(shard).stat().st_mtime for shard in shards)
    if len(shards) > 1 and not unit.complete:
        known["eta_s"] = round((times_s[-1] - times_s[0]) / (len(shards) - 1) * (unit.num_shards - len(shards)))
    found = [(commit.fidelity, commit.files.values()) for commit in map(unit.commit, shards)]
    known["bytes"] = sum(file.bytes for _, files in found for file in files)
    known["cosine"] = min(fidelity.cosine for fidelity, _ in found)
    return known | {name: max(getattr(f, name) for f, _ in found) for name in ("relative_mse", "precision_mse")}


def summary(known: dict[str, Any]) -> str:
    """The description as lines for a person."""
    if known["kind"] == "dataset":
        size = f"{known['classes']} classes, {known['bytes'] / 1e6:.1f} MB, seed {known['seed']}"
        lines = [f"DATASET {known['path']}: {size}"]
        for name, split in known["splits"].items():
            lines.append(f"  {name:<8} {split['rows']} rows in {split['shards']} shards, {split['refused']} refused")
        return "\n".join(lines)
    identity = known["identity"]
    teacher, grid = identity["teacher"], identity["grid"]
    lines = [
        f"CACHE {known['path']} ({known['sha256'][:12]})",
        f"  teacher  {teacher['name']}, {teacher['activation']}, {teacher['height']}x{teacher['width']} px",
        f"  pixels   mean {teacher['mean']}, std {teacher['std']}, {teacher['kernel']}",
        f"  features {grid[0]}x{grid[1]} tokens x {identity['channels']} channels, {identity['dtype']}"
        + (f" by {identity['compress']}" if identity.get("compress") else "")
        + (", CLS" if identity["has_cls"] else ""),
        f"  views    {identity['view_height']}x{identity['view_width']} px, {identity['crop']['kind']}, "
        + identity["view_encoding"],
    ]
    for name, unit in known["units"].items():
        state = "complete" if unit["complete"] else f"{unit['shards']} of {unit['of']} shards"
        line = f"  {name:<10} {state}, {unit['rows']} rows"
        if "cosine" in unit:
            line += f", {unit['bytes'] / 1e6:.1f} MB, error {unit['relative_mse']:.1e}, cosine {unit['cosine']:.6f}"
        lines.append(line + (f", about {unit['eta_s']} s left at the pace so far" if "eta_s" in unit else ""))
    return "\n".join(lines + [f"warning: {known['warning']}"] * bool(known["warning"]))
