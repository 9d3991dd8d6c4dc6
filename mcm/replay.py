"""`mcm-train replay`: repeats the step at which a RUN diverged, and names the non-finite values.

Every draw is a hash of counters, so the newest checkpoint and the number of the step are enough.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from cache_tools.console import StopFlag
from cache_tools.errors import Diverged, ResourceError, UsageError
from cache_tools.records import load_toml, read_json, read_record
from cache_tools.storage import make_dir, write_atomic
from mcm import checkpoint
from mcm.config import FinetuneConfig, PretrainConfig
from mcm.finetune import finetune
from mcm.loop import Job, Loop
from mcm.pretrain import pretrain
from mcm.run_dir import ExitRecord, recorded

NO_SAVE = f"train.checkpoint_steps={10**9}"
SETTINGS = ("train.log_steps=1", NO_SAVE, "train.compile=false", "train.track=")
FINITE = "expected the step to diverge again; found finite values; check the memory of the device"


def replay(run: Path) -> dict[str, list[str]]:
    """Train a copy of RUN from its newest checkpoint to the step that diverged, in one process.

    Returns the error of that step, and by stage the names of what is not finite in it, in the order
    of computation: weights, batch, forward, loss, gradients.

    Raises: UsageError if no step of RUN diverged; ResourceError if the step is finite this time.
    """
    message = read_record(ExitRecord, run / "exit.json").message
    if not (step := re.match(r"Diverged: step (\d+):", message)):
        raise UsageError(f"{run}: expected a RUN with a step that diverged; found: {message}")
    found, facts, places = dict[str, list[str]](), recorded(run), read_json(run / "env.json")
    train, config = partial(_train, int(step[1]), found), run / "config.toml"
    with TemporaryDirectory() as temporary:
        copy = Path(temporary, run.name)
        make_dir(copy / "checkpoints")
        write_atomic(copy / "run.json", (run / "run.json").read_bytes())
        for path in checkpoint.complete(run.absolute()):
            (copy / "checkpoints" / path.name).symlink_to(path)
        try:
            if facts["kind"] == "pretrain":
                settings = load_toml(PretrainConfig, config, SETTINGS)
                pretrain(settings, Path(places["cache"]), copy, train=train)
            else:
                tuning, data = load_toml(FinetuneConfig, config, SETTINGS), Path(places["dataset"])
                weights = Path(places["weights"]) if places.get("weights") else None
                finetune(tuning, data, facts["init"], weights, copy, train)
        except Diverged as error:
            return {"error": [str(error).partition(" on rows ")[0]]} | found
    raise ResourceError(FINITE)


def _train(
    last: int, found: dict[str, list[str]], job: Job, accelerator: Accelerator, stop: StopFlag
) -> dict[str, float]:
    """Take the steps of `job` up to the step `last`; `found` is that of the newest step."""

    def note(stage: str, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and not value.isfinite().all():
            if name not in found.setdefault(stage, []):
                found[stage].append(name)

    def loss(wrapped: nn.Module, batch: dict[str, Any]) -> Tensor:
        for name, parameter in job.model.named_parameters():
            note("weights", name, parameter)
        for name, x in batch.items():
            if isinstance(x, Tensor) and not x.isfinite().all():  # by row, or by chunk of rows
                bad = ~x.isfinite().reshape(len(x), -1).all(1).cpu()
                rows = batch["rows"].reshape(len(x), -1)[bad].flatten().tolist()
                note("batch", f"{name} of rows {', '.join(map(str, rows))}", x)
        value = job.loss(wrapped, batch)
        note("loss", str(value.item()), value)
        return value

    class Traced(Loop):
        def step(self, step: int, *arguments: Any) -> int:
            if step == last:
                raise ResourceError(FINITE)
            found.clear()
            return super().step(step, *arguments)

    names = {module: name for name, module in job.model.named_modules()}
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad:
            hook = partial(lambda name, x: note("gradients", name, x.grad), name)
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    with register_module_forward_hook(
        lambda module, _, y: note("forward", names.get(module) or type(module).__name__, y)
    ):
        return Traced(replace(job, loss=loss), accelerator).run(stop)
