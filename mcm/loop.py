"""One loop for pre-training and fine-tuning: clip, step, log, evaluate, save, stop; resumes to the bit on a CPU."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from cache_tools.console import StopFlag, error_line, progress
from cache_tools.errors import Diverged, Interrupted, UsageError
from cache_tools.rng import hash_u64
from mcm import checkpoint
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.optim import learning_rate, peak_lr, swap_average
from mcm.run_dir import Log
from mcm.sampler import Order
from mcm.stream import Batch, Stream, batches

MODES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
SHOWN_SPANS = 32
GO_ON, SAVE, STOP = 0, 1, 2  # after a step; the largest wish of all ranks wins
FAILED_SAVES = 3  # in a row, before a run that cannot save stops
TIMEOUT = timedelta(minutes=10)  # the longest wait of a rank: for the main process, which saves a checkpoint


@dataclass(frozen=True)
class Job:
    """What one run trains. The model is not wrapped; `stream.order` is an `Order` for this process.

    `loss(model, batch)` gets the wrapped model and a batch on the device and returns the float32 mean over its rows.
    `evaluate(epochs_done)` runs on every process at the end of an epoch and returns numbers for the log, or none.
    """

    run_dir: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    stream: Stream
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[int], dict[str, float]]
    config: PretrainConfig | FinetuneConfig


def evaluation_due(config: PretrainConfig | FinetuneConfig, every: int, epochs_done: int) -> bool:
    """Tell whether to evaluate after an epoch: after each `every` (0: none), and always after the last."""
    return epochs_done == config.schedule.epochs or bool(every and epochs_done % every == 0)


@contextmanager
def engine(precision: str) -> Iterator[Accelerator]:
    """Accelerate, on the CPU where there is no GPU; its process group ends with the block.

    Raises: UsageError for a mode of the launcher that is neither one process nor DDP, and for bf16 on a GPU without it.
    """
    _check_launcher()
    torch.backends.cudnn.allow_tf32 = False  # True by default for convolutions: fp32 must mean float32
    torch._dynamo.config.recompile_limit = 8  # timm.optim sets 1,000,000; torch warns beyond the limit
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise UsageError('train.precision = "bf16": this GPU has no bfloat16; use --set train.precision=fp32')
    mixed = "bf16" if precision == "bf16" else "no"
    # The gradients lie in the buckets that the ranks reduce, which saves a copy of each.
    handlers = [InitProcessGroupKwargs(timeout=TIMEOUT), DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)
    try:
        if (kind := accelerator.distributed_type) not in MODES:
            raise UsageError(f"accelerate launch: expected one process or DDP; found {kind}")
        yield accelerator
    finally:
        accelerator.end_training()


def _check_launcher() -> None:
    """Check the launcher's environment: on a CPU, Accelerate replaces FSDP and DeepSpeed by DDP without a message.

    Raises: UsageError naming the option that must be left out.
    """
    for name in ("USE_FSDP", "USE_DEEPSPEED", "DYNAMO_BACKEND"):
        if (value := os.environ.get(f"ACCELERATE_{name}", "no").lower()) not in ("no", "false"):
            option = f"--{name.lower()}" + f" {value}" * (value != "true")
            raise UsageError(
                f"accelerate launch: expected one process or DDP; found {option}; leave it out"
                " (train.compile = true compiles the model)"
            )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device; row numbers are read on the host."""
    stays = {k for k, v in batch.items() if not isinstance(v, Tensor) or k == "rows"}
    return {k: v if k in stays else v.to(device, non_blocking=True) for k, v in batch.items()}


