"""The encodings of views: bytes, decoding rate, and the cosine of features to the exact view.

    python bench/views.py --photos FOLDER --weights deit_tiny.safetensors
        --out bench/results/views.json

Views are random resized crops of photographs at 224 px. Features are all tokens of the last layer
of DeiT-tiny.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from record import write_results

from cache_tools.images import decode_rgb, decode_view_into, encode_view
from cache_tools.schema import CropPolicy
from pipeline.teachers import Teacher, load_teacher
from pipeline.views import draw_crop, render

SIZE = 224
ENCODINGS = ["png", *(f"jpeg:{q}:{s}" for q in (98, 95, 92, 85, 75) for s in ("444", "420"))]


def draw_views(folder: Path, rows: int) -> list[np.ndarray]:
    """A random resized crop of each of the first `rows` pictures, uint8 [224, 224, 3]."""
    views = []
    for row, path in enumerate(islice((p for p in sorted(folder.rglob("*")) if p.is_file()), rows)):
        rgb = decode_rgb(path.read_bytes())
        crop = draw_crop(CropPolicy(kind="rrc"), 0, "train", row, 0, *rgb.shape[:2])
        views.append(render(rgb, crop, SIZE, SIZE))
    return views


def features(teacher: Teacher, pictures: np.ndarray) -> torch.Tensor:
    """float32 [rows, N, C]."""
    return torch.cat([teacher.features(part)[0] for part in torch.from_numpy(pictures).split(16)])


def decode_rate(encoded: list[bytes], out: np.ndarray) -> float:
    """Views a second of one core, the best of five passes: the machine has neighbors."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for data, picture in zip(encoded, out, strict=True):
            decode_view_into(data, picture)
        best = min(best, time.perf_counter() - start)
    return len(encoded) / best


def main() -> None:
    """Print the table, a line an encoding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--weights", required=True, help="DeiT-tiny's, or 'random'")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="16 views, two encodings: for the tests"
    )
    arguments = parser.parse_args()
    views = draw_views(arguments.photos, 16 if arguments.quick else arguments.rows)
    teacher = load_teacher("timm:deit_tiny_patch16_224", arguments.weights, device="cpu")
    exact, table = features(teacher, np.stack(views)), []
    for encoding in ENCODINGS[:2] if arguments.quick else ENCODINGS:
        encoded = [encode_view(view, encoding) for view in views]
        out = np.empty((len(views), SIZE, SIZE, 3), np.uint8)
        rate = decode_rate(encoded, out)
        cosine = torch.cosine_similarity(features(teacher, out), exact, dim=-1)
        row = {
            "encoding": encoding,
            "rows": len(views),
            "kilobytes": round(sum(map(len, encoded)) / len(encoded) / 1e3, 1),
            "views_a_second": round(rate),
            "cosine": float(cosine.mean()),
            "cosine_1_percent": float(cosine.quantile(0.01)),
        }
        table.append(row)
        print(
            f"{encoding:<12} {row['kilobytes']:>6} KB  "
            f"{row['views_a_second']:>6} views/s per core  "
            f"cosine {row['cosine']:.4f}, 1 % of tokens below {row['cosine_1_percent']:.3f}",
            flush=True,
        )
    write_results(arguments.out, table)


if __name__ == "__main__":
    main()
