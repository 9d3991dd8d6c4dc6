"""Draws: pure functions of their counters, uniform, and pinned for ever (caches and runs depend on them)."""

import numpy as np

from cache_tools.rng import hash_u64, permutation, uniform


def test_pinned() -> None:
    assert [int(hash_u64(0, "order", 1)), int(hash_u64(7, "crop/train", 2, 3))] == [
        6671636003177203296,
        3309686969935993442,
    ]


def test_batches_do_not_matter_and_purposes_differ() -> None:
    rows = np.arange(100)
    whole = hash_u64(3, "mask", 5, rows)
    assert [int(hash_u64(3, "mask", 5, row)) for row in range(100)] == whole.tolist()
    assert not set(whole.tolist()) & set(hash_u64(3, "masks", 5, rows).tolist())
    assert not set(whole.tolist()) & set(hash_u64(4, "mask", 5, rows).tolist())


def test_uniform_is_uniform() -> None:
    u = uniform(0, "u", np.arange(200_000))
    assert 0 <= u.min() and u.max() < 1
    counts = np.histogram(u, 20, (0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 45  # chi-square with 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.01


def test_permutation() -> None:
    order = permutation(1000, 0, "order", 4)
    assert sorted(order.tolist()) == list(range(1000)) and (order != permutation(1000, 0, "order", 5)).mean() > 0.9
