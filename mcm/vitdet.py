"""ViTDet: a plain ViT with windows, a feature pyramid of its last map, and torchvision's R-CNN.

B batch, N objects, D width, C channels of the pyramid, S pixels of the canvas, h w its patches.
"""

from collections import OrderedDict
from typing import Any

import torch
from timm.layers import Attention, LayerNorm2d
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from cache_tools.errors import UsageError
from mcm.backbones import Backbone, PictureModel
from mcm.config import Detect
from mcm.jitter import Pair

RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors
POOLED = ("0", "1", "2", "3")  # the maps that regions are pooled from; the RPN reads all five
CONVS, HIDDEN = 4, 1024  # convolutions of the box and the mask head, and units of the box head
PROPOSALS = 1000  # per picture, in training and evaluation
# boxes [N, 4], labels [N], masks if any; detections have scores [N] and masks [N, 1, 28, 28]
Objects = dict[str, Tensor]


def windowed(vit: VisionTransformer, detect: Detect, drop_path: float) -> VisionTransformerSAM:
    """Return a ViT with windowed attention on a square canvas; its output is its last map.

    It reuses the modules of `vit`, so the names in the state dict stay the same. Relative positions
    start at zero. The absolute positions keep the grid of `vit`, and each forward resamples them to
    the canvas. The prefix tokens and the final norm are left out.

    Raises: UsageError if the canvas, the windows or the blocks do not fit `vit`.
    """
    _check(vit, detect)
    encoder = VisionTransformerSAM(
        img_size=detect.size,
        patch_size=vit.patch_embed.patch_size,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=vit.blocks[0].attn.num_heads,
        drop_path_rate=drop_path,
        use_rel_pos=detect.rel_pos,
        window_size=detect.window,
        global_attn_indexes=tuple(block - 1 for block in detect.global_blocks),
        # The neck and the head would be parameters without a gradient, which DDP refuses.
        neck_chans=0,
        head_hidden_size=1,
    )
    encoder.neck, encoder.head = nn.Identity(), nn.Identity()
    for block, plain in zip(encoder.blocks, vit.blocks, strict=True):
        for name in ("norm1", "ls1", "norm2", "mlp", "ls2"):
            setattr(block, name, getattr(plain, name))
        for name in ("qkv", "q_norm", "k_norm", "proj"):
            setattr(block.attn, name, getattr(plain.attn, name))
    encoder.patch_embed.proj, encoder.patch_embed.norm = vit.patch_embed.proj, vit.patch_embed.norm
    encoder.norm_pre = vit.norm_pre
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    positions_1ND = vit.pos_embed.detach()[:, prefix:]
    grid_1hwD = positions_1ND.reshape(1, *vit.patch_embed.grid_size, vit.embed_dim)
    encoder.pos_embed = nn.Parameter(grid_1hwD.clone())
    return encoder.requires_grad_(True)


