"""A pre-training step as in a run, on a resident batch or on the stream, without a RUN folder."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import torch
from accelerate import Accelerator
from clock import seconds, synchronize

from cache_tools.cache import Cache
from cache_tools.console import StopFlag
from cache_tools.dataset import CHUNK_ROWS
from cache_tools.records import config_file, load_toml
from mcm import checkpoint
from mcm.config import PretrainConfig
from mcm.engine import on_device, to_device
from mcm.loop import Job, Loop
from mcm.objective import Objective
from mcm.optim import build_adamw
from mcm.pretrain import choose_units, run_record
from mcm.sampler import Order
from mcm.stream import PREFETCH, Batch, Stream, batches


def load_config(name: str, batch: int, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Return a shipped configuration with `batch` rows per step, in bf16 on a GPU, else float32."""
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    engine = [
        f"train.global_batch={batch}",
        f"train.micro_batch={batch}",
        f"train.precision={precision}",
    ]
    return load_toml(
        PretrainConfig, config_file(name), [*engine, "train.compile=false", *overrides]
    )


def first_batch(stream: Stream, device: torch.device) -> Batch:
    """The first batch of a stream, on the device for good."""
    with batches(stream, 0, 1, workers=0) as items:
        return to_device(next(items), device)


class OneStep:
    """A model, optimizer and stream in a run's loop; `resident` is a first batch on the device."""

    def __init__(self, config: PretrainConfig, cache_path: Path, accelerator: Accelerator) -> None:
        cache, train = Cache(cache_path), config.train
        units, _ = choose_units(cache, ())
        order = Order(
            units[0].rows, CHUNK_ROWS, train.global_batch, train.micro_batch, seed=train.seed
        )
        self.objective = objective = Objective(
            config, run_record(config, cache, units), cache, units, accelerator
        )
        stream = objective.stream(order, units, config.mask.unmasked_fraction)
        optimizer = build_adamw(objective.model, config.optim)
        self.job = Job(
            Path("no run"),
            objective.model,
            optimizer,
            stream,
            objective.loss,
            lambda epochs: {},
            config,
        )
        self.loop, self.device, self.done = Loop(self.job, accelerator), accelerator.device, 0
        self.resident = first_batch(self.job.stream, self.device)
        self.batch = train.global_batch

    def run(self, items: Iterator[Batch], count: int) -> None:
        """`count` steps on these batches, to the end of the last on the device."""
        for _ in range(count):
            self.loop.step(self.done, items, StopFlag())
            self.done += 1
        losses = torch.stack(self.loop.pending)
        self.loop.pending.clear()
        assert losses.isfinite().all(), losses

    def resident_s(self, count: int) -> float:
        """Return seconds per step on the resident batch over `count` steps, after a warm-up."""
        self.run(repeat(self.resident), 1)
        return seconds(lambda: self.run(repeat(self.resident), count), self.device) / count

    def streamed_s(self, workers: int, count: int, ahead: bool = True) -> tuple[float, float]:
        """Return (seconds per step, share of waiting for the stream) after the prefetched batches.

        Without `ahead`, no batch is copied to the device before its step.
        All steps use the masks of epoch 0. A pool is made once per epoch; epochs here are short.
        """
        warm = PREFETCH * workers + 2
        end = (warm + count) * self.job.stream.order.accumulation  # type: ignore[union-attr]
        with batches(self.job.stream, 0, end, workers, self.device.type == "cuda") as loaded:
            items = (
                on_device(loaded, self.device)
                if ahead
                else (to_device(b, self.device) for b in loaded)
            )
            same_pool = (batch | {"epoch": 0} for batch in items)
            self.run(same_pool, warm)
            self.loop.waited_s = 0.0
            took = seconds(lambda: self.run(same_pool, count), self.device)
        return took / count, self.loop.waited_s / took

    def saving(self, run_dir: Path) -> dict[str, float]:
        """Measure a checkpoint: copy to the host, write in a thread, the time that steps lose."""
        plain_s = self.resident_s(4)
        synchronize(self.device)
        start = time.perf_counter()
        tensors = checkpoint.optimizer_tensors(self.job.model, self.loop.optimizer.optimizer)
        model, optimizer = (
            checkpoint.on_host(self.job.model.state_dict()),
            checkpoint.on_host(tensors),
        )
        copied, steps = time.perf_counter(), 0
        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(checkpoint.save, run_dir, self.done, model, optimizer, {})
            while not writing.done():
                self.run(repeat(self.resident), 1)
                synchronize(self.device)
                steps += 1
            end = time.perf_counter()
        gb = sum(path.stat().st_size for path in writing.result().iterdir()) / 1e9
        lost_s = end - start - steps * plain_s
        share = lost_s / (60 * self.job.config.train.checkpoint_minutes)
        return {
            "copy_s": copied - start,
            "write_s": end - copied,
            "gb": gb,
            "lost_s": lost_s,
            "share": share,
        }
