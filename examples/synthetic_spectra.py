"""Mask the channels of synthetic spectra (not measured ones), and predict the hidden channels.

A spectrum is a mixture of 4 Gaussian peaks over 64 channels, plus noise with a std of 0.02.
"""

import torch
from torch import Tensor, nn

import mcm


def spectra(count: int, draw: torch.Generator) -> Tensor:
    """Return synthetic spectra [count, 64]."""
    peaks = torch.exp(-(((torch.arange(64) - torch.linspace(8, 56, 4)[:, None]) / 6) ** 2))
    amounts = torch.rand(count, 4, generator=draw)
    return amounts @ peaks + 0.02 * torch.randn(count, 64, generator=draw)


def main(steps: int = 300) -> float:
    """Print and return R^2 of the hidden channels of new spectra."""
    draw = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    fill = nn.Parameter(torch.zeros(64))  # learned, as in masked channel modeling
    optimizer = torch.optim.AdamW([*network.parameters(), fill], lr=3e-3)
    for _ in range(steps):
        x = spectra(256, draw)
        mask = mcm.mask_channels(x, 0.75, draw)  # True = hidden: 48 of 64 channels per spectrum
        loss = ((network(torch.where(mask, fill, x)) - x) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, mask = spectra(2_000, draw), mcm.mask_channels(torch.empty(2_000, 64), 0.75, draw)
    error = ((network(torch.where(mask, fill, x)) - x)[mask] ** 2).mean()
    r2 = 1 - (error / ((x - x.mean(0))[mask] ** 2).mean()).item()
    print(f"R^2 of the hidden channels of 2,000 new synthetic spectra: {r2:.3f}")
    return r2


if __name__ == "__main__":
    main()
