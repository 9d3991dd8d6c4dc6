"""Masks with an exact count of hidden values: each epoch draws a pool, and a hash picks from it.

B batch, N patches, D student width, K pool rows. A mask is boolean and **True means hidden**.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_tools.rng import hash_u64, normal, uniform


def mask_channels(x: Tensor, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a boolean mask for `x` [..., D] in which **True means hidden**, on the device of `x`.

    Every vector of D channels has its own round(ratio * D) hidden channels. To hide them:
    `torch.where(mask_channels(x, 0.75), fill, x)`. `generator` is one of the device of `x`.

    Raises: ValueError unless 0 <= ratio <= 1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio: expected a number from 0 to 1; found {ratio}")
    return _hide_smallest(torch.rand(x.shape, generator=generator, device=x.device), ratio)


def _hide_smallest(values: Tensor, ratio: float) -> Tensor:
    """Return a mask of `values` [..., D] in which each vector's round(ratio * D) smallest are True.

    With random values, this is a uniform draw without replacement.
    """
    hidden = round(ratio * values.shape[-1])
    smallest = values.topk(hidden, largest=False, sorted=False).indices
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, smallest, True)


def mask_pool(
    seed: int, epoch: int, pool_rows: int, width: int, ratio: float
) -> npt.NDArray[np.bool_]:
    """Return the pool_KD of an epoch; each row has round(ratio * width) True values."""
    rows_K1, channels_1D = np.arange(pool_rows)[:, None], np.arange(width)[None, :]
    hashes_KD = hash_u64(seed, "mask_pool", epoch, rows_K1, channels_1D)
    # torch cannot sort uint64. Half of each hash is an int64 and has the same order.
    halves_KD = torch.from_numpy((hashes_KD >> np.uint64(1)).astype(np.int64))
    return _hide_smallest(halves_KD, ratio).numpy()


def noise_pool(
    seed: int, epoch: int, pool_rows: int, width: int, std: float
) -> npt.NDArray[np.float32]:
    """Return a pool_KD of normal draws, for the controls that add noise in place of a mask."""
    rows_K1, channels_1D = np.arange(pool_rows)[:, None], np.arange(width)[None, :]
    return np.float32(std) * normal(seed, "noise_pool", epoch, rows_K1, channels_1D)


def mask_picks(
    seed: int, epoch: int, rows_B: npt.NDArray[np.int64], positions: int, pool_rows: int,
    unmasked_fraction: float = 0.0,
) -> npt.NDArray[np.int32]:  # fmt: skip
    """Return picks [B, positions] in [0, pool_rows): hashes of seed, epoch, row and position.

    A row therefore gets the same picks in every batch, rank and worker. `positions` is N, or 1 in
    patch mode. An unmasked row picks `pool_rows`: the mask after the pool, which hides nothing.
    """
    rows_B1, positions_1N = np.asarray(rows_B)[:, None], np.arange(positions)[None, :]
    hashes = hash_u64(seed, "mask_pick", epoch, rows_B1, positions_1N)
    picks = (hashes % np.uint64(pool_rows)).astype(np.int32)
    if unmasked_fraction:
        picks[uniform(seed, "unmasked", epoch, np.asarray(rows_B)) < unmasked_fraction] = pool_rows
    return picks


def mask_from_pool(pool: Tensor, picks: Tensor, patchwise: bool) -> Tensor:
    """Return mask_BND = pool_KD[picks_BN]; in patch mode, mask_BN1 from pool_KN and picks_B1."""
    mask = pool[picks.long()]
    return mask.transpose(1, 2) if patchwise else mask


def apply_fill(x_BND: Tensor, mask_BND: Tensor, fill_D: Tensor) -> Tensor:
    """Replace each hidden value by the fill; neither the hidden value nor its gradient remains."""
    return torch.where(mask_BND, fill_D.to(x_BND.dtype), x_BND)
