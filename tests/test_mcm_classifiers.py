"""k-NN and the linear probe against plain references."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from mcm import classifiers as module
from mcm.classifiers import (
    C_GRID,
    CHOICE_ROWS,
    Features,
    _l2,
    choice_rows,
    fit_softmax,
    knn_accuracy,
    linear_probe,
)


def clusters(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(rows) % 3
    return Features(torch.eye(8)[y] * 2 + torch.randn(rows, 8, generator=generator), y)


def test_knn_is_dinos():
    train, val = clusters(90, 0), clusters(60, 1)
    right = 0
    for x, y in zip(val.x, val.y, strict=True):
        similarity = functional.cosine_similarity(x[None], train.x)
        votes = torch.zeros(3)
        for row in similarity.argsort(descending=True)[:20]:
            votes[train.y[row]] += torch.exp(similarity[row] / 0.07)
        right += int(votes.argmax() == y)
    assert knn_accuracy(train, val) == right / 60
    assert 0.5 < right / 60 < 1


def test_linear_probe_separates_what_is_linear_and_ignores_scale():
    train, val = clusters(300, 0), clusters(100, 1)
    probe = linear_probe(train, seed=0)
    other_train, other_val = (Features(part.x * torch.logspace(-3, 3, 8) + 5, part.y) for part in (train, val))
    hits = probe.hits(val)
    assert hits.double().mean() > 0.8 and probe.fit.converged
    again = linear_probe(other_train, seed=0)
    assert torch.equal(again.hits(other_val), hits) and again.c == probe.c


@pytest.mark.parametrize("classes", [2, 3])
def test_the_fit_is_that_of_scikit_learn(classes, monkeypatch):
    data = clusters(300, 0)
    x, y = data.x, data.y % classes
    for c in C_GRID:
        reference = LogisticRegression(C=c, tol=1e-8, max_iter=10_000).fit(x.double().numpy(), y.numpy())
        expected = torch.from_numpy(reference.predict_proba(x.double().numpy())).float()
        fit = fit_softmax(x, y, _l2(c, len(x), classes))
        assert fit.converged
        assert torch.allclose((x @ fit.weight.T + fit.bias).softmax(1), expected, atol=2e-3)
    again = fit_softmax(x, functional.one_hot(y).float(), _l2(c, len(x), classes))  # shares of pixels
    assert torch.allclose(again.weight, fit.weight, atol=1e-2)
    monkeypatch.setattr(module, "MAX_LOGITS", 100)  # in parts of the rows
    assert torch.allclose(fit_softmax(x, y, _l2(c, len(x), classes)).weight, fit.weight, atol=1e-2)
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    assert not fit_softmax(x, y, _l2(c, len(x), classes)).converged


def test_the_linear_probe_agrees_with_scikit_learn_to_a_tenth_of_a_point():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 32, generator=generator)
    train, val = (
        Features(centers[y] + 1.5 * torch.randn(rows, 32, generator=generator), y * 3)  # labels with gaps
        for rows in (800, 2000) for y in [torch.arange(rows) % 10]
    )  # fmt: skip
    probe = linear_probe(train, seed=0)
    accuracy, mean, std = float(probe.hits(val).double().mean()), train.x.mean(0), train.x.std(0)
    reference = LogisticRegression(C=probe.c, max_iter=1000).fit((train.x - mean) / std, train.y)
    assert probe.fit.converged and 0.5 < accuracy < 0.99
    assert abs(accuracy - reference.score((val.x - mean) / std, val.y)) <= 0.001


def test_rows_that_choose_are_drawn_by_class():
    labels = np.where(np.arange(20_000) < 3, 1, 0)  # three defects in twenty thousand rows
    bank, held = choice_rows(labels, seed=1)
    assert len(bank) + len(held) == CHOICE_ROWS == len({*bank, *held})
    assert sorted([labels[bank].sum(), labels[held].sum()]) == [1, 2] and 0.19 < len(held) / CHOICE_ROWS < 0.21
    bank, held = choice_rows(np.arange(7000), seed=1)  # more classes than rows that choose
    assert (len(bank), len(held)) == (7000, 0)


def test_a_rare_class_is_fitted_and_one_that_cannot_be_is_none():
    train = clusters(40, 0)
    rare = Features(train.x, (torch.arange(40) < 2).long())
    assert all(linear_probe(rare, seed).c for seed in range(3))
    assert linear_probe(Features(train.x[:3], torch.arange(3)), 0) is None
    assert linear_probe(Features(train.x, torch.zeros(40).long()), 0) is None
