"""`mcm-cache info`: describe a DATASET or CACHE and its progress, without locks."""

from pathlib import Path
from typing import Any

from .cache import Cache, Unit
from .dataset import Dataset
from .errors import UsageError, found_at

SHOWN_NAMES = 8  # the most class names in a line of text


def info(path: Path) -> dict[str, Any]:
    """Return a description of a DATASET or CACHE that can be written as JSON.

    Raises: UsageError if `path` is neither.
    """
    if (path / "cache.json").is_file():
        return _cache_info(Cache(path))
    if (path / "dataset.json").is_file():
        return _dataset_info(Dataset(path))
    expected = "expected a DATASET (dataset.json) or a CACHE (cache.json)"
    raise UsageError(f"{path}: {expected}; found {found_at(path)}")


def _dataset_info(dataset: Dataset) -> dict[str, Any]:
    splits = dataset.record.splits
    return {
        "kind": "dataset",
        "path": str(dataset.path),
        "sha256": dataset.sha256,
        "task": dataset.record.task or "classify",
        "ignore": dataset.record.ignore or (),
        "names": dataset.classes,
        "splits": {
            name: {"rows": split.rows, "shards": len(split.shards), "refused": split.refused}
            | ({"objects": split.objects} if dataset.record.coco else {})
            for name, split in splits.items()
        },
        "classes": len(dataset.classes),
        "seed": dataset.record.seed,
        "bytes": sum(shard.tar_bytes for split in splits.values() for shard in split.shards),
    }


def _cache_info(cache: Cache) -> dict[str, Any]:
    return {
        "kind": "cache",
        "path": str(cache.path),
        "sha256": cache.sha256,
        "identity": cache.identity.model_dump(mode="json", exclude={"classes"}),
        "units": {str(unit): _unit_info(unit) for unit in cache.all_units()},
    }


def _unit_info(unit: Unit) -> dict[str, Any]:
    shards = unit.committed()
    facts: dict[str, Any] = {"complete": unit.complete, "shards": len(shards)}
    facts |= {"of": unit.num_shards, "rows": unit.rows}
    if not shards:
        return facts
    times_s = sorted(unit.commit_file(shard).stat().st_mtime for shard in shards)
    if len(shards) > 1 and not unit.complete:
        shard_s = (times_s[-1] - times_s[0]) / (len(shards) - 1)
        facts["eta_s"] = round(shard_s * (unit.num_shards - len(shards)))
    recorded = [(commit.fidelity, commit.files.values()) for commit in map(unit.commit, shards)]
    facts["bytes"] = sum(file.bytes for _, files in recorded for file in files)
    facts["cosine"] = min(fidelity.cosine for fidelity, _ in recorded)
    facts["relative_mse"] = max(fidelity.relative_mse for fidelity, _ in recorded)
    facts["precision_mse"] = max(fidelity.precision_mse for fidelity, _ in recorded)
    return facts


def summary(facts: dict[str, Any]) -> str:
    """Return the description of `info` as lines of text."""
    if facts["kind"] == "dataset":
        size = f"{facts['classes']} classes, {facts['bytes'] / 1e6:.1f} MB, seed {facts['seed']}"
        lines = [f"DATASET {facts['path']} ({facts['task']}): {size}"]
        for name, split in facts["splits"].items():
            rows = f"{split['rows']} rows in {split['shards']} shards"
            objects = f", {split['objects']} objects" if "objects" in split else ""
            lines.append(f"  {name:<8} {rows}{objects}, {split['refused']} refused")
        if facts["task"] != "classify":
            more = "; ..." * (len(facts["names"]) > SHOWN_NAMES)
            lines.append(f"  classes  {'; '.join(facts['names'][:SHOWN_NAMES])}{more}")
        if facts["ignore"]:
            ignored = ", ".join(map(str, facts["ignore"]))
            lines.append(f"  ignored  value {ignored} of the source's masks")
        return "\n".join(lines)
    identity = facts["identity"]
    teacher, grid = identity["teacher"], identity["grid"]
    teacher_px = f"{teacher['height']}x{teacher['width']} px"
    view_px = f"{identity['view_height']}x{identity['view_width']} px"
    shape = f"{grid[0]}x{grid[1]} tokens x {identity['channels']} channels"
    compress = f" by {identity['compress']}" if identity.get("compress") else ""
    cls = ", CLS" if identity["has_cls"] else ""
    lines = [
        f"CACHE {facts['path']} ({facts['sha256'][:12]})",
        f"  teacher  {teacher['name']}, {teacher['activation']}, {teacher_px}",
        f"  pixels   mean {teacher['mean']}, std {teacher['std']}, {teacher['kernel']}",
        f"  features {shape}, {identity['dtype']}{compress}{cls}",
        f"  views    {view_px}, {identity['crop']['kind']}, {identity['view_encoding']}",
    ]
    for name, unit in facts["units"].items():
        state = "complete" if unit["complete"] else f"{unit['shards']} of {unit['of']} shards"
        line = f"  {name:<10} {state}, {unit['rows']} rows"
        if "cosine" in unit:
            line += f", {unit['bytes'] / 1e6:.1f} MB, error {unit['relative_mse']:.1e}"
            line += f", cosine {unit['cosine']:.6f}"
        if "eta_s" in unit:
            line += f", about {unit['eta_s']} s left at the average rate"
        lines.append(line)
    return "\n".join(lines)
