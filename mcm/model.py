"""The student of masked channel modeling: a timm ViT encoder, two fills and a small decoder.

`MaskedChannelModel.forward` has the steps of the method: mask, encode, fill again, decode.
B batch, N patches, D student width, C target channels, H W pixels, P values per patch, K pool rows.
A mask is boolean, and **True means hidden**. In the control modes `gaussian` and `pixels`, it is
float32 noise instead.
"""

from collections.abc import Sequence
from typing import cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cache_tools.errors import UsageError
from mcm.config import Decoder as DecoderConfig
from mcm.config import PretrainConfig, Student
from mcm.masking import apply_fill, mask_from_pool

MAX_DECODER_WIDTH = 768
DECODER_HEAD_WIDTH = 64

# pool_KD (boolean, or float32 noise) and integer picks_BN; in patch mode, pool_KN and picks_B1.
Masks = tuple[Tensor, Tensor]


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return fixed 2-D sin-cos positions [1, 1 + N, width], zero for CLS (MAE, util/pos_embed.py).

    The first half of the channels encodes the column, the second half the row. Each half holds
    sines, then cosines.
    """
    rows, columns = grid
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row_N = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    column_N = torch.arange(columns, dtype=torch.float64).repeat(rows)
    angles = [axis_N[:, None] * omega for axis_N in (column_N, row_N)]
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()[None]


def init_mae(module: nn.Module) -> None:
    """Initialize one module as MAE does: xavier for weights, zero for biases, 1 and 0 for norms."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def build_encoder(
    size_hw: tuple[int, int], patch: int, student: Student, seed: int = 0
) -> VisionTransformer:
    """Return the student's encoder, a ViT of timm, with weights drawn from the seed."""
    encoder = VisionTransformer(
        img_size=size_hw,
        patch_size=patch,
        embed_dim=student.width,
        depth=student.depth,
        num_heads=student.heads,
        mlp_ratio=student.mlp_ratio,
        drop_path_rate=student.drop_path,
        class_token=True,
        global_pool="token",
        num_classes=0,
        weight_init="skip",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        encoder.apply(init_mae)
        nn.init.normal_(encoder.cls_token, std=0.02)
        encoder.pos_embed.copy_(sincos_positions(student.width, encoder.patch_embed.grid_size))
    encoder.pos_embed.requires_grad_(False)
    return encoder


def unfold_patches(pictures_BHW3: Tensor, patch: int) -> Tensor:
    """Return the pixels of every patch [B, N, P = patch * patch * 3]: row, column, color."""
    B, H, W, _ = pictures_BHW3.shape
    x = pictures_BHW3.view(B, H // patch, patch, W // patch, patch, 3).transpose(2, 3)
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * 3)


def embed_pixels(
    projection: nn.Conv2d, pictures_BHW3: Tensor, mean: Sequence[float], std: Sequence[float],
    noise_BNP: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the patch embedding x_BND of uint8 pictures as one matrix product.

    The result equals that of `projection` on the normalized picture, up to rounding. The mean and
    the std of pixels in [0, 1] are folded into the weight and the bias; compiled code therefore
    stores no float picture. Pixels minus 128 are exact in bfloat16 and nearly centered, which keeps
    the rounding error small. `noise_BNP`, for pixels in [0, 1], is added to the picture.
    """
    pixels_BNP = unfold_patches(pictures_BHW3, projection.kernel_size[0]).float() - 128
    if noise_BNP is not None:
        pixels_BNP = pixels_BNP + 255 * noise_BNP
    # One weight [D, patch, patch] per color.
    weights = [projection.weight[:, c] / (255 * std[c]) for c in range(3)]
    assert projection.bias is not None
    bias_D = projection.bias
    for weight, center in zip(weights, mean, strict=True):
        bias_D = bias_D + weight.sum((1, 2)) * (128 - 255 * center)
    return F.linear(pixels_BNP, torch.stack(weights, -1).flatten(1), bias_D)


def encode_tokens(encoder: VisionTransformer, pictures_B3HW: Tensor) -> Tensor:
    """Return the tokens [B, prefix + N, D] of normalized pictures, after the final norm."""
    return run_blocks(encoder, encoder.patch_embed(pictures_B3HW))


def run_blocks(encoder: VisionTransformer, x_BND: Tensor, bf16_residual: bool = False) -> Tensor:
    """Add positions to patch embeddings and return the normalized tokens [B, prefix + N, D]."""
    x = residual_stream(encoder.norm_pre(encoder._pos_embed(x_BND)), bf16_residual)
    return cast(Tensor, encoder.norm(encoder.blocks(x)))


def residual_stream(x: Tensor, bf16: bool) -> Tensor:
    """Return `x` in bfloat16 if `bf16` is set and autocast uses it, and unchanged otherwise.

    The positions are float32. Without the cast, every norm and addition moves twice the bytes.
    """
    if not (bf16 and torch.is_autocast_enabled(x.device.type)):
        return x
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype) if dtype is torch.bfloat16 else x


class Decoder(nn.Module):
    """Adapter (if the widths differ), positions, blocks, norm, and a linear layer to the target."""

    def __init__(
        self, width: int, config: DecoderConfig, grid: tuple[int, int], out: int, cls: bool = False,
        bf16_residual: bool = False,
    ) -> None:  # fmt: skip
        """Build the decoder for tokens [B, 1 + N, width]. `cls` adds a head for CLS."""
        super().__init__()
        depth = config.depth
        inner = (config.width or min(MAX_DECODER_WIDTH, width)) if depth else width
        self.depth, self.bf16_residual = depth, bf16_residual
        self.adapter = nn.Linear(width, inner) if inner != width else nn.Identity()
        if depth:
            counts = range(max(1, inner // DECODER_HEAD_WIDTH), 0, -1)
            heads = next(count for count in counts if inner % count == 0)
            self.pos_embed = nn.Parameter(sincos_positions(inner, grid), requires_grad=False)
            self.blocks = nn.Sequential(*(Block(inner, heads, qkv_bias=True) for _ in range(depth)))
            self.norm = nn.LayerNorm(inner, eps=1e-6)
        self.linear = nn.Linear(inner, out)
        self.cls_linear = nn.Linear(inner, out) if cls else None

    def forward(self, h: Tensor) -> Tensor:
        """Return predictions [B, N, out] of tokens [B, 1 + N, width].

        With a CLS head, its prediction comes first: [B, 1 + N, out].
        """
        if self.depth:
            h = residual_stream(self.adapter(h) + self.pos_embed, self.bf16_residual)
            h = self.norm(self.blocks(h))
        y: Tensor = self.linear(h[:, 1:])
        return y if self.cls_linear is None else torch.cat([self.cls_linear(h[:, :1]), y], dim=1)


class MaskedChannelModel(nn.Module):
    """A student and a decoder that predict the target of every patch from masked pictures."""

    def __init__(
        self, config: PretrainConfig, grid: tuple[int, int], patch: int, channels: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:  # fmt: skip
        """Build the model for pictures of grid * patch pixels and a target of C channels.

        `mean` and `std` of pixels in [0, 1] normalize uint8 pictures. The model has only the
        parameters that the mask mode uses: DDP raises an error for a parameter without a gradient.

        Raises: UsageError if a ratio of patch mode does not fit the number of patches.
        """
        super().__init__()
        self.mode, self.ratio, self.hides = config.mask.mode, config.mask.ratio, config.mask.hides
        self.mean, self.std = tuple(mean), tuple(std)
        self.bf16_residual = config.train.residual == "bf16"
        width, num_patches = config.student.width, grid[0] * grid[1]
        if self.mode == "patch" and (problem := config.mask.problem(num_patches, "patches")):
            raise UsageError(problem)
        size_hw = (grid[0] * patch, grid[1] * patch)
        self.encoder = build_encoder(size_hw, patch, config.student, config.train.seed)
        out = channels if config.target.projection == "prediction" else width
        self.decoder = Decoder(
            width, config.decoder, grid, out, config.loss.cls, self.bf16_residual
        )
        first_fill = self.mode in ("channel", "patch")
        self.encoder_fill = nn.Parameter(torch.empty(width)) if first_fill else None
        second_fill = config.mask.second != "none" and self.hides
        self.decoder_fill = nn.Parameter(torch.empty(width)) if second_fill else None
        self.untied = config.mask.second == "untied"
        learned = config.target.projection == "learned"
        self.target_projection = nn.Linear(channels, width, bias=False) if learned else None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.train.seed + 1)  # the encoder uses `seed`
            self.decoder.apply(init_mae)
            for parameter in (self.encoder_fill, self.decoder_fill):
                if parameter is not None:
                    nn.init.normal_(parameter, std=0.02)
            if self.target_projection is not None:
                nn.init.orthogonal_(self.target_projection.weight)

    def mask(self, masks: Masks | None) -> Tensor | None:
        """Return mask_BND, or mask_BN1 in patch mode, of pool and picks; None for full inputs."""
        if masks is None or self.mode == "none":
            return None
        return mask_from_pool(*masks, patchwise=self.mode == "patch")

    def hide(self, x_BND: Tensor, mask: Tensor) -> Tensor:
        """Replace hidden values by the fill; in dropout mode, zero them and scale the others up.

        In gaussian mode, the mask is noise, and the values are multiplied by 1 + noise.
        """
        if self.mode == "gaussian":
            return x_BND * (1 + mask).to(x_BND.dtype)
        if self.encoder_fill is None:
            visible_share = 1.0 - mask.float().mean(-1, keepdim=True)
            return x_BND.masked_fill(mask, 0.0) / visible_share.to(x_BND.dtype)
        return apply_fill(x_BND, mask, self.encoder_fill)

    def tokens(self, pictures: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the encoder's CLS and patch tokens [B, 1 + N, D] of full or masked inputs.

        The pictures are uint8 [B, H, W, 3], as the cache stores them, or normalized [B, 3, H, W].
        """
        if pictures.dtype == torch.uint8:
            proj, noise = self.encoder.patch_embed.proj, mask if self.mode == "pixels" else None
            x_BND = embed_pixels(proj, pictures, self.mean, self.std, noise)
        else:
            x_BND = self.encoder.patch_embed(pictures)
        if mask is not None and self.mode != "pixels":  # before `run_blocks` adds positions
            x_BND = self.hide(x_BND, mask)
        return run_blocks(self.encoder, x_BND, self.bf16_residual)

    def decode(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Apply the second fill, so that no hidden value reaches the decoder; return y_BNC.

        An untied second fill uses the mask of the previous patch (of the last one for patch 0),
        which is independent of the mask of this patch.
        """
        if mask is not None and self.decoder_fill is not None:
            mask = mask.roll(1, dims=1) if self.untied else mask
            h = torch.cat([h[:, :1], apply_fill(h[:, 1:], mask, self.decoder_fill)], dim=1)
        return cast(Tensor, self.decoder(h))

    def project(self, target_BNC: Tensor) -> Tensor:
        """Return target_BND, float32, for target.projection = "learned"; else the target itself."""
        if self.target_projection is None:
            return target_BNC
        with torch.autocast(target_BNC.device.type, enabled=False):
            return cast(Tensor, self.target_projection(target_BNC))

    def forward(
        self, pictures: Tensor, masks: Masks | None = None, target_BNC: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return predictions y_BNC of the pictures, or y_BND if the target is projected to D.

        With loss.cls, the prediction of CLS comes first: [B, 1 + N, C]. With a target, return
        (y, projected target): DDP must see the learned projection inside `forward`.
        """
        mask = self.mask(masks)
        y = self.decode(self.tokens(pictures, mask), mask)
        return y if target_BNC is None else (y, self.project(target_BNC))


def folded_state(
    encoder: VisionTransformer, encoder_fill: Tensor | None, s: float
) -> dict[str, Tensor]:
    """Return a copy of the encoder's state with x~ = e + s (x - e) folded into the patch embedding.

    W' = sW and b' = sb + (1 - s)e. Without a fill (dropout mode), e is zero.
    """
    state = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
    state["patch_embed.proj.weight"] *= s
    state["patch_embed.proj.bias"] *= s
    if encoder_fill is not None:
        bias = state["patch_embed.proj.bias"]
        bias += (1.0 - s) * encoder_fill.detach().to(bias.device)
    return state
