"""The parts of the GPU benchmark: ceilings, steps, online teachers, extraction, a real command.

Students are those of configs/pretrain at 224 px in bf16; teachers have random weights.
Utilization is 3 times the operations of the forward per second, divided by the measured rate of a
bf16 matrix product on the same machine.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from clock import describe, in_turns, peak, reset_peak, seconds
from one_step import OneStep, load_config
from record import write_results
from synthetic import Shape, make_cache, make_dataset, pictures, tiny_clip
from torch import Tensor, nn

from cache_tools.records import config_file, load_toml, write_toml
from mcm.ablate import Plan
from mcm.engine import engine
from mcm.memory import forward_macs
from mcm.objective import loss_fn
from mcm.stream import Batch
from pipeline.teachers import Teacher, load_teacher

CLIP_B = ("open_clip:ViT-B-16-quickgelu", 224)
CLIP_L = ("open_clip:ViT-L-14-quickgelu", 196)
KINDS = {  # of a kernel, by a piece of its name; the first that fits
    "attention": ("sdpa", "flash", "fmha", "cudnn::fusion"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
    "optimizer": ("multi_tensor",),
    "copies": ("memcpy", "memset"),
    "elementwise": ("triton", "elementwise", "reduce", "layer_norm", "index", "vectorized"),
}
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Student:
    """A measured student: configuration, rows per step, steps per measurement, cache shape."""

    config: str
    batch: int
    steps: int
    shape: Shape
    overrides: tuple[str, ...] = ()


STUDENTS = {
    "B": Student("pretrain/imagenet_vitb16_clipb16", 256, 16, Shape(4096)),
    "L": Student("pretrain/imagenet_vitl16_clipl14_196", 256, 8, Shape(2048, channels=1024)),
    "S": Student("pretrain/imagenet_vits16_clipb16", 512, 16, Shape(4096)),
}
TINY = ("student.width=32", "student.depth=1", "student.heads=2", "decoder.depth=1")
QUICK = Student("pretrain/imagenet_vitb16_clipb16", 16, 2, Shape(64, 64, 4, 64, 32), TINY)


SCIENCE = "ablate/imagenette_vitb16_112px"
QUICK_SCIENCE = (*TINY, "schedule.epochs=2", "schedule.warmup_epochs=1", "train.global_batch=16")
QUICK_SCIENCE += ("train.micro_batch=16", "train.precision=fp32", "train.workers=0")


def run(name: str, out: Path, quick: bool, data: Path | None) -> None:
    """Run one part in a temporary folder; exit with 1 if one of its rows failed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        engine("bf16" if torch.cuda.is_available() else "fp32") as accelerator,
    ):
        part = Part(name, out, Path(folder), accelerator, quick, data)
        works: dict[str, Callable[[], None]] = {
            "machine": part.machine,
            "online": part.online,
            "extract": part.extract,
            "road": part.road,
            "science": part.science,
            **{student: lambda s=student: part.student(s) for student in STUDENTS},
            **{f"compile_{student}": lambda s=student: part.compile(s) for student in STUDENTS},
        }
        works[name]()
    if part.failed:
        raise SystemExit(f"{name}: failed: {', '.join(part.failed)}")


