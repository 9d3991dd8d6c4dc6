"""Classifiers on frozen features: weighted k-NN and logistic regression.

Letters: B batch, D width, R rows of the training split, K neighbours.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from cache_tools.errors import UsageError
from cache_tools.rng import permutation

C_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse strengths of the linear probe's L2 penalty
NEIGHBOURS, TEMPERATURE = 20, 0.07  # of k-NN, as in DINO
CHOICE_ROWS = 6000  # training rows that choose C and s; a fifth is held out
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
    """Return the fraction of val rows that `knn_hits` counts."""
    return knn_hits(train, val, device) / len(val.y)


def knn_hits(train: Features, val: Features, device: torch.device | str = "cpu") -> int:
    """Return the number of val rows whose label the nearest training rows predict.

    Neighbours are found by cosine similarity and vote with weight exp(similarity / T), as in DINO.
    """
    bank_RD, labels_R = functional.normalize(train.x.to(device), dim=1), train.y.to(device)
    num_classes, correct = int(labels_R.max()) + 1, 0
    batches = (torch.split(part.to(device), KNN_ROWS) for part in (val.x, val.y))
    for x_BD, y_B in zip(*batches, strict=True):
        similarity_BR = functional.normalize(x_BD, dim=1) @ bank_RD.T
        top_BK, rows_BK = similarity_BR.topk(min(NEIGHBOURS, len(bank_RD)), dim=1)
        votes = torch.zeros(len(x_BD), num_classes, device=device)
        votes.scatter_add_(1, labels_R[rows_BK], (top_BK / TEMPERATURE).exp())
        correct += int((votes.argmax(1) == y_B).sum())
    return correct


def linear_probe(train: Features, val: Features, seed: int) -> tuple[float, float, bool] | None:
    """Return (accuracy, C, converged) of logistic regression by LBFGS on standardised features.

    C is the value of C_GRID with the best accuracy on held-out training rows; the smallest C wins
    ties.
    Return None where no class has a row to hold out, or only one class has rows.
    """
    bank, held = choice_rows(train.y.numpy(), seed)
    if not len(held) or train.y.min() == train.y.max():
        return None
    mean_D, std_D = train.x.mean(0), train.x.std(0).clamp_min(1e-6)
    train, val = (Features((part.x - mean_D) / std_D, part.y) for part in (train, val))
    scores = {c: _fit(train.rows(bank), train.rows(held), c)[0] for c in C_GRID}
    c = max(C_GRID, key=lambda c: (scores[c], -c))
    accuracy, converged = _fit(train, val, c)
    return accuracy, c, converged


def _fit(train: Features, val: Features, c: float) -> tuple[float, bool]:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=1000)  # the default solver is LBFGS, multinomial
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the return value reports convergence
        model.fit(train.x.numpy(), train.y.numpy())
    converged = bool(model.n_iter_.max() < model.max_iter)
    return float(model.score(val.x.numpy(), val.y.numpy())), converged


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
