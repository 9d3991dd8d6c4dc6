"""What version 1 wrote stays readable for ever: a small CACHE and DATASET under tests/data that no code rewrites."""

import hashlib
from pathlib import Path

import numpy as np

from cache_tools.cache import Cache
from cache_tools.dataset import Dataset
from cache_tools.images import decode_view_into
from cache_tools.verify import verify

DATA = Path(__file__).parent / "data"
FIRST_MEANS = [0.007913, 0.364218, -0.373247]
PICTURES_SHA256 = "71140a5cdbea6682"


def test_cache_v1() -> None:
    (unit,) = Cache(DATA / "cache-v1").complete_units("train")
    chunks = [unit.chunk(number) for number in range(unit.num_chunks)]
    assert [chunk.rows for chunk in chunks] == [16, 4] and chunks[1].labels.tolist() == [0, 1, 0, 1]
    features = np.concatenate([chunk.features() for chunk in chunks])
    assert np.allclose(features.mean((0, 1))[:3], FIRST_MEANS, atol=1e-5)
    picture = np.zeros((32, 32, 3), np.uint8)
    decode_view_into(chunks[0].pictures[0], picture)
    assert hashlib.sha256(b"".join(p for chunk in chunks for p in chunk.pictures)).hexdigest()[:16] == PICTURES_SHA256
    assert not verify(DATA / "cache-v1", quiet=True).problems


def test_dataset_v1() -> None:
    dataset = Dataset(DATA / "dataset-v1")
    assert dataset.labels("train").tolist() == [0, 1] * 4 and dataset.rows("val") == 4
    assert not verify(DATA / "dataset-v1", quiet=True).problems
