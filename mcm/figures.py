"""Every figure of the report: arrays in, an <img> that holds its own PNG out.

Letters: S samples, N patches, C channels, H W pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt
from matplotlib.figure import Figure

from cache_tools.preview import pca_colours

Array = npt.NDArray[Any]
Points = Sequence[tuple[int, float]]


def curves(series: Mapping[str, Points]) -> str:
    """An axis a name over the steps."""
    if not series:
        return "<p>no metrics yet</p>"
    columns = 3
    height = -(-len(series) // columns)
    figure = Figure(figsize=(12, 2.6 * height), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for axis, (name, points) in zip(axes, series.items(), strict=False):
        axis.plot(*zip(*points, strict=True), linewidth=1, marker="." if len(points) < 20 else None)
        axis.set(title=name, xlabel="step")
    for axis in axes[len(series) :]:
        axis.remove()
    return _image(figure)


def samples(tensors: Mapping[str, Array], grid: Sequence[int]) -> str:
    """Views [S, H, W, 3] beside the PCA colours of target and prediction [S, N, C], in one basis: the target's."""
    target = tensors["target"]
    rows = [pca_colours(tensors[name], target).reshape(len(target), *grid, 3) for name in ("target", "prediction")]
    figure = Figure(figsize=(1.4 * len(target), 4.4), layout="constrained")
    axes = figure.subplots(3, len(target), squeeze=False)
    for label, pictures, row in zip(("view", "target", "prediction"), (tensors["views"], *rows), axes, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(label)
    return _image(figure)


def _image(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
