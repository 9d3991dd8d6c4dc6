"""The figures of one GPU, by one command, without network or weights: steps, extraction, the stream, cached or online.

    python bench/gpu.py --out bench/results/gpu.json [--students B,L,S] [--quick]

Every picture and code is synthetic; students are those of configs/pretrain at 224 px in bf16, teachers have random
weights in fp16. Within nine minutes on an H100; the file is written after every part. Utilisation counts multiply-adds
(forward x 3) against the rate of a large bf16 matrix product, measured here. A part that runs out of memory, or fails,
says so in its row and the rest goes on; one that failed makes the exit code 1. `--quick` runs the same code with tiny
sizes, for the tests.
"""

import argparse
import dataclasses
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from clock import describe, in_turns, peak, reset_peak, seconds
from one_step import OneStep, load_config
from record import write_results
from synthetic import Shape, make_cache, tiny_clip
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache_tools.errors import ResourceError
from mcm.loop import engine
from mcm.stream import Batch
from mcm.targets import loss_fn
from pipeline.teachers import Teacher, load_teacher

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError, ResourceError)  # the last: a worker of the stream was killed
CLIP_B = ("open_clip:ViT-B-16-quickgelu", 224)
CLIP_L = ("open_clip:ViT-L-14-quickgelu", 196)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Student:
    """A student as it is benched; `workers` are those with which the stream feeds it."""

    config: str
    batch: int
    teacher: tuple[str, int]  # and its pictures' side
    shape: Shape
    workers: tuple[int, ...] = (4, 8, 16)
    steps: int = 16
    overrides: tuple[str, ...] = ()


STUDENTS = {
    "B": Student("pretrain/imagenet_vitb16_clipb16", 256, CLIP_B, Shape(4096)),
    "L": Student("pretrain/imagenet_vitl16_clipl14_196", 128, CLIP_L, Shape(4096, channels=1024), (8,), 10),
    "S": Student("pretrain/imagenet_vits16_clipb16", 256, CLIP_B, Shape(4096)),
}


def quick_students(folder: Path) -> dict[str, Student]:
    """One of a single block, its teacher at another size than it."""
    shape = Shape(rows=64, rows_per_shard=64, grid=4, channels=64, pixels=32)
    small = ("student.width=32", "student.depth=1", "student.heads=2", "decoder.depth=1")
    teacher = (tiny_clip(folder / "clip", 28, 7), 28)
    return {"B": Student("pretrain/imagenet_vitb16_clipb16", 16, teacher, shape, (0, 1), 2, small)}


