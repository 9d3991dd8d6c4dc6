import os
import resource
import shutil
import signal
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from make_cache import make_cache
from make_dataset import make_dataset

from cache_tools.errors import CorruptionError, ResourceError, UsageError
from cache_tools.images import decode_rgb
from cache_tools.rng import hash_u64
from mcm.config import Target
from mcm.masking import mask_picks
from mcm.sampler import EvalOrder, Order
from mcm.stream import CacheSource, DatasetSource, Stream, batches
from mcm.targets import Targets


@pytest.fixture(scope="module", params=["int8", "float16"])
def cache(request, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("stream") / request.param, dtype=request.param)


def source(cache, split="train", seed=3):
    return CacheSource(cache.complete_units(split), (32, 32), positions=16, pool_rows=64, seed=seed)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """Enough rows for two global batches of 384, which worlds of 1, 2, 3, 4 and 8 divide, and a remainder."""
    return make_cache(tmp_path_factory.mktemp("worlds") / "cache", rows=840, val_rows=0)


def given(cache, world, micro_batch, workers):
    """Every row of three epochs with digests of its view, features and mask, put together from what every rank gets."""
    parts = {}
    for rank in range(world):
        order = Order(840, 16, 384, micro_batch, world, rank, seed=3)
        with batches(Stream(order, source(cache)), 0, 6 * order.accumulation, workers) as items:
            for index, batch in enumerate(items):
                digests = ([zlib.crc32(row) for row in batch[name].numpy()] for name in ("pictures", "codes", "picks"))
                numbers = (batch[name].tolist() for name in ("rows", "labels"))
                parts[index, rank] = list(zip(*numbers, *digests, [batch["epoch"]] * order.batch, strict=True))
    return [row for key in sorted(parts) for row in parts[key]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(("workers", "splits"), [(0, (16, 48, 100, 384)), (1, (48,)), (3, (16,))])
def test_one_sequence_of_rows_views_and_masks_for_every_world(two_steps, workers, splits):
    expected = given(two_steps, 1, 384, 0)
    assert len(expected) == 6 * 384 and len({(row, picture) for row, _, picture, *_ in expected}) > 840
    for world in (1, 2, 3, 4, 8):
        for micro_batch in splits:
            assert given(two_steps, world, micro_batch, workers) == expected, (world, micro_batch)


@pytest.mark.parametrize(("micro_batch", "batch"), [(16, 16), (31, 16), (100, 96), (5000, 192)])
def test_micro_batch_is_the_largest_divisor(micro_batch, batch):
    order = Order(1000, 16, 192, micro_batch)
    assert (order.batch, order.batch * order.accumulation) == (batch, 192)


def test_an_epoch_permutes_chunks_and_leaves_another_remainder():
    order = Order(1000, 16, 192, 192)  # 62 whole chunks, 12 a step
    assert order.steps_per_epoch == 5
    epochs = [np.concatenate([order.step_chunks(5 * e + s)[1] for s in range(5)]) for e in range(2)]
    left_out = [set(range(62)) - set(epoch.tolist()) for epoch in epochs]
    assert all(len(set(epoch.tolist())) == 60 for epoch in epochs) and left_out[0] != left_out[1]
    assert order.slice(5)[0] == 1 and not np.array_equal(*epochs)
    assert not np.array_equal(Order(1000, 16, 192, 192, seed=1).step_chunks(0)[1], epochs[0][:12])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((100, 16, 128, 16), "too few rows for one global batch: .*128 rows .*found 100"),
        ((1000, 16, 96, 16, 4), "multiple of 16 rows x 4 processes.*found 96.*processes that fit: 1, 2, 3, 6"),
        ((1000, 1, 96, 8), "micro_batch >= 16; found 96 and 8"),
    ],
)
def test_impossible_orders_are_refused(arguments, words):
    with pytest.raises(UsageError, match=words):
        Order(*arguments)