class Part:
    """The rows of one part; the JSON file is written after every row."""

    def __init__(
        self, name: str, out: Path, folder: Path, accelerator: Any, quick: bool, data: Path | None
    ) -> None:
        self.name, self.out, self.folder, self.data = name, out, folder, data
        self.accelerator, self.quick = accelerator, quick
        self.device: torch.device = accelerator.device
        self.file, self.failed = out / f"{name}.json", []
        self.table: dict[str, Row] = {
            "where": describe(self.device) | {"cores": len(os.sched_getaffinity(0))}
        }
        if name == "machine" and self.file.exists():  # measured again last, on a warm card
            self.table = json.loads(self.file.read_text())["table"]

    def row(self, name: str, work: Callable[[], Row]) -> None:
        """Add a row; one that fails says so, and the rest goes on."""
        start = time.perf_counter()
        try:
            found = work()
        except Exception as error:
            traceback.print_exc()
            found = {"failed": repr(error).splitlines()[0][:300]}
            self.failed.append(name)
        found["row_s"] = time.perf_counter() - start
        self.table[name] = {
            key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in found.items()
        }
        print(f"{self.name}: {name}: {self.table[name]}", flush=True)
        write_results(self.file, self.table)

    def machine(self) -> None:
        """The ceilings of this machine."""
        self.row("ceilings again" if "ceilings" in self.table else "ceilings", self.ceilings)

    def ceilings(self) -> Row:
        """Measure a bf16 matrix product, a device copy (bytes read and written), a pinned copy."""
        side, mega = (128, 1) if self.quick else (8192, 1024)
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        x = torch.empty(mega * 2**20, dtype=torch.uint8, device=self.device)
        y, is_cuda = torch.empty_like(x), self.device.type == "cuda"
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=is_cuda)
        works = {
            "product": lambda: a @ b,
            "copy": lambda: y.copy_(x),
            "h2d": lambda: x.copy_(host, non_blocking=True),
        }
        took = in_turns(works, self.device, 5, 10)
        return {
            "matmul_tflops": 2 * side**3 / took["product"] / 1e12,
            "copy_tb_per_s": 2 * x.nbytes / took["copy"] / 1e12,
            "h2d_gb_per_s": x.nbytes / took["h2d"] / 1e9,
            "cudnn": torch.backends.cudnn.version(),
            "torch": torch.__version__,
            "shm_gb": shutil.disk_usage("/dev/shm").total / 1e9,
        }

    def rate(self) -> float:
        """FLOP/s of a matrix product, as the part `machine` found it."""
        ceilings = json.loads((self.out / "machine.json").read_text())["table"]["ceilings"]
        return 1e12 * float(ceilings["matmul_tflops"])

    def build(
        self, student: Student, *overrides: str, compiled: bool = True, batch: int = 0
    ) -> OneStep:
        """A step of a student; its cache is made at the first call."""
        cache = self.folder / f"{student.shape.channels} channels"
        if not cache.exists():
            make_cache(cache, student.shape, "int8")
        torch._dynamo.reset()  # models share code; dynamo stops compiling code that varies
        self.accelerator.free_memory()
        chosen = [
            *student.overrides,
            f"train.compile={str(compiled and not self.quick).lower()}",
            *overrides,
        ]
        return OneStep(
            load_config(student.config, batch or student.batch, chosen), cache, self.accelerator
        )

    def resident(self, step: OneStep, steps: int) -> Row:
        """A step on a resident batch: median of three measurements."""
        flops = 3 * forward_flops(step)
        first = seconds(self.first_step(step), self.device)
        reset_peak(self.device)
        took = median(step.resident_s(steps) for _ in range(3))
        rate = step.batch / took
        return {
            "batch": step.batch,
            "step_ms": 1e3 * took,
            "images_per_s": rate,
            "gflop_per_image": flops / 1e9,
            "utilization": rate * flops / self.rate(),
            "peak_mb": peak(self.device),
            "first_step_s": first,
        }

    def student(self, name: str) -> None:
        """The step resident, profiled and fed by the stream, and a checkpoint."""
        student = QUICK if self.quick else STUDENTS[name]
        kept: dict[str, OneStep] = {}

        def measured(label: str, **build: Any) -> Row:
            kept.clear()
            kept[label] = self.build(student, **build)
            return self.resident(kept[label], student.steps)

        if name == "B":
            self.row("eager", lambda: measured("eager", compiled=False))
        self.row("compiled", lambda: measured("compiled"))
        if not kept:
            return
        (step,) = kept.values()
        if self.device.type == "cuda":
            self.row("profile", lambda: self.profile(step, self.out / f"profile_{name}.txt"))
        if name != "L":
            for workers in (0, 1) if self.quick else (8, 12):
                self.row(
                    f"stream, {workers} workers",
                    lambda w=workers: self.stream(step, w, student.steps),
                )
        self.row("checkpoint", lambda: step.saving(self.folder / "run"))

    def compile(self, name: str) -> None:
        """Compile a student, and with B the teachers, into the compiler's cache for other parts."""
        student = QUICK if self.quick else STUDENTS[name]
        self.row(
            "student", lambda: {"s": seconds(self.first_step(self.build(student)), self.device)}
        )
        for teacher in (CLIP_B, CLIP_L) if name == "B" and not self.quick else ():
            self.row(
                teacher[0],
                lambda t=teacher: {"s": seconds(compiled_teacher(*t, student.batch), self.device)},
            )

    def first_step(self, step: OneStep) -> Callable[[], None]:
        """A function that takes one step."""
        return lambda: step.run(repeat(step.resident), 1)

    def stream(self, step: OneStep, workers: int, steps: int) -> Row:
        """The same step fed by the stream, with the next batch copied ahead and without."""
        resident = step.resident_s(steps)
        plain, _ = step.streamed_s(workers, steps, ahead=False)
        streamed, waited = step.streamed_s(workers, 2 * steps)
        row = {
            "images_per_s": step.batch / streamed,
            "ratio": resident / streamed,
            "wait_share": waited,
        }
        return row | {"ratio_without_side_stream": resident / plain}

    def profile(self, step: OneStep, file: Path) -> Row:
        """Return the share of GPU time per kind of kernel over three steps; write a file."""
        with torch.profiler.profile() as profile:
            step.run(repeat(step.resident), 3)
        kernels = [
            e for e in profile.key_averages() if e.self_device_time_total and "#" not in e.key
        ]
        kernels = [e for e in kernels if str(e.device_type).endswith("CUDA")]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in kernels)
        shares = dict.fromkeys((*KINDS, "other"), 0.0)
        for event in kernels:
            name = event.key.lower()
            kind = next(
                (kind for kind, pieces in KINDS.items() if any(p in name for p in pieces)), "other"
            )
            shares[kind] += event.self_device_time_total / total
        lines = [
            f"{e.self_device_time_total / 3e3:9.3f} ms {e.count // 3:5} x  {e.key[:150]}"
            for e in kernels[:60]
        ]
        file.write_text("\n".join(lines) + "\n")
        attention = next(
            (event.key for event in kernels if "sdpa" in event.key or "flash" in event.key),
            "none seen",
        )
        return {"gpu_ms": total / 3e3, **shares, "attention_kernel": attention[:100]}

    def online(self) -> None:
        """Compare the cached step of ViT-B with a step that runs the teacher."""
        own, workers = QUICK if self.quick else STUDENTS["B"], 0 if self.quick else 8
        wide = dataclasses.replace(own, shape=dataclasses.replace(own.shape, channels=1024))
        pairs = {"B/16": (own, *CLIP_B), "L/14 at 196 px": (wide, *CLIP_L)}
        if self.quick:
            pairs = {"tiny": (own, tiny_clip(self.folder / "clip", 28, 7), 28)}
        for name, (student, teacher, size) in pairs.items():
            step = self.build(student)
            resident = step.resident_s(student.steps)
            cached, _ = step.streamed_s(workers, student.steps)
            for kind in ("eager teacher",) if self.quick else ("eager teacher", "compiled teacher"):
                work = (
                    step,
                    resident,
                    cached,
                    workers,
                    student.steps,
                    teacher,
                    size,
                    kind == "compiled teacher",
                )
                self.row(f"{name}, {kind}", lambda work=work: one_online(*work))

    def extract(self) -> None:
        """The teacher's forward, and `mcm-cache extract` itself with one process and with many."""
        name, size = (tiny_clip(self.folder / "clip"), 32) if self.quick else CLIP_B
        self.row("forward", lambda: self.forward(name, size))
        rows, per_shard, many = (
            (128, 64, 2) if self.quick else (7168, 128, max(1, len(os.sched_getaffinity(0)) - 2))
        )
        dataset = make_dataset(self.folder, list(pictures(None, 32)), rows, per_shard).path
        flags = ["--teacher", name, "--weights", "random", "--views", "4", "--size", str(size)]
        for label, processes, seconds_s in (("1 process", 1, 25), ("many processes", many, 120)):
            work = (dataset, self.folder / label, flags, processes, seconds_s)
            self.row(label, lambda work=work: extraction(*work))

    def forward(self, name: str, size: int) -> Row:
        """Views per second of the teacher alone, from pictures on the device; compiled too."""
        teacher, found = load_teacher(name, "random", size), {}
        for batch in (16,) if self.quick else (64, 256):
            x = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=self.device)
            found[f"views_per_s_{batch}"] = (
                batch / in_turns({"": lambda x=x: teacher.features(x)}, self.device, 3, 5)[""]
            )
        if not self.quick:
            teacher.tower.compile()
            compiled = in_turns({"": lambda: teacher.features(x)}, self.device, 3, 5)[""]
            found[f"compiled_views_per_s_{batch}"] = batch / compiled
        return found

    def road(self) -> None:
        """Run `mcm-train pretrain` of ViT-S as a user would; stop it by SIGTERM and restart it."""
        student = QUICK if self.quick else STUDENTS["S"]
        make_cache(self.folder / "cache", student.shape, "int8")
        epochs, precision = (150, "fp32") if self.quick else (40, "bf16")
        chosen = [
            *student.overrides,
            f"schedule.epochs={epochs}",
            "schedule.warmup_epochs=1",
            "train.log_steps=4",
        ]
        chosen += [f"train.global_batch={student.batch}", f"train.micro_batch={student.batch}"]
        chosen += [
            f"train.precision={precision}",
            f"train.workers={0 if self.quick else 8}",
            "train.compile=false",
        ]
        line = [
            "pretrain",
            student.config,
            "--cache",
            self.folder / "cache",
            "--out",
            self.folder / "run",
        ]
        line += [word for key in chosen for word in ("--set", key)]
        self.row("first command", lambda: command_until(line, self.folder / "run", stop_after=2))
        self.row("second command", lambda: command_until(line, self.folder / "run"))

    def science(self) -> None:
        """Run a pre-registered plan by `mcm-train ablate`, in several processes on one card."""
        plan, data = load_toml(Plan, config_file(SCIENCE)), self.data
        if self.quick:
            small = {"set": (*plan.set, *QUICK_SCIENCE), "seeds": (0,), "lr": (), "corrupt": ()}
            few = {name: plan.rows[name] for name in ("none, depth 0", "channel .25")}
            plan, data = plan.model_copy(update=small | {"rows": few}), tiny_science(self.folder)
        if data is None:
            raise SystemExit(f"science: expected --data DATA, as configs/{SCIENCE}.toml prepares")
        file, out = self.folder / "plan.toml", self.out / "science"
        file.write_text(write_toml(plan))
        line = [sys.executable, "-c", "from mcm.cli import app; app()", "ablate", str(file)]
        line += ["--cache", str(data / "cache"), "--data", str(data / "dataset")]
        line += ["--out", str(out), "--workers", "0" if self.quick else "3"]
        processes = [subprocess.Popen(line) for _ in range(2 if self.quick else 4)]
        self.failed += [f"ablate, exit {code}" for code in (p.wait() for p in processes) if code]
        results = json.loads((out / "results.json").read_text())
        for row in results["rows"]:
            means = {column: fmean(values) for column, values in row["values"].items()}
            self.row(row["name"], lambda row=row, means=means: means | {"mark": row["mark"]})


