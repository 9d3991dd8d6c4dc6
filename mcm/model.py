"""The student: a plain timm ViT whose embedding is masked and filled, and the small decoder behind a second fill.

B batch, N patches, D student width, W decoder width, C teacher channels, H W pixels, K pool rows.
A mask is boolean and **True means hidden**.
"""

from collections.abc import Callable
from typing import cast

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from cache_tools.errors import UsageError
from mcm.config import PretrainConfig, Student
from mcm.masking import apply_fill, hidden_channels, mask_from_pool

MAX_DECODER_WIDTH = 768
DECODER_HEAD_WIDTH = 64

Masks = tuple[Tensor, Tensor]  # pool_KD bool and picks_BN integer; in patch mode pool_KN and picks_B1
Hide = Callable[[Tensor], Tensor]


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


def encode_tokens(encoder: VisionTransformer, pictures_B3HW: Tensor, hide: Hide | None = None) -> Tensor:
    """Run any timm ViT and return its prefix and patch tokens after the final norm [B, prefix + N, D].

    `hide` changes the content of the patches before the positions are added (design: fill first, then positions).
    """
    x_BND = encoder.patch_embed(pictures_B3HW)
    if hide is not None:
        x_BND = hide(x_BND)
    x = encoder.norm_pre(encoder._pos_embed(x_BND))
    return cast(Tensor, encoder.norm(encoder.blocks(x)))


class Decoder(nn.Module):
    """Adapter where widths differ, positions, blocks, norm, and the linear layer to the target's channels."""

    def __init__(self, width: int, depth: int, grid: tuple[int, int], out: int, cls: bool = False) -> None:
        """Build it for tokens [B, 1 + N, width]; `depth` 0 is the linear layer alone, `cls` adds a head for CLS."""
        super().__init__()
        inner = min(MAX_DECODER_WIDTH, width) if depth else width
        self.depth = depth
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
            h = self.norm(self.blocks(self.adapter(h) + self.pos_embed))
        y: Tensor = self.linear(h[:, 1:])
        return y if self.cls_linear is None else torch.cat([self.cls_linear(h[:, :1]), y], dim=1)


class MaskedChannelModel(nn.Module):
    """Pictures and a mask in, a prediction of every patch's teacher features out."""

    def __init__(self, cfg: PretrainConfig, grid: tuple[int, int], patch: int, channels: int) -> None:
        """Build it for pictures of grid * patch pixels and C channels of the target.

        Only the parameters that the mode uses exist: DDP stops at one without a gradient.
        Raises UsageError where the ratio hides none or all of the patches.
        """
        super().__init__()
        self.mode, self.ratio = cfg.mask.mode, cfg.mask.ratio
        width, num_patches = cfg.student.width, grid[0] * grid[1]
        if self.mode == "patch" and not 0 < hidden_channels(num_patches, self.ratio) < num_patches:
            hidden = hidden_channels(num_patches, self.ratio)
            raise UsageError(f"mask.ratio = {self.ratio} hides {hidden} of {num_patches} patches; choose another ratio")
        self.encoder = build_encoder((grid[0] * patch, grid[1] * patch), patch, cfg.student, cfg.train.seed)
        out = channels if cfg.target.projection == "prediction" else width
        self.decoder = Decoder(width, cfg.decoder.depth, grid, out, cfg.loss.cls)
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

    def tokens(self, pictures_B3HW: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the encoder's CLS and patch tokens [B, 1 + N, D] of full or, with a mask, of masked inputs."""
        hide = None if mask is None else lambda x_BND: self.hide(x_BND, mask)
        return encode_tokens(self.encoder, pictures_B3HW, hide)

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
        self, pictures_B3HW: Tensor, masks: Masks | None = None, target_BNC: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return predictions y_BNC (y_BND where the target is projected to D) of normalised float pictures.

        With loss.cls that of CLS comes first, [B, 1 + N, C]. A target comes back beside them, projected if that is
        learned: here, as DDP looks for parameters only inside.
        """
        mask = self.mask(masks)
        y = self.decode(self.tokens(pictures_B3HW, mask), mask)
        return y if target_BNC is None else (y, self.project(target_BNC))


def folded_state(encoder: VisionTransformer, encoder_fill: Tensor | None, s: float) -> dict[str, Tensor]:
    """Return the encoder's state with x~ = e + s (x - e) folded into the patch embedding: W' = sW, b' = sb + (1 - s)e.

    Without a fill (the dropout control) e is zero. A copy: the encoder itself does not change.
    """
    state = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
    state["patch_embed.proj.weight"] *= s
    state["patch_embed.proj.bias"] *= s
    if encoder_fill is not None:
        state["patch_embed.proj.bias"] += (1.0 - s) * encoder_fill.detach()
    return state
