"""Quantization of stored features: float16, or int8 codes of standardized channels.

B rows, N tokens, C channels. int8: x = (code * scale_BN) * std_C + mean_C. Channels are
standardized first: otherwise the outlier channels of CLIP would set the scale of every token.
The argument `xp` is the array library: numpy or torch.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

FILL_INT8 = -128  # never a code: codes lie in [-127, 127]
CALIBRATION_ROWS = 256
Floats = npt.NDArray[np.float32]


def channel_stats(x_BNC: Any, xp: Any = np) -> tuple[Any, Any]:
    """Return the mean and std per channel, float32 [C]; the std of a constant channel is 1."""
    flat = x_BNC.reshape(-1, x_BNC.shape[-1])
    mean = xp.mean(flat, axis=0, dtype=xp.float64)
    std = xp.sqrt(xp.mean((flat - mean) ** 2, axis=0))
    std = xp.where(std > 1e-6 * xp.abs(mean) + 1e-12, std, xp.ones_like(std))
    return xp.asarray(mean, dtype=xp.float32), xp.asarray(std, dtype=xp.float32)


def encode(dtype: str, x_BNC: Any, mean_C: Any, std_C: Any, xp: Any = np) -> dict[str, Any]:
    """Encode float32 features [B, N, C] as `dtype`; return the arrays to store, by name.

    float16 gives `patch` [B, N, C]; int8 gives `patch` and `scale` [B, N].
    """
    if dtype == "float16":
        return {"patch": xp.asarray(x_BNC, dtype=xp.float16)}
    z_BNC = (x_BNC - mean_C) / std_C
    peak_BN = xp.amax(xp.abs(z_BNC), axis=-1)
    scale_BN = xp.where(peak_BN == 0, xp.ones_like(peak_BN), peak_BN / 127)  # a NaN stays NaN
    codes_BNC = xp.round(z_BNC / scale_BN[..., None])
    return {"patch": xp.asarray(xp.clip(codes_BNC, -127, 127), dtype=xp.int8), "scale": scale_BN}


def decode(codes: Any, scale: Any = None, mean: Any = None, std: Any = None, xp: Any = np) -> Any:
    """Return float32 features [..., N, C] from the stored arrays.

    float16 needs only `codes`. int8 also needs `scale` [..., N], and `mean` and `std` as [C] or
    [B, 1, C].
    """
    if scale is None:
        return xp.asarray(codes, dtype=xp.float32)
    return (codes * scale[..., None]) * std + mean
