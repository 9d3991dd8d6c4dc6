"""The maths of the method: what the encoder sees, what reaches the decoder, and what does not."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

from cache_tools.errors import UsageError
from mcm.config import Decoder, Loss, Mask, Optim, PretrainConfig, Schedule, Student, Target, Train
from mcm.masking import mask_picks, mask_pool, noise_pool
from mcm.model import (
    MaskedChannelModel,
    build_encoder,
    embed_pixels,
    encode_tokens,
    folded_state,
    run_blocks,
    sincos_positions,
    unfold_patches,
)
from mcm.objective import loss_fn

GRID, PATCH, WIDTH, CHANNELS, BATCH = (2, 3), 8, 32, 24, 4
MODES = ("channel", "dropout", "patch", "none")


def config(mode="channel", ratio=0.75, second="tied", depth=2, projection="prediction", student=None, seed=0, **train):
    return PretrainConfig(
        student=student or Student(width=WIDTH, depth=2, heads=4),
        decoder=Decoder(depth=depth),
        mask=Mask(mode=mode, ratio=ratio, second=second, pool=64),
        target=Target(projection=projection),
        optim=Optim(lr=1e-3),
        schedule=Schedule(epochs=2),
        train=Train(seed=seed, global_batch=16, micro_batch=16, **train),
    )


def model_of(**options):
    return MaskedChannelModel(config(**options), GRID, PATCH, CHANNELS)


def masks_of(model, rows=None):
    rows = np.arange(BATCH) if rows is None else rows
    patchwise, num_patches = model.mode == "patch", GRID[0] * GRID[1]
    pool = mask_pool(0, 0, 64, num_patches if patchwise else WIDTH, model.ratio)
    picks = mask_picks(0, 0, rows, 1 if patchwise else num_patches, 64)
    return torch.from_numpy(pool), torch.from_numpy(picks)


def pictures(seed=1):
    return torch.randn(BATCH, 3, GRID[0] * PATCH, GRID[1] * PATCH, generator=torch.Generator().manual_seed(seed))


def first_block_input(model, masks):
    seen = []
    handle = model.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(pictures(), masks)
    handle.remove()
    return seen[0]


def test_dropout_scales_each_token_by_what_it_keeps():
    model = model_of(mode="dropout", ratio=0.75)
    x_BND, mask = torch.ones(1, 3, WIDTH), torch.zeros(1, 3, WIDTH, dtype=torch.bool)
    mask[0, 0, : WIDTH // 2], mask[0, 1, :8] = True, True
    kept = model.hide(x_BND, mask).sum(-1)
    torch.testing.assert_close(kept, torch.full((1, 3), float(WIDTH)))  # a whole token stays as it is


def test_cls_has_a_head_of_its_own_and_a_gradient():
    cfg = config().model_copy(update={"loss": Loss(cls=True)})
    model = MaskedChannelModel(cfg, GRID, PATCH, CHANNELS)
    y = model(pictures(), masks_of(model))
    assert y.shape == (BATCH, 1 + GRID[0] * GRID[1], CHANNELS)
    y[:, 0].sum().backward()
    assert model.decoder.cls_linear.weight.grad.any() and not model.decoder.linear.weight.grad.any()


def test_a_learned_projection_is_trained_by_the_target_that_comes_back():
    model = model_of(projection="learned")
    target = torch.randn(BATCH, GRID[0] * GRID[1], CHANNELS, generator=torch.Generator().manual_seed(2))
    y, z = model(pictures(), masks_of(model), target)
    assert y.shape == z.shape == (BATCH, GRID[0] * GRID[1], WIDTH)
    torch.testing.assert_close(z.norm(dim=-1), target.norm(dim=-1))  # it begins orthogonal
    loss_fn(y, z).backward()
    assert model.target_projection.weight.grad.any()


def test_positions_are_those_of_mae():
    rows, columns, width = 3, 5, 16
    expected = np.zeros((1 + rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for half, place in enumerate((column, row)):  # MAE's meshgrid puts the column first
                for k in range(width // 4):
                    angle = place / 10000 ** (k / (width / 4))
                    start = half * width // 2 + k
                    expected[1 + row * columns + column, start] = np.sin(angle)
                    expected[1 + row * columns + column, start + width // 4] = np.cos(angle)
    np.testing.assert_allclose(sincos_positions(width, (rows, columns))[0], expected, atol=1e-7)


def test_encoder_is_a_plain_timm_vit_with_the_initialization_of_mae():
    encoder = build_encoder((16, 24), PATCH, Student(width=WIDTH, depth=2, heads=4), seed=5)
    plain = VisionTransformer(
        img_size=(16, 24), patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=4, num_classes=0, global_pool="token"
    )
    plain.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(plain.eval()(pictures()), encoder.eval()(pictures()))
    torch.testing.assert_close(encode_tokens(encoder, pictures()), encoder.forward_features(pictures()))
    assert not encoder.pos_embed.requires_grad and not encoder.pos_embed[0, 0].any()
    weight = encoder.patch_embed.proj.weight
    bound = (6 / (3 * PATCH * PATCH + WIDTH)) ** 0.5  # as of a linear layer, not of a convolution
    assert 0.97 * bound < weight.abs().max() <= bound
    assert all(not p.any() for n, p in encoder.named_parameters() if n.endswith("bias"))
    assert 0.01 < encoder.cls_token.std() < 0.03
    assert encoder.norm.eps == encoder.blocks[0].norm1.eps == 1e-6


def test_seed_decides_every_weight_and_touches_no_global_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = model_of(seed=3), model_of(seed=3), model_of(seed=4)
    torch.random.set_rng_state(before)
    one, two = first.state_dict(), second.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    for name in ("encoder.blocks.0.attn.qkv.weight", "decoder.linear.weight", "encoder_fill"):
        assert not torch.equal(one[name], other.state_dict()[name]), name
    assert not torch.equal(one["encoder_fill"], one["decoder_fill"])
    assert not torch.equal(one["encoder.blocks.0.mlp.fc1.weight"], one["decoder.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_first_block_sees_the_filled_content_plus_positions_and_an_unmasked_cls(mode):
    model = model_of(mode=mode)
    masks = None if mode == "none" else masks_of(model)
    x_BND = model.encoder.patch_embed(pictures()).detach()
    if mode == "dropout":
        mask_BND = masks[0][masks[1].long()]
        x_BND = torch.where(mask_BND, 0.0, x_BND / (1 - model.ratio))
    elif mode != "none":
        mask_BND = masks[0][masks[1].long()] if mode == "channel" else masks[0][masks[1][:, 0].long()][:, :, None]
        x_BND = torch.where(mask_BND, model.encoder_fill, x_BND)
    seen = first_block_input(model, masks)
    torch.testing.assert_close(seen[:, 1:], (x_BND + model.encoder.pos_embed[:, 1:]).detach())
    torch.testing.assert_close(seen[:, :1], model.encoder.cls_token.detach().expand(BATCH, -1, -1))


def test_noise_controls_scale_the_embedding_or_change_the_picture():
    draw = np.random.default_rng(0)
    views = torch.from_numpy(draw.integers(0, 256, (BATCH, GRID[0] * PATCH, GRID[1] * PATCH, 3), np.uint8))
    gaussian, pixels, plain = (model_of(mode=mode, ratio=0.5) for mode in ("gaussian", "pixels", "none"))
    assert not gaussian.hides and gaussian.decoder_fill is None is pixels.encoder_fill
    picks, noise = torch.arange(6).repeat(BATCH, 1), torch.randn(6, 3 * PATCH**2)
    factor = noise[:, :WIDTH]
    x_BND = embed_pixels(plain.encoder.patch_embed.proj, views, plain.mean, plain.std).detach()
    seen = gaussian.hide(x_BND, gaussian.mask((factor, picks)))
    torch.testing.assert_close(seen, x_BND * (1 + factor))
    patches = unfold_patches(views, PATCH).float() / 255 + noise
    weight = torch.stack([plain.encoder.patch_embed.proj.weight[:, c] for c in range(3)], -1).flatten(1)
    handle = pixels.encoder._pos_embed
    pixels.encoder._pos_embed = lambda x: found.append(x) or handle(x)
    found = []
    pixels.tokens(views, pixels.mask((noise, picks)))
    torch.testing.assert_close(found[0], patches @ weight.T, atol=1e-4, rtol=1e-4)  # mean 0, std 1, no bias
    pool = noise_pool(3, 1, 512, 64, 0.5)
    assert pool.dtype == np.float32 and abs(pool.mean()) < 0.02 and abs(pool.std() - 0.5) < 0.02
    assert (pool == noise_pool(3, 1, 512, 64, 0.5)).all() and (pool != noise_pool(3, 2, 512, 64, 0.5)).all()


@pytest.mark.parametrize("second", ["tied", "untied", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_only_the_fills_in_use_exist_and_everything_trainable_gets_a_gradient(mode, second):
    model = model_of(mode=mode, second=second)
    names = {name for name, _ in model.named_parameters() if name.endswith("fill")}
    expected = {"encoder_fill"} if mode in ("channel", "patch") else set()
    assert names == expected | ({"decoder_fill"} if second != "none" and mode != "none" else set())
    masks = None if mode == "none" else masks_of(model)
    loss_fn(model(pictures(), masks), torch.randn(BATCH, 6, CHANNELS)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("pos_embed" not in name), name
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("mode", ["channel", "dropout", "patch"])
def test_no_hidden_slot_after_the_final_norm_reaches_the_prediction(mode, depth):
    model = model_of(mode=mode, depth=depth)
    mask = model.mask(masks_of(model))
    h = model.tokens(pictures(), mask).detach()
    noise = 100 * torch.randn_like(h[:, 1:])
    hidden, visible = (torch.cat([h[:, :1], h[:, 1:] + noise * m], dim=1) for m in (mask, ~mask))
    with torch.no_grad():
        assert torch.equal(model.decode(hidden, mask), model.decode(h, mask))
        assert not torch.allclose(model.decode(visible, mask), model.decode(h, mask))
        leaky = model_of(mode=mode, depth=depth, second="none")
        assert not torch.allclose(leaky.decode(hidden, mask), leaky.decode(h, mask))


@pytest.mark.parametrize("mode", ["channel", "patch"])
def test_an_untied_second_fill_hides_the_slots_of_the_previous_patch(mode):
    model = model_of(mode=mode, second="untied")
    mask = model.mask(masks_of(model))
    h, previous = model.tokens(pictures(), mask).detach(), mask[:, [5, 0, 1, 2, 3, 4]]
    noise = 100 * torch.randn_like(h[:, 1:])
    hidden, first = (torch.cat([h[:, :1], h[:, 1:] + noise * m], dim=1) for m in (previous, mask & ~previous))
    with torch.no_grad():
        assert torch.equal(model.decode(hidden, mask), model.decode(h, mask))
        assert not torch.allclose(model.decode(first, mask), model.decode(h, mask))


@pytest.mark.parametrize(("width", "expected"), [(None, WIDTH), (768, 768), (64, 64)])
def test_the_decoder_has_the_width_that_is_asked_for(width, expected):
    cfg = config().model_copy(update={"decoder": Decoder(width=width)})
    decoder = MaskedChannelModel(cfg, GRID, PATCH, CHANNELS).decoder
    assert decoder.linear.in_features == decoder.pos_embed.shape[-1] == expected
    assert isinstance(decoder.adapter, torch.nn.Identity) == (expected == WIDTH)


@pytest.mark.parametrize("mode", ["channel", "dropout", "patch"])
def test_no_hidden_input_channel_changes_the_loss(mode):
    model = model_of(mode=mode)
    mask, target_BNC = model.mask(masks_of(model)), torch.randn(BATCH, 6, CHANNELS)
    noise = 100 * torch.randn(BATCH, 6, WIDTH)
    losses = []
    for added in (0.0 * noise, noise * mask, noise * ~mask):
        handle = model.encoder.patch_embed.register_forward_hook(lambda *args, added=added: args[2] + added)
        losses.append(loss_fn(model(pictures(), masks_of(model)), target_BNC).item())
        handle.remove()
    assert losses[0] == losses[1] != losses[2]


def test_prediction_of_a_row_does_not_depend_on_the_batch():
    model, rows = model_of(), np.arange(BATCH)
    with torch.no_grad():
        whole = model(pictures(), masks_of(model))
        parts = [model(pictures()[part], masks_of(model, part)) for part in np.split(rows, 2)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_full_inputs_are_neither_filled_nor_scaled():
    model = model_of()
    with torch.no_grad():
        torch.testing.assert_close(model.tokens(pictures()), model.encoder.forward_features(pictures()))
        torch.testing.assert_close(model(pictures()), model.decoder(model.encoder.forward_features(pictures())))
        assert not torch.allclose(model.tokens(pictures(), model.mask(masks_of(model))), model.tokens(pictures()))


def test_decoder_parts_widths_and_outputs():
    decoder, h = model_of().decoder, torch.randn(BATCH, 7, WIDTH)
    by_hand = decoder.linear(decoder.norm(decoder.blocks(h + sincos_positions(WIDTH, GRID))))[:, 1:]
    torch.testing.assert_close(decoder(h), by_hand)
    assert [n for n, _ in model_of(depth=0).decoder.named_parameters()] == ["linear.weight", "linear.bias"]
    assert model_of(projection="orthogonal").decoder.linear.out_features == WIDTH
    with torch.device("meta"):
        small, large = (
            MaskedChannelModel(config(student=Student(width=w, depth=1, heads=4)), GRID, PATCH, 512)
            for w in (384, 1024)
        )
    assert isinstance(small.decoder.adapter, torch.nn.Identity) and small.decoder.blocks[0].attn.num_heads == 6
    assert large.decoder.adapter.out_features == 768 and large.decoder.blocks[0].attn.num_heads == 12


def test_patch_ratio_that_hides_nothing_is_refused():
    with pytest.raises(UsageError, match="mask.ratio = 0.05 hides 0 of 6 patches"):
        model_of(mode="patch", ratio=0.05)


@pytest.mark.parametrize("s", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("mode", ["channel", "dropout"])
def test_folded_weights_equal_folded_inputs(mode, s):
    model = model_of(mode=mode)
    torch.nn.init.normal_(model.encoder.patch_embed.proj.bias)
    e = 0.0 if model.encoder_fill is None else model.encoder_fill
    folded = build_encoder((16, 24), PATCH, Student(width=WIDTH, depth=2, heads=4), seed=9)
    folded.load_state_dict(folded_state(model.encoder, model.encoder_fill, s))
    with torch.no_grad():
        expected = run_blocks(model.encoder, e + s * (model.encoder.patch_embed(pictures()) - e))
        torch.testing.assert_close(folded.forward_features(pictures()), expected, atol=1e-5, rtol=1e-5)


def test_multiply_adds_of_vit_b():
    with torch.device("meta"):
        model = MaskedChannelModel(config(student=Student(width=768, depth=12, heads=12)), (14, 14), 16, 768)
        masks = torch.empty(64, 768, dtype=torch.bool), torch.empty(1, 196, dtype=torch.int32)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224), masks)
    assert counter.get_total_flops() / 2 == pytest.approx(20.6e9, rel=0.02)


def test_pixels_of_a_patch_are_those_at_its_place():
    pictures_BHW3 = torch.arange(2 * 4 * 6 * 3).view(2, 4, 6, 3)
    pixels_BNP = unfold_patches(pictures_BHW3, 2)
    assert pixels_BNP.shape == (2, 6, 12)
    for n, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        there = pictures_BHW3[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(pixels_BNP[:, n], there.reshape(2, 12))


def test_patch_product_of_uint8_pictures_is_the_convolution_of_normalized_ones():
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    projection = build_encoder((16, 24), PATCH, Student(width=WIDTH, depth=1, heads=4)).patch_embed.proj
    torch.nn.init.normal_(projection.bias, generator=torch.Generator().manual_seed(1))
    pictures_BHW3 = torch.randint(0, 256, (4, 16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    normalized = ((pictures_BHW3.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
    kernel = projection.weight.double(), projection.bias.double()
    expected = torch.nn.functional.conv2d(normalized, *kernel, PATCH).flatten(2).mT
    for autocast, tolerance in ((False, 1e-6), (True, 4e-3)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = embed_pixels(projection, pictures_BHW3, mean, std)
        assert (found - expected).norm() / expected.norm() < tolerance


def test_residual_stream_is_bfloat16_where_asked_for():
    model, seen = model_of(residual="bf16"), []
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(pictures(), masks_of(model))
    assert set(seen) == {torch.bfloat16}
    model(pictures(), masks_of(model))  # a probe computes in float32
    assert seen[-1] == torch.float32
