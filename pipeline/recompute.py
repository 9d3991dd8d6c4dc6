"""`mcm-cache verify --recompute`: compute the features of random rows again and compare them.

B rows, N patch tokens, C channels. Checksums show that the bytes are those of the commit. This
check shows that the committed features are right, for example that none belongs to another row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cache_tools.cache import Cache, Unit
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.errors import IdentityError, UsageError
from cache_tools.images import resize_rgb
from cache_tools.records import differences
from cache_tools.rng import hash_u64
from cache_tools.verify import Problem

from .extract import compare_probe
from .teachers import Teacher, load_teacher, probe_pictures

# The lowest cosines of 64 photographs by DeiT-tiny: 0.99997 for int8, 0.99984 with fp16 instead of
# fp32, 0.9935 with bf16. Each row is therefore computed in the precision that its commit names.
MIN_COSINE = 0.999


@dataclass
class Recomputed:
    """The number of recomputed rows, the lowest cosine, and the rows at or below `MIN_COSINE`."""

    rows: int = 0
    lowest_cosine: float = 1.0
    problems: list[Problem] = field(default_factory=list)


def recompute(
    path: Path, rows: int, name: str, weights: str, device: str | None = None, seed: int = 0
) -> Recomputed:
    """Recompute `rows` rows of the committed shards, which `seed` draws.

    Raises: UsageError without a committed shard; IdentityError if the identity or the probe
    features of the teacher differ from those of the cache; CorruptionError if a stored row cannot
    be read.
    """
    cache, result = Cache(path), Recomputed()
    teacher = _load(cache, name, weights, device)
    for unit, shard, chunk_rows in _drawn(cache, rows, seed):
        cosines = _cosines(unit, shard, chunk_rows, teacher)
        result.rows += len(chunk_rows)
        result.lowest_cosine = min(result.lowest_cosine, *cosines)
        file = str(unit.group / unit.specs["patch"].shard_file(shard))
        for row, cosine in zip(chunk_rows, cosines, strict=True):
            if not cosine > MIN_COSINE:
                text = f"{file}: row {row}: expected a cosine above {MIN_COSINE} to the features"
                text += f" computed again; found {cosine:.6f}"
                problem = Problem(text, file, "features", unit.split, str(unit), shard)
                result.problems.append(problem)
    return result


def _load(cache: Cache, name: str, weights: str, device: str | None) -> Teacher:
    """Load the teacher at the size of the cache, and compare it with the teacher of the cache."""
    cached = cache.identity.teacher
    size, normalization = (cached.height, cached.width), (cached.mean, cached.std)
    teacher = load_teacher(name, weights, None, device, None, normalization)
    if (teacher.identity.height, teacher.identity.width) != size:
        teacher = load_teacher(name, weights, cached.height, device, None, normalization)
    if different := differences(teacher.identity, cached):
        other = f"{cache.path}: this is not the teacher of the cache (asked != found)"
        raise IdentityError(f"{other}: {'; '.join(different)}")
    if (cache.path / "probe.json").is_file():
        pictures = torch.from_numpy(probe_pictures(*size))
        compare_probe(cache.path, teacher.features(pictures, "fp32")[0].cpu().numpy())
    return teacher


def _drawn(cache: Cache, rows: int, seed: int) -> Iterator[tuple[Unit, int, list[int]]]:
    """Yield (unit, shard, rows of one chunk), in order, for the rows with the smallest hashes."""
    shards = [(unit, shard) for unit in cache.all_units() for shard in unit.committed()]
    if not shards:
        expected = "expected a committed shard; found none"
        raise UsageError(f"--recompute {rows}: {cache.path}: {expected}")
    pairs, hashes = [], []  # of every committed row: (position in `shards`, row), and its hash
    for position, (unit, shard) in enumerate(shards):
        own = shard * cache.identity.rows_per_shard + np.arange(unit.shard_rows(shard))
        pairs.append(np.stack([np.full_like(own, position), own], axis=1))
        hashes.append(hash_u64(seed, f"recompute/{unit}", own))
    smallest = np.sort(np.argsort(np.concatenate(hashes), kind="stable")[:rows])
    drawn = np.concatenate(pairs)[smallest].tolist()
    for (position, _), group in groupby(drawn, key=lambda pair: (pair[0], pair[1] // CHUNK_ROWS)):
        yield *shards[position], [row for _, row in group]


def _cosines(unit: Unit, shard: int, rows: list[int], teacher: Teacher) -> list[float]:
    """Return the cosine of each row: of the standardized patch tokens, or of CLS if it is lower."""
    chunk, commit = unit.chunk(rows[0] // CHUNK_ROWS), unit.commit(shard)
    chosen, identity = [row - chunk.row0 for row in rows], unit.identity.teacher
    views = chunk.images()[chosen]
    inputs = np.stack([resize_rgb(view, identity.height, identity.width) for view in views])
    patch_BNC, cls_BC = teacher.features(torch.from_numpy(inputs), commit.fingerprint.precision)
    mean_C, var_C = torch.tensor(commit.channel_mean), torch.tensor(commit.channel_var)
    std_C = torch.where(var_C > 0, var_C, 1.0).sqrt()
    stored_BNC = torch.from_numpy(chunk.features()[chosen])
    cosine_B = _cosine((patch_BNC.cpu() - mean_C) / std_C, (stored_BNC - mean_C) / std_C)
    if chunk.cls is not None and cls_BC is not None:
        stored_BC = torch.from_numpy(chunk.cls[chosen].astype(np.float32))
        cosine_B = torch.minimum(cosine_B, _cosine(cls_BC.cpu(), stored_BC))
    return [float(cosine) for cosine in cosine_B]


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    return cosine_similarity(x.flatten(1), y.flatten(1), dim=-1)
