"""A teacher on clean and on corrupted pictures of "val": k-NN and linear probe of its patch mean.

    python bench/teacher_robust.py TEACHER WEIGHTS DATASET --size PIXELS --patch PIXELS --out FILE \
        --plan ablate/demo_robust

The pictures are the center crops that `mcm-train probe` gives to a student, with the same
corruptions of the plan; the bank of k-NN and the rows of the linear probe are clean. `--size` is
that of the student's views, and `--patch` the student's patch, which black patches follow.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from record import write_results
from torch import Tensor

from cache_tools.dataset import Dataset
from cache_tools.records import config_file, load_toml
from mcm.ablate import Plan
from mcm.backbones import CROP_PCT, Backbone
from mcm.classifiers import knn_accuracy, linear_probe
from mcm.corruptions import Corruption
from mcm.features import Featurizer
from pipeline.teachers import load_teacher


def main() -> None:
    """Probe the teacher, and write one row per corruption."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("weights", type=str)
    parser.add_argument("data", type=Path)
    for option in ("--size", "--patch"):
        parser.add_argument(option, type=int, required=True)
    parser.add_argument("--plan", required=True, help="the plan whose `corrupt` is used")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    teacher = load_teacher(options.teacher, options.weights, options.size)
    corruptions = load_toml(Plan, config_file(options.plan)).corrupt
    embed = SimpleNamespace(patch_size=(options.patch, options.patch))
    model: Any = SimpleNamespace(patch_embed=embed)
    size, kernel = (options.size, options.size), teacher.identity.kernel
    # Mean 0 and std 1: the teacher normalizes its pictures itself.
    backbone = Backbone(model, "", size, (0.0,) * 3, (1.0,) * 3, kernel, CROP_PCT)
    featurizer = Featurizer(backbone, Dataset(options.data).labeled(), 0, 0, quiet=False)

    def encode(pictures_B3HW: Tensor, rows: Any) -> Tensor:
        pixels_BHW3 = (255 * pictures_B3HW).round().byte().permute(0, 2, 3, 1).contiguous()
        return cast(Tensor, teacher.features(pixels_BHW3)[0].float().mean(1))

    (bank,) = featurizer.features("train", [encode])
    parsed = [None, *map(Corruption.parse, corruptions)]
    linear, table = linear_probe(bank, 0), {}
    for name, val in zip(
        ("clean", *corruptions), featurizer.features("val", [encode], None, parsed), strict=True
    ):
        accuracy = float(linear.hits(val).double().mean()) if linear else None
        table[name] = {"knn": knn_accuracy(bank, val), "linear": accuracy}
        print(name, table[name], flush=True)
        write_results(options.out, table)


if __name__ == "__main__":
    main()
