"""Run one extraction on the actors of a Ray cluster: a driver hands out the missing shards.

Ray restarts an actor that was killed or that lost its node, and repeats its shard. The commits
alone say which shards are done.
"""

import os
import re
import socket
from collections import deque
from dataclasses import replace
from typing import Any

from cache_tools.console import StopFlag, progress
from cache_tools.errors import Interrupted, ResourceError, UsageError, check_output, missing_package
from cache_tools.storage import try_lock, work_dir

from .extract import STOPPED, Request, Session, missing_shards
from .worker import WorkerInfo, processes_per_gpu
from .worker_pool import POLL_S

CONNECT_S = 10.0  # for the address of the cluster to answer


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
    """Make every missing shard of the request's units on `count` workers of a Ray cluster.

    `address` is that of `ray.init`. The driver computes on the CPU. A worker runs as several actors
    if the request asks for several processes, or if it has a GPU. 0 processes or threads mean the
    default.

    Raises: UsageError or IdentityError, before any shard; the first error of an actor; Interrupted
    when the user stops the run, which then ends after the shards in work.
    """
    check_output(request.cache, "a CACHE", own=("dataset",))
    session = Session(replace(request, worker=WorkerInfo(device="cpu")))
    session.publish()
    with try_lock(work_dir(request.cache) / "driver") as held:
        if not held:
            raise UsageError(f"{request.cache}: expected no other Ray driver; found one at work")
        if missing := list(missing_shards(session.units, request.cache, WorkerInfo())):
            with _connect(address):
                import ray

                worker, needs = actor_share(request.worker, ray.nodes())
                request = replace(request, source=str(session.dataset.path), worker=worker)
                _make_shards(session, missing, _start_actors(request, count, needs))
        complete, units = session.finish()
    print(f"{request.cache}: {complete} of {units} units complete", flush=True)


def _connect(address: str | None) -> Any:
    """Connect to the cluster, and return the context that ends the connection and the actors."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address in (None, "auto"):  # as Ray itself does
        address = os.environ.get("RAY_ADDRESS") or address
    if address not in (None, "local"):  # by default, Ray tries 20 times, 41 s each
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    try:
        if address and re.fullmatch(r"[^/]+:\d+", address):
            host, port = address.rsplit(":", 1)
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        import ray

        return ray.init(address, log_to_driver=False, logging_level="ERROR")
    except ModuleNotFoundError as error:
        raise missing_package("--ray", str(error.name), "ray") from error
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"--ray-address {address}: expected a running cluster; {said}") from error


def actor_share(
    worker: WorkerInfo, nodes: list[dict[str, Any]]
) -> tuple[WorkerInfo, dict[str, float]]:
    """Return the worker with its defaults filled in, and the resources that each actor holds.

    `nodes` are those of `ray.nodes`. Without a device, the actors have GPUs if a node has any.
    The node with the fewest cores per GPU decides the actors per GPU and their threads.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cores = [int(node.get("CPU", 0) / node["GPU"]) for node in alive if node.get("GPU")]
    device = (worker.device or ("cuda" if cores else "cpu")).split(":")[0]
    if device == "cuda":
        processes = worker.processes or processes_per_gpu(min(cores, default=1))
        threads = worker.threads or max(1, min(cores, default=1) // processes)
        needs = {"num_gpus": 10_000 // processes / 10_000}  # Ray keeps 4 digits: 6 * 0.1667 > 1
    else:
        processes, threads = worker.processes or 1, worker.threads or 1
        needs = {"num_cpus": float(threads)}
    return worker._replace(device=device, threads=threads, processes=processes), needs


def _start_actors(request: Request, count: int, needs: dict[str, float]) -> dict[Any, Any]:
    """Start the actors of `count` workers; return each by a reference that is done when it runs.

    An actor that finds no free node waits for one.
    """
    import ray

    worker, found = request.worker, ray.cluster_resources()
    actors = count * worker.processes
    each = f"{worker.processes} per GPU" if "num_gpus" in needs else "on CPUs"
    has = ", ".join(f"{one}: {found.get(one, 0):g}" for one in ("GPU", "CPU"))
    print(f"Ray: {actors} actors ({each}), threads each: {worker.threads}; found {has}", flush=True)
    actor = ray.remote(max_restarts=-1, max_task_retries=-1, **needs)(ShardActor)
    started = [actor.remote(request, os.getcwd()) for _ in range(actors)]
    return {one.__ray_ready__.remote(): one for one in started}


def _make_shards(session: Session, missing: list[tuple[str, int]], actors: dict[Any, Any]) -> None:
    """Give each ready actor the next missing shard, until a stop or an error; await the others.

    An actor without a further shard is released. Ray then starts a waiting actor in its place.
    """
    import ray

    cache, todo, busy, error = session.request.cache, deque(missing), set[Any](), None
    total = sum(unit.rows for unit in session.every_unit)
    left = sum(unit.shard_rows(k) for split, k in missing for unit in session.units[split])
    with (
        StopFlag("each actor finishes and commits its current shard") as stop,
        progress(total, f"extract {cache}", "views", total - left) as bar,
    ):
        while busy or (todo and not error and not stop.requested):
            for done in ray.wait(list(actors), timeout=POLL_S)[0]:
                try:
                    rows = ray.get(done)
                    if done in busy:
                        bar.update(rows)
                except ray.exceptions.RayError as failed:
                    said = str(failed).rstrip().splitlines()[-1]
                    error = error or getattr(failed, "cause", None) or ResourceError(f"Ray: {said}")
                busy.discard(done)
                if todo and not error and not stop.requested:
                    task = actors[done].shard.remote(*todo.popleft())
                    actors[task] = actors[done]
                    busy.add(task)
                del actors[done]
    if error:
        raise error
    if todo:
        raise Interrupted(f"{cache}: {STOPPED}")