def on_device(items: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches on the device. A GPU copies the next one on a side stream while it computes with the current one."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in items)
        return
    side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead = None
    for batch in items:
        with torch.cuda.stream(side):
            copied = to_device(batch, device)
            done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(side)
        if ahead is not None:
            yield _ready(*ahead)
        ahead = copied, done
    if ahead is not None:
        yield _ready(*ahead)


def _ready(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, for the current stream; its memory is not reused before that stream has read it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for x in batch.values():
        if isinstance(x, Tensor) and x.is_cuda:
            x.record_stream(stream)
    return batch


def train(job: Job, accelerator: Accelerator, stop: StopFlag) -> dict[str, float]:
    """Train from the newest checkpoint, or from the start, to the last step; return the last evaluation.

    Raises: Interrupted once it has saved when asked to stop; Diverged on a loss that is not finite; errors of the data.
    """
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # each step seeds the generators
        return Loop(job, accelerator).run(stop)


class Loop:
    """A run in progress. `step` alone needs no RUN folder, so a bench times the step of a run itself."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        assert isinstance(job.stream.order, Order)
        self.job, self.order = job, job.stream.order
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.total_steps = job.config.schedule.epochs * self.order.steps_per_epoch
        self.warmup_steps = job.config.schedule.warmup_epochs * self.order.steps_per_epoch
        self.peak_lr, self.lr = peak_lr(job.config.optim, self.order.global_batch), 0.0
        if job.config.train.compile:
            job.model.compile()  # in place: names of the state stay
        self.model, self.optimizer = accelerator.prepare(job.model, job.optimizer)
        self.model.train()
        # What the processes agree on at each step must not wait for the GPU: it goes through the hosts.
        several = accelerator.num_processes > 1
        self.hosts: Any = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if several else None
        self.pending: list[Tensor] = []  # (loss, gradient norm) of steps that are still on the device
        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.window: list[float] = []  # losses since the last line of the log
        self.grad_norm, self.waited_s, self.logged_at = 0.0, 0.0, time.perf_counter()
        self.logged_step, self.saved_step, self.failed_saves, self.note = 0, -1, 0, ""
        self.writer, self.saved_at = ThreadPoolExecutor(1), time.monotonic()
        self.writing: tuple[int, Future[None]] | None = None

    def run(self, stop: StopFlag) -> dict[str, float]:
        """Take the steps that are left; a complete run is evaluated again, as its log may have lost the last line."""
        settings, order, cuda = self.job.config.train, self.order, self.accelerator.device.type == "cuda"
        found = self._newest()
        step = found.step if found else -1
        evaluated = found is not None and bool(found.meta["evaluated"]) and step < self.total_steps
        log = Log(self.job.run_dir, step, evaluated, self.main, order.steps_per_epoch)
        with closing(log) as self.log:
            if found:
                self._restore(found, evaluated)
                found = None  # frees a whole checkpoint
            step = max(step, 0)
            left = range(step * order.accumulation, self.total_steps * order.accumulation)
            with (
                progress(self.total_steps, f"training {self.job.run_dir}", "steps", step, not self.main) as bar,
                batches(self.job.stream, left.start, left.stop, settings.workers if left else 0, cuda) as loaded,
            ):
                items = on_device(loaded, self.accelerator.device)
                try:
                    while step < self.total_steps:
                        asked = self.step(step, items, stop)
                        step += 1
                        if step % settings.log_steps == 0 or step == self.total_steps:
                            self._log(step)
                        bar.update(1, self.note)
                        self._end_of_step(step, asked)
                finally:
                    self._join_save(must=False)
        return self.metrics

    def _end_of_step(self, step: int, asked: int) -> None:
        """Evaluate at the end of an epoch, save if it is time to, and stop if asked to."""
        epoch_ends, every = step % self.order.steps_per_epoch == 0, self.job.config.train.checkpoint_steps
        last = step == self.total_steps
        stopping = asked == STOP and not last
        due = asked == SAVE if every is None else step % every == 0 if every else epoch_ends
        if epoch_ends and not stopping:
            self._evaluate(step)
        if stopping or last or due:
            self._save(step, evaluated=epoch_ends and not stopping, must=stopping or last)
        if stopping:
            raise Interrupted(f"stopped after step {step} of {self.total_steps}, saved; the same command resumes")

    def _newest(self) -> checkpoint.Checkpoint | None:
        """The newest sound checkpoint, on every rank; the main rank reads and verifies it."""
        found = checkpoint.latest(self.job.run_dir) if self.main else None
        return found if self.hosts is None else checkpoint.shared(found, self.hosts)

    def _restore(self, found: checkpoint.Checkpoint, evaluated: bool) -> None:
        checkpoint.restore(found, self.job.model, self.optimizer.optimizer)
        swap_average(self.optimizer.optimizer)
        self.window = list(found.meta["window"])
        self.logged_step = self.saved_step = found.step
        if self.main:
            print(f"{self.job.run_dir}: resumes after step {found.step} of {self.total_steps}", flush=True)
        if found.step % self.order.steps_per_epoch == 0 and not evaluated:
            self._evaluate(found.step)

    def step(self, step: int, items: Iterator[Batch], stop: StopFlag) -> int:
        """One optimizer step on batches on the device; returns what all ranks do next: GO_ON, SAVE or STOP."""
        job, micro_steps = self.job, self.order.accumulation
        self.lr = learning_rate(step, self.total_steps, self.warmup_steps, self.peak_lr, job.config.schedule.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        # Dropout and drop-path draw from here: a pure function of the step. No generator is saved.
        torch.manual_seed(int(hash_u64(job.config.train.seed, "step", step, self.order.rank)) >> 1)
        total = torch.zeros((), device=self.accelerator.device)
        for left in reversed(range(micro_steps)):
            batch = self._next(items)
            asked = GO_ON if left else self._agree(stop)
            with self.accelerator.no_sync(self.model) if left else nullcontext():
                loss = job.loss(self.model, batch) / micro_steps
                # Not accelerator.backward: it divides by the launcher's own accumulation; bf16 needs no scaler.
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), job.config.optim.clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.pending.append(torch.stack([total, norm.to(total)]))
        return asked

    def _next(self, items: Iterator[Batch]) -> Batch:
        start = time.perf_counter()
        batch = next(items)
        self.waited_s += time.perf_counter() - start
        return batch

    def _agree(self, stop: StopFlag) -> int:
        """The largest wish of all ranks; the main rank's clock decides when to save."""
        due = self.main and time.monotonic() - self.saved_at >= 60 * self.job.config.train.checkpoint_minutes
        wish = torch.tensor(STOP if stop.requested else SAVE if due else GO_ON)
        if self.hosts is not None:
            torch.distributed.all_reduce(wish, torch.distributed.ReduceOp.MAX, group=self.hosts)
        return int(wish)

    def _drain(self, step: int) -> None:
        """Bring the losses of the steps up to `step` to the host, averaged over the processes.

        Raises: Diverged naming step and rows when one is not finite; nothing was saved since.
        """
        if not self.pending:
            return
        values = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist()
        first, self.pending = step - len(values), []
        for position, numbers in enumerate(values):
            if not all(map(math.isfinite, numbers)):
                raise self._poisoned(first + position, *numbers)
        self.window += [loss for loss, _ in values]
        self.grad_norm = values[-1][1]

    def _poisoned(self, step: int, loss: float, norm: float) -> Diverged:
        rows = self.job.stream.source.rows_of(self.order.step_chunks(step)[1])
        spans = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        shown = ", ".join(f"{span[0]}-{span[-1]}" for span in spans[:SHOWN_SPANS]) + " ..." * (len(spans) > SHOWN_SPANS)
        return Diverged(
            f"step {step + 1}: expected a finite loss and gradient norm; found {loss} and {norm} on rows {shown};"
            f" the checkpoints in {self.job.run_dir} are of steps before; lower optim.lr, or check the rows"
        )

    def _log(self, step: int) -> None:
        """Log the mean loss and the speed since the last line."""
        self._drain(step)
        now, loss = time.perf_counter(), math.fsum(self.window) / len(self.window)
        elapsed_s, steps = now - self.logged_at, step - self.logged_step
        self.note = f"loss {loss:.4f}"
        self.log.write(step, {
            "loss": loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "images_per_s": steps * self.order.global_batch / elapsed_s,
            "wait_share": self.waited_s / elapsed_s,
        })  # fmt: skip
        self.logged_at, self.logged_step, self.waited_s, self.window = now, step, 0.0, []

    def _evaluate(self, step: int) -> None:
        self._drain(step)
        start = time.perf_counter()
        self.model.eval()
        swap_average(self.optimizer.optimizer)
        self.metrics = self.job.evaluate(step // self.order.steps_per_epoch)
        swap_average(self.optimizer.optimizer)
        self.model.train()
        self.logged_at += time.perf_counter() - start  # images_per_s is the speed of training
        if self.metrics:
            self.log.write(step, {"eval": self.metrics})

    def _save(self, step: int, evaluated: bool, must: bool) -> None:
        """Save a checkpoint on the main rank: it copies to the host, and a thread writes while training goes on.

        The file `model` holds the averaged weights, where there are some, and `optimizer` the weights.
        With `must`, all ranks wait until it is written, as a launcher ends them all when one ends.
        """
        self._drain(step)
        self.saved_at = time.monotonic()
        if self.main:
            self._join_save(must=False)
            swap_average(self.optimizer.optimizer)
            tensors = checkpoint.optimizer_tensors(self.job.model, self.optimizer.optimizer)
            model, optimizer = checkpoint.on_host(self.job.model.state_dict()), checkpoint.on_host(tensors)
            swap_average(self.optimizer.optimizer)
            meta = {"window": list(self.window), "evaluated": evaluated}
            self.writing = step, self.writer.submit(self._write, step, model, optimizer, meta)
        if must:
            self._join_save(must)
            self.accelerator.wait_for_everyone()

    def _write(self, step: int, model: checkpoint.Tensors, optimizer: checkpoint.Tensors, meta: dict[str, Any]) -> None:
        run_dir = self.job.run_dir
        checkpoint.save(run_dir, step, model, optimizer, meta)
        checkpoint.rotate(run_dir, self.saved_step, step, self.job.config.train.keep_last)
        self.saved_step = step

    def _join_save(self, must: bool) -> None:
        """Wait for the checkpoint that is being written, if there is one.

        A full disk costs a warning and the checkpoint. It ends the run with `must`, or after FAILED_SAVES in a row.
        """
        if self.writing is None:
            return
        (step, writing), self.writing = self.writing, None
        try:
            writing.result()
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            if must or self.failed_saves == FAILED_SAVES:
                raise
            print(f"warning: step {step} is not saved: {error_line(error)}; training goes on", flush=True)
