"""The learning rate as a pure function of the step, so that it needs no state and resumes exactly."""

import math

from mcm.config import Optim


def peak_lr(optim: Optim, global_batch: int) -> float:
    """Return `optim.lr`, or `optim.blr` scaled linearly from a batch of 256 (MAE's rule)."""
    if optim.lr is not None:
        return optim.lr
    assert optim.blr is not None  # the config holds exactly one of the two
    return optim.blr * global_batch / 256


def learning_rate(step: int, total_steps: int, warmup_steps: int, base_lr: float, min_lr: float) -> float:
    """Linear warm-up that reaches base_lr at its last step, then a half cosine to min_lr at the last step of all.

    `step` counts from 0.
    """
    if step < warmup_steps:
        return base_lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return min_lr + (base_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
