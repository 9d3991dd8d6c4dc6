"""Features as stored: float16, or int8 codes of channel-standardised values. One arithmetic for numpy and torch (`xp`).

B rows, N tokens, C channels. int8: x = (code * scale_BN) * std_C + mean_C. Channels are standardised first, because
CLIP has outlier channels, which would otherwise set the scale of every token.
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


def encode(dtype: str, x_BNC: Any, mean_C: Any, std_C: Any, xp: Any = np) -> dict[str, Any]:
    """The arrays of float32 features as `dtype` (float16 or int8), by name; `xp` is numpy or torch."""
    if dtype == "float16":
        return {"patch": xp.asarray(x_BNC, dtype=xp.float16)}
    z_BNC = (x_BNC - mean_C) / std_C
    peak_BN = xp.amax(xp.abs(z_BNC), axis=-1)
    scale_BN = xp.where(peak_BN == 0, xp.ones_like(peak_BN), peak_BN / 127)  # a NaN stays one, for who refuses it
    codes_BNC = xp.round(z_BNC / scale_BN[..., None])
    return {"patch": xp.asarray(xp.clip(codes_BNC, -127, 127), dtype=xp.int8), "scale": scale_BN}


def decode(codes: Any, scale: Any = None, mean: Any = None, std: Any = None, xp: Any = np) -> Any:
    """float32 features [..., N, C] of stored arrays, numpy or torch; mean and std may be [C] or [B, 1, C].

    float16 has the codes alone; int8 also has the scale [..., N], mean and std.
    """
    if scale is None:
        return xp.asarray(codes, dtype=xp.float32)
    return (codes * scale[..., None]) * std + mean
