"""Features as stored: float16, or codes of channel-standardised values. One arithmetic for numpy and torch (`xp`).

B rows, N tokens, C channels, G = C / 64 groups. int8: x = (code * scale_BN) * std_C + mean_C. int4: x = (code *
scale_BNG + low_BNG) * std_C + mean_C; a byte holds channel i of a group's first half in its low bits, of the second in
its high ones. Channels are standardised first, because CLIP has outlier channels, which would set the scale of all.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

FILL_INT8 = -128  # never emitted: codes lie in [-127, 127]
CALIBRATION_ROWS = 256
GROUP = 64  # channels that share a low and a scale in int4
Floats = npt.NDArray[np.float32]


def channel_stats(x_BNC: npt.NDArray[Any]) -> tuple[Floats, Floats]:
    """Mean and std of each channel, float32 [C]; the std of a constant channel is 1."""
    flat = x_BNC.reshape(-1, x_BNC.shape[-1])
    mean, std = flat.mean(axis=0, dtype=np.float64), flat.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 1e-6 * np.abs(mean) + 1e-12, std, 1.0).astype(np.float32)


def encode(dtype: str, x_BNC: Any, mean_C: Any, std_C: Any, xp: Any = np) -> dict[str, Any]:
    """The arrays of float32 features as `dtype` (float16, int8 or int4), by name; `xp` is numpy or torch."""
    if dtype == "float16":
        return {"patch": xp.asarray(x_BNC, dtype=xp.float16)}
    z_BNC = (x_BNC - mean_C) / std_C
    return _encode_int8(z_BNC, xp) if dtype == "int8" else _encode_int4(z_BNC, xp)


def _encode_int8(z_BNC: Any, xp: Any) -> dict[str, Any]:
    peak_BN = xp.amax(xp.abs(z_BNC), axis=-1)
    scale_BN = xp.where(peak_BN == 0, xp.ones_like(peak_BN), peak_BN / 127)  # a NaN stays one, for who refuses it
    codes_BNC = xp.round(z_BNC / scale_BN[..., None])
    return {"patch": xp.asarray(xp.clip(codes_BNC, -127, 127), dtype=xp.int8), "scale": scale_BN}


def _encode_int4(z_BNC: Any, xp: Any) -> dict[str, Any]:
    z_BNGK = z_BNC.reshape(*z_BNC.shape[:2], -1, GROUP)
    low_BNG = xp.asarray(xp.amin(z_BNGK, axis=-1), dtype=xp.float16)
    low = xp.asarray(low_BNG, dtype=xp.float32)[..., None]
    # Codes are made for the scale as it is stored, in float16; 0 where a group is constant, or nearly so.
    scale_BNG = xp.asarray((xp.amax(z_BNGK, axis=-1) - low[..., 0]) / 15, dtype=xp.float16)
    scale = xp.asarray(scale_BNG, dtype=xp.float32)[..., None]
    codes = xp.round((z_BNGK - low) / xp.where(scale > 0, scale, xp.ones_like(scale)))
    codes_BNGK = xp.asarray(xp.clip(codes, 0, 15), dtype=xp.uint8)
    packed = codes_BNGK[..., : GROUP // 2] | (codes_BNGK[..., GROUP // 2 :] << 4)
    return {"patch": packed.reshape(*z_BNC.shape[:2], -1), "low": low_BNG, "scale": scale_BNG}


def decode(codes: Any, scale: Any = None, mean: Any = None, std: Any = None, low: Any = None, xp: Any = np) -> Any:
    """float32 features [..., N, C] of stored arrays, numpy or torch; mean and std may be [C] or [B, 1, C].

    float16 alone; int8 with scale [..., N]; int4 (uint8 [..., N, C / 2]) with low and scale [..., N, G].
    """
    if scale is None:
        return xp.asarray(codes, dtype=xp.float32)
    if low is None:
        return (codes * scale[..., None]) * std + mean
    packed = codes.reshape(*scale.shape, GROUP // 2)
    codes = xp.asarray(xp.concatenate((packed & 15, packed >> 4), axis=-1), dtype=xp.float32)
    scale, low = (xp.asarray(part, dtype=xp.float32)[..., None] for part in (scale, low))
    return (codes * scale + low).reshape(*scale.shape[:-2], -1) * std + mean
