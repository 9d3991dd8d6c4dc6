"""Classifiers on frozen features: weighted k-NN and softmax regression.

B batch, D width, R training rows, K neighbors of k-NN, or classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cache_tools.errors import UsageError
from cache_tools.rng import permutation

C_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse strengths of the linear probe's L2 penalty
NEIGHBORS, TEMPERATURE = 20, 0.07  # of k-NN, as in DINO
CHOICE_ROWS = 6000  # training rows that choose C and s; a fifth is held out
MAX_ITERATIONS, GRADIENT_TOLERANCE = 1000, 1e-6  # of L-BFGS in float32; scikit-learn stops at 1e-4
MAX_LOGITS = 1 << 26  # the most logits at once: 256 MB, and as much for their gradient
KNN_ROWS = 256  # rows per product; with ImageNet's 1,281,167 rows, 1.3 GB of similarities


@dataclass(frozen=True)
class Features:
    """Features [R, D] float32 and labels [R] of one split."""

    x: Tensor
    y: Tensor

    def rows(self, rows: npt.NDArray[np.int64]) -> "Features":
        """Return the features and labels of some rows."""
        return Features(self.x[rows], self.y[rows])


def knn_accuracy(train: Features, val: Features, device: torch.device | str = "cpu") -> float:
    """Return the fraction of True in `knn_hits`."""
    return float(knn_hits(train, val, device).double().mean())


def knn_hits(train: Features, val: Features, device: torch.device | str = "cpu") -> Tensor:
    """Return, for each val row, whether the nearest training rows predict its label [R] bool.

    Neighbors are found by cosine similarity and vote with weight exp(similarity / T), as in DINO.
    """
    bank_RD, labels_R = functional.normalize(train.x.to(device), dim=1), train.y.to(device)
    num_classes, hits = int(labels_R.max()) + 1, []
    batches = (torch.split(part.to(device), KNN_ROWS) for part in (val.x, val.y))
    for x_BD, y_B in zip(*batches, strict=True):
        similarity_BR = functional.normalize(x_BD, dim=1) @ bank_RD.T
        top_BK, rows_BK = similarity_BR.topk(min(NEIGHBORS, len(bank_RD)), dim=1)
        votes = torch.zeros(len(x_BD), num_classes, device=device)
        votes.scatter_add_(1, labels_R[rows_BK], (top_BK / TEMPERATURE).exp())
        hits.append((votes.argmax(1) == y_B).cpu())
    return torch.cat(hits)


class LinearProbe(NamedTuple):
    """Logistic regression on features standardized by the training rows' mean and std [D]."""

    mean: Tensor
    std: Tensor
    classes: Tensor
    fit: "Fit"
    c: float

    def hits(self, val: Features) -> Tensor:
        """Return, for each row, whether its label is predicted [R] bool."""
        x_RD = ((val.x - self.mean) / self.std).to(self.classes.device)
        hits = self.classes[_predicted(x_RD, self.fit)] == val.y.to(self.classes.device)
        return hits.cpu()


def linear_probe(
    train: Features, seed: int, device: torch.device | str = "cpu"
) -> LinearProbe | None:
    """Fit a linear probe.

    C is the value of C_GRID with the best accuracy on held-out training rows; the smallest C wins
    ties. The classes are those of the training rows.
    Return None where no class has a row to hold out, or only one class has rows.
    """
    bank, held = choice_rows(train.y.numpy(), seed)
    classes, y = torch.unique(train.y, return_inverse=True)
    if not len(held) or len(classes) < 2:
        return None
    mean_D, std_D = train.x.mean(0), train.x.std(0).clamp_min(1e-6)
    x, y, classes = ((train.x - mean_D) / std_D).to(device), y.to(device), classes.to(device)
    fits, scores = dict[float, Fit](), dict[float, float]()
    start = None
    for c in C_GRID:  # each fit starts from the one before
        start = fits[c] = fit_softmax(x[bank], y[bank], _l2(c, len(bank), len(classes)), start)
        scores[c] = float((_predicted(x[held], start) == y[held]).double().mean())
    c = max(C_GRID, key=lambda c: (scores[c], -c))
    whole = fit_softmax(x, y, _l2(c, len(x), len(classes)), fits[c])
    return LinearProbe(mean_D, std_D, classes, whole, c)


