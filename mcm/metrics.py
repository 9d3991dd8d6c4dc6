"""Figures of held-out rows besides a loss: R^2 per channel, hidden against visible, effective ranks.

B batch, N patches, D student width, C channels of the target. Every sum is added up over all processes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cache_tools.errors import Diverged

COLLAPSED = 0.1  # of what it was before the first step: a learned projection has its optimum at 0


class Collapsed(Diverged):
    """A learned target has become all but constant: the loss then falls without teaching anything."""


class Fit:
    """Sums for the loss and for R^2 against the channel-mean predictor; all-reduce `sums` (add) before reading."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        """Start from nothing; sums [4, C] float64: count, target, target squared, error squared."""
        self.sums = torch.zeros(4, channels, dtype=torch.float64, device=device)

    def update(self, prediction_BNC: Tensor, target_BNC: Tensor, weight_B: Tensor | None = None) -> None:
        """Add a batch; weight 0 leaves a padded row out."""
        target = target_BNC.float()
        error = prediction_BNC.detach().float() - target
        weight = torch.ones(len(target), device=target.device) if weight_B is None else weight_B.to(target)
        terms = (torch.ones_like(target), target, target.square(), error.square())
        self.sums += torch.stack([(term * weight[:, None, None]).sum((0, 1), dtype=torch.float64) for term in terms])

    def loss(self) -> float:
        """Return the mean squared error."""
        return float(self.sums[3].sum() / self.sums[0].sum())

    def r2(self) -> float:
        """Return 1 - sum (y - t)^2 / sum (t - mean_c)^2."""
        return float(1.0 - self.sums[3].sum() / self._spread().sum())

    def r2_channels(self) -> Tensor:
        """Return r2_C, each channel against its own mean; 0 where the target does not vary."""
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
    """Effective rank of tokens, by their sum of outer products: exp of the entropy of singular values (RankMe)."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        """Start from nothing; sums [D, D] float64."""
        self.sums = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, x_BND: Tensor, weight_B: Tensor | None = None) -> None:
        """Add a batch; weight 0 leaves a padded row out."""
        x_BND = x_BND.to(self.sums.device, torch.float32)
        flat = (x_BND if weight_B is None else x_BND * weight_B[:, None, None]).flatten(0, 1)
        with torch.autocast(flat.device.type, enabled=False):  # in bf16 nine directions read as 22
            self.sums += (flat.T @ flat).double()

    def rank(self) -> float:
        """Return a number in [1, D]; 0 where every token is zero."""
        # On the host: some GPUs compute in float64 64 times as slowly, and this is one small matrix.
        singular_D = torch.linalg.eigvalsh(self.sums.cpu()).clamp_min(0.0).sqrt()
        if not (total := singular_D.sum()):
            return 0.0
        share_D = singular_D / total
        return float(torch.exp(-(share_D * share_D.clamp_min(1e-12).log()).sum()))


class HeldOut:
    """Figures of predictions from masked and from full inputs: `update` with every batch, `reduce` once, then read."""

    def __init__(self, kinds: list[str], channels: int, width: int, device: torch.device) -> None:
        """`kinds` of inputs: "full", and "masked" where the mode has masks."""
        self.fits = {kind: Fit(channels, device) for kind in kinds}
        self.features, self.target = Gram(width, device), Gram(channels, device)
        self.sides = torch.zeros(2, 2, dtype=torch.float64, device=device)  # squared error, count; hidden, visible

    def update(
        self, kind: str, h_BND: Tensor, prediction_BNC: Tensor, target_BNC: Tensor, mask: Tensor | None,
        weight_B: Tensor,
    ) -> None:  # fmt: skip
        """Add a batch of one kind; a mask of patches [B, N, 1] separates hidden from visible values of the target.

        A mask of student channels says nothing about the channels of the target.
        """
        self.fits[kind].update(prediction_BNC, target_BNC, weight_B)
        if kind == "full":
            self.features.update(h_BND, weight_B)
            self.target.update(target_BNC, weight_B)
        elif mask is not None and mask.shape[-1] == 1:
            error = (prediction_BNC.float() - target_BNC).square() * weight_B[:, None, None]
            count = torch.ones_like(error) * weight_B[:, None, None]
            parts = [(part * side).sum(dtype=torch.float64) for part in (error, count) for side in (mask, ~mask)]
            self.sides += torch.stack(parts).view(2, 2)

    def reduce(self, add: Callable[[Tensor], Tensor]) -> None:
        """Add up over the processes."""
        for fit in self.fits.values():
            fit.sums = add(fit.sums)
        self.features.sums, self.target.sums = add(self.features.sums), add(self.target.sums)
        self.sides = add(self.sides)

    def metrics(self) -> dict[str, float]:
        """Loss and R^2 per kind, the loss on hidden and on visible patches, ranks of features and target."""
        found = {f"{name}_{kind}": getattr(fit, name)() for kind, fit in self.fits.items() for name in ("loss", "r2")}
        if self.sides[1].all():
            hidden, visible = (self.sides[0] / self.sides[1]).tolist()
            found |= {"loss_hidden": hidden, "loss_visible": visible}
        return found | {"rank_features": self.features.rank(), "rank_target": self.target.rank()}

    def channels(self) -> dict[str, Tensor]:
        """R^2 of every channel, float32 [C], per kind, and std_C of the target."""
        found = {f"r2_{kind}": fit.r2_channels() for kind, fit in self.fits.items()}
        return {name: x_C.float().cpu() for name, x_C in (found | {"target_std": self.fits["full"].std()}).items()}


def collapse(z_BND: Tensor, first_BND: Tensor) -> tuple[float, float]:
    """(std, effective rank) of a learned target against what the projection made of the same rows before step 0.

    std: the median over the channels of std over the rows, as a fraction; so is the rank.
    """
    stds, ranks = [], []
    for x_BND in (z_BND, first_BND):
        flat = x_BND.float().flatten(0, 1)
        centred = Gram(flat.shape[-1], flat.device)
        centred.update((flat - flat.mean(0))[None])
        stds.append(flat.std(0).median())
        ranks.append(centred.rank())
    return float(stds[0] / stds[1]), ranks[0] / ranks[1]
