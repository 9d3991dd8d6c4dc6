"""Semantic segmentation: UPerNet or a linear head on a ViT, its loss, and sliding windows.

B batch, D width, C channels, K classes, h w the grid, S pixels of the crop, H W pixels.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.images import RGB, encode_view
from cache_tools.labels import IGNORED, encode_mask
from mcm.backbones import Backbone, PictureModel, freeze, pooled, recorded_backbone, set_drop_path
from mcm.config import FinetuneConfig, Segment
from mcm.dense import confused, confusion, most_probable, scores
from mcm.downstream import Classes, Metrics, Prediction, Predictor
from mcm.draw import draw_labels
from mcm.engine import device
from mcm.model import encode_tokens
from mcm.run_dir import recorded_config
from mcm.scenes import SceneSource, for_windows
from mcm.stream import Batch

# The loss weight, the width and the input map of the auxiliary head (an FCN).
AUXILIARY, AUXILIARY_CHANNELS, AUXILIARY_MAP = 0.4, 256, 2
POOLS = (1, 2, 3, 6)  # cells of a side, in UPerNet's pyramid pooling
DROPOUT, HEAD_STD = 0.1, 0.01  # before each classifier; the std of its new weights
WINDOWS, SHOWN = 8, 8  # windows per forward; held-out pictures in the report

resized = partial(functional.interpolate, mode="bilinear")


def _conv(into: int, out: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())


def _classifier(width: int, num_classes: int, first: nn.Module) -> nn.Sequential:
    linear = nn.Conv2d(width, num_classes, 1)
    nn.init.normal_(linear.weight, std=HEAD_STD)
    return nn.Sequential(first, linear)


class FourScales(nn.Module):
    """BEiT's maps of 4, 2, 1 and 1/2 times the grid, one from each of four blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        up = partial(nn.ConvTranspose2d, width, width, 2, 2)
        four = nn.Sequential(up(), nn.BatchNorm2d(width), nn.GELU(), up())
        self.scales = nn.ModuleList([four, up(), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


class UPerNet(nn.Module):
    """UPerNet: pyramid pooling of the coarsest of four maps, and a feature pyramid of all."""

    def __init__(self, width: int, channels: int, num_classes: int) -> None:
        super().__init__()
        C = channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), _conv(width, C, 1)) for cells in POOLS
        )
        self.bottleneck = _conv(width + len(POOLS) * C, C, 3)
        self.laterals = nn.ModuleList(_conv(width, C, 1) for _ in range(3))
        self.smooths = nn.ModuleList(_conv(C, C, 3) for _ in range(3))
        self.fuse = _conv(4 * C, C, 3)
        self.classifier = _classifier(C, num_classes, nn.Dropout2d(DROPOUT))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return logits [B, K, 4 h, 4 w] of four maps [B, D, ...] from fine to coarse."""
        *fine, x = maps
        pooled_maps = [resized(pool(x), x.shape[2:]) for pool in self.pools]
        levels = [self.bottleneck(torch.cat([x, *pooled_maps], 1))]
        for lateral, x in reversed(list(zip(self.laterals, fine, strict=True))):
            levels.insert(0, lateral(x) + resized(levels[0], x.shape[2:]))
        smooths = [*self.smooths, nn.Identity()]
        levels = [smooth(x) for smooth, x in zip(smooths, levels, strict=True)]
        first = levels[0].shape[2:]
        x = self.fuse(torch.cat([resized(x, first) for x in levels], 1))
        return cast(Tensor, self.classifier(x))


class Segmenter(PictureModel):
    """A ViT with a segmentation head. A `frozen` ViT stays in eval mode.

    Raises: UsageError if the crop or the blocks do not fit the ViT.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, segment: Segment, drop_path: float = 0.0,
        frozen: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        """Draw the weights of the head from `seed`."""
        super().__init__(backbone)
        vit, depth = backbone.model, len(backbone.model.blocks)
        if any(segment.crop % side for side in vit.patch_embed.patch_size):
            patch = "x".join(map(str, vit.patch_embed.patch_size))
            expected = f"expected a multiple of the patch of {patch} pixels"
            raise UsageError(f"segment.crop: {expected}; found {segment.crop}")
        vit.set_input_size(img_size=(segment.crop, segment.crop))  # resamples the positions
        vit.reset_classifier(0)
        set_drop_path(vit, drop_path)
        vit.requires_grad_(True)
        self.encoder, width = vit, vit.embed_dim
        self.indices = [block - 1 for block in segment.blocks]
        self.head: nn.Module
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if segment.head == "linear":
                self.scales = self.auxiliary = None
                self.head = _classifier(width, num_classes, nn.BatchNorm2d(width))
            else:
                if max(segment.blocks) > depth:
                    expected = f"expected blocks from 1 to {depth}, the depth of the encoder"
                    raise UsageError(f"segment.blocks: {expected}; found {list(segment.blocks)}")
                self.scales = FourScales(width)
                self.head = UPerNet(width, segment.channels, num_classes)
                dropout = nn.Dropout2d(DROPOUT)
                self.auxiliary = nn.Sequential(
                    _conv(width, AUXILIARY_CHANNELS, 3),
                    _classifier(AUXILIARY_CHANNELS, num_classes, dropout),
                )
                # UPerNet does not use these, and DDP refuses parameters without a gradient.
                for unused in (vit.norm, vit.fc_norm, vit.blocks[max(segment.blocks) :]):
                    unused.requires_grad_(False)
        if frozen:
            freeze(vit)
        if torch.cuda.is_available() and torch.distributed.is_initialized():
            nn.SyncBatchNorm.convert_sync_batchnorm(self)  # type: ignore[no-untyped-call]

    def forward(self, pictures_BSS3: Tensor) -> list[Tensor]:
        """Return logits [B, K, ...] of uint8 pictures; UPerNet's training adds the auxiliary's."""
        x_B3SS = self.backbone.normalized(pictures_BSS3.permute(0, 3, 1, 2))
        if self.scales is None or self.auxiliary is None:
            tokens_BND = pooled(self.encoder, encode_tokens(self.encoder, x_B3SS), "patch")
            grid = self.encoder.patch_embed.grid_size
            return [self.head(tokens_BND.mT.reshape(*tokens_BND.mT.shape[:2], *grid))]
        blocks = self.encoder.forward_intermediates(
            x_B3SS, indices=self.indices, stop_early=True, intermediates_only=True
        )
        maps = self.scales(blocks)
        auxiliary = [self.auxiliary(maps[AUXILIARY_MAP])] if self.training else []
        return [self.head(maps), *auxiliary]


