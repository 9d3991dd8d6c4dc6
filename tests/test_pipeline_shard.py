"""Shards: which pictures get a row, which readers take them, and what a repeated command does."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run, tree_digest
from PIL import Image

from cache_tools.dataset import Dataset
from cache_tools.errors import CorruptionError, IdentityError, Interrupted, TooManyRefused, UsageError
from cache_tools.rng import permutation
from cache_tools.storage import try_lock
from pipeline.listing import list_sources
from pipeline.shard import shard

COMMAND = Path(sys.executable).with_name("mcm-cache")

# The golden outcome of odd-images/ in the test data: these are refused, the other 36 get rows.
REFUSED = {
    "exif/LICENSE": "format",
    "made/n00000004_truncated_header.JPEG": "damaged",
    "made/n00000006_text.JPEG": "format",
    "made/n00000008_184Mpx_bomb.png": "too-large",
    "pillow/16bit.cropped.tif": "format",
    "pillow/broken_data_stream.png": "damaged",
    "pillow/decompression_bomb.gif": "format",
    "pillow/dispose_bgnd_transparency.gif": "format",
    "pillow/hopper.bmp": "format",
    "pillow/hopper.iccprofile.tif": "format",
    "pillow/no_palette.gif": "format",
    "pillow/png_decompression_dos.png": "damaged",
    "pillow/tiff_strip_cmyk_jpeg.tif": "format",
    "pillow/transparent.gif": "format",
    "pillow/truncated_end_chunk.png": "damaged",
    "pillow/truncated_jpeg.jpg": "damaged",
}


def picture(seed: int, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, ("PNG", "JPEG", "WEBP")[seed % 3])
    return buffer.getvalue()


def make_source(root: Path, train: int = 40, val: int = 10, bad: int = 0, size: int = 32) -> Path:
    for split, rows in (("train", train), ("val", val)):
        for i in range(rows):
            path = root / split / f"class{i % 3}" / f"{i:03d}.img"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(i, size) if split == "val" or i >= bad else b"GIF89a no picture")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("shard")
    shard(make_source(root / "source"), root / "out", rows_per_shard=16, seed=3)
    return root


def test_rows_are_the_listing_in_the_order_of_the_seed(made):
    dataset, sources = Dataset(made / "out"), list_sources(made / "source")
    assert dataset.classes == ("class0", "class1", "class2")
    for split, candidates in sources.splits.items():
        order = permutation(len(candidates), 3, f"shard/{split}")
        assert dataset.rows(split) == len(candidates)
        for row, position in enumerate(order):
            item = candidates[int(position)]
            assert dataset.picture(split, row) == (item.path.read_bytes(), item.label)
        assert dataset.labels(split).tolist() == [candidates.labels[i] for i in order]
    assert not (made / "out" / ".run" / "shard").exists()


@pytest.mark.filterwarnings("ignore")
def test_plain_webdataset_reads_them(made):
    dataset = Dataset(made / "out")
    samples = list(dataset.webdataset("train"))
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(40)]
    for row, sample in enumerate(samples):
        data = next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
        assert (data, int(sample["cls"])) == dataset.picture("train", row)
        assert (made / "source" / json.loads(sample["json"])["source"]).read_bytes() == data


@pytest.mark.filterwarnings("ignore")
def test_timm_reads_them(made):
    from timm.data import create_dataset

    dataset, root = Dataset(made / "out"), str(made / "out" / "train")
    read = create_dataset("wds/", root=root, split="train", is_training=False, batch_size=8)
    found = sorted((np.asarray(picture).tobytes(), label) for picture, label in read)
    expected = [dataset.picture("train", row) for row in range(40)]
    rgb = [(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes(), label) for data, label in expected]
    assert len(read) == 40 and found == sorted(rgb)


def test_every_odd_picture_ends_as_written(shared_data, tmp_path):
    shard(shared_data / "odd-images", tmp_path / "out", max_refused=1)
    lines = [json.loads(line) for line in (tmp_path / "out/train/quarantine.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in lines} == REFUSED
    assert all(line["detail"] for line in lines)
    dataset, candidates = Dataset(tmp_path / "out"), list_sources(shared_data / "odd-images").splits["train"]
    kept = [item.path for item in map(candidates.__getitem__, range(len(candidates))) if item.name not in REFUSED]
    rows = sorted(dataset.picture("train", row) for row in range(dataset.rows("train")))
    assert len(kept) == 36 and [row[0] for row in rows] == sorted(path.read_bytes() for path in kept)


def test_tars_can_be_sharded_again(made, tmp_path):
    shard(made / "out" / "train", tmp_path / "again", rows_per_shard=16)
    first, again = Dataset(made / "out"), Dataset(tmp_path / "again")
    assert again.classes == ("0", "1", "2")
    rows = [sorted(dataset.picture("train", row) for row in range(40)) for dataset in (first, again)]
    assert rows[0] == rows[1]


def test_too_many_refused_stops_and_resumes_with_a_larger_budget(tmp_path, capsys):
    source, out = make_source(tmp_path / "source", bad=6), tmp_path / "out"
    with pytest.raises(TooManyRefused, match=r"quarantine\.jsonl: expected at most 4 of 40 .* found 6 format") as error:
        shard(source, out, rows_per_shard=16, max_refused=0.1)
    assert error.value.exit_code == 3
    assert len((out / "train" / "quarantine.jsonl").read_text().splitlines()) == 6
    assert not (out / "dataset.json").exists()
    record = shard(source, out, rows_per_shard=16, max_refused=0.2)
    assert (record.splits["train"].rows, record.splits["train"].refused) == (34, 6)
    assert [entry.rows for entry in record.splits["train"].shards] == [16, 16, 2]
    shard(source, tmp_path / "straight", rows_per_shard=16, max_refused=1)
    assert tree_digest(out) == tree_digest(tmp_path / "straight")


def test_refused_pictures_behind_the_last_full_shard_make_no_empty_one(tmp_path):
    source = make_source(tmp_path / "source", train=33)
    candidates = list_sources(source).splits["train"]
    last = int(permutation(33, 0, "shard/train")[32])
    candidates[last].path.write_bytes(b"")
    record = shard(source, tmp_path / "out", rows_per_shard=16, max_refused=0.1)
    assert [entry.rows for entry in record.splits["train"].shards] == [16, 16]
    assert record.splits["train"].refused == 1
    assert not (tmp_path / "out/train/000002.tar").exists()


def test_a_split_without_a_good_picture_is_refused(tmp_path):
    with pytest.raises(UsageError, match="all were refused"):
        shard(make_source(tmp_path / "source", bad=40), tmp_path / "out", max_refused=1)


def test_a_finished_dataset_knows_its_request(made, tmp_path, capsys):
    source, out = made / "source", made / "out"
    before = tree_digest(out)
    shard(source, out, rows_per_shard=16, seed=3)
    assert "complete" in capsys.readouterr().out
    with pytest.raises(IdentityError, match=r"seed: 4 != 3"):
        shard(source, out, rows_per_shard=16, seed=4)
    with pytest.raises(IdentityError, match=r"rows_per_shard: 32 != 16"):
        shard(source, out, rows_per_shard=32, seed=3)
    with pytest.raises(IdentityError, match=r"splits.train.listing_sha256"):
        shard(make_source(tmp_path / "other", train=41), out, rows_per_shard=16, seed=3)
    assert tree_digest(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows_per_shard": 17}, "multiple of 16"),
        ({"max_refused": 2.0}, "from 0 to 1"),
        ({"seed": -1}, "positive"),
        ({"out": "source/out"}, "outside its source"),
        ({"out": "."}, "new or empty"),
        ({"out": "source/val/class0/000.img"}, "found a file"),
    ],
)
def test_impossible_requests_write_nothing(made, tmp_path, monkeypatch, arguments, message):
    make_source(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    before = tree_digest(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        shard("source", **{"out": "out", **arguments})
    assert tree_digest(tmp_path / "source") == before
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_second_process_stops_at_the_lock(made):
    lock = made / "out" / ".run" / "shard.lock"
    with try_lock(lock), pytest.raises(UsageError, match=r"shard\.lock: another process"):
        shard(made / "source", made / "out", rows_per_shard=16, seed=3)


def test_a_signal_stops_behind_a_shard_and_damage_is_named(made, tmp_path, monkeypatch):
    from pipeline import shard_writer as module

    def publish_and_stop(path, data, publish=module.publish):
        publish(path, data)
        if path.name == "000000.json":
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("cache_tools.storage.settle", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="after 0 shards"):
            shard(made / "source", out, rows_per_shard=16, seed=3)
    assert not list(out.rglob("*.tar"))
    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", publish_and_stop)
        with pytest.raises(Interrupted, match="after 1 shards"):
            shard(made / "source", out, rows_per_shard=16, seed=3)
    whole = (out / "train/000000.tar").read_bytes()
    (out / "train/000000.tar").write_bytes(whole[:-512])
    with pytest.raises(CorruptionError, match=r"000000\.tar: expected"):
        shard(made / "source", out, rows_per_shard=16, seed=3)
    (out / "train/000000.tar").write_bytes(whole)
    with pytest.raises(IdentityError, match=r"seed: 0 != 3"):
        shard(made / "source", out, rows_per_shard=16, seed=0)
    out = out.rename(tmp_path / "moved")  # its progress moves with it
    shard(made / "source", out, rows_per_shard=16, seed=3)
    assert tree_digest(out) == tree_digest(made / "out")
    (out / "train/000000.tar").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("cache_tools.storage.settle", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="stopped; the same command resumes"):
            shard(made / "source", out, rows_per_shard=16, seed=3)
    assert not (out / "train/000000.tar").exists()
    shard(made / "source", out, rows_per_shard=16, seed=3)
    assert tree_digest(out) == tree_digest(made / "out")


def test_the_command_ends_in_one_line_and_the_right_code(tmp_path):
    source, out = make_source(tmp_path / "source", bad=6), tmp_path / "out"
    said = run("mcm-cache", "shard", source, out, expect=3)
    assert "error: " in said and f"resume by `mcm-cache shard SOURCE {out}` with a --max-refused above" in said
    for words in ([tmp_path / "none", out], [source, out, "--train", source], [out], [source, "x", out]):
        said = run("mcm-cache", "shard", *words, expect=2)
        assert "expected an ImageFolder" in said or "expected SOURCE and DATASET, or DATASET with --train" in said


def test_the_command_takes_a_source_per_split_or_a_share(tmp_path):
    source = make_source(tmp_path / "source", train=30)
    run("mcm-cache", "shard", tmp_path / "a", "--val", source / "val", "--train", source / "train")
    assert [Dataset(tmp_path / "a").rows(split) for split in ("train", "val")] == [30, 10]
    run("mcm-cache", "shard", source / "train", tmp_path / "b", "--val", "0.4")
    assert 30 == sum(Dataset(tmp_path / "b").rows(split) for split in ("train", "val"))


def test_a_script_shards_without_the_guard_of_multiprocessing(tmp_path):
    """Its decoding processes do not run it again: they would import torch, or shard without end."""
    make_source(tmp_path / "source", train=2, val=1)
    script = tmp_path / "script.py"
    script.write_text("print('begun')\nfrom pipeline.shard import shard\nshard('source', 'out', workers=2)\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("begun") == 1 and not done.stderr


def test_a_refusal_is_written_in_the_same_bytes_each_time(tmp_path):
    make_source(tmp_path / "source", train=4, val=1)
    (tmp_path / "source/train/class0/000.img").write_bytes(picture(0)[:30])  # Pillow's error holds an address
    for name in ("a", "b"):
        shard(tmp_path / "source", tmp_path / name, max_refused=1)
    assert tree_digest(tmp_path / "a") == tree_digest(tmp_path / "b")
    detail = json.loads((tmp_path / "a/train/quarantine.jsonl").read_text())["detail"]
    assert detail == "cannot identify image file"
