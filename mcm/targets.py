"""The target: teacher features, decoded, normalized and projected on the device in float32.

B batch, N patches, D student width, C teacher channels, M chunks of the batch.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cache_tools.quantize import decode
from mcm.config import Target

NORM_EPS = 1e-6
Stats = npt.NDArray[np.float64]


def orthogonal_matrix(rows: int, columns: int, seed: int) -> Tensor:
    """Return a seeded (semi-)orthogonal float32 matrix [rows, columns].

    It comes from a float64 QR decomposition with a positive diagonal.
    """
    tall = max(rows, columns)
    normal = np.random.default_rng(seed).standard_normal((tall, min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q if rows == tall else q.T.copy()).float()


class Targets(nn.Module):
    """A module that converts codes of the cache to the target; it has no trainable parameter."""

    mean_C: Tensor
    std_C: Tensor
    projection_CD: Tensor
    joint: Tensor | None

    def __init__(
        self, config: Target, channels: int, width: int,
        channel_stats: tuple[Stats, Stats] | None = None, seed: int = 0,
        joint: npt.NDArray[np.float32] | None = None,
    ) -> None:  # fmt: skip
        """Store the constants of the target as buffers.

        `channel_stats`: (mean_C, std_C) of the units, for target.norm = "channel".
        `seed`: draws the frozen matrix, for target.projection = "orthogonal".
        `joint`: the teacher's matrix from C channels to its joint space, for features = "joint".
        """
        super().__init__()
        self.config = config
        self.register_buffer("joint", None if joint is None else torch.from_numpy(joint))
        if config.norm == "channel":
            assert channel_stats is not None, 'target.norm = "channel" needs channel_stats'
            mean, std = (torch.as_tensor(stat).float() for stat in channel_stats)
            self.register_buffer("mean_C", mean)
            self.register_buffer("std_C", std.clamp_min(NORM_EPS))
        if config.projection == "orthogonal":
            self.register_buffer("projection_CD", orthogonal_matrix(channels, width, seed))

    @torch.no_grad()
    def forward(
        self, codes: Tensor, scale: Tensor | None = None, mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return target_BNC (target_BND if projected) in float32, also under autocast.

        `codes` [B, N, C] are float16 or int8. int8 codes need `scale` [B, N], and `mean` and `std`
        [M, C] per chunk, where M divides B.
        """
        with torch.autocast(codes.device.type, enabled=False):
            if scale is None or mean is None or std is None:
                target = codes.float()
            else:  # each chunk has one mean and std, broadcast over its rows and patches
                codes, scale = (x.view(len(mean), -1, *x.shape[1:]) for x in (codes, scale))
                mean, std = mean[:, None, None], std[:, None, None]
                target = decode(codes, scale, mean, std, torch).flatten(0, 1)
            return self.normalize(target)

    @torch.no_grad()
    def normalize(self, target: Tensor) -> Tensor:
        """Normalize and project decoded features, CLS tokens or pixels [B, ..., C]."""
        with torch.autocast(target.device.type, enabled=False):
            target = target.float() if self.joint is None else target.float() @ self.joint
            if self.config.norm == "layer_norm":
                target = F.layer_norm(target, target.shape[-1:], eps=NORM_EPS)
            elif self.config.norm == "channel":
                target = (target - self.mean_C) / self.std_C
            return target @ self.projection_CD if self.config.projection == "orthogonal" else target
