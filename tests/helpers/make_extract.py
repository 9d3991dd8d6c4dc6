"""A tiny real DATASET and CACHE made by the very commands: JPEGs of odd sizes sharded, features of a seeded tower."""

from pathlib import Path

from make_cache import view
from make_teacher import make_teacher
from PIL import Image

from pipeline.config import load_config
from pipeline.extract import Request, extract
from pipeline.shard import shard
from pipeline.worker import WorkerInfo


def make_place(root: Path, rows: int = 72, val_rows: int = 16, refused: int = 0) -> Path:
    """ROOT/pictures, ROOT/dataset in shards of 32 rows, ROOT/clip; `refused` files of train are no pictures."""
    for split, count in (("train", rows), ("val", val_rows)):
        for row in range(count + (refused if split == "train" else 0)):
            folder = root / "pictures" / split / ("odd" if row % 2 else "even")
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(view(split, 0, row)).resize((40 + row % 30, 36 + row % 17))
            if row < count:
                picture.save(folder / f"{row}.jpg", quality=95)
            else:
                (folder / f"{row}.jpg").write_bytes(b"no picture")
    shard(str(root / "pictures"), root / "dataset", rows_per_shard=32, max_refused=0.5)
    make_teacher(root / "clip")
    return root


def request(
    place: Path, cache: Path, source: str = "", worker: tuple[int, int] = (0, 1), device: str = "cpu", **changes: object
) -> Request:
    """What `extract` is asked for: 2 views of 32 px, with ROOT/clip on the CPU."""
    weights = place / "clip" / "open_clip_model.safetensors"
    flags = dict(teacher=f"open_clip:{place / 'clip'}", weights=str(weights), views=2, size=32, batch=16)
    return Request(
        source or str(place / "dataset"), cache, load_config(None, flags | changes), WorkerInfo(*worker, device, 2)
    )


def make_extracted(place: Path, name: str, **changes: object) -> Path:
    """ROOT/NAME, a complete CACHE."""
    extract(request(place, place / name, **changes))
    return place / name
