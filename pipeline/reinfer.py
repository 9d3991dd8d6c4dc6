"""`mcm-cache verify --reinfer`: rows through the teacher once more; what is stored must be what it computes.

B rows, N patch tokens, C channels. Checksums tell that bytes are what was committed; this tells that they were right:
neither features of another row nor another activation under the same names.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from cache_tools.cache import Cache, Chunk, Unit
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.draws import hash_u64
from cache_tools.errors import IdentityError, UsageError
from cache_tools.identity import Commit, Fingerprint
from cache_tools.images import decode_view_into, resize_rgb
from cache_tools.records import differences
from cache_tools.tars import read_sealed_npy
from cache_tools.verify import Problem, step_error

from .extract import PROBE_TOLERANCE, relative_mse, versions
from .teachers import Teacher, load_teacher, probe_pictures

# The error of a precision on standardised channels of a few real rows, over that on the probe pictures: DeiT-tiny on
# photographs, a row to three at a time, up to 6.1 (fp16) and 5.7 (bf16).
STANDARDISED = 16.0
HALF_ERROR = 1e-6  # of a CLS token, stored as float16: relative MSE 8e-8 at most where no channel is subnormal


@dataclass
class Again:
    """A shard's chosen rows, computed again: relative MSE on channel-standardised values and what of it is allowed."""

    unit: str
    shard: int
    rows: int = 0
    cosine: float = 0.0
    largest: float = 0.0
    relative_mse: float = 0.0
    allowed: float = 0.0
    cls_mse: float = 0.0

    @property
    def text(self) -> str:
        """A line for a person."""
        return (
            f"{self.unit} shard {self.shard}: {self.rows} rows, cosine {self.cosine:.6f}, largest difference "
            f"{self.largest:.2g}, relative MSE {self.relative_mse:.2e} of {self.allowed:.2e}, CLS {self.cls_mse:.1e}"
        )


@dataclass
class Reinferred:
    """What came of it; a problem of kind "teacher" says that it cannot be told which of the two is wrong."""

    probe_mse: float
    shards: list[Again] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class _Row(NamedTuple):
    unit: Unit
    shard: int
    chunk: Chunk
    position: int


def reinfer(
    path: Path,
    rows: int,
    name: str,
    weights: str,
    device: str | None = None,
    precision: str | None = None,
    seed: int = 0,
) -> Reinferred:
    """Compute `rows` rows of the committed shards again, drawn by `seed`.

    Raises: UsageError when there is none; IdentityError with the fields in which the teacher is another than the
    cache's; CorruptionError when a stored row does not read.
    """
    cache = Cache(path)
    teacher = _load(cache, name, weights, device, precision)
    precision_mse, probe_mse = _probe(path, teacher)
    found = Reinferred(probe_mse)
    chosen = _chosen(cache, rows, seed)
    for (unit, shard), group in groupby(chosen, key=lambda row: (row.unit, row.shard)):
        again = _compare(unit, unit.commit(shard), list(group), teacher, precision_mse)
        found.shards.append(again)
        if not again.relative_mse <= again.allowed or not again.cls_mse <= again.allowed + HALF_ERROR:
            file = str(unit.group / unit.specs["patch"].shard_file(shard))
            text = f"{file}: expected the features of its views; found others: {again.text}"
            found.problems.append(Problem(text, file, "features", unit.split, str(unit), shard))
    if not probe_mse <= PROBE_TOLERANCE:
        text = f"{path / 'probe.npy'}: this teacher's probe features differ by {probe_mse:.1e}, at most "
        text += f"{PROBE_TOLERANCE:.0e} was expected: it, or what filled the cache, is not what name and weights say"
        found.problems.append(Problem(text, str(path / "probe.npy"), "teacher"))
    return found


def _load(cache: Cache, name: str, weights: str, device: str | None, precision: str | None) -> Teacher:
    theirs = cache.identity.teacher
    teacher = load_teacher(name, weights, None, device, precision)
    if (teacher.identity.height, teacher.identity.width) != (theirs.height, theirs.width):
        teacher = load_teacher(name, weights, theirs.height, device, precision)
    if found := differences(teacher.identity, theirs):
        raise IdentityError(f"{cache.path}: this is not the teacher of the cache (asked != found): {'; '.join(found)}")
    return teacher


def _probe(path: Path, teacher: Teacher) -> tuple[float, float]:
    """Relative MSE of this precision to float32, and of float32 to what began the cache, on the probe pictures."""
    pictures = torch.from_numpy(probe_pictures(teacher.identity.height, teacher.identity.width))
    exact, found = (teacher.features(pictures, p)[0].cpu().numpy() for p in ("fp32", teacher.precision))
    known = (path / "probe.npy").is_file()
    return relative_mse(found, exact), relative_mse(exact, read_sealed_npy(path / "probe.npy")) if known else 0.0


