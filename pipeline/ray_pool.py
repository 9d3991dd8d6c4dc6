"""Run one extraction on the actors of a Ray cluster: a driver hands out the missing shards.

Ray restarts an actor that was killed or that lost its node, and repeats its shard. The commits
alone say which shards are done.
"""

import os
from dataclasses import replace
from typing import Any

from cache_tools.console import StopFlag, progress
from cache_tools.errors import Interrupted, ResourceError, UsageError, check_output, missing_package
from cache_tools.storage import try_lock, work_dir

from .extract import STOPPED, Request, Session, missing_shards
from .worker import WorkerInfo
from .worker_pool import POLL_S

GPU_THREADS = 8  # rendering threads of an actor with a GPU


class ShardActor:
    """One worker. Its first shard opens the session, because Ray hides errors of `__init__`."""

    def __init__(self, request: Request, folder: str) -> None:
        self.request = request
        self.session: Session | None = None
        if os.path.isdir(folder):  # the relative paths of the request begin here
            os.chdir(folder)

    def shard(self, split: str, shard: int) -> int:
        """Make one shard of each unit that lacks it; return its rows in all units."""
        if self.session is None:
            self.session = Session(self.request)
            self.session.publish()
            self.extractor = self.session.extractor()
        units = self.session.units[split]
        if missing := [unit for unit in units if not unit.commit_file(shard).is_file()]:
            self.extractor.shard(missing, shard, lambda n, note: None)
        return len(units) * units[0].shard_rows(shard)


def extract_on_ray(request: Request, count: int, address: str | None) -> None:
    """Make every missing shard of the request's units on `count` actors of a Ray cluster.

    `address` is that of `ray.init`. The driver computes on the CPU. Without a device, the actors
    have GPUs if the cluster has any. 0 threads mean GPU_THREADS with a GPU, and 1 without.

    Raises: UsageError or IdentityError, before any shard; the first error of an actor; Interrupted
    when the user stops the run, which then ends after the shards in work.
    """
    check_output(request.cache, "a CACHE")
    session = Session(replace(request, worker=WorkerInfo(device="cpu")))
    session.publish()
    with try_lock(work_dir(request.cache) / "driver") as held:
        if not held:
            raise UsageError(f"{request.cache}: expected no other Ray driver; found one at work")
        if missing := list(missing_shards(session.units, request.cache, WorkerInfo())):
            with _connect(address):
                request = replace(request, source=str(session.dataset.path))
                _make_shards(session, missing, _start_actors(request, count))
        complete, units = session.finish()
    print(f"{request.cache}: {complete} of {units} units complete", flush=True)


def _connect(address: str | None) -> Any:
    """Connect to the cluster, and return the context that ends the connection and the actors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray

        return ray.init(address, log_to_driver=False, logging_level="ERROR")
    except ModuleNotFoundError as error:
        raise missing_package("--ray", str(error.name), "ray") from error
    except (ConnectionError, ValueError) as error:
        raise UsageError(f"--ray-address {address}: expected a running cluster; {error}") from error


def _start_actors(request: Request, count: int) -> list[Any]:
    """Return the actors; those that find no free node wait for one."""
    import ray

    info = request.worker
    on_gpu = (info.device or "cuda").startswith("cuda") and ray.cluster_resources().get("GPU", 0)
    threads = info.threads or (GPU_THREADS if on_gpu else 1)
    worker = WorkerInfo(device="cuda" if on_gpu else "cpu", threads=threads)
    needs = dict(num_gpus=1) if on_gpu else dict(num_cpus=threads)
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, **needs)(ShardActor)
    return [actor.remote(replace(request, worker=worker), os.getcwd()) for _ in range(count)]


def _make_shards(session: Session, missing: list[tuple[str, int]], actors: list[Any]) -> None:
    """Give each free actor the next missing shard, until a stop or an error; await the others."""
    from ray.exceptions import RayError
    from ray.util import ActorPool

    cache, pool, todo, error = session.request.cache, ActorPool(actors), iter(missing), None
    total = sum(unit.rows for unit in session.every_unit)
    left = sum(unit.shard_rows(k) for split, k in missing for unit in session.units[split])
    with (
        StopFlag("each actor finishes and commits its current shard") as stop,
        progress(total, f"extract {cache}", "views", total - left) as bar,
    ):
        while True:
            while pool.has_free() and not (error or stop.requested) and (one := next(todo, None)):
                pool.submit(lambda actor, shard: actor.shard.remote(*shard), one)
            if not pool.has_next():
                break
            try:
                bar.update(pool.get_next_unordered(POLL_S))
            except RayError as failed:
                said = str(failed).rstrip().splitlines()[-1]
                error = error or getattr(failed, "cause", None) or ResourceError(f"Ray: {said}")
            except TimeoutError:  # time to look at the stop
                continue
    if error:
        raise error
    if stop.requested and next(todo, None):
        raise Interrupted(f"{cache}: {STOPPED}")
