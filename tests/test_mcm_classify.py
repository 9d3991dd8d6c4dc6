"""k-NN and the linear probe against plain references."""

import torch
from torch.nn import functional

from mcm.classify import Features, knn_accuracy, linear_probe


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
    accuracy, c, converged = linear_probe(train, val, seed=0)
    scaled = [Features(part.x * torch.logspace(-3, 3, 8) + 5, part.y) for part in (train, val)]
    assert accuracy > 0.8 and converged
    assert linear_probe(*scaled, seed=0)[:2] == (accuracy, c)