class Fit(NamedTuple):
    """The weight [K, D] and the bias [K] of softmax regression, and whether the fit converged."""

    weight: Tensor
    bias: Tensor
    converged: bool


def _l2(c: float, rows: int, classes: int) -> float:
    """Return the penalty of scikit-learn's LogisticRegression(C).

    For two classes, it penalizes one vector, which is the difference of our two.
    """
    return (2 if classes == 2 else 1) / (c * rows)


def _predicted(x_RD: Tensor, fit: Fit) -> Tensor:
    rows = max(1, MAX_LOGITS // len(fit.bias))
    parts = [
        functional.linear(x_BD, fit.weight, fit.bias).argmax(1) for x_BD in torch.split(x_RD, rows)
    ]
    return torch.cat(parts)


def fit_softmax(x_RD: Tensor, y: Tensor, l2: float, start: Fit | None = None) -> Fit:
    """Fit softmax regression by full-batch L-BFGS with a strong Wolfe line search.

    `y` holds classes [R] or the share of each class [R, K]. The loss is the mean cross-entropy per
    row, or per unit of all shares, plus l2 / 2 times the squared weights: the objective of
    scikit-learn. It is summed over parts of the rows, so the logits take bounded memory.
    """
    total = len(y) if y.ndim == 1 else float(y.sum())
    num_classes = int(y.max()) + 1 if y.ndim == 1 else y.shape[1]
    shapes = (num_classes, x_RD.shape[1]), (num_classes,)
    first = (x_RD.new_zeros(shape) for shape in shapes) if start is None else start[:2]
    weight_KD, bias_K = (tensor.clone().requires_grad_() for tensor in first)
    optimizer = torch.optim.LBFGS(
        [weight_KD, bias_K],
        max_iter=MAX_ITERATIONS,
        max_eval=10 * MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        line_search_fn="strong_wolfe",
    )
    rows = max(1, MAX_LOGITS // num_classes)
    batches = list(zip(torch.split(x_RD, rows), torch.split(y, rows), strict=True))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = l2 / 2 * weight_KD.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        for x_BD, y_B in batches:
            logits_BK = functional.linear(x_BD, weight_KD, bias_K)
            part = functional.cross_entropy(logits_BK, y_B, reduction="sum") / total
            part.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    converged = optimizer.state[weight_KD]["n_iter"] < MAX_ITERATIONS
    return Fit(weight_KD.detach(), bias_K.detach(), converged)


def choice_rows(
    labels: npt.NDArray[np.integer], seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (bank, held-out) training rows, drawn in rounds of one row per class.

    A fifth of each class is held out, and at least one row of a class with two or more.
    The bank has a row of every class.
    """
    order = permutation(len(labels), seed, "probe_choice")
    _, counts = np.unique(labels, return_counts=True)
    by_class = np.argsort(labels[order], kind="stable")
    rank = np.empty(len(labels), np.int64)  # the position of each row within its class
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    chosen = np.argsort(rank, kind="stable")[: max(CHOICE_ROWS, 2 * len(counts))]
    held = rank[chosen] % 5 == 1
    return order[chosen[~held]], order[chosen[held]]


def training_rows(
    labels: npt.NDArray[np.int32], classes: Sequence[str], shots: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return all rows of "train", or `shots` rows of each class, drawn by the seed.

    Raises: UsageError for a class with fewer pictures than `shots`.
    """
    if not shots:
        return np.arange(len(labels))
    order = permutation(len(labels), seed, "shots")
    rows = [order[labels[order] == label][:shots] for label in range(len(classes))]
    for name, chosen in zip(classes, rows, strict=True):
        if len(chosen) < shots:
            found = f"class {name!r} has {len(chosen)}; use fewer shots"
            raise UsageError(f"shots: expected {shots} labels per class; {found}")
    return np.sort(np.concatenate(rows))