def tiny_science(folder: Path) -> Path:
    """Return a folder with a `dataset` of two classes, and a `cache` of a tiny CLIP's features."""
    for number, picture in enumerate(pictures(None, 64, 32, 32)):
        name = f"{'val' if number % 4 == 0 else 'train'}/{number // 4 % 2}/{number}.jpg"
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pictures" / name).write_bytes(picture)
    program = [sys.executable, "-c", "from pipeline.cli import app; app()"]
    dataset, cache = folder / "dataset", folder / "cache"
    flags = ["--teacher", tiny_clip(folder / "clip"), "--weights", "random", "--views", "1"]
    for words in (["shard", folder / "pictures", dataset], ["extract", dataset, cache, *flags]):
        size = ["--size", "32", "--set", "patch=8"] if words[0] == "extract" else []
        subprocess.run([*program, *map(str, words), *size], check=True)
    return folder


def forward_flops(step: OneStep) -> int:
    """Return the floating-point operations of the forward of one picture, two per multiply-add.

    Attention counts as matrix products.
    """
    return 2 * forward_macs(step.objective.model, step.resident["pictures"][:1])


def one_online(
    step: OneStep,
    resident: float,
    cached: float,
    workers: int,
    steps: int,
    name: str,
    size: int,
    compiled: bool,
) -> Row:
    """Measure a step whose loss runs the teacher.

    `bound` is 1 + t_teacher / t_step, both measured on resident batches.
    """
    teacher, own = load_teacher(name, "random", size), step.loop.job
    if compiled:
        teacher.tower.compile()
    forward = in_turns(
        {"": lambda: features(teacher, step.resident["pictures"])}, step.device, 3, 3
    )[""]

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        prediction = wrapped(batch["pictures"], step.objective.masks(batch))
        return loss_fn(prediction, step.objective.targets(features(teacher, batch["pictures"])))

    step.loop.job = dataclasses.replace(own, loss=loss)
    online, _ = step.streamed_s(workers, steps)
    step.loop.job = own
    bound = 1 + forward / resident
    found = {"teacher_ms": 1e3 * forward, "step_ms": 1e3 * resident, "cached_ms": 1e3 * cached}
    gain = online / cached
    return found | {"online_ms": 1e3 * online, "gain": gain, "bound": bound, "ratio": gain / bound}


