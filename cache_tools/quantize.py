"""int8 features: codes a token against channel-standardised values. One arithmetic for numpy and torch.

B rows, N tokens, C channels. x = (code * scale_BN) * std_C + mean_C. Channels are standardised first, because CLIP has
outlier channels: with two of them, a scale a token alone loses 3.2e-3 of the ordinary channels' variance.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

FILL_INT8 = -128  # never emitted: codes lie in [-127, 127]
CALIBRATION_ROWS = 256
Floats = npt.NDArray[np.float32]


def channel_stats(x_BNC: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """Mean and std of each channel, float32 [C]; the std of a constant channel is 1."""
    flat = x_BNC.reshape(-1, x_BNC.shape[-1])
    mean, std = flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6 * np.abs(mean) + 1e-12, std, 1.0).astype(np.float32)


def encode_int8(x_BNC: Any, mean_C: Any, std_C: Any, xp: Any = np) -> tuple[Any, Any]:
    """Codes int8 [B, N, C] and scales float32 [B, N]; `xp` is numpy or torch."""
    z_BNC = (x_BNC - mean_C) / std_C
    peak_BN = xp.amax(xp.abs(z_BNC), axis=-1)
    scale_BN = xp.where(peak_BN > 0, peak_BN / 127, xp.ones_like(peak_BN))
    codes_BNC = xp.round(z_BNC / scale_BN[..., None])
    return xp.asarray(xp.clip(codes_BNC, -127, 127), dtype=xp.int8), scale_BN


def decode(codes_BNC: Any, scale_BN: Any, mean_C: Any, std_C: Any) -> Any:
    """float32 features of int8 codes, numpy or torch; mean and std may be [C] or [B, 1, C]."""
    return (codes_BNC * scale_BN[..., None]) * std_C + mean_C
