"""The parts of a pre-training step beside its matrix products: stream, masks, target, saving.

    python bench/step.py --out bench/results/step.json [--config pretrain/NAME] [--set KEY=VALUE]
        [--quick]

The step is that of the loop (mcm.loop.Loop.step). Bars: resident over streamed >= 0.97 where
compute dominates, masks and fills <= 3 % of the step, saving <= 2 % of a run.
On a GPU the student is ViT-B/16 in bf16 with 256 rows. On a CPU it is a ViT-S/16 of 4 blocks in
float32 with 32 rows. Data are synthetic: 196 x 768 features and views of 224 px. Compared variants
alternate.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from clock import describe, in_turns
from one_step import OneStep, first_batch, load_config
from record import write_results
from synthetic import Shape, make_cache

from cache_tools.cache import Cache
from mcm.engine import engine
from mcm.masking import apply_fill
from mcm.sampler import EvalOrder

DTYPES = ("int8", "float16")
Row = dict[str, Any]


class Bench:
    """The parts of the table; each is a method that returns its row."""

    def __init__(self, options: argparse.Namespace, folder: Path, accelerator: Accelerator) -> None:
        self.options, self.folder, self.accelerator = options, folder, accelerator
        self.device = accelerator.device
        self.own = self.build()
        self.step_s = self.own.resident_s(options.steps)

    def build(self, *overrides: str) -> OneStep:
        """A step of the configuration, changed."""
        config = load_config(
            self.options.config, self.options.batch, [*self.options.set, *overrides]
        )
        return OneStep(config, self.folder / "int8", self.accelerator)

    def stream(self) -> Row:
        """The same step on a resident batch and fed by the stream."""
        count, workers = self.options.steps, self.options.workers
        pairs = [
            (self.own.resident_s(count), *self.own.streamed_s(workers, count))
            for _ in range(self.options.rounds)
        ]
        resident, streamed, waited = (median(column) for column in zip(*pairs, strict=True))
        ratio = median(one / other for one, other, _ in pairs)
        row = {
            "resident_ms": 1e3 * resident,
            "streamed_ms": 1e3 * streamed,
            "ratio": ratio,
            "wait_share": waited,
        }
        return row | {"images_per_s": self.options.batch / streamed, "workers": workers}

    def masks(self) -> Row:
        """Measure masks and fills: the step against mask.mode none, and the operations alone."""
        plain, count = self.build("mask.mode=none"), self.options.steps
        works = {
            "masked": partial(self.own.resident_s, count),
            "none": partial(plain.resident_s, count),
        }
        rounds = [
            {name: work() for name, work in works.items()} for _ in range(self.options.rounds)
        ]
        masked, none = (median(one[name] for one in rounds) for name in works)
        ops = in_turns({"ops": self.mask_ops()}, self.device, self.options.rounds, 5)["ops"]
        shares = {
            "share": median(1 - one["none"] / one["masked"] for one in rounds),
            "ops_share": ops / self.step_s,
        }
        return {"masked_ms": 1e3 * masked, "none_ms": 1e3 * none, "ops_ms": 1e3 * ops} | shares

    def mask_ops(self) -> Callable[[], object]:
        """What a mask adds to a step, forward and backward: gather from the pool, and two fills."""
        model, task, batch = self.own.objective.model, self.own.objective, self.own.resident
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        shape = (self.options.batch, model.encoder.patch_embed.num_patches, model.encoder.embed_dim)
        x_BND = torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)
        fills = [model.encoder_fill, model.decoder_fill]

        def work() -> object:
            mask = model.mask(task.masks(batch))
            filled = [apply_fill(x_BND, mask, fill) for fill in fills]
            return torch.autograd.grad(filled, [x_BND, *fills], [x_BND.detach()] * len(filled))

        return work

    def target(self, dtype: str) -> Row:
        """Codes to the normalized target, alone, of the whole step."""
        units = Cache(self.folder / dtype).complete_units("train")
        order = EvalOrder(self.options.batch, 16, self.options.batch)
        batch = first_batch(self.own.objective.stream(order, units), self.device)
        works = {"target": lambda: self.own.objective.target(batch)}
        took = in_turns(works, self.device, self.options.rounds, 5)["target"]
        return {"ms": 1e3 * took, "share": took / self.step_s}


def parse() -> argparse.Namespace:
    """The command line, with what it leaves out chosen by the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    gpu = torch.cuda.is_available()
    parser.add_argument(
        "--config", default=f"pretrain/imagenet_{'vitb16' if gpu else 'vits16'}_clipb16"
    )
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="as in mcm-train")
    parser.add_argument("--batch", type=int, default=256 if gpu else 32)
    parser.add_argument("--workers", type=int, default=8 if gpu else 1)
    parser.add_argument("--steps", type=int, default=20 if gpu else 4, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny student: for the tests")
    options = parser.parse_args()
    options.set = options.set or ([] if gpu else ["student.depth=4"])
    if options.quick:
        options.config, options.set = (
            "pretrain/demo",
            ["student.depth=1", "student.width=32", "decoder.depth=1"],
        )
        options.batch, options.workers, options.steps, options.rounds = 32, 0, 2, 1
    return options


def main() -> None:
    """Make the caches, measure part by part, print."""
    options = parse()
    tiny = {"rows_per_shard": 64, "grid": 4, "channels": 64, "pixels": 32} if options.quick else {}
    with (
        tempfile.TemporaryDirectory() as place,
        engine(load_config(options.config, 16).train.precision) as accelerator,
    ):
        folder = Path(place)
        for dtype in DTYPES:
            make_cache(
                folder / dtype,
                Shape(rows=options.batch * (4 if dtype == "int8" else 1), **tiny),
                dtype,
            )
        bench = Bench(options, folder, accelerator)
        parts: dict[str, Callable[[], Row]] = {
            "stream": bench.stream,
            "masks": bench.masks,
            **{f"target {dtype}": partial(bench.target, dtype) for dtype in DTYPES},
            "saving": lambda: bench.own.saving(folder / "run"),
        }
        settings = {"config": options.config, "set": options.set, "batch": options.batch}
        table: dict[str, Row] = {
            "where": describe(bench.device) | settings | {"steps": options.steps}
        }
        for name, part in parts.items():
            found = part()
            table[name] = {
                key: round(x, 4) if isinstance(x, float) else x for key, x in found.items()
            }
            print(f"{name}: {table[name]}", flush=True)
            write_results(options.out, table)


if __name__ == "__main__":
    main()
