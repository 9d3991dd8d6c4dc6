"""`mcm-cache verify --recompute`: compute the features of chosen rows again and compare them.

B rows, N patch tokens, C channels. Checksums show that the bytes are those of the commit. This
check shows that the committed features were right, for example that none belongs to another row.
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
    """The number of rows computed again, the lowest cosine, and the rows below `MIN_COSINE`."""

    rows: int = 0
    lowest_cosine: float = 1.0
    problems: list[Problem] = field(default_factory=list)


def recompute(
    path: Path, rows: int, name: str, weights: str, device: str | None = None, seed: int = 0
) -> Recomputed:
    """Compute `rows` rows of the committed shards again; `seed` draws the rows.

    Raises: UsageError without a committed shard; IdentityError when the record or the probe
    features of the teacher differ from those of the cache; CorruptionError when a stored row cannot
    be read.
    """
    cache, found = Cache(path), Recomputed()
    teacher = _load(cache, name, weights, device)
    for unit, shard, chosen in _chosen(cache, rows, seed):
        cosines = _cosines(unit, shard, chosen, teacher)
        found.rows += len(chosen)
        found.lowest_cosine = min(found.lowest_cosine, *cosines)
        file = str(unit.group / unit.specs["patch"].shard_file(shard))
        for row, cosine in zip(chosen, cosines, strict=True):
            if not cosine > MIN_COSINE:
                text = f"{file}: row {row}: expected a cosine above {MIN_COSINE} to the features"
                text += f" computed again; found {cosine:.6f}"
                found.problems.append(Problem(text, file, "features", unit.split, str(unit), shard))
    return found


def _load(cache: Cache, name: str, weights: str, device: str | None) -> Teacher:
    theirs = cache.identity.teacher
    teacher = load_teacher(name, weights, None, device, None, (theirs.mean, theirs.std))
    if (teacher.identity.height, teacher.identity.width) != (theirs.height, theirs.width):
        teacher = load_teacher(
            name, weights, theirs.height, device, None, (theirs.mean, theirs.std)
        )
    if found := differences(teacher.identity, theirs):
        other = f"{cache.path}: this is not the teacher of the cache (asked != found)"
        raise IdentityError(f"{other}: {'; '.join(found)}")
    if (cache.path / "probe.json").is_file():
        pictures = torch.from_numpy(probe_pictures(theirs.height, theirs.width))
        compare_probe(cache.path, teacher.features(pictures, "fp32")[0].cpu().numpy())
    return teacher


def _chosen(cache: Cache, rows: int, seed: int) -> Iterator[tuple[Unit, int, list[int]]]:
    """Yield (unit, shard, rows of one chunk), in order, for the rows with the smallest hashes."""
    places = [(unit, shard) for unit in cache.all_units() for shard in unit.committed()]
    if not places:
        raise UsageError(
            f"--recompute {rows}: {cache.path}: expected a committed shard; found none"
        )
    numbers, hashes = [], []  # of every committed row: (place, row), and its hash
    for place, (unit, shard) in enumerate(places):
        own = shard * cache.identity.rows_per_shard + np.arange(unit.shard_rows(shard))
        numbers.append(np.stack([np.full_like(own, place), own], axis=1))
        hashes.append(hash_u64(seed, f"recompute/{unit}", own))
    smallest = np.sort(np.argsort(np.concatenate(hashes), kind="stable")[:rows])
    chosen = np.concatenate(numbers)[smallest].tolist()
    for (place, _), group in groupby(chosen, key=lambda pair: (pair[0], pair[1] // CHUNK_ROWS)):
        yield *places[place], [row for _, row in group]


def _cosines(unit: Unit, shard: int, rows: list[int], teacher: Teacher) -> list[float]:
    """Return the cosine of each row: of standardized patch tokens, or of CLS if lower."""
    chunk, commit = unit.chunk(rows[0] // CHUNK_ROWS), unit.commit(shard)
    chosen, identity = [row - chunk.row0 for row in rows], unit.identity
    inputs = np.zeros((len(rows), identity.teacher.height, identity.teacher.width, 3), np.uint8)
    for place, view in zip(inputs, chunk.images()[chosen], strict=True):
        place[:] = resize_rgb(view, *place.shape[:2])
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
