"""Read a cache with NumPy alone, and classify "val" by the nearest mean of the teacher's features.

python examples/read_cache.py CACHE
"""

import sys

import numpy as np

from cache_tools import Cache


def mean_tokens(cache: Cache, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean patch token of every row [rows, C], and the labels [rows]."""
    tokens, labels = [], []
    for chunk in cache.unit(split, view=0):  # 16 rows, checked against their checksums
        features_BNC = chunk.features()  # float32; chunk.images() is uint8 [B, H, W, 3]
        tokens.append(features_BNC.mean(axis=1))
        labels.append(chunk.labels)
    return np.concatenate(tokens), np.concatenate(labels)


def main(path: str) -> float:
    """Print and return the accuracy."""
    cache = Cache(path)
    train, train_labels = mean_tokens(cache, "train")
    val, val_labels = mean_tokens(cache, "val")
    mean, std = train.mean(axis=0), train.std(axis=0)
    train, val = (train - mean) / std, (val - mean) / std
    classes = np.unique(train_labels)
    means = np.stack([train[train_labels == label].mean(axis=0) for label in classes])
    nearest = ((val[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    accuracy = float((classes[nearest] == val_labels).mean())
    print(f"{len(val)} rows of {len(classes)} classes: accuracy {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main(sys.argv[1])
