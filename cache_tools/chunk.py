"""A chunk of a CACHE in memory: 16 rows of one unit, with encoded pictures and stored features.

B rows, N tokens, C channels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .images import RGB, decode_view_into
from .quantize import decode


@dataclass(frozen=True)
class Chunk:
    """16 rows (fewer at the end of a split), after every checksum agreed. Pictures are encoded.

    labels int32 [B], codes int8 or float16 [B, N, C], scale float32 [B, N], mean and std float32
    [C], cls float16 [B, C]. `scale`, `mean` and `std` are None unless the dtype is int8, and `cls`
    is None if the teacher has no CLS token. `size_HW` is the size of every picture.
    """

    row0: int
    size_HW: tuple[int, int]
    pictures: list[memoryview]
    labels: npt.NDArray[np.int32]
    codes: npt.NDArray[Any]
    scale: npt.NDArray[Any] | None
    mean: npt.NDArray[np.float32] | None
    std: npt.NDArray[np.float32] | None
    cls: npt.NDArray[np.float16] | None

    @property
    def rows(self) -> int:
        """Number of rows in this chunk."""
        return len(self.labels)

    def features(self) -> npt.NDArray[np.float32]:
        """Return the decoded patch features, float32 [B, N, C]."""
        features: npt.NDArray[np.float32] = decode(self.codes, self.scale, self.mean, self.std)
        return features

    def images(self) -> RGB:
        """Return the decoded pictures, uint8 [B, H, W, 3]."""
        images_BHW3 = np.empty((self.rows, *self.size_HW, 3), np.uint8)
        for data, image_HW3 in zip(self.pictures, images_BHW3, strict=True):
            decode_view_into(data, image_HW3)
        return images_BHW3
