"""Pre-training: read a cache, train the student, write checkpoints and held-out metrics to a RUN.

`pretrain` assembles a run: data order, objective, evaluation, stream, optimizer, loop.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from safetensors.torch import save as safetensors_bytes

from cache_tools.cache import Cache, Unit
from cache_tools.dataset import CHUNK_ROWS, Dataset
from cache_tools.errors import UsageError
from cache_tools.records import read_record, record_sha256
from cache_tools.schema import CacheIdentity
from cache_tools.storage import work_dir, write_atomic
from mcm.config import PretrainConfig
from mcm.engine import engine
from mcm.evaluate import Evaluation
from mcm.loop import Job, train
from mcm.objective import Objective
from mcm.optim import build_adamw
from mcm.probe import ProbeResult
from mcm.run_dir import (
    PretrainRun,
    claim,
    identity_config,
    recorded,
    recorded_exit,
    write_environment,
)
from mcm.sampler import Order

PAPER_WIDTH, PAPER_RATIO = 768, 0.75
# 64 digits x 1 view overfit in 220 epochs; 1,438 x 4 in 20 do not (docs/results.md).
OVERFIT_VIEWS, OVERFIT_EPOCHS = 1280, 50  # stored training views; epochs per stored view


def pretrain(
    config: PretrainConfig, cache_path: Path, out: Path, data: Path | None = None,
    train: Callable[..., dict[str, float]] = train,
) -> None:  # fmt: skip
    """Train, or resume, the run in `out` on the complete units of a cache.

    `data` is the DATASET of the k-NN evaluation. `train` is `loop.train`, or that of a replay.

    Raises: UsageError or IdentityError before the first step; the errors of `loop.train`.
    """
    dataset = Dataset(data).labeled() if data is not None else None
    cache, seed = Cache(cache_path), config.train.seed
    units, val = choose_units(cache, recorded(out).get("units", ()), config.data.views)
    run = run_record(config, cache, [*units, *val], dataset)
    with engine(config.train.precision, config.train.track) as accelerator:
        main = accelerator.is_main_process
        world, rank = accelerator.num_processes, accelerator.process_index
        global_batch, micro_batch = config.train.global_batch, config.train.micro_batch
        order = Order(units[0].rows, CHUNK_ROWS, global_batch, micro_batch, world, rank, seed)
        objective = Objective(config, run, cache, units, accelerator)
        claim(out, run, PretrainConfig)
        with recorded_exit(out, main) as stop:
            if main:
                facts = {"cache": str(cache_path), "processes": world, "rows": order.rows}
                write_environment(out, config, **facts)
                no_knn = bool(config.train.knn_epochs and dataset is None)
                announce(cache, units, val, order, no_knn)
                for line in advice(config, cache, order.rows, len(units)):
                    print(f"advice: {line}", flush=True)
            evaluation = Evaluation(out, objective, units, val, order, dataset)
            stream = objective.stream(order, units, config.mask.unmasked_fraction)
            model = objective.model
            optimizer = build_adamw(model, config.optim)
            job = Job(out, model, optimizer, stream, objective.loss, evaluation, config)
            train(job, accelerator, stop)
            if main:
                samples = safetensors_bytes(evaluation.samples())
                write_atomic(out / "samples.safetensors", samples)


def choose_units(
    cache: Cache, resumed: Collection[str], views: int = 0
) -> tuple[list[Unit], list[Unit]]:
    """Return the complete units of "train" and at most one complete unit of "val".

    `views` is the number of "train" units to use, from view 0 on; 0 takes all. A resumed
    run keeps the units of its run.json (`resumed`).

    Raises: UsageError when too few units are complete; CorruptionError when an array belongs to
    another cache.
    """
    cache.check_pictures()
    complete = cache.complete_units("train")
    units = [unit for unit in complete if str(unit) in resumed] or complete[: views or None]
    if not units:
        raise UsageError(
            f"{cache.path}: expected a complete unit of 'train';"
            f" found {len(cache.units('train'))} begun; finish `mcm-cache extract`"
        )
    if len(units) < views:
        raise UsageError(
            f"{cache.path}: expected data.views = {views} complete units of 'train';"
            f" found {len(units)}; extract more views or lower data.views"
        )
    complete = cache.complete_units("val")
    val = [unit for unit in complete if not resumed or str(unit) in resumed][:1]
    for unit in (*units, *val):
        unit.check_arrays()
    return units, val


def student_patch(identity: CacheIdentity) -> int:
    """Return the student's patch size in pixels that gives the token grid of the cache.

    Raises: UsageError when no square patch gives that grid.
    """
    (rows, columns), height, width = identity.grid, identity.view_height, identity.view_width
    patch = height // rows
    if (rows * patch, columns * patch) != (height, width):
        raise UsageError(
            f"cache: expected views of {rows}x{columns} square patches;"
            f" found {height}x{width} pixels; extract again"
        )
    return patch


def target_channels(config: PretrainConfig, cache: Cache) -> int:
    """Return C: the channels of the teacher or its joint space, or the values of a pixel patch."""
    features = config.target.features
    if features == "pixels":
        return 3 * student_patch(cache.identity) ** 2
    return cache.projection().shape[1] if features == "joint" else cache.identity.channels


def run_record(
    config: PretrainConfig, cache: Cache, units: Sequence[Unit], dataset: Dataset | None = None
) -> PretrainRun:
    """Return the identity of the run. The student and the teacher share one mean and one std.

    Raises: UsageError when the cache lacks the configured target.
    """
    identity = cache.identity
    if config.loss.cls and not identity.has_cls:
        raise UsageError(
            "loss.cls = true: expected a teacher with a CLS token;"
            f" {identity.teacher.name} has none; use --set loss.cls=false"
        )
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


def advice(config: PretrainConfig, cache: Cache, rows: int, views: int) -> Iterator[str]:
    """Yield what is known to go wrong with such a run at a small scale; see docs/results.md."""
    mask, width, epochs = config.mask, config.student.width, config.schedule.epochs
    if mask.mode in ("channel", "dropout"):
        visible = width - round(mask.ratio * width)
        leaves = f"mask.ratio = {mask.ratio} leaves {visible} of {width} channels of a patch"
        scores = work_dir(cache.path) / "teacher.json"  # of `mcm-train probe CACHE`
        teacher = read_record(ProbeResult, scores).teacher if scores.is_file() else None
        if teacher and visible < teacher.effective_rank:
            rank = f"the effective rank of the teacher's features is {teacher.effective_rank:.0f}"
            yield f"{leaves}, and {rank}; hide fewer, or use a wider student"
        if width < PAPER_WIDTH and mask.ratio >= PAPER_RATIO:
            paper = f"the paper leaves {PAPER_WIDTH // 4} of {PAPER_WIDTH}"
            yield f"{leaves}; {paper}; try mask.ratio = 0.25"
    if rows * views < OVERFIT_VIEWS and epochs >= OVERFIT_EPOCHS * views:
        stored = f"{rows} pictures x {views} views"
        yield f"{stored} for {epochs} epochs may overfit; extract more views, or train for less"


def announce(
    cache: Cache, units: Sequence[Unit], val: Sequence[Unit], order: Order, no_knn: bool
) -> None:
    """Print what the run trains on and what it leaves out."""
    left_out = len(cache.units("train")) - len(units)
    without = f"left out: {left_out} views that are incomplete or beyond data.views"
    print(f"{order.rows} rows in {len(units)} views; {without}")
    if partial := order.rows % CHUNK_ROWS:
        print(f"the last {partial} rows, a partial chunk, are left out of training")
    print(order, flush=True)
    if not val:
        print("the cache has no complete unit of 'val': no held-out loss or R^2", flush=True)
    if no_knn:
        print("train.knn_epochs is set without --data DATASET: no k-NN accuracy", flush=True)