class Bench:
    """The table, and what its parts share."""

    def __init__(self, options: argparse.Namespace, folder: Path, accelerator: Accelerator) -> None:
        self.options, self.folder, self.accelerator = options, folder, accelerator
        self.device = accelerator.device
        self.table: dict[str, Row] = {"where": describe(self.device) | {"cores": len(os.sched_getaffinity(0))}}
        self.failed: list[str] = []
        self.rate = 0.0  # bf16 matrix product, FLOP/s

    def part(self, name: str, work: Callable[[], Row]) -> None:
        """Add a row and write the file."""
        start = time.perf_counter()
        try:
            row = work()
        except OUT_OF_MEMORY as error:
            row = {"out_of_memory": str(error).splitlines()[0]}
        except Exception as error:
            traceback.print_exc()
            row = {"failed": repr(error)}
            self.failed.append(name)
        row["part_s"] = time.perf_counter() - start
        self.table[name] = {key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in row.items()}
        print(f"{name}: {self.table[name]}", flush=True)
        write_results(self.options.out, self.table)

    def matmul(self) -> Row:
        """The rate of a large bf16 matrix product of random numbers."""
        side = 128 if self.options.quick else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        took = in_turns({"product": lambda: a @ b}, self.device, 5, 20)["product"]
        self.rate = 2 * side**3 / took
        return {"side": side, "tflops": self.rate / 1e12}

    def teacher(self, name: str, size: int) -> Row:
        """The forward of extraction on a resident batch; with half weights, what autocast's casts leave to gain."""
        teacher, row = load_teacher(name, "random", size, precision="fp16"), {}
        for batch in (16,) if self.options.quick else (64, 256):
            x = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=self.device)
            row[f"views_per_s_{batch}"] = batch / in_turns({"": lambda x=x: teacher.features(x)}, self.device, 5, 5)[""]
        teacher.tower.half()
        half = batch / in_turns({"": lambda: teacher.features(x)}, self.device, 5, 5)[""]
        return row | {f"half_weights_views_per_s_{batch}": half}

    def student(self, name: str, student: Student) -> None:
        """All parts of one student; its compiled step serves the parts after it."""
        cache = self.folder / f"cache of {student.shape.channels} channels"
        if not cache.exists():
            make_cache(cache, student.shape, "int8")
        kept: dict[str, OneStep] = {}
        for kind, setting in (("eager", "false"), ("compiled", "true")):
            torch._dynamo.reset()  # students share code, and dynamo leaves what varies too often uncompiled
            kept.clear()
            self.accelerator.free_memory()
            config = load_config(student.config, student.batch, [*student.overrides, f"train.compile={setting}"])
            self.part(f"{name} {kind}", lambda config=config: self.resident(student, config, cache, kept))
        if not kept:
            return
        step = kept["step"]
        for workers in student.workers:
            self.part(f"{name} stream, {workers} workers", lambda w=workers: self.stream(student, step, w))
        if name != "S":
            self.part(f"{name} online", lambda: self.online(student, step))
        self.part(f"{name} checkpoint", lambda: step.saving(self.folder / "run"))

    def resident(self, student: Student, config: Any, cache: Path, kept: dict[str, OneStep]) -> Row:
        """A step on a resident batch."""
        step = OneStep(config, cache, self.accelerator)
        flops = 3 * forward_flops(step)
        first = seconds(lambda: step.run(repeat(step.resident), 1), self.device)
        reset_peak(self.device)
        rate = student.batch / step.resident_s(student.steps)
        kept["step"] = step
        return {
            "batch": student.batch,
            "images_per_s": rate,
            "step_ms": 1e3 * student.batch / rate,
            "gflop_per_image": flops / 1e9,
            "utilisation": rate * flops / self.rate,
            "peak_mb": peak(self.device),
            "first_step_s": first,
        }

    def stream(self, student: Student, step: OneStep, workers: int) -> Row:
        """The same step fed by the stream."""
        resident = step.resident_s(student.steps)
        streamed, waited = step.streamed_s(workers, 2 * student.steps)
        return {"images_per_s": student.batch / streamed, "ratio": resident / streamed, "wait_share": waited}

    def online(self, student: Student, step: OneStep) -> Row:
        """The cached step against one whose loss runs the teacher, both fed by the stream; the bound is resident."""
        teacher, own = load_teacher(student.teacher[0], "random", student.teacher[1]), step.loop.job
        pictures = step.resident["pictures"]
        forward = in_turns({"": lambda: features(teacher, pictures)}, self.device, 5, 2)[""]
        resident, workers = step.resident_s(student.steps), min(8, max(student.workers))

        def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
            prediction = wrapped(step.task.inputs(batch), step.task.masks(batch))
            return loss_fn(prediction, step.task.targets(features(teacher, batch["pictures"])))

        cached, _ = step.streamed_s(workers, student.steps)
        step.loop.job = dataclasses.replace(own, loss=loss)
        online, _ = step.streamed_s(workers, student.steps)
        step.loop.job = own
        bound = 1 + forward / resident
        row = {"teacher_ms": 1e3 * forward, "step_ms": 1e3 * resident, "cached_ms": 1e3 * cached}
        return row | {
            "online_ms": 1e3 * online,
            "gain": online / cached,
            "bound": bound,
            "ratio": online / cached / bound,
        }


def forward_flops(step: OneStep) -> int:
    """Floating-point operations of the forward of one picture: two a multiply-add, attention as matrix products."""
    batch = {name: x[:1] if isinstance(x, Tensor) else x for name, x in step.resident.items()}
    plain = type(step.task.model).forward  # below autocast and torch.compile, which would hide what it calls
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        plain(step.task.model, step.task.inputs(batch), step.task.masks(batch))
    return counter.get_total_flops()


def features(teacher: Teacher, pictures_BHW3: Tensor) -> Tensor:
    """The teacher's patch features of a batch on the device, resized there where its pictures are smaller."""
    size = (teacher.identity.height, teacher.identity.width)
    if pictures_BHW3.shape[1:3] != size:
        x_B3HW = pictures_BHW3.permute(0, 3, 1, 2).float()
        x_B3HW = nn.functional.interpolate(x_B3HW, size, mode="bicubic", antialias=True)
        pictures_BHW3 = x_B3HW.clamp(0, 255).round().permute(0, 2, 3, 1)
    return teacher.features(pictures_BHW3)[0]


def main() -> None:
    """Run the parts, the most important first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", default="B,L,S", help="which, in which order")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on the CPU too: for the tests")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as place,
        engine(load_config(STUDENTS["B"].config, 16).train.precision) as accelerator,
    ):
        folder = Path(place)
        students = quick_students(folder) if options.quick else STUDENTS
        bench = Bench(options, folder, accelerator)
        bench.part("matmul", bench.matmul)
        names = [name for name in options.students.split(",") if name in students]
        for name in names[:2]:
            bench.student(name, students[name])
        for teacher in dict.fromkeys(student.teacher for student in students.values()):
            bench.part(f"teacher {Path(teacher[0]).name} at {teacher[1]} px", lambda t=teacher: bench.teacher(*t))
        for name in names[2:]:
            bench.student(name, students[name])
        if bench.failed:
            raise SystemExit(f"failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
