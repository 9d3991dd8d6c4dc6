"""The student: a plain timm ViT whose embedding is masked and filled, and the small decoder behind a second fill.

B batch, N patches, D student width, W decoder width, C teacher channels, H W pixels, P values per patch, K pool rows.
A mask is boolean and **True means hidden**.
"""

from collections.abc import Sequence
from typing import cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cache_tools.errors import UsageError
from mcm.config import PretrainConfig, Student
from mcm.masking import apply_fill, hidden_channels, mask_from_pool

MAX_DECODER_WIDTH = 768
DECODER_HEAD_WIDTH = 64

Masks = tuple[Tensor, Tensor]  # pool_KD bool and picks_BN integer; in patch mode pool_KN and picks_B1


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Return fixed 2-D sin-cos positions [1, 1 + N, width] of entries up to 1, zero for CLS (MAE, util/pos_embed.py).

    The first half of the channels encodes the column, the second the row, each as sines then cosines.
    """
    height, columns = grid
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row = torch.arange(height, dtype=torch.float64).repeat_interleave(columns)
    column = torch.arange(columns, dtype=torch.float64).repeat(height)
    angles = [axis[:, None] * omega for axis in (column, row)]
    patches = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()[None]


def init_mae(module: nn.Module) -> None:
    """Initialise one module as MAE does: xavier for linear layers and the patch projection, zero biases, norms 1/0."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def build_encoder(size_hw: tuple[int, int], patch: int, student: Student, seed: int = 0) -> VisionTransformer:
    """Return the student's encoder, the same weights for the same seed; timm alone can build and load it again."""
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
    """Return the pixels of every patch [B, N, P = patch * patch * 3], in the order (row, column, colour)."""
    B, H, W, _ = pictures_BHW3.shape
    x = pictures_BHW3.view(B, H // patch, patch, W // patch, patch, 3).transpose(2, 3)
    return x.reshape(B, (H // patch) * (W // patch), patch * patch * 3)


def embed_pixels(projection: nn.Conv2d, pictures_BHW3: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return the patch embedding x_BND of uint8 pictures as one matrix product.

    The result is that of `projection` on the normalised picture, to rounding. The mean and the std, of pixels in
    [0, 1], are folded into the weight and the bias, so that no float picture is stored. Pixels minus 128 are exact in
    bfloat16 and nearly centred, so that the folded mean does not enlarge the rounding error.
    """
    pixels_BNP = unfold_patches(pictures_BHW3, projection.kernel_size[0]).float() - 128
    weights = [projection.weight[:, c] / (255 * std[c]) for c in range(3)]  # [D, patch, patch] per colour
    assert projection.bias is not None
    bias_D = projection.bias
    for weight, centre in zip(weights, mean, strict=True):
        bias_D = bias_D + weight.sum((1, 2)) * (128 - 255 * centre)
    return F.linear(pixels_BNP, torch.stack(weights, -1).flatten(1), bias_D)


def encode_tokens(encoder: VisionTransformer, pictures_B3HW: Tensor) -> Tensor:
    """Run any timm ViT on normalised pictures; return its tokens after the final norm [B, prefix + N, D]."""
    return run_blocks(encoder, encoder.patch_embed(pictures_B3HW))


def run_blocks(encoder: VisionTransformer, x_BND: Tensor, bf16_residual: bool = False) -> Tensor:
    """Return the tokens [B, prefix + N, D] after the final norm of patch embeddings, to which positions are added."""
    x = residual_stream(encoder.norm_pre(encoder._pos_embed(x_BND)), bf16_residual)
    return cast(Tensor, encoder.norm(encoder.blocks(x)))


def residual_stream(x: Tensor, bf16: bool) -> Tensor:
    """Return `x` as the blocks carry it: in bfloat16 if asked for and under autocast, else as it is.

    The positions are float32, so that without the cast every norm and every addition moves twice the bytes.
    """
    return x.to(torch.bfloat16) if bf16 and torch.is_autocast_enabled(x.device.type) else x


class Decoder(nn.Module):
    """Adapter where widths differ, positions, blocks, norm, and the linear layer to the target's channels."""

    def __init__(
        self, width: int, depth: int, grid: tuple[int, int], out: int, cls: bool = False,
        bf16_residual: bool = False,
    ) -> None:  # fmt: skip
        """Build it for tokens [B, 1 + N, width]; `depth` 0 is the linear layer alone, `cls` adds a head for CLS."""
        super().__init__()
        inner = min(MAX_DECODER_WIDTH, width) if depth else width
        self.depth, self.bf16_residual = depth, bf16_residual
        self.adapter = nn.Linear(width, inner) if inner != width else nn.Identity()
        if depth:
            most_heads = max(1, inner // DECODER_HEAD_WIDTH)
            heads = next(count for count in range(most_heads, 0, -1) if inner % count == 0)
            self.pos_embed = nn.Parameter(sincos_positions(inner, grid), requires_grad=False)
            self.blocks = nn.Sequential(*(Block(inner, heads, qkv_bias=True) for _ in range(depth)))
            self.norm = nn.LayerNorm(inner, eps=1e-6)
        self.linear = nn.Linear(inner, out)
        self.cls_linear = nn.Linear(inner, out) if cls else None

    def forward(self, h: Tensor) -> Tensor:
        """Return predictions [B, N, out] of tokens [B, 1 + N, width], before them that of CLS where there is a head."""
        if self.depth:
            h = residual_stream(self.adapter(h) + self.pos_embed, self.bf16_residual)
            h = self.norm(self.blocks(h))
        y: Tensor = self.linear(h[:, 1:])
        return y if self.cls_linear is None else torch.cat([self.cls_linear(h[:, :1]), y], dim=1)


class MaskedChannelModel(nn.Module):
    """Pictures and a mask in, a prediction of every patch's teacher features out."""

    def __init__(
        self, cfg: PretrainConfig, grid: tuple[int, int], patch: int, channels: int,
        mean: Sequence[float] = (0.0, 0.0, 0.0), std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:  # fmt: skip
        """Build it for pictures of grid * patch pixels and C channels of the target.

        `mean` and `std`, of pixels in [0, 1], normalise uint8 pictures.
        Only the parameters that the mode uses exist: DDP stops at one without a gradient.
        Raises UsageError where the ratio hides none or all of the patches.
        """
        super().__init__()
        self.mode, self.ratio, self.mean, self.std = cfg.mask.mode, cfg.mask.ratio, tuple(mean), tuple(std)
        self.bf16_residual = cfg.train.residual == "bf16"
        width, num_patches = cfg.student.width, grid[0] * grid[1]
        if self.mode == "patch" and not 0 < hidden_channels(num_patches, self.ratio) < num_patches:
            hidden = hidden_channels(num_patches, self.ratio)
            raise UsageError(f"mask.ratio = {self.ratio} hides {hidden} of {num_patches} patches; choose another ratio")
        self.encoder = build_encoder((grid[0] * patch, grid[1] * patch), patch, cfg.student, cfg.train.seed)
        out = channels if cfg.target.projection == "prediction" else width
        self.decoder = Decoder(width, cfg.decoder.depth, grid, out, cfg.loss.cls, self.bf16_residual)
        fill = width if cfg.mask.fill == "vector" else 1
        self.encoder_fill = nn.Parameter(torch.empty(fill)) if self.mode in ("channel", "patch") else None
        second_fill = cfg.mask.second_fill and self.mode != "none"
        self.decoder_fill = nn.Parameter(torch.empty(fill)) if second_fill else None
        learned = cfg.target.projection == "learned"
        self.target_projection = nn.Linear(channels, width, bias=False) if learned else None
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(cfg.train.seed + 1)  # the encoder has used the seed itself
            self.decoder.apply(init_mae)
            for parameter in (self.encoder_fill, self.decoder_fill):
                if parameter is not None:
                    nn.init.normal_(parameter, std=0.02)
            if self.target_projection is not None:
                nn.init.orthogonal_(self.target_projection.weight)

    def mask(self, masks: Masks | None) -> Tensor | None:
        """Return mask_BND (in patch mode mask_BN1) of a pool and its picks, or None for full inputs."""
        if masks is None or self.mode == "none":
            return None
        return mask_from_pool(*masks, patchwise=self.mode == "patch")

    def hide(self, x_BND: Tensor, mask: Tensor) -> Tensor:
        """Hide content: the encoder fill, or for the dropout control zeros and the kept values scaled up."""
        if self.encoder_fill is None:
            return x_BND.masked_fill(mask, 0.0) / (1.0 - mask.float().mean(-1, keepdim=True)).to(x_BND.dtype)
        return apply_fill(x_BND, mask, self.encoder_fill)

    def tokens(self, pictures: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the encoder's CLS and patch tokens [B, 1 + N, D] of full or, with a mask, of masked inputs.

        The pictures are uint8 [B, H, W, 3], as the cache stores them, or normalised [B, 3, H, W].
        """
        if pictures.dtype == torch.uint8:
            x_BND = embed_pixels(self.encoder.patch_embed.proj, pictures, self.mean, self.std)
        else:
            x_BND = self.encoder.patch_embed(pictures)
        if mask is not None:  # the fill comes before the positions, so that every patch keeps its own
            x_BND = self.hide(x_BND, mask)
        return run_blocks(self.encoder, x_BND, self.bf16_residual)

    def decode(self, h: Tensor, mask: Tensor | None) -> Tensor:
        """Return y_BNC of tokens [B, 1 + N, D]; the second fill keeps every hidden value from the decoder."""
        if mask is not None and self.decoder_fill is not None:
            h = torch.cat([h[:, :1], apply_fill(h[:, 1:], mask, self.decoder_fill)], dim=1)
        return cast(Tensor, self.decoder(h))

    def project(self, target_BNC: Tensor) -> Tensor:
        """Return target_BND of target.projection = "learned" in float32; any other target as it is."""
        if self.target_projection is None:
            return target_BNC
        with torch.autocast(target_BNC.device.type, enabled=False):
            return cast(Tensor, self.target_projection(target_BNC))

    def forward(
        self, pictures: Tensor, masks: Masks | None = None, target_BNC: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return predictions y_BNC (y_BND where the target is projected to D) of pictures as `tokens` takes them.

        With loss.cls that of CLS comes first, [B, 1 + N, C]. A target comes back beside them, projected if that is
        learned: here, as DDP looks for parameters only inside.
        """
        mask = self.mask(masks)
        y = self.decode(self.tokens(pictures, mask), mask)
        return y if target_BNC is None else (y, self.project(target_BNC))


def folded_state(encoder: VisionTransformer, encoder_fill: Tensor | None, s: float) -> dict[str, Tensor]:
    """Return the encoder's state with x~ = e + s (x - e) folded into the patch embedding: W' = sW, b' = sb + (1 - s)e.

    Without a fill (the dropout control) e is zero. A copy: the encoder itself does not change.
    """
    state = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
    state["patch_embed.proj.weight"] *= s
    state["patch_embed.proj.bias"] *= s
    if encoder_fill is not None:
        bias = state["patch_embed.proj.bias"]
        bias += (1.0 - s) * encoder_fill.detach().to(bias.device)
    return state
