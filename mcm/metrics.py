"""Held-out metrics: loss, R^2 per channel, effective rank.

B batch, N patches, D student width, C channels of the target. All sums are reduced over the ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cache_tools.errors import Diverged

# A constant target has no loss. Below this share of its first std or rank, it has collapsed.
COLLAPSED = 0.1


class Collapsed(Diverged):
    """A learned target is almost constant: the loss falls, but the student learns nothing."""


class ErrorSums:
    """Sums that give the loss and R^2 against the channel mean; reduce `sums` over the ranks."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        """Zero `sums` [4, C] float64: count, target, target squared, error squared."""
        self.sums = torch.zeros(4, channels, dtype=torch.float64, device=device)

    def update(
        self, prediction_BNC: Tensor, target_BNC: Tensor, weight_B: Tensor | None = None
    ) -> None:
        """Add a batch; weight 0 leaves a padded row out."""
        target = target_BNC.float()
        error = prediction_BNC.detach().float() - target
        ones_B = torch.ones(len(target), device=target.device)
        weight = (ones_B if weight_B is None else weight_B.to(target))[:, None, None]
        terms = (torch.ones_like(target), target, target.square(), error.square())
        sums = [(term * weight).sum((0, 1), dtype=torch.float64) for term in terms]
        self.sums += torch.stack(sums)

    def loss(self) -> float:
        """Return the mean squared error."""
        return float(self.sums[3].sum() / self.sums[0].sum())

    def r2(self) -> float:
        """Return 1 - sum (y - t)^2 / sum (t - mean_c)^2."""
        return float(1.0 - self.sums[3].sum() / self._spread().sum())

    def r2_channels(self) -> Tensor:
        """Return r2_C, each channel against its own mean; 0 for a constant channel."""
        spread_C = self._spread()
        r2_C: Tensor = torch.where(spread_C > 0, 1.0 - self.sums[3] / spread_C, 0.0)
        return r2_C

    def std(self) -> Tensor:
        """Return std_C of the target."""
        return (self._spread() / self.sums[0]).sqrt()

    def _spread(self) -> Tensor:
        """Return sum (t - mean_c)^2 [C]."""
        count, total, square, _ = self.sums
        spread_C: Tensor = (square - total.square() / count).clamp_min(0.0)
        return spread_C


class Gram:
    """The sum of the outer products of tokens, which gives their effective rank.

    The effective rank is the exponential of the entropy of the singular values (RankMe).
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """Zero `sums` [D, D] float64."""
        self.sums = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, x_BND: Tensor, weight_B: Tensor | None = None) -> None:
        """Add a batch; weight 0 leaves a padded row out."""
        x_BND = x_BND.to(self.sums.device, torch.float32)
        flat = (x_BND if weight_B is None else x_BND * weight_B[:, None, None]).flatten(0, 1)
        with torch.autocast(flat.device.type, enabled=False):  # bf16 gave rank 22 instead of 9
            self.sums += (flat.T @ flat).double()

    def rank(self) -> float:
        """Return the effective rank in [1, D], or 0 if every token is zero."""
        # On the host: float64 is 64 times slower on some GPUs, and the matrix is small.
        singular_D = torch.linalg.eigvalsh(self.sums.cpu()).clamp_min(0.0).sqrt()
        if not (total := singular_D.sum()):
            return 0.0
        share_D = singular_D / total
        return float(torch.exp(-(share_D * share_D.clamp_min(1e-12).log()).sum()))


class HeldOut:
    """Metrics of predictions from masked and full inputs.

    Call `update` with every batch, then `reduce` once, then read `metrics` and `channels`.
    """

    def __init__(self, kinds: list[str], channels: int, width: int, device: torch.device) -> None:
        """Start from zero; `kinds` of predictions: "full", and with masks "masked" and "filled"."""
        self.fits = {kind: ErrorSums(channels, device) for kind in kinds}
        self.features, self.target = Gram(width, device), Gram(channels, device)

    def update(
        self, kind: str, h_BND: Tensor, prediction_BNC: Tensor, target_BNC: Tensor,
        weight_B: Tensor,
    ) -> None:  # fmt: skip
        """Add a batch of one kind."""
        self.fits[kind].update(prediction_BNC, target_BNC, weight_B)
        if kind == "full":
            self.features.update(h_BND, weight_B)
            self.target.update(target_BNC, weight_B)

    def reduce(self, add: Callable[[Tensor], Tensor]) -> None:
        """Sum over the ranks with `add`."""
        for fit in self.fits.values():
            fit.sums = add(fit.sums)
        self.features.sums, self.target.sums = add(self.features.sums), add(self.target.sums)

    def metrics(self) -> dict[str, float]:
        """Return loss and R^2 per kind, and the effective ranks."""
        metrics: dict[str, float] = {}
        for kind, fit in self.fits.items():
            metrics |= {f"loss_{kind}": fit.loss(), f"r2_{kind}": fit.r2()}
        return metrics | {"rank_features": self.features.rank(), "rank_target": self.target.rank()}

    def channels(self) -> dict[str, Tensor]:
        """Return the R^2 of every channel per kind, and the target's std, all float32 [C]."""
        channels = {f"r2_{kind}": fit.r2_channels() for kind, fit in self.fits.items()}
        channels["target_std"] = self.fits["full"].std()
        return {name: x_C.float().cpu() for name, x_C in channels.items()}


def collapse(z_BND: Tensor, first_BND: Tensor) -> tuple[float, float]:
    """Return (std, effective rank) of a learned target, each divided by its value before step 0.

    `first_BND` is the target of the same rows with the initial projection. The std is the median
    over the channels of the std over the rows.
    """
    stds, ranks = [], []
    for x_BND in (z_BND, first_BND):
        flat = x_BND.float().flatten(0, 1)
        centered = Gram(flat.shape[-1], flat.device)
        centered.update((flat - flat.mean(0))[None])
        stds.append(flat.std(0).median())
        ranks.append(centered.rank())
    return float(stds[0] / stds[1]), ranks[0] / ranks[1]
