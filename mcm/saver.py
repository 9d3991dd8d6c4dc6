"""Checkpoints that a thread writes while the training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache_tools.console import error_line
from mcm import checkpoint
from mcm.checkpoint import Tensors, on_host
from mcm.optim import swap_ema

FAILED_SAVES = 3  # the run stops after this many failed saves in a row


class Saver:
    """The checkpoints of a RUN, written one at a time; `saved_step` is the step of the last one."""

    def __init__(
        self, run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, keep_last: int
    ) -> None:
        self.run_dir, self.model, self.optimizer = run_dir, model, optimizer
        self.keep_last, self.saved_step, self.failed_saves = keep_last, -1, 0
        self.thread = ThreadPoolExecutor(1)
        self.writing: tuple[int, Future[None]] | None = None

    def save(self, step: int, meta: dict[str, Any]) -> None:
        """Copy the state to the host, and write it in the thread.

        With EMA, the file `model` holds the EMA and the file `optimizer` holds the weights.
        """
        self.wait()
        swap_ema(self.optimizer)
        model = on_host(self.model.state_dict())
        optimizer = on_host(checkpoint.optimizer_tensors(self.model, self.optimizer))
        swap_ema(self.optimizer)
        self.writing = step, self.thread.submit(self._write, step, model, optimizer, meta)

    def _write(self, step: int, model: Tensors, optimizer: Tensors, meta: dict[str, Any]) -> None:
        checkpoint.save(self.run_dir, step, model, optimizer, meta)
        checkpoint.rotate(self.run_dir, self.saved_step, step, self.keep_last)
        self.saved_step = step

    def wait(self, must: bool = False) -> None:
        """Wait for the checkpoint that is being written, if any.

        If the disk is full, print a warning and go on without this checkpoint.

        Raises: OSError with `must`, or after FAILED_SAVES failed saves in a row.
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
            cause = error_line(error)
            print(f"warning: step {step} is not saved: {cause}; training goes on", flush=True)
