"""Ranks, hidden against visible, and the guard of a learned projection, against formulas written by hand."""

import numpy as np
import pytest
import torch

from mcm.metrics import Gram, HeldOut, collapse


def test_rank_is_that_of_the_singular_values_and_leaves_padding_out():
    x_BND = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    gram, weight_B = Gram(8), torch.tensor([1.0, 1, 1, 1, 1, 0])
    for rows in (slice(0, 2), slice(2, 6)):
        gram.update(x_BND[rows], weight_B[rows])
    singular = np.linalg.svd(x_BND[:5].reshape(-1, 8).numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert gram.rank() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    half = Gram(8)
    with torch.autocast("cpu", torch.bfloat16):
        half.update(x_BND, weight_B)
    assert half.rank() == pytest.approx(gram.rank(), rel=1e-5)


@pytest.mark.parametrize(("rank", "expected"), [(0, 0.0), (1, 1.0), (8, 8.0)])
def test_rank_of_plain_cases(rank, expected):
    gram = Gram(8)
    gram.update((torch.eye(8) * (torch.arange(8) < rank))[None], torch.ones(1))
    assert gram.rank() == pytest.approx(expected, rel=1e-3)


def test_a_padded_row_is_left_out():
    target = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    prediction = target + 0.5
    held = HeldOut(["masked", "full"], 6, 6, torch.device("cpu"))
    prediction[2] = 1e6  # a padded row
    for kind in ("masked", "full"):
        held.update(kind, target, prediction, target, torch.tensor([1.0, 1.0, 0.0]))
    metrics = held.metrics()
    assert metrics["loss_masked"] == metrics["loss_full"] == pytest.approx(0.25)
    assert {name: tuple(x.shape) for name, x in held.channels().items()} == dict.fromkeys(
        ("r2_masked", "r2_full", "target_std"), (6,)
    )


def test_collapse_is_seen_in_the_spread_and_in_the_rank():
    first = torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    assert collapse(first, first) == (1.0, 1.0)
    std, rank = collapse(first * 0.01 + 5, first)
    assert std == pytest.approx(0.01, rel=1e-3) and rank == pytest.approx(1.0, rel=1e-3)
    std, rank = collapse(first[..., :1].expand_as(first), first)
    assert std > 0.5 and rank < 0.2  # channels that vary, all alike