def test_a_group_of_one_row_allows_small_batches():
    orders = [Order(19, 1, 4, 3, world, rank, group=1) for world, rank in ((1, 0), (2, 0), (2, 1))]
    assert [order.batch for order in orders] == [2, 2, 2] and [order.accumulation for order in orders] == [2, 1, 1]
    alone, *ranks = orders
    assert [alone.slice(k)[1].tolist() for k in (0, 1)] == [order.slice(0)[1].tolist() for order in ranks]
    with pytest.raises(UsageError, match="multiple of 1 rows x 3 processes"):
        Order(19, 1, 4, 3, 3, group=1)


@pytest.mark.parametrize(("world", "batch"), [(1, 48), (2, 16), (4, 32)])
def test_evaluation_sees_every_row_once(cache, world, batch):
    seen = []
    for rank in range(world):
        order = EvalOrder(100, 16, batch, world, rank)
        stream = Stream(order, source(cache))
        for index in range(len(order)):
            item = stream[index]
            assert len(item["rows"]) == len(item["weight"]) == len(item["pictures"]) == batch
            assert (item["pictures"][item["weight"] == 0] == 0).all()
            seen += item["rows"][item["weight"] > 0].tolist()
    assert sorted(seen) == list(range(100))


def test_a_batch_equals_direct_reads(cache):
    order = Order(100, 16, 64, 32, world=2, rank=1, seed=3)
    stream, units = Stream(order, source(cache)), cache.complete_units("train")
    for index in (0, 1, 4):
        batch, (epoch, chunks) = stream[index], order.slice(index)
        views = [(int(hash_u64(3, "view", int(c))) + epoch) % 2 for c in chunks]
        direct = [units[view].chunk(int(number)) for view, number in zip(views, chunks, strict=True)]
        pictures = np.stack([decode_rgb(data) for chunk in direct for data in chunk.pictures])
        assert np.array_equal(batch["pictures"].numpy(), pictures)
        parts = (batch.get(name) for name in ("codes", "scale", "mean", "std"))
        decoded = Targets(Target(norm="none"), 16, 32)(*parts)
        assert np.array_equal(decoded.numpy(), np.concatenate([chunk.features() for chunk in direct]))
        rows = np.concatenate([np.arange(chunk.row0, chunk.row0 + 16) for chunk in direct])
        assert np.array_equal(batch["rows"].numpy(), rows) and np.array_equal(rows, source(cache).rows_of(chunks))
        assert np.array_equal(batch["labels"].numpy(), rows % 2) and batch["epoch"] == epoch
        assert np.array_equal(batch["picks"].numpy(), mask_picks(3, epoch, rows, 16, 64))
        assert batch["weight"].tolist() == [1.0] * 32


def test_cls_is_read_where_it_is_asked_for_and_bound_to_its_row(cache):
    units = cache.complete_units("train")
    plain, asked = (CacheSource(units[:1], (32, 32), 16, 64, 0, cls=cls) for cls in (False, True))
    for chunks in (np.array([2, 0]), np.array([6])):  # the last chunk has four rows
        batch = asked(0, chunks, 32)
        assert "cls" not in plain(0, chunks, 32)
        direct = np.concatenate([units[0].chunk(int(number)).cls for number in chunks])
        assert np.array_equal(batch["cls"][: len(direct)].numpy(), direct) and not batch["cls"][len(direct) :].any()


def test_epochs_mix_views(cache):
    chunks = source(cache)
    first, second = ([chunks.view(epoch, number).chunk(number).pictures for number in range(6)] for epoch in (0, 1))
    v0, v1 = ([unit.chunk(number).pictures for number in range(6)] for unit in chunks.units)
    assert all({f[0], s[0]} == {a[0], b[0]} for f, s, a, b in zip(first, second, v0, v1, strict=True))
    assert first not in (v0, v1) and chunks.view(2, 0).chunk(0).pictures == first[0]


