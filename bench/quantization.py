"""The size and the error of each dtype and compression, on real and on difficult features.

    python bench/quantization.py --photos FOLDER --weights deit_tiny.safetensors
        --out bench/results/quantization.json

The columns are bytes per row, relative MSE, cosine and the worst channel. The features are:

* DeiT-tiny on photographs (real features);
* the same with two added channels of 100 times the std of the widest channel;
* the same with two channels at 10, 40 and 100 sigma in one token per picture (massive tokens, which
  large ViTs have);
* CLIP B/16 and L/14 with random weights: real shapes, but no outliers of their own.
"""

import argparse
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_results

from cache_tools.images import decode_rgb
from cache_tools.quantize import CALIBRATION_ROWS, channel_stats, decode, encode
from cache_tools.schema import CropPolicy
from cache_tools.zarr_shards import ArraySpec, shard_writer
from pipeline.teachers import load_teacher
from pipeline.views import draw_crop, render

CHUNK_ROWS = 16
FORMS = [("float16", None), ("float16", "zstd"), ("int8", None), ("int8", "zstd")]


def photographs(folder: Path, rows: int, size: int) -> np.ndarray:
    """Return center crops, uint8 [rows, size, size, 3], of the first pictures; repeat if few."""
    files = list(islice((p for p in sorted(folder.rglob("*")) if p.is_file()), rows))
    views = []
    for row in range(rows):
        rgb = decode_rgb(files[row % len(files)].read_bytes())
        crop = draw_crop(CropPolicy(kind="center"), 0, "train", row, 0, *rgb.shape[:2])
        views.append(render(rgb, crop, size, size))
    return np.stack(views)


def features(teacher: str, weights: str, folder: Path, rows: int) -> np.ndarray:
    """float32 [rows, N, C], computed 16 at a time."""
    tower = load_teacher(teacher, weights, device="cpu")
    pictures = torch.from_numpy(photographs(folder, rows, tower.identity.height))
    return torch.cat([tower.features(part)[0] for part in pictures.split(CHUNK_ROWS)]).numpy()


def wide_channels(x_BNC: np.ndarray, sigma: float) -> np.ndarray:
    """Return `x_BNC` with two off-center channels, `sigma` times as wide as the widest."""
    x = x_BNC.copy()
    widest = x.std((0, 1)).max()
    for channel in (7, 100):
        x[..., channel] = (x[..., channel] / x[..., channel].std() + 2) * sigma * widest
    return x


def massive_tokens(x_BNC: np.ndarray, sigma: float) -> np.ndarray:
    """`x_BNC` with two channels of one token a picture `sigma` of their standard deviations out."""
    x, tokens = x_BNC.copy(), np.arange(len(x_BNC)) % x_BNC.shape[1]
    for channel in (7, 100):
        x[np.arange(len(x)), tokens, channel] += sigma * x_BNC[..., channel].std()
    return x


def stored_bytes(arrays: dict[str, np.ndarray], compress: str | None) -> int:
    """Return the bytes of the shard files of these arrays; only `patch` is compressed."""
    with tempfile.TemporaryDirectory() as folder:
        total = 0
        for name, array in arrays.items():
            rows = len(array)
            spec = ArraySpec(
                name,
                array.shape,
                array.dtype.name,
                CHUNK_ROWS,
                rows,
                compress if name == "patch" else None,
            )
            with shard_writer(Path(folder), spec, 0) as writer:
                for start in range(0, rows, CHUNK_ROWS):
                    writer.append(array[start : start + CHUNK_ROWS])
            total += writer.file.bytes
    return total


def measure(x_BNC: np.ndarray, dtype: str, compress: str | None) -> dict[str, Any]:
    """Return errors on channel-standardized values, with calibration on the first 256 rows."""
    calibration = channel_stats(x_BNC[:CALIBRATION_ROWS])
    arrays = encode(dtype, x_BNC, *calibration)
    decoded = decode(arrays["patch"], arrays.get("scale"), *calibration)
    mean, std = channel_stats(x_BNC)
    z, q = ((part - mean) / std for part in (x_BNC.astype(np.float64), decoded))
    error_C, energy_C = ((z - q) ** 2).mean((0, 1)), (z**2).mean((0, 1))
    error_BNC, largest = (z - q) ** 2, np.argsort(-np.abs(z), axis=-1)[..., 2:]
    rest = (np.take_along_axis(part, largest, -1).sum(-1) for part in (error_BNC, z**2))
    cosine = (z * q).sum(-1) / np.linalg.norm(z, axis=-1) / np.linalg.norm(q, axis=-1)
    return {
        "dtype": dtype,
        "compress": compress or "",
        "bytes_a_row": round(stored_bytes(arrays, compress) / len(x_BNC)),
        "relative_mse": float(error_C.sum() / energy_C.sum()),
        "cosine": float(cosine.mean()),
        "worst_token_cosine": float(cosine.min()),
        "worst_token_mse_but_2_channels": float(np.divide(*rest).max()),
        "worst_channel_mse": float((error_C / energy_C).max()),
    }


def main() -> None:
    """Print the table, one line per feature set, dtype and compression."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--weights", required=True, help="DeiT-tiny's, or 'random'")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help="32 rows of DeiT-tiny alone: for the tests"
    )
    arguments = parser.parse_args()
    rows = 32 if arguments.quick else arguments.rows
    real = features("timm:deit_tiny_patch16_224", arguments.weights, arguments.photos, rows)
    sets = {"DeiT-tiny" if arguments.weights != "random" else "DeiT-tiny (random weights)": real}
    if not arguments.quick:
        sets["DeiT-tiny, 2 channels x 100"] = wide_channels(real, 100)
        sets |= {
            f"DeiT-tiny, tokens at {sigma} sigma": massive_tokens(real, sigma)
            for sigma in (10, 40, 100)
        }
        for name in ("ViT-B-16", "ViT-L-14"):
            few = features(f"open_clip:{name}-quickgelu", "random", arguments.photos, rows // 8)
            sets[f"CLIP {name}, random weights"] = few
    table = []
    for name, x_BNC in sets.items():
        for dtype, compress in FORMS:
            row = {"features": name, "rows": len(x_BNC), **measure(x_BNC, dtype, compress)}
            table.append(row)
            print(
                f"{name:<32} {dtype:<8} {row['compress']:<6} {row['bytes_a_row']:>8} B  "
                f"mse {row['relative_mse']:.2e}  cosine {row['cosine']:.6f}  "
                f"worst token {row['worst_token_mse_but_2_channels']:.1e}  "
                f"channel {row['worst_channel_mse']:.1e}",
                flush=True,
            )
    write_results(arguments.out, table)


if __name__ == "__main__":
    main()
