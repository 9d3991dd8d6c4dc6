"""Train in a loop of your own: python examples/own_training_loop.py CACHE [STEPS]."""

import sys

import torch
from torch.nn.functional import layer_norm, mse_loss
from torch.utils.data import DataLoader

import mcm
from cache_tools import Cache

CONFIG = """{"student": {"width": 64, "depth": 2, "heads": 4}, "optim": {"lr": 1e-3},
"schedule": {"epochs": 1}, "train": {"global_batch": 32, "micro_batch": 32}}"""


def main(path: str, steps: int = 200) -> list[float]:
    """Print and return the losses."""
    cache = Cache(path).identity
    config = mcm.PretrainConfig.model_validate_json(CONFIG)
    patch_px = cache.view_height // cache.grid[0]
    model = mcm.MaskedChannelModel(config, cache.grid, patch_px, cache.channels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    picks_BN = torch.arange(32 * cache.tokens).view(32, -1)  # every patch has its own mask
    data, losses = mcm.CacheDataset(path, batch=32, epochs=1_000), []
    for batch in DataLoader(data, batch_size=None, sampler=range(steps)):
        masks = mcm.mask_channels(torch.empty(picks_BN.numel(), 64), ratio=0.75)
        target_BNC = layer_norm(batch["features"], (cache.channels,))
        loss = mse_loss(model(batch["pictures"], (masks, picks_BN)), target_BNC)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{steps} steps: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    return losses


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
