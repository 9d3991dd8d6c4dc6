"""The target: teacher features decoded, normalised and projected on the device in float32.

B batch, N patches, D student width, C teacher channels, K chunks in the batch.
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
    """Return a fixed (semi-)orthogonal matrix [rows, columns] in float32, from a float64 QR with positive diagonal."""
    tall = max(rows, columns)
    normal = np.random.default_rng(seed).standard_normal((tall, min(rows, columns)))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(q if rows == tall else q.T.copy()).float()


class Targets(nn.Module):
    """Turns the cache's codes into the target; it has no trainable parameter."""

    mean_C: Tensor
    std_C: Tensor
    projection_CD: Tensor
    joint: Tensor | None

    def __init__(
        self,
        cfg: Target,
        channels: int,
        width: int,
        channel_stats: tuple[Stats, Stats] | None = None,
        seed: int = 0,
        joint: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """Hold what the target needs: the dataset's (mean_C, std_C) for norm "channel", the frozen matrix for
        "orthogonal", and for "joint" the teacher's own matrix from its C channels to the joint space.
        """
        super().__init__()
        self.cfg = cfg
        self.register_buffer("joint", None if joint is None else torch.from_numpy(joint))
        if cfg.norm == "channel":
            assert channel_stats is not None, 'target.norm = "channel" needs the statistics of the cache'
            mean, std = (torch.as_tensor(stat).float() for stat in channel_stats)
            self.register_buffer("mean_C", mean)
            self.register_buffer("std_C", std.clamp_min(NORM_EPS))
        if cfg.projection == "orthogonal":
            self.register_buffer("projection_CD", orthogonal_matrix(channels, width, seed))

    @torch.no_grad()
    def forward(
        self,
        codes: Tensor,
        scale: Tensor | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> Tensor:
        """Return target_BNC (target_BND if projected), float32, also under autocast.

        codes float16 alone, or int8 [B, N, C] with scale [B, N] and the chunks' mean and std [K, C] (K divides B).
        """
        with torch.autocast(codes.device.type, enabled=False):
            if scale is None or mean is None or std is None:
                target = codes.float()
            else:  # mean and std belong to the chunk: broadcast over its rows and patches
                codes, scale = (x.view(len(mean), -1, *x.shape[1:]) for x in (codes, scale))
                target = decode(codes, scale, mean[:, None, None], std[:, None, None], torch).flatten(0, 1)
            return self.normalise(target)

    @torch.no_grad()
    def normalise(self, target: Tensor) -> Tensor:
        """Normalise and project what is predicted [B, ..., C]: decoded features, the CLS token, or pixels."""
        with torch.autocast(target.device.type, enabled=False):
            target = target.float() if self.joint is None else target.float() @ self.joint
            if self.cfg.norm == "layer_norm":
                target = F.layer_norm(target, target.shape[-1:], eps=NORM_EPS)
            elif self.cfg.norm == "channel":
                target = (target - self.mean_C) / self.std_C
            return target @ self.projection_CD if self.cfg.projection == "orthogonal" else target