def pixel_loss(logits_BKhw: Tensor, masks_BSS: Tensor) -> Tensor:
    """Return the mean cross-entropy over all pixels of bilinearly resized logits (mmsegmentation).

    The loss of an ignored pixel is 0, so the loss of a picture without labels is 0.
    """
    logits_BKSS = resized(logits_BKhw.float(), masks_BSS.shape[1:])
    loss = functional.cross_entropy(
        logits_BKSS, masks_BSS.long(), ignore_index=IGNORED, reduction="sum"
    )
    return loss / masks_BSS.numel()


def starts(length: int, crop: int, stride: int) -> list[int]:
    """Return the starts of windows that cover `length` pixels; the last window ends at `length`."""
    return [min(start, length - crop) for start in range(0, length - crop + stride, stride)]


@torch.inference_mode()
def slide(model: Segmenter, picture_HW3: Tensor, crop: int, stride: int) -> Tensor:
    """Return logits [K, H, W]: the mean over the windows of crop x crop that cover a pixel."""
    height, width = picture_HW3.shape[:2]
    corners = list(product(starts(height, crop, stride), starts(width, crop, stride)))
    sums_KHW, counts_HW = torch.zeros(()), picture_HW3.new_zeros((height, width))
    for first in range(0, len(corners), WINDOWS):
        places = [
            (slice(y, y + crop), slice(x, x + crop)) for y, x in corners[first : first + WINDOWS]
        ]
        logits_BKhw = model(torch.stack([picture_HW3[place] for place in places]))[0].float()
        if not first:
            sums_KHW = logits_BKhw.new_zeros((logits_BKhw.shape[1], height, width))
        for place, logits_KSS in zip(places, resized(logits_BKhw, (crop, crop)), strict=True):
            sums_KHW[:, *place] += logits_KSS
            counts_HW[place] += 1
    return sums_KHW / counts_HW


