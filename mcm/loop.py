"""The training loop of pre-training and fine-tuning: step, log, evaluate, save, stop, resume.

On the same machine with the same number of ranks, a resumed run is identical to the bit. For a GPU,
this is a measurement: see docs/performance.md.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cache_tools.console import StopFlag, progress
from cache_tools.errors import Diverged, Interrupted
from cache_tools.rng import hash_u64
from mcm import checkpoint
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.engine import TIMEOUT, on_device
from mcm.memory import activation_bytes, print_estimate, state_bytes
from mcm.optim import learning_rate, peak_lr, swap_ema
from mcm.run_dir import Log
from mcm.sampler import Order
from mcm.saver import Saver
from mcm.stream import Batch, Stream, batches
from mcm.tracking import start_tracker

SHOWN_SPANS = 32
CONTINUE, SAVE, STOP = 0, 1, 2  # requests after a step; the maximum over the ranks applies


@dataclass(frozen=True)
class Job:
    """The parts of one training run. `model` is not wrapped; `stream.order` is this rank's `Order`.

    `loss(model, batch)` takes the wrapped model and a batch on the device; it returns the float32
    mean over the rows. `evaluate(epochs_done)` runs on every rank at the end of an epoch and
    returns the metrics to log, if any.
    """

    run_dir: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stream: Stream
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[int], dict[str, float]]
    config: PretrainConfig | FinetuneConfig


def evaluation_due(config: PretrainConfig | FinetuneConfig, every: int, epochs_done: int) -> bool:
    """Return whether to evaluate: after every `every`-th epoch (0: none) and after the last."""
    return epochs_done == config.schedule.epochs or bool(every and epochs_done % every == 0)


def train(job: Job, accelerator: Accelerator, stop: StopFlag) -> dict[str, float]:
    """Train from the newest checkpoint, or from step 0, to the last step; return the last metrics.

    Raises: Interrupted, after a checkpoint is saved, if a stop was requested; Diverged if a loss is
    not finite; the errors of reading the data.
    """
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    if cuda and accelerator.is_main_process:
        order, fp32 = job.stream.order, job.config.train.precision == "fp32"
        activations = activation_bytes(job.model, order.batch, 4 if fp32 else 2)
        print_estimate(state_bytes(job.model, job.config.optim), activations)
    with torch.random.fork_rng(cuda):  # each step seeds the generators
        return Loop(job, accelerator).run(stop)


class Loop:
    """A run in progress. `step` does not use the RUN folder, so benchmarks can call it."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        assert isinstance(job.stream.order, Order)
        self.job, self.order = job, job.stream.order
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.scaler = accelerator.scaler  # of the losses in fp16; None otherwise
        schedule = job.config.schedule
        self.total_steps = schedule.epochs * self.order.steps_per_epoch
        self.warmup_steps = schedule.warmup_epochs * self.order.steps_per_epoch
        self.warmup_steps += schedule.warmup_steps
        self.peak_lr, self.lr = peak_lr(job.config.optim, self.order.global_batch), 0.0
        if job.config.train.compile:
            job.model.compile()  # in place: the names in the state dict do not change
        self.model, self.optimizer = accelerator.prepare(job.model, job.optimizer)
        self.model.train()
        # The ranks exchange requests in a gloo group, which does not wait for the GPU.
        self.gloo: Any = None
        if accelerator.num_processes > 1:
            self.gloo = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
        self.pending: list[Tensor] = []  # (loss, gradient norm) of steps, still on the device
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.window: list[float] = []  # losses since the last log line
        self.grad_norm, self.waited_s, self.logged_at = 0.0, 0.0, time.perf_counter()
        self.logged_step, self.note, self.saved_at = 0, "", time.monotonic()
        keep_last = job.config.train.keep_last
        self.saver = Saver(job.run_dir, job.model, self.optimizer.optimizer, keep_last)

    def run(self, stop: StopFlag) -> dict[str, float]:
        """Take the remaining steps and return the last metrics.

        A complete run is evaluated again, because its log may have lost the last line.
        """
        settings, order, device = self.job.config.train, self.order, self.accelerator.device
        saved = checkpoint.latest(self.job.run_dir) if self.main else None
        if self.gloo is not None:
            saved = checkpoint.shared(saved, self.gloo)
        step = saved.step if saved else -1
        evaluated = saved is not None and bool(saved.meta["evaluated"]) and step < self.total_steps
        start_tracker(self.accelerator, settings.track, self.job.run_dir, self.job.config)
        state, track = (self.job.run_dir, step, evaluated, self.main), self.accelerator.log
        log = Log(*state, order.steps_per_epoch, track)
        with closing(log) as self.log:
            if saved:
                self._restore(saved, evaluated)
                saved = None  # frees the memory of the checkpoint
            step = max(step, 0)
            start, end = step * order.accumulation, self.total_steps * order.accumulation
            workers, title = settings.workers if start < end else 0, f"training {self.job.run_dir}"
            with (
                progress(self.total_steps, title, "steps", step, not self.main) as bar,
                batches(self.job.stream, start, end, workers, device.type == "cuda") as loaded,
            ):
                items = on_device(loaded, device)
                try:
                    while step < self.total_steps:
                        request = self.step(step, items, stop)
                        step += 1
                        if step % settings.log_steps == 0 or step == self.total_steps:
                            self._log(step)
                        bar.update(1, self.note)
                        self._end_of_step(step, request)
                finally:
                    self.saver.wait()
        return self.metrics

    def _end_of_step(self, step: int, request: int) -> None:
        """Evaluate at the end of an epoch, save if a checkpoint is due, and stop if requested."""
        every = self.job.config.train.checkpoint_steps
        epoch_ends, last = step % self.order.steps_per_epoch == 0, step == self.total_steps
        stopping = request == STOP and not last
        if every is None:
            due = request == SAVE
        elif every:
            due = step % every == 0
        else:
            due = epoch_ends
        if epoch_ends and not stopping:
            self._evaluate(step)
        if stopping or last or due:
            self._save(step, evaluated=epoch_ends and not stopping, must=stopping or last)
        if stopping:
            place = f"step {step} of {self.total_steps}"
            raise Interrupted(f"stopped after {place}, saved; the same command resumes")

    def _restore(self, saved: checkpoint.Checkpoint, evaluated: bool) -> None:
        checkpoint.restore(saved, self.job.model, self.optimizer.optimizer)
        if self.scaler is not None:
            self.scaler.load_state_dict(saved.meta["scaler"])
        swap_ema(self.optimizer.optimizer)
        self.window = list(saved.meta["window"])
        self.logged_step = self.saver.saved_step = saved.step
        if self.main:
            place = f"step {saved.step} of {self.total_steps}"
            print(f"{self.job.run_dir}: resumes after {place}", flush=True)
        if saved.step % self.order.steps_per_epoch == 0 and not evaluated:
            self._evaluate(saved.step)

    def step(self, step: int, items: Iterator[Batch], stop: StopFlag) -> int:
        """Take one optimizer step; return the request for all ranks: CONTINUE, SAVE or STOP."""
        job, micro_steps = self.job, self.order.accumulation
        schedule, steps = job.config.schedule, (step, self.total_steps, self.warmup_steps)
        self.lr = learning_rate(*steps, self.peak_lr, schedule.min_lr, schedule.shape)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        # Dropout and drop path depend on the step only, so checkpoints save no generator state.
        torch.manual_seed(int(hash_u64(job.config.train.seed, "step", step, self.order.rank)) >> 1)
        total = torch.zeros((), device=self.accelerator.device)
        for left in reversed(range(micro_steps)):
            batch = self._next(items)
            request = CONTINUE if left else self._agree(stop)
            with self.accelerator.no_sync(self.model) if left else nullcontext():
                loss = job.loss(self.model, batch) / micro_steps
                # accelerator.backward would divide by gradient_accumulation_steps again.
                scaled = loss if self.scaler is None else self.scaler.scale(loss)
                scaled.backward()
            total += loss.detach()
        clip_norm = job.config.optim.clip_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending.append(torch.stack([total, norm.to(total)]))
        return request

    def _next(self, items: Iterator[Batch]) -> Batch:
        start = time.perf_counter()
        batch = next(items)
        self.waited_s += time.perf_counter() - start
        return batch

    def _agree(self, stop: StopFlag) -> int:
        """Return the maximum request over the ranks; the clock of the main rank requests SAVE."""
        every_s = 60 * self.job.config.train.checkpoint_minutes
        due = self.main and time.monotonic() - self.saved_at >= every_s
        request = torch.tensor(STOP if stop.requested else SAVE if due else CONTINUE)
        if self.gloo is not None:
            torch.distributed.all_reduce(request, torch.distributed.ReduceOp.MAX, group=self.gloo)
        return int(request)

    def _fetch_losses(self, step: int) -> None:
        """Copy the losses of the steps before `step` to the host, averaged over the ranks.

        Every checkpoint is saved after this check of its losses. In fp16, a step whose gradients
        overflow is skipped and the scale is halved; a scale below 1 does not help any more.

        Raises: Diverged with the step and its rows if a value is not finite.
        """
        if not self.pending:
            return
        values = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist()
        first, self.pending = step - len(values), []
        skips = self.scaler is not None and self.scaler.get_scale() >= 1
        for position, (loss, norm) in enumerate(values):
            if not math.isfinite(loss) or not (skips or math.isfinite(norm)):
                raise self._diverged(first + position, loss, norm)
            self.grad_norm = norm if math.isfinite(norm) else self.grad_norm
        self.window += [loss for loss, _ in values]

    def _diverged(self, step: int, loss: float, norm: float) -> Diverged:
        rows = np.sort(self.job.stream.source.rows_of(self.order.step_chunks(step)[1]))
        spans = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        ends = (sorted({span[0], span[-1]}) for span in spans[:SHOWN_SPANS])
        shown = ", ".join("-".join(map(str, pair)) for pair in ends)
        shown += " ..." * (len(spans) > SHOWN_SPANS)
        return Diverged(
            f"step {step + 1}: expected a finite loss and gradient norm; found {loss} and {norm}"
            f" on rows {shown}; `mcm-train replay {self.job.run_dir}` names the first values;"
            " lower optim.lr, or check the rows"
        )

    def _log(self, step: int) -> None:
        """Log the mean loss and the speed since the last log line."""
        self._fetch_losses(step)
        now, loss = time.perf_counter(), math.fsum(self.window) / len(self.window)
        elapsed_s, steps = now - self.logged_at, step - self.logged_step
        self.note = f"loss {loss:.4f}"
        self.log.write(step, {
            "loss": loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "images_per_s": steps * self.order.global_batch / elapsed_s,
            "wait_share": self.waited_s / elapsed_s,
            **({"loss_scale": self.scaler.get_scale()} if self.scaler else {}),
        })  # fmt: skip
        self.logged_at, self.logged_step, self.waited_s, self.window = now, step, 0.0, []

    def _evaluate(self, step: int) -> None:
        self._fetch_losses(step)
        start = time.perf_counter()
        self.model.eval()
        swap_ema(self.optimizer.optimizer)
        self.metrics = self.job.evaluate(step // self.order.steps_per_epoch)
        swap_ema(self.optimizer.optimizer)
        self.model.train()
        self.logged_at += time.perf_counter() - start  # images_per_s excludes the evaluation
        if self.metrics:
            self.log.write(step, {"eval": self.metrics})

    def _save(self, step: int, evaluated: bool, must: bool) -> None:
        """Save a checkpoint on the main rank; with `must`, all ranks wait until it is written.

        A launcher ends all ranks if one ends.
        """
        self._fetch_losses(step)
        self.saved_at = time.monotonic()
        if self.main:
            meta = {"window": list(self.window), "evaluated": evaluated}
            if self.scaler is not None:
                meta["scaler"] = self.scaler.state_dict()
            self.saver.save(step, meta)
        if must:
            self.saver.wait(must)
            self.accelerator.wait_for_everyone()
