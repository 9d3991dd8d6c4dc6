"""Pre-training: a cache in, a RUN with checkpoints and held-out figures out."""

from collections.abc import Collection, Sequence
from pathlib import Path

from safetensors.torch import save as safetensors_bytes

from cache_tools.cache import Cache, Unit
from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.errors import UsageError
from cache_tools.records import record_sha256
from cache_tools.schema import CacheIdentity
from cache_tools.storage import write_atomic
from mcm.config import PretrainConfig
from mcm.evaluate import Evaluation
from mcm.loop import Job, engine, train
from mcm.objective import Objective
from mcm.optim import build_adamw
from mcm.probe import labelled
from mcm.run_dir import PretrainRun, claim, identity_config, recorded, recorded_exit, write_environment
from mcm.sampler import Order


def pretrain(config: PretrainConfig, cache_path: Path, out: Path, data: Path | None = None) -> None:
    """Train, or resume, the run in `out` on the complete units of a cache; `data` is for the k-NN probe.

    Raises: UsageError or IdentityError before the first step; what `loop.train` raises.
    """
    dataset = labelled(Dataset(data)) if data is not None else None
    cache = Cache(cache_path)
    units, val = choose_units(cache, recorded(out).get("units", ()), config.data.views)
    run, seed = run_record(config, cache, [*units, *val], dataset), config.train.seed
    with engine(config.train.precision) as accelerator:
        main, world, rank = accelerator.is_main_process, accelerator.num_processes, accelerator.process_index
        order = Order(units[0].rows, CHUNK_ROWS, config.train.global_batch, config.train.micro_batch, world, rank, seed)
        objective = Objective(config, run, cache, units, accelerator)
        claim(out, run, PretrainConfig)
        with recorded_exit(out, main) as stop:
            if main:
                write_environment(out, config, cache=str(cache_path), processes=world, rows=order.rows)
                announce(cache, units, val, order, bool(config.train.knn_epochs and dataset is None))
            evaluation = Evaluation(out, objective, units, val, order, dataset)
            stream = objective.stream(order, units, config.mask.unmasked_fraction)
            optimizer = build_adamw(objective.model, config.optim)
            train(Job(out, objective.model, optimizer, stream, objective.loss, evaluation, config), accelerator, stop)
            if main:
                write_atomic(out / "samples.safetensors", safetensors_bytes(evaluation.samples()))


def choose_units(cache: Cache, recorded: Collection[str], views: int = 0) -> tuple[list[Unit], list[Unit]]:
    """The complete units of "train", or the first `views`, and one of "val" or none; a run that has begun keeps the
    `recorded` ones.

    Raises: UsageError when too few are complete; CorruptionError when an array is not the one of this cache.
    """
    complete = cache.complete_units("train")
    units = [unit for unit in complete if str(unit) in recorded] or complete[: views or None]
    if not units:
        begun = len(cache.units("train"))
        raise UsageError(
            f"{cache.path}: expected a complete unit of 'train'; found {begun} begun; finish `mcm-cache extract`"
        )
    if len(units) < views:
        raise UsageError(f"{cache.path}: expected data.views = {views} complete units of 'train'; found {len(units)}")
    val = [unit for unit in cache.complete_units("val") if not recorded or str(unit) in recorded][:1]
    for unit in (*units, *val):
        unit.check_arrays()
    return units, val


def student_patch(identity: CacheIdentity) -> int:
    """The student's patch size in pixels, so that its token grid is the cache's.

    Raises: UsageError when no square patch gives that grid.
    """
    (rows, columns), height, width = identity.grid, identity.view_height, identity.view_width
    patch = height // rows
    if (rows * patch, columns * patch) != (height, width):
        raise UsageError(
            f"cache: expected views of {rows}x{columns} square patches; found {height}x{width} pixels; extract again"
        )
    return patch


def target_channels(config: PretrainConfig, cache: Cache) -> int:
    """C of the target: the teacher's channels, those of its joint space, or the values of a patch of pixels."""
    features = config.target.features
    if features == "pixels":
        return 3 * student_patch(cache.identity) ** 2
    return cache.projection().shape[1] if features == "joint" else cache.identity.channels


def run_record(
    config: PretrainConfig, cache: Cache, units: Sequence[Unit], dataset: Dataset | None = None
) -> PretrainRun:
    """The run's identity. The student sees its pictures normalised as the teacher does.

    Raises: UsageError for a target that the cache has not.
    """
    identity = cache.identity
    if config.loss.cls and not identity.has_cls:
        raise UsageError(f"loss.cls = true: expected a teacher with a CLS token; {identity.teacher.name} has none")
    return PretrainRun(
        config=identity_config(config),
        cache_sha256=cache.sha256,
        units={str(unit): record_sha256(unit.manifest) for unit in units},
        teacher=identity.teacher.name,
        size=(identity.view_height, identity.view_width),
        patch=student_patch(identity),
        grid=identity.grid,
        channels=target_channels(config, cache),
        mean=identity.teacher.mean,
        std=identity.teacher.std,
        interpolation=identity.teacher.kernel,
        cache=identity,
        data_sha256=dataset.sha256 if dataset else None,
    )


def announce(cache: Cache, units: Sequence[Unit], val: Sequence[Unit], order: Order, no_knn: bool) -> None:
    """Say what is trained on and what is left out."""
    left_out = len(cache.units("train")) - len(units)
    print(f"{order.rows} rows in {len(units)} views; {left_out} incomplete or later views are left out")
    if partial := order.rows % CHUNK_ROWS:
        print(f"the last {partial} rows, a partial chunk, are left out of training")
    split = f"{order.world} processes x {order.accumulation} x {order.batch}"
    print(f"{order.steps_per_epoch} steps an epoch of {order.global_batch} rows: {split}", flush=True)
    if not val:
        print("the run has no complete unit of 'val': no held-out loss and R^2", flush=True)
    if no_knn:
        print("train.knn_epochs is set, but there is no --data DATASET: no k-NN accuracy", flush=True)
