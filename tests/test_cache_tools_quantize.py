"""int8: the error bar on ordinary and outlier channels, one arithmetic for numpy and torch."""

import numpy as np
import pytest
import torch

from cache_tools.quantize import FILL_INT8, channel_stats, decode, encode_int8


def features(outlier_sigma: float) -> np.ndarray:
    x = np.random.default_rng(0).standard_normal((64, 49, 96)).astype(np.float32)
    x *= np.random.default_rng(1).uniform(0.3, 3, 96).astype(np.float32)
    x[..., 5] = x[..., 5] * outlier_sigma + 2 * outlier_sigma
    x[..., 7] = 3.0  # constant
    return x


@pytest.mark.parametrize("sigma", [1, 10, 40, 100])
def test_error_stays_small_beside_outlier_channels(sigma: float) -> None:
    x = features(sigma)
    mean, std = channel_stats(x)
    codes, scale = encode_int8(x, mean, std)
    decoded = decode(codes, scale, mean, std)
    z, q = (x - mean) / std, (decoded - mean) / std
    error = ((z - q) ** 2).sum() / (z**2).sum()
    cosine = ((z * q).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(q, axis=-1)).mean()
    assert cosine >= 0.9999 and error < 2e-4
    assert codes.min() > FILL_INT8 and codes.max() <= 127 and codes.dtype == np.int8 and scale.dtype == np.float32
    assert np.abs(decoded[..., 7] - 3).max() < 1e-3


def test_torch_and_numpy_agree() -> None:
    x = features(40)
    mean, std = channel_stats(x)
    codes, scale = encode_int8(x, mean, std)
    tensors = [torch.from_numpy(value) for value in (x, mean, std)]
    torch_codes, torch_scale = encode_int8(*tensors, torch)
    assert (torch_codes.numpy() == codes).mean() > 0.9999 and np.allclose(torch_scale.numpy(), scale, rtol=1e-6)
    decoded = decode(torch.from_numpy(codes), torch.from_numpy(scale), tensors[1], tensors[2])
    assert decoded.dtype == torch.float32
    assert np.allclose(decoded.numpy(), decode(codes, scale, mean, std), rtol=1e-5, atol=1e-5)


def test_a_token_of_zeros() -> None:
    codes, scale = encode_int8(np.zeros((1, 2, 4), np.float32), np.zeros(4, np.float32), np.ones(4, np.float32))
    assert not codes.any() and (scale == 1).all()
