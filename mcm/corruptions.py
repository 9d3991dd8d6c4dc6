"""Corruptions of held-out pictures, which measure the robustness of features.

Every draw is a hash of (seed, kind, row, position), so a row has the same corruption in each run.
B batch, H W pixels.
"""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from simplejpeg import decode_jpeg, encode_jpeg
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from cache_tools.errors import UsageError
from cache_tools.records import nearest
from cache_tools.rng import normal, uniform

# The default strength of each kind, and its unit.
DEFAULTS = {
    "noise": 0.25,  # standard deviation of Gaussian noise, for pixels in [0, 1]
    "blur": 2.0,  # standard deviation of a Gaussian blur, in pixels
    "contrast": 0.5,  # factor around the mean of the picture
    "jpeg": 10,  # quality
    "patches": 0.25,  # share of black patches
}


class Corruption(NamedTuple):
    """One kind of corruption and its strength, such as `noise:0.25`."""

    kind: str
    strength: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the corruption KIND or KIND:STRENGTH.

        Raises: UsageError for an unknown kind or a strength that is not a positive number.
        """
        kind, colon, number = text.partition(":")
        if kind not in DEFAULTS:
            expected = f"expected {', '.join(DEFAULTS)}"
            raise UsageError(
                f"--corrupt {text}: {expected}; found {kind!r}{nearest(kind, DEFAULTS)}"
            )
        try:
            strength = float(number) if colon else DEFAULTS[kind]
        except ValueError:
            strength = -1.0
        limit = {"jpeg": 100.0, "patches": 1.0, "contrast": 1.0}.get(kind, 1000.0)
        if not 0 < strength <= limit:
            expected = f"expected KIND:STRENGTH with 0 < STRENGTH <= {limit:g}"
            raise UsageError(f"--corrupt {text}: {expected}; found {number!r}")
        return cls(kind, strength)

    def __str__(self) -> str:
        return f"{self.kind}:{self.strength:g}"

    def __call__(
        self, pictures_B3HW: Tensor, rows: npt.NDArray[np.int64], seed: int, patch: int
    ) -> Tensor:
        """Return corrupted copies of uint8 pictures; the side of a `patch` is in pixels."""
        x = pictures_B3HW.float() / 255
        if self.kind == "noise":
            place = np.arange(x[0].numel())[None]
            draws = torch.from_numpy(normal(seed, "noise", rows[:, None], place))
            x = x + self.strength * draws.view_as(x).to(x)
        elif self.kind == "blur":
            x = gaussian_blur(x, [2 * int(3 * self.strength) + 1] * 2, [self.strength] * 2)
        elif self.kind == "contrast":
            mean = x.mean((1, 2, 3), keepdim=True)
            x = mean + self.strength * (x - mean)
        elif self.kind == "jpeg":
            pictures_BHW3 = pictures_B3HW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            data = (encode_jpeg(rgb, quality=int(self.strength)) for rgb in pictures_BHW3)
            decoded_BHW3 = torch.from_numpy(np.stack([decode_jpeg(jpeg) for jpeg in data]))
            x = decoded_BHW3.permute(0, 3, 1, 2).to(x) / 255
        else:
            x = x * ~_black(seed, rows, x.shape[2:], patch, self.strength).to(x.device)
        return (255 * x.clamp(0, 1)).round().to(torch.uint8)


def _black(
    seed: int, rows: npt.NDArray[np.int64], size: torch.Size, patch: int, share: float
) -> Tensor:
    """Return a mask [B, 1, H, W], True in round(share * N) patches of each picture."""
    grid = [side // patch for side in size]
    draws = uniform(seed, "patches", rows[:, None], np.arange(grid[0] * grid[1])[None])
    black = draws.argsort(1).argsort(1) < round(share * draws.shape[1])
    mask = torch.from_numpy(black).view(-1, 1, *grid)
    return mask.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