def _check(vit: VisionTransformer, detect: Detect) -> None:
    patch, depth = vit.patch_embed.patch_size, len(vit.blocks)
    attention: Any = getattr(vit.blocks[0], "attn", None)
    plain = type(vit.blocks[0]) is Block and type(attention) is Attention
    plain = plain and attention.gate is None and isinstance(attention.norm, nn.Identity)
    if not plain or vit.pos_embed is None:
        kind = f"{type(vit.blocks[0]).__name__} with {type(attention).__name__}"
        expected = "expected a plain ViT with absolute positions and no gate or norm in attention"
        raise UsageError(f"detect: {expected}; found {kind}")
    if detect.size % (2 * patch[0]) or patch[0] != patch[1]:
        expected = f"expected a multiple of two patches of {patch[0]}x{patch[1]} pixels"
        raise UsageError(f"detect.size: {expected}; found {detect.size}")
    if detect.window > (grid := detect.size // patch[0]):
        expected = f"expected at most the {grid} patches of a side of the canvas"
        raise UsageError(f"detect.window: {expected}; found {detect.window}")
    if detect.window and not set(detect.global_blocks) <= set(range(1, depth + 1)):
        expected = f"expected blocks from 1 to {depth}, the depth of the encoder"
        raise UsageError(f"detect.global_blocks: {expected}; found {list(detect.global_blocks)}")


class Pyramid(nn.Module):
    """ViTDet's feature pyramid: maps of 4, 2, 1, 1/2 and 1/4 times the grid, of C channels."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.out_channels = channels  # torchvision reads it
        half, quarter = width // 2, width // 4
        up = nn.ConvTranspose2d
        scales: tuple[list[nn.Module], ...] = (
            [up(width, half, 2, 2), LayerNorm2d(half), nn.GELU(), up(half, quarter, 2, 2)],
            [up(width, half, 2, 2)],
            [],
            [nn.MaxPool2d(2)],
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(into, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, into in zip(scales, (quarter, half, width, width), strict=True)
        )

    def forward(self, x_BDhw: Tensor) -> OrderedDict[str, Tensor]:
        maps = [level(x_BDhw) for level in self.levels]
        maps.append(functional.max_pool2d(maps[-1], 1, 2))
        return OrderedDict((str(i), x) for i, x in enumerate(maps))


class Detector(PictureModel):
    """Mask R-CNN, or Faster R-CNN without masks, on a windowed ViT, with the heads of ViTDet.

    Class k of a DATASET is label k + 1 here, because torchvision's label 0 is the background.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, detect: Detect, drop_path: float = 0.0,
        seed: int = 0,
    ) -> None:  # fmt: skip
        """Take the modules of `backbone`; draw the weights of the pyramid and the heads."""
        super().__init__(backbone)
        self.encoder = windowed(backbone.model, detect, drop_path)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.pyramid = Pyramid(self.encoder.embed_dim, detect.channels)
            rcnn = _rcnn(self.pyramid, num_classes + 1, detect)
        self.rpn, self.roi_heads, self.has_masks = rcnn.rpn, rcnn.roi_heads, detect.masks
        patch = self.encoder.patch_embed.patch_size[0]
        pools = [self.roi_heads.box_roi_pool] + [self.roi_heads.mask_roi_pool] * detect.masks
        for pool in pools:  # torchvision guesses the scales from the pictures of the first batch
            pool.scales = [4 / patch, 2 / patch, 1 / patch, 0.5 / patch]
            pool.map_levels = initLevelMapper(2, 5)  # a box of 224 pixels, as in ImageNet: level 4
        for head in (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            if head is not None:  # boxes in bfloat16 would be off by pixels
                head.register_forward_hook(lambda module, args, out: _float32(out))

    def forward(
        self, pictures_BSS3: Tensor, extents: list[Pair], targets: list[Objects] | None = None
    ) -> Tensor | list[Objects]:
        """Return the sum of the losses in training, otherwise the detections in each picture.

        A target has float32 boxes [N, 4] (x0, y0, x1, y1), labels [N] from 1 and, with masks, masks
        [N, S, S]. Boxes are in pixels of the canvas and inside the extent.
        """
        x_B3SS = self.backbone.normalized(pictures_BSS3.permute(0, 3, 1, 2))
        maps = self.pyramid(self.encoder.forward_features(x_B3SS))
        proposals, rpn_losses = self.rpn(ImageList(x_B3SS, extents), maps, targets)
        detections, losses = self.roi_heads(maps, proposals, extents, targets)
        return torch.stack([*(rpn_losses | losses).values()]).sum() if self.training else detections


def _rcnn(pyramid: Pyramid, labels: int, detect: Detect) -> FasterRCNN:
    """Return torchvision's R-CNN with ViTDet's heads: LayerNorms and more convolutions."""
    channels = pyramid.out_channels
    box_head = FastRCNNConvFCHead((channels, 7, 7), [channels] * CONVS, [HIDDEN], LayerNorm2d)
    kwargs: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((size,) for size in detect.anchors), (RATIOS,) * len(detect.anchors)
        ),
        "rpn_head": RPNHead(channels, len(RATIOS), conv_depth=2),
        "rpn_post_nms_top_n_train": PROPOSALS,
        "box_batch_size_per_image": detect.regions,
        "rpn_post_nms_top_n_test": PROPOSALS,
        "box_roi_pool": MultiScaleRoIAlign(POOLED, 7, 2),
        "box_head": box_head,
        "box_predictor": FastRCNNPredictor(HIDDEN, labels),
    }
    if not detect.masks:
        return FasterRCNN(pyramid, **kwargs)
    return MaskRCNN(
        pyramid,
        mask_roi_pool=MultiScaleRoIAlign(POOLED, 14, 2),
        mask_head=MaskRCNNHeads(channels, [channels] * CONVS, 1, LayerNorm2d),
        mask_predictor=MaskRCNNPredictor(channels, channels, labels),
        **kwargs,
    )


def _float32(out: Any) -> Any:
    return out.float() if isinstance(out, Tensor) else type(out)(map(_float32, out))
