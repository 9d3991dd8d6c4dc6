"""Which values are hidden: exact-count mask rows from a pool made anew each epoch, picked by a counter hash.

B batch, N patches, D student width, K pool rows. A mask is boolean and **True means hidden**.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cache_tools.rng import hash_u64, uniform


def hidden_channels(width: int, ratio: float) -> int:
    """Return how many of `width` channels (or patches) are hidden: round(ratio * width)."""
    return round(ratio * width)


def mask_pool(seed: int, epoch: int, pool_rows: int, width: int, ratio: float) -> npt.NDArray[np.bool_]:
    """Return pool_KD of an epoch, each row with exactly hidden_channels(width, ratio) values True.

    The hidden ones are those with the smallest hashes: a uniform draw without replacement.
    """
    hashes_KD = hash_u64(seed, "mask_pool", epoch, np.arange(pool_rows)[:, None], np.arange(width)[None, :])
    hidden = hidden_channels(width, ratio)
    if not hidden:  # the end of a schedule to zero
        return np.zeros((pool_rows, width), dtype=np.bool_)
    chosen = np.argpartition(hashes_KD, hidden - 1, axis=1)[:, :hidden]
    pool_KD = np.zeros((pool_rows, width), dtype=np.bool_)
    np.put_along_axis(pool_KD, chosen, True, axis=1)
    return pool_KD


def mask_picks(
    seed: int, epoch: int, rows_B: npt.NDArray[np.int64], positions: int, pool_rows: int, unmasked_fraction: float = 0.0
) -> npt.NDArray[np.int32]:
    """Return picks [B, positions] in [0, pool_rows): a function of the row's number and the position alone.

    So they are the same whatever batch, rank or worker a row falls to. `positions` is N, or 1 in patch mode. A row of
    the unmasked ones picks `pool_rows`: the mask behind the pool, which hides nothing.
    """
    hashes = hash_u64(seed, "mask_pick", epoch, np.asarray(rows_B)[:, None], np.arange(positions)[None, :])
    picks = (hashes % np.uint64(pool_rows)).astype(np.int32)
    if unmasked_fraction:
        picks[uniform(seed, "unmasked", epoch, np.asarray(rows_B)) < unmasked_fraction] = pool_rows
    return picks


def mask_from_pool(pool: Tensor, picks: Tensor, patchwise: bool) -> Tensor:
    """Return mask_BND = pool_KD[picks_BN], or in patch mode mask_BN1 from pool_KN and picks_B1, which broadcasts."""
    mask = pool[picks.long()]
    return mask.transpose(1, 2) if patchwise else mask


def apply_fill(x_BND: Tensor, mask_BND: Tensor, fill_D: Tensor) -> Tensor:
    """Put the fill where the mask is True; no hidden value survives, nor does its gradient."""
    return torch.where(mask_BND, fill_D.to(x_BND.dtype), x_BND)