def compiled_teacher(name: str, size: int, batch: int) -> Callable[[], object]:
    """Return a function that computes the features of a batch of 224 px by a compiled teacher."""
    teacher = load_teacher(name, "random", size)
    teacher.tower.compile()
    pictures_BHW3 = torch.zeros(batch, 224, 224, 3, dtype=torch.uint8, device=teacher.device)
    return lambda: features(teacher, pictures_BHW3)


def features(teacher: Teacher, pictures_BHW3: Tensor) -> Tensor:
    """Return the teacher's patch features of a batch on the device; resize pictures if needed."""
    size = (teacher.identity.height, teacher.identity.width)
    if pictures_BHW3.shape[1:3] != size:
        x_B3HW = pictures_BHW3.permute(0, 3, 1, 2).float()
        x_B3HW = nn.functional.interpolate(x_B3HW, size, mode="bicubic", antialias=True)
        pictures_BHW3 = x_B3HW.clamp(0, 255).round().permute(0, 2, 3, 1).to(torch.uint8)
    return teacher.features(pictures_BHW3)[0]


def extraction(dataset: Path, cache: Path, flags: list[str], processes: int, limit_s: float) -> Row:
    """Measure `mcm-cache extract` in views per second, from its first to its last commit.

    The extraction is stopped after `limit_s`.
    """
    program = [sys.executable, "-c", "from pipeline.cli import app; app()", "extract"]
    line = [*program, str(dataset), str(cache), *flags, "--processes", str(processes)]
    start = time.time()
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    ends = sorted(path.stat().st_mtime for path in cache.glob("train/v*/commits/*.json"))
    rows = json.loads((cache / "train/v0/commits/000000.json").read_text())["rows"]
    # All views of the first shard are committed together.
    later = sum(1 for end in ends if end > ends[0] + 0.5)
    return {
        "views_per_s": later * rows / (ends[-1] - ends[0]),
        "commits": len(ends),
        "first_commit_s": ends[0] - start,
        "all_s": ends[-1] - start,
        "processes": processes,
        "exit": code,
    }


def command_until(line: list[Any], run_dir: Path, stop_after: int = 0) -> Row:
    """Run `mcm-train`; with `stop_after`, send SIGTERM after that many lines of the log."""
    log, start = run_dir / "metrics.jsonl", time.time()
    words = [sys.executable, "-c", "from mcm.cli import app; app()", *map(str, line)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while stop_after and process.poll() is None:
        if log.exists() and log.read_text().count('"loss"') >= stop_after:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    code = process.wait(240)
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    rates = [entry["images_per_s"] for entry in lines if "images_per_s" in entry]
    waits = [entry["wait_share"] for entry in lines if "wait_share" in entry]
    return {
        "exit": code,
        "s": time.time() - start,
        "steps": lines[-1]["step"],
        "images_per_s": median(rates),
        "wait_share": median(waits),
        "last_loss": [e["loss"] for e in lines if "loss" in e][-1],
    }