def _chosen(cache: Cache, rows: int, seed: int) -> Iterator[_Row]:
    """The rows of the smallest hashes, in the order in which they lie; a chunk is read once."""
    units = cache.all_units()
    places = [(unit, shard) for unit in units for shard in unit.committed()]
    if rows < 1 or not places:
        raise UsageError(f"--reinfer {rows}: expected at least 1 row, and a cache with a committed shard")
    size = cache.identity.rows_per_shard
    all_rows = [np.arange(shard * size, shard * size + unit.shard_rows(shard)) for unit, shard in places]
    hashes = [hash_u64(seed, f"reinfer/{unit}", own) for (unit, _), own in zip(places, all_rows, strict=True)]
    smallest = np.sort(np.argsort(np.concatenate(hashes), kind="stable")[:rows])
    ends = np.cumsum([len(own) for own in all_rows])
    wanted = [(int(np.searchsorted(ends, at, side="right")), at) for at in smallest]
    numbered = [(place, int(all_rows[place][at - ends[place]])) for place, at in wanted]
    for (place, number), group in groupby(numbered, key=lambda item: (item[0], item[1] // CHUNK_ROWS)):
        unit, shard = places[place]
        chunk = unit.chunk(number)
        yield from (_Row(unit, shard, chunk, row % CHUNK_ROWS) for _, row in group)


def _compare(unit: Unit, commit: Commit, rows: list[_Row], teacher: Teacher, precision_mse: float) -> Again:
    again, sums = Again(str(unit), commit.shard, len(rows)), dict.fromkeys(("error", "energy", "step", "cls"), 0.0)
    todo = iter(rows)
    while batch := list(islice(todo, commit.fingerprint.batch)):
        fresh_BNC, fresh_BC = _features(batch, unit, commit.fingerprint.batch, teacher)
        for row, x_NC, cls_C in zip(batch, fresh_BNC, fresh_BC, strict=True):
            chunk, at = row.chunk, row.position
            q_NC = torch.from_numpy(chunk.features()[at])
            mean, std = _channels(chunk, commit)
            z, q = (x_NC - mean) / std, (q_NC - mean) / std
            again.cosine += float(cosine_similarity(z, q, dim=-1).mean()) / len(rows)
            again.largest = max(again.largest, float((x_NC - q_NC).abs().max()))
            sums["error"] += float(((z - q) ** 2).sum(dtype=torch.float64))
            sums["energy"] += float((z**2).sum(dtype=torch.float64))
            if chunk.scale is not None:
                sums["step"] += step_error(chunk.scale[at : at + 1], x_NC.shape[-1])
            if chunk.cls is not None and cls_C is not None:
                stored = torch.from_numpy(chunk.cls[at].astype(np.float32))
                again.cls_mse = max(again.cls_mse, float(((cls_C - stored) ** 2).sum() / (cls_C**2).sum()))
    again.relative_mse = sums["error"] / max(sums["energy"], 1e-30)
    again.allowed = _allowed(commit, sums, teacher, precision_mse)
    return again


def _features(batch: list[_Row], unit: Unit, size: int, teacher: Teacher) -> tuple[Tensor, list[Tensor | None]]:
    """Float32 patch [B, N, C] and CLS [C] a row, of the stored views by the way that extraction goes."""
    identity = unit.identity
    # On a GPU the bits depend on the batch, and padding is cheap there; on a CPU it would be most of the work.
    padded = size if teacher.device.type != "cpu" else len(batch)
    inputs = np.zeros((padded, identity.teacher.height, identity.teacher.width, 3), np.uint8)
    view = np.empty((identity.view_height, identity.view_width, 3), np.uint8)
    for place, row in zip(inputs, batch, strict=False):
        decode_view_into(row.chunk.pictures[row.position], view)
        place[:] = resize_rgb(view, *place.shape[:2])
    patch_BNC, cls_BC = teacher.features(torch.from_numpy(inputs))
    return patch_BNC[: len(batch)].cpu(), [None] * len(batch) if cls_BC is None else list(cls_BC[: len(batch)].cpu())


def _channels(chunk: Chunk, commit: Commit) -> tuple[Tensor, Tensor]:
    """Mean and std [C] to standardise by: those of the codes; float16 has none, and takes those of the whole shard."""
    if chunk.mean is not None and chunk.std is not None:
        return torch.from_numpy(chunk.mean.copy()), torch.from_numpy(chunk.std.copy())
    var = torch.tensor(commit.channel_var)
    return torch.tensor(commit.channel_mean), torch.where(var > 0, var, 1.0).sqrt()


def _allowed(commit: Commit, sums: dict[str, float], teacher: Teacher, precision_mse: float) -> float:
    """The relative MSE that quantisation explains, and on another fingerprint precision too.

    Of codes these rows' own scales tell it to a few percent, of float16 the shard's commit tells the size.
    """
    lost = 1.25 * sums["step"] / max(sums["energy"], 1e-30) if sums["step"] else 2 * commit.fidelity.relative_mse
    here = Fingerprint(
        device=teacher.device.type,
        precision=teacher.precision,
        batch=commit.fingerprint.batch,
        versions=versions(teacher),
    )
    other = precision_mse + commit.fidelity.precision_mse + PROBE_TOLERANCE
    return lost + 1e-8 + (0.0 if here == commit.fingerprint else STANDARDISED * other)