class Segmentation:
    """The task "segment" of fine-tuning, on a DATASET with masks.

    BatchNorm depends on the split of a batch over ranks and micro-batches, and so do the losses.

    Raises: UsageError if the crop or the blocks do not fit the encoder.
    """

    headline = "miou"

    def __init__(self, config: FinetuneConfig, dataset: Dataset, backbone: Backbone) -> None:
        segment, seed = config.segment, config.train.seed
        assert segment is not None  # the config checks it
        self.segment, self.num_classes = segment, len(dataset.classes)
        # UPerNet pools a picture to one cell, and the BatchNorm needs two values.
        self.group = 2 if segment.head == "upernet" else 1
        self.model = Segmenter(
            backbone, self.num_classes, segment, config.drop_path, config.frozen, seed
        )
        self.train = SceneSource(dataset, "train", segment, backbone.mean, seed, training=True)
        self.val = SceneSource(dataset, "val", segment, backbone.mean, seed, training=False)
        self.shown: dict[str, Tensor] = {}

    def loss(self, wrapped: nn.Module, batch: Batch) -> Tensor:
        """Return the loss over all pixels, and 0.4 of the auxiliary head's."""
        losses = [pixel_loss(logits, batch["masks"]) for logits in wrapped(batch["pictures"])]
        return losses[0] + AUXILIARY * losses[1] if len(losses) > 1 else losses[0]

    def evaluate(self, items: Iterable[Batch], accelerator: Accelerator) -> tuple[Metrics, Classes]:
        """Return mIoU, mean accuracy and pixel accuracy, and the IoU of each class.

        The confusion and the first pictures of this rank are kept in `shown`.
        """
        size, shown = (self.num_classes, self.num_classes), list[list[Tensor]]()
        total = torch.zeros(size, dtype=torch.int64, device=accelerator.device)
        for batch in items:
            scenes = zip(batch["pictures"], batch["masks"], batch["extents"], strict=True)
            for picture_HW3, mask_HW, (height, width) in scenes:
                pixels_HW3 = picture_HW3.to(accelerator.device)
                logits = slide(self.model, pixels_HW3, self.segment.crop, self.segment.stride)
                predicted_HW = most_probable(logits[:, :height, :width], tuple(mask_HW.shape))
                total += confusion(mask_HW.numpy(), predicted_HW, self.num_classes)
                if len(shown) < SHOWN:
                    labels = (mask_HW, predicted_HW.cpu())
                    shown.append([self._drawn(picture_HW3[:height, :width], x) for x in labels])
        columns = map(torch.stack, zip(*shown, strict=True))
        self.shown = dict(zip(("truth", "predicted"), columns, strict=bool(shown)))
        total = cast(Tensor, accelerator.reduce(total, "sum"))
        self.shown["confusion"] = confused(total)
        metrics = scores(total)
        return metrics, {"iou": list(metrics.pop("iou"))}

    @staticmethod
    def predictor(run: Path) -> Predictor:
        """Return a function that gives the masks of upright pictures."""
        record, backbone = recorded_backbone(run)
        segment, classes = recorded_config(FinetuneConfig, record.config).segment, record.classes
        assert segment is not None
        model = Segmenter(backbone, len(classes), segment).load_newest(run).to(device())
        color = [255 * value for value in backbone.mean]

        def segmented(rgb: RGB) -> Prediction:
            picture_HW3, (height, width) = for_windows(rgb, segment.crop, color)
            logits_KHW = slide(model, picture_HW3.to(device()), segment.crop, segment.stride)
            size = (rgb.shape[0], rgb.shape[1])
            labels_HW = most_probable(logits_KHW[:, :height, :width], size).byte().cpu().numpy()
            counts = np.bincount(labels_HW.ravel(), minlength=len(classes))
            named = zip(classes, (counts / labels_HW.size).tolist(), strict=True)
            overlay = draw_labels(rgb, labels_HW, len(classes))
            pictures = {"masks": encode_mask(labels_HW), "drawn": encode_view(overlay, "png")}
            return Prediction({"shares": {name: share for name, share in named if share}}, pictures)

        return lambda pictures: [segmented(rgb) for rgb in pictures]

    def _drawn(self, picture_HW3: Tensor, labels_HW: Tensor) -> Tensor:
        """Return the picture [S, S, 3], squashed to the crop, under the colors of its classes."""
        size = (self.segment.crop, self.segment.crop)
        images = (Image.fromarray(x.byte().numpy()) for x in (picture_HW3, labels_HW))
        rgb, labels = (np.asarray(x.resize(size, Image.Resampling.NEAREST)) for x in images)
        return torch.from_numpy(draw_labels(rgb, labels, self.num_classes))
