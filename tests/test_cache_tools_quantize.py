"""int8 under attack: outlier channels, massive tokens, constants; one arithmetic for numpy and torch."""

import numpy as np
import pytest
import torch

from cache_tools.quantize import FILL_INT8, channel_stats, decode, encode


def features(outlier_sigma: float, channels: int = 128) -> np.ndarray:
    """Channels of unlike spread, one `outlier_sigma` wide and off center, one constant; a massive token a picture."""
    x = np.random.default_rng(0).standard_normal((64, 49, channels)).astype(np.float32)
    x *= np.random.default_rng(1).uniform(0.3, 3, channels).astype(np.float32)
    x[..., 5] = x[..., 5] * outlier_sigma + 2 * outlier_sigma
    x[:, 3] *= 20
    x[..., 7] = 3.0  # constant
    return x


def stored(dtype: str, x: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    mean, std = channel_stats(x)
    arrays = encode(dtype, x, mean, std)
    return decode(arrays["patch"], arrays.get("scale"), mean, std), arrays


@pytest.mark.parametrize("sigma", [1, 10, 40, 100])
def test_error_stays_small_beside_outliers(sigma: float) -> None:
    x = features(sigma)
    mean, std = channel_stats(x)
    decoded, arrays = stored("int8", x)
    z, q = (x - mean) / std, (decoded - mean) / std
    ordinary = np.delete(np.arange(128), (5, 7))
    error = ((z - q)[..., ordinary] ** 2).sum() / (z[..., ordinary] ** 2).sum()
    cosine = ((z * q).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(q, axis=-1)).mean()
    assert cosine >= 0.9999 and error < 2e-4
    assert np.abs(np.delete(decoded[..., 7], 3, axis=1) - 3).max() < 0.5 and decoded.dtype == np.float32
    assert {name: (a.dtype.name, a.shape[2:]) for name, a in arrays.items()} == {
        "patch": ("int8", (128,)),
        "scale": ("float32", ()),
    }


def test_int8_never_emits_the_fill_value() -> None:
    codes = stored("int8", features(100))[1]["patch"]
    assert codes.min() > FILL_INT8 and codes.max() <= 127


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_torch_and_numpy_agree(dtype: str) -> None:
    x = features(40)
    mean, std = channel_stats(x)
    decoded, arrays = stored(dtype, x)
    stats = channel_stats(torch.from_numpy(x), torch)
    assert np.allclose(stats[0], mean, 1e-6) and np.allclose(stats[1], std, 1e-6)
    stats = torch.from_numpy(mean), torch.from_numpy(std)
    found = encode(dtype, torch.from_numpy(x), *stats, torch)
    assert {name: str(a.dtype).removeprefix("torch.") for name, a in found.items()} == {
        name: a.dtype.name for name, a in arrays.items()
    }
    assert all((found[name].numpy() == a).mean() > 0.9999 for name, a in arrays.items() if name == "patch")
    parts = {name: torch.from_numpy(array) for name, array in arrays.items()}
    again = decode(parts["patch"], parts.get("scale"), *stats, torch)
    assert again.dtype == torch.float32 and np.allclose(again.numpy(), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-30, -7.25, 3e4])
def test_constant_tokens_stay_what_they_are(value: float) -> None:
    x = np.full((1, 2, 64), value, np.float32)
    arrays = encode("int8", x, np.zeros(64, np.float32), np.ones(64, np.float32))
    decoded = decode(arrays["patch"], arrays["scale"], np.float32(0), np.float32(1))
    assert np.allclose(decoded, x, rtol=5e-4, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_does_not_decode_to_something_that_is(dtype: str, value: float) -> None:
    """extract looks at the decoded features: no dtype may hide what it must refuse."""
    x = features(1)[:2]
    mean, std = channel_stats(x)
    x[1, 2, 3] = value
    arrays = encode(dtype, torch.from_numpy(x), torch.from_numpy(mean), torch.from_numpy(std), torch)
    decoded = decode(arrays["patch"], arrays.get("scale"), torch.from_numpy(mean), torch.from_numpy(std), torch)
    assert not torch.isfinite(decoded[1, 2]).all() and torch.isfinite(decoded[0]).all()
