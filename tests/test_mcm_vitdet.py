"""ViTDet: its backbone is the plain ViT, its windows are alone, and its size is that of the paper."""

import pytest
import timm
import torch

from cache_tools.errors import UsageError
from mcm.backbones import Backbone
from mcm.config import Detect
from mcm.model import encode_tokens
from mcm.optim import param_groups
from mcm.vitdet import Detector, windowed

SMALL = {"size": 64, "window": 2, "global_blocks": (2,), "channels": 16, "anchors": (8, 16, 32, 64, 128)}


def vit(**changes):
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **args | changes).eval()


def detector(plain, detect, num_classes=3):
    return Detector(Backbone(plain, "", (32, 32), (0.5,) * 3, (0.2,) * 3, "bicubic", 1.0), num_classes, detect)


def tokens(model, x_B3HW):
    """The patch tokens before the final norm, as a map."""
    model.norm = model.fc_norm = torch.nn.Identity()
    return encode_tokens(model, x_B3HW).transpose(1, 2).unflatten(2, model.patch_embed.grid_size)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "more", [{}, {"pre_norm": True}, {"init_values": 0.3, "qk_norm": True}, {"no_embed_class": True}]
)
def test_without_windows_the_backbone_is_the_plain_vit(more):
    plain, x = vit(class_token=False, global_pool="avg", **more), noise(2, 3, 32, 32)
    with torch.no_grad():
        expected = tokens(plain, x)
        for rel_pos in (False, True):  # relative positions begin at zero
            found = windowed(plain, Detect(**SMALL | {"size": 32, "window": 0, "rel_pos": rel_pos}), 0.0)
            error = (found.eval().forward_features(x) - expected).abs().max()
            assert error == 0 if not rel_pos else error < 1e-5


def test_each_window_equals_the_window_alone():
    plain, x = vit(class_token=False, global_pool="avg"), noise(1, 3, 32, 32)
    torch.nn.init.zeros_(plain.pos_embed)  # a window alone would lie at another position
    with torch.no_grad():
        every = Detect(**SMALL | {"size": 32, "global_blocks": ()})
        found = windowed(plain, every, 0.0).eval().forward_features(x)
        alone = windowed(plain, Detect(**SMALL | {"size": 16, "window": 0}), 0.0).eval()
        for top in (0, 16):
            for left in (0, 16):
                part = alone.forward_features(x[..., top : top + 16, left : left + 16])
                patch = found[..., top // 8 : top // 8 + 2, left // 8 : left // 8 + 2]
                torch.testing.assert_close(patch, part, atol=1e-6, rtol=0)


def test_the_names_positions_and_prefix_of_the_plain_vit():
    plain = vit(reg_tokens=3)
    names, positions = set(plain.state_dict()), plain.pos_embed.detach().clone()
    encoder = windowed(plain, Detect(**SMALL), 0.2)
    own = {name for name in encoder.state_dict() if "rel_pos" not in name}
    assert names - own == {"cls_token", "reg_token", "norm.weight", "norm.bias"} and own <= names
    assert torch.equal(encoder.pos_embed.flatten(1, 2), positions[:, 4:])
    assert encoder.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_mask_rcnn_of_vit_b_has_110_9_million_parameters_and_its_maps_have_the_strides_of_the_paper():
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224", num_classes=0)
        model = detector(base, Detect(), 80)
        maps = model.pyramid(torch.empty(1, 768, 64, 64)).values()
    assert round(sum(x.numel() for x in model.parameters()) / 1e6, 1) == 110.9
    assert [1024 // x.shape[-1] for x in maps] == [4, 8, 16, 32, 64] and {x.shape[1] for x in maps} == {256}


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("counts", [(1, 0), (0, 0)])
def test_every_parameter_has_a_gradient_also_without_objects(masks, counts):
    detect = Detect(**SMALL, masks=masks)
    model = detector(vit(), detect)
    pictures = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    boxes, labels = torch.tensor([[4.0, 4, 40, 40]]), torch.tensor([2])
    objects = [{"boxes": boxes[:n], "labels": labels[:n], "masks": torch.ones(n, 64, 64)} for n in counts]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(pictures, [(64, 64), (40, 64)], objects)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    missing = [name for name, x in model.named_parameters() if x.grad is None]
    assert not missing
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first, second = model.eval()(pictures, [(64, 64), (40, 64)])
    assert first["boxes"].dtype == torch.float32 and second["boxes"][:, 3].max() <= 40
    assert (first.keys() >= {"masks"}) == masks


def test_the_layer_decay_reaches_the_encoder_and_not_the_heads():
    groups = param_groups(detector(vit(), Detect(**SMALL)), 0.1, 0.5)
    scales = {name: group["lr_scale"] for group in groups for name, _ in group["params"]}
    assert scales["encoder.pos_embed"] == scales["encoder.patch_embed.proj.weight"] == 0.125
    assert (scales["encoder.blocks.0.attn.rel_pos_h"], scales["encoder.blocks.1.norm1.weight"]) == (0.25, 0.5)
    assert {scale for name, scale in scales.items() if not name.startswith("encoder.")} == {1.0}


def test_the_first_batch_does_not_set_the_scale_of_the_regions():
    model = detector(vit(), Detect(**SMALL))
    assert model.roi_heads.box_roi_pool.scales == [1 / 2, 1 / 4, 1 / 8, 1 / 16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 72}, "detect.size: expected a multiple of two patches of 8x8 pixels; found 72"),
        ({"window": 9}, "detect.window: expected at most the 8 patches of a side of the canvas; found 9"),
        ({"global_blocks": (2, 3)}, r"detect.global_blocks: expected blocks from 1 to 2, .*; found \[2, 3\]"),
    ],
)
def test_a_canvas_windows_and_blocks_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        windowed(vit(), Detect(**SMALL | changes), 0.0)


@pytest.mark.parametrize(
    "more",
    [{"block_fn": timm.models.vision_transformer.ResPostBlock}, {"scale_attn_norm": True}, {"pos_embed": "none"}],
)
def test_another_kind_of_vit_is_refused(more):
    with pytest.raises(UsageError, match="expected a plain ViT with absolute positions"):
        windowed(vit(**more), Detect(**SMALL), 0.0)