def test_workers_give_the_same_batches_and_their_errors_arrive(tmp_path):
    cache = make_cache(tmp_path / "cache", views=2, val_rows=0)
    stream = Stream(Order(100, 16, 32, 16), source(cache))
    with batches(stream, 1, 5, workers=2) as items:
        found = list(items)
    assert len(found) == 4
    for index, batch in enumerate(found, start=1):
        direct = stream[index]
        assert batch.keys() == direct.keys()
        same = [torch.equal(batch[k], v) if torch.is_tensor(v) else batch[k] == v for k, v in direct.items()]
        assert all(same)
    for unit in cache.complete_units("train"):
        shutil.rmtree(unit.path / "views")
    with (
        pytest.raises(CorruptionError, match=r"views/000000\.\S+: expected"),
        batches(stream, 0, 6, 2) as items,
    ):
        list(items)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_batch_is_the_callers_until_the_next_one(cache, workers):
    """Memory is used again, but not while workers run ahead of who holds a batch."""
    stream = Stream(Order(100, 16, 16, 16), source(cache))
    memory, kept = [], []
    with batches(stream, 0, 24, workers) as items:
        for index, batch in enumerate(items):
            time.sleep(0.02 * (workers > 0))  # workers make what they may
            assert all(torch.equal(stream[index][k], batch[k]) for k in ("pictures", "codes"))
            memory.append(batch["pictures"].data_ptr())
            kept.append((batch["labels"], batch["rows"]))
    assert index == 23 and len(set(memory)) < 24
    for number, (labels, rows) in enumerate(kept):  # these are not used again
        assert torch.equal(labels, stream[number]["labels"]) and torch.equal(rows, stream[number]["rows"])


class Killed:
    """What the system does to a worker that takes too much memory; before, Pillow warns of a picture."""

    def __call__(self, epoch, chunks, batch, used=None):
        with warnings.catch_warnings(record=True) as shown:
            warnings.warn_explicit("odd metadata", UserWarning, "Image.py", 1, "PIL.Image")
        assert not shown
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_a_lack_of_memory():
    words = r"^DataLoader worker .*/dev/shm.* train\.workers"
    with pytest.raises(ResourceError, match=words), batches(Stream(Order(100, 16, 32, 16), Killed()), 0, 6, 1) as items:
        next(items)


def test_too_few_open_files_for_the_workers_are_told_before_they_start():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (79, before[1]))
    try:
        words = "open files: expected a limit of 80 for 2 workers; found 79; raise it by `ulimit -n 80`"
        with pytest.raises(ResourceError, match=words), batches(Stream(Order(100, 16, 32, 16), Killed()), 0, 6, 2):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_dataset_rows_through_a_transform(tmp_path):
    data = make_dataset(tmp_path / "data")
    rows = np.arange(data.rows("train"))[::-1][:20].copy()
    calls = []

    def transform(seed, picture):
        calls.append(seed)
        return torch.tensor(decode_rgb(picture)).permute(2, 0, 1)

    order, few = Order(20, 1, 16, 16, seed=1), DatasetSource(data, "train", transform, seed=1, rows=rows)
    epoch, chosen = order.slice(1)
    batch = Stream(order, few)[1]
    assert epoch == 1 and batch["rows"].tolist() == rows[chosen].tolist() == few.rows_of(chosen).tolist()
    assert calls == [int(hash_u64(1, "augment", 1, int(row))) for row in rows[chosen]]
    for picture, label, row in zip(batch["pictures"], batch["labels"], batch["rows"], strict=True):
        stored, known = data.picture("train", int(row))
        assert label == known and np.array_equal(picture.permute(1, 2, 0).numpy(), decode_rgb(stored))
    last = Stream(EvalOrder(20, 1, 16), few)[1]
    assert last["weight"].tolist() == [1.0] * 4 + [0.0] * 12 and last["rows"].tolist()[4:] == [-1] * 12
