"""The target and the loss, against formulas written by hand."""

import numpy as np
import pytest
import torch

from cache_tools.quantize import channel_stats, decode, encode
from mcm.config import Target
from mcm.metrics import ErrorSums
from mcm.objective import loss_fn
from mcm.targets import Targets, orthogonal_matrix

ROWS, N, C, D = 32, 4, 24, 40


def features(seed=0, channels=C):
    rng = np.random.default_rng(seed)
    x_BNC = rng.standard_normal((ROWS, N, channels)) * rng.uniform(0.1, 9, channels)
    return (x_BNC + rng.uniform(-5, 5, channels)).astype(np.float32)


def targets(norm="none", projection="prediction", width=D, stats=None):
    return Targets(Target(norm=norm, projection=projection), C, width, stats, seed=0)


def test_codes_decode_with_the_statistics_of_their_own_chunk():
    x_BNC = features()
    x_BNC[16:] *= 3
    stats = [channel_stats(part) for part in np.split(x_BNC, 2)]
    parts = [encode("int8", part, *own) for part, own in zip(np.split(x_BNC, 2), stats, strict=True)]
    arrays = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    mean, std = (torch.from_numpy(np.stack([own[i] for own in stats])) for i in (0, 1))
    got = targets()(arrays["patch"], arrays["scale"], mean, std).numpy()
    expected = [decode(p["patch"], p["scale"], *s) for p, s in zip(parts, stats, strict=True)]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-5, atol=1e-5)
    assert np.abs(got - x_BNC).max() < 0.03 * np.abs(x_BNC).max()


def test_normalizations():
    x_BNC = features()
    codes = torch.from_numpy(x_BNC)
    assert torch.equal(targets()(codes.half()), codes.half().float())  # float16 codes are the features
    layer = targets("layer_norm")(codes).numpy()
    expected = (x_BNC - x_BNC.mean(-1, keepdims=True)) / np.sqrt(x_BNC.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer, expected, atol=1e-5)
    mean_C, std_C = x_BNC.mean((0, 1), dtype=np.float64), x_BNC.std((0, 1), dtype=np.float64)
    channel = targets("channel", stats=(mean_C, std_C))(codes).numpy()
    np.testing.assert_allclose(channel, (x_BNC - mean_C) / std_C, atol=1e-5)


def test_joint_features_are_one_matmul_of_the_decoded_ones():
    x_BNC, matrix_CE = features(), np.random.default_rng(1).standard_normal((C, 7)).astype(np.float32)
    plain = Targets(Target(features="joint", norm="none"), 7, D, joint=matrix_CE)
    np.testing.assert_allclose(plain(torch.from_numpy(x_BNC)), x_BNC @ matrix_CE, rtol=1e-4, atol=1e-3)
    assert (
        Targets(Target(features="joint"), 7, D, joint=matrix_CE)(torch.from_numpy(x_BNC)).std(-1).sub(1).abs().max()
        < 0.1
    )


def test_r2_a_channel_is_that_channel_alone():
    target = torch.from_numpy(features())
    target[..., 3] = 2.0  # dead
    prediction = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    fit = ErrorSums(C)
    fit.update(prediction, target)
    spread_C = (target - target.mean((0, 1))).square().sum((0, 1))
    expected_C = 1 - (prediction - target).square().sum((0, 1)) / spread_C
    expected_C[3] = 0
    np.testing.assert_allclose(fit.r2_channels(), expected_C, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fit.std(), target.flatten(0, 1).std(0, correction=0), atol=1e-4)


@pytest.mark.parametrize("width", [C, D])
def test_orthogonal_projection_keeps_norms_and_angles(width):
    x_BNC = torch.from_numpy(features())
    out_BND = targets(projection="orthogonal", width=width)(x_BNC)
    assert out_BND.shape == (ROWS, N, width)
    torch.testing.assert_close(out_BND.norm(dim=-1), x_BNC.norm(dim=-1))
    torch.testing.assert_close(out_BND[0] @ out_BND[1].T, x_BNC[0] @ x_BNC[1].T, rtol=1e-4, atol=1e-3)


def test_projection_is_fixed_by_the_seed_and_frozen():
    wide = orthogonal_matrix(40, 24, 0).double()
    torch.testing.assert_close(wide.T @ wide, torch.eye(24, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(orthogonal_matrix(40, 24, 0), wide.float())
    assert not torch.equal(orthogonal_matrix(40, 24, 1), wide.float())
    module = targets(projection="orthogonal")
    assert not list(module.parameters()) and list(module.state_dict()) == ["projection_CD"]


def test_target_and_loss_stay_in_float32_under_autocast():
    module, codes = targets("layer_norm", "orthogonal"), torch.from_numpy(features())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target_BND = module(codes)
        loss = loss_fn(target_BND.bfloat16(), target_BND)
    assert torch.equal(target_BND, module(codes)) and not target_BND.requires_grad
    assert loss.dtype == torch.float32


def test_loss_counts_every_channel_of_every_patch():
    y_BNC, t_BNC = torch.randn(3, N, C, requires_grad=True), torch.randn(3, N, C)
    total = sum((y_BNC[i].item() - t_BNC[i].item()) ** 2 for i in np.ndindex(3, N, C))
    loss = loss_fn(y_BNC, t_BNC)
    assert loss.item() == pytest.approx(total / (3 * N * C), rel=1e-5)
    loss.backward()
    torch.testing.assert_close(y_BNC.grad, 2 * (y_BNC.detach() - t_BNC) / y_BNC.numel())


def test_r2_of_parts_summed_equals_the_formula_and_leaves_padding_out():
    t_BNC = torch.from_numpy(features(1))
    y_BNC = t_BNC + torch.randn(t_BNC.shape, generator=torch.Generator().manual_seed(0))
    kept = t_BNC[:24].double()
    error = (y_BNC[:24].double() - kept).square()
    r2 = 1 - error.sum() / (kept - kept.mean((0, 1))).square().sum()
    ranks = [ErrorSums(C), ErrorSums(C)]
    ranks[0].update(y_BNC[:16], t_BNC[:16])
    ranks[1].update(y_BNC[16:], t_BNC[16:], torch.tensor([1.0] * 8 + [0.0] * 8))
    ranks[0].sums += ranks[1].sums  # what an all-reduce does
    assert ranks[0].r2() == pytest.approx(r2.item(), abs=1e-6)
    assert ranks[0].loss() == pytest.approx(error.mean().item(), rel=1e-5)


def test_r2_is_one_for_the_truth_and_zero_for_the_channel_mean():
    t_BNC = torch.from_numpy(features())
    for y_BNC, expected in ((t_BNC, 1.0), (t_BNC.mean((0, 1)).expand_as(t_BNC), 0.0)):
        fit = ErrorSums(C)
        fit.update(y_BNC, t_BNC)
        assert fit.r2() == pytest.approx(expected, abs=1e-6)
