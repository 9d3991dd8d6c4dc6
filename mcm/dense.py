"""Dense prediction: the class of each pixel, and scores.

K classes, h w the grid, H W pixels.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cache_tools.errors import UsageError
from cache_tools.labels import IGNORED, Mask

PIXEL_LOGITS = 1 << 26  # the size of one computation


def most_probable(logits_Khw: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the most probable class [H, W] of logits [K, h, w], resized bilinearly to `size`.

    The pixels are computed in strips of bounded memory.
    """
    eyes = [torch.eye(cells, device=logits_Khw.device)[None] for cells in logits_Khw.shape[1:]]
    rows_Hh = functional.interpolate(eyes[0], size[0], mode="linear")[0].T
    columns_Ww = functional.interpolate(eyes[1], size[1], mode="linear")[0].T
    logits_KhW = logits_Khw @ columns_Ww.T
    strips = torch.split(rows_Hh, max(1, PIXEL_LOGITS // logits_KhW[:, 0].numel()))
    return torch.cat([torch.einsum("Hh,KhW->KHW", strip, logits_KhW).argmax(0) for strip in strips])


def confusion(mask_HW: Mask, predicted_HW: Tensor, num_classes: int) -> Tensor:
    """Return the pixel counts per (true, predicted) class, int64 [K, K], without ignored pixels."""
    truth_HW = torch.tensor(mask_HW, dtype=torch.int64, device=predicted_HW.device)
    pairs = (truth_HW * num_classes + predicted_HW)[truth_HW != IGNORED]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def confused(counts_KK: Tensor) -> Tensor:
    """Return the counts above 0 as lines (true class, predicted class, count), int64 [R, 3]."""
    sparse = counts_KK.to_sparse().coalesce()
    return torch.cat([sparse.indices(), sparse.values()[None]]).T.cpu().contiguous()


def scores(confusion_KK: Tensor) -> dict[str, Any]:
    """Return miou, mean_accuracy, pixel_accuracy and iou (one value per class, None if undefined).

    mean_accuracy omits classes without a true pixel. miou omits classes that occur neither in the
    truth nor in the prediction.

    Raises: UsageError if no pixel has a label.
    """
    if not confusion_KK.any():
        raise UsageError("expected labeled pixels in split 'val'; found only ignored ones")
    hits, truth = confusion_KK.diagonal().double(), confusion_KK.sum(1).double()
    predicted = confusion_KK.sum(0).double()
    iou, accuracy = hits / (truth + predicted - hits), hits / truth
    means = {"miou": iou.nanmean(), "mean_accuracy": accuracy.nanmean()}
    means["pixel_accuracy"] = hits.sum() / truth.sum()
    each = tuple(None if math.isnan(value) else value for value in iou.tolist())
    return {name: float(value) for name, value in means.items()} | {"iou": each}
