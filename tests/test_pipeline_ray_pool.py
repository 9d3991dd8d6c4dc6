"""Extraction on a real Ray cluster of this machine: the bytes of one process, though actors and nodes are killed."""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import run, tree_digest
from make_extract import request
from test_pipeline_worker_pool import ended, place, start, words

from cache_tools.errors import UsageError
from cache_tools.storage import try_lock, work_dir
from pipeline import ray_pool
from pipeline.cli import extract_command
from pipeline.ray_pool import actor_share, extract_on_ray
from pipeline.worker import WorkerInfo

pytestmark = pytest.mark.slow
__all__ = ["place"]  # a fixture

MEMORY = {"object_store_memory": 100 << 20}
NODE = MEMORY | {"num_cpus": 2, "num_gpus": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, and one node for two actors that can share a GPU."""
    Cluster = pytest.importorskip("ray.cluster_utils").Cluster
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # CUDA finds no GPU, and Ray counts one
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # as a token of this user would enable it in drivers alone
        cluster = Cluster(initialize_head=True, head_node_args=MEMORY | {"num_cpus": 0, "num_gpus": 0})
        cluster.add_node(**NODE)
        yield cluster
        cluster.shutdown()


def on(cluster: Any, actors: int = 2) -> tuple[object, ...]:
    return "--ray", actors, "--ray-address", cluster.address


def kill_an_actor(cluster: Any, extra: Any) -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if path.read_bytes().startswith(b"ray::ShardActor.shard"):
            os.kill(int(path.parent.name), signal.SIGKILL)
            return
    pytest.fail("no actor is at work")


def replace_all_nodes(cluster: Any, extra: Any) -> None:
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**NODE)


def lose_a_node(cluster: Any, extra: Any) -> None:
    cluster.remove_node(extra, allow_graceful=False)


@pytest.mark.parametrize("disturb", [kill_an_actor, replace_all_nodes, lose_a_node])
def test_the_bytes_are_those_of_one_process(
    disturb: Callable[[Any, Any], None],
    cluster: Any,
    place: Path,
    tmp_path: Path,
    how_many: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    for trial in range(how_many(1, 5)):
        cache, extra = tmp_path / f"cache{trial}", cluster.add_node(**MEMORY, num_cpus=1, num_gpus=0)
        process = start(place, cache, *on(cluster, 4))  # one more than there are places
        assert process.poll() is None
        disturb(cluster, extra)
        said = ended(process, 0)
        assert said.count("teacher open_clip") == 1 and "440/440 views" in said and "3 of 3 units complete" in said
        assert "Ray: 4 actors (on CPUs), threads each: 1; found GPU: 1, CPU: 3\n" in said
        assert tree_digest(cache) == tree_digest(place / "cache")
        if extra in cluster.worker_nodes:
            cluster.remove_node(extra)
    tally(f"Ray: {disturb.__name__}", runs=trial + 1, failures=0)


def test_processes_of_a_worker_share_its_gpu(
    cluster: Any, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray, make, wanted = pytest.importorskip("ray"), ray_pool._make_shards, request(place, tmp_path / "cache")

    def share_on_cpu(worker: WorkerInfo, nodes: list[dict[str, Any]]) -> tuple[WorkerInfo, dict[str, float]]:
        worker, needs = actor_share(worker._replace(device="cuda", processes=2), nodes)
        return worker._replace(device="cpu"), needs

    def make_on_both(session: Any, missing: Any, actors: dict[Any, Any]) -> None:
        assert len(ray.wait(list(actors), num_returns=2, timeout=300)[0]) == 2
        assert ray.available_resources().get("GPU", 0) == 0
        make(session, missing, actors)

    monkeypatch.setattr(ray_pool, "actor_share", share_on_cpu)
    monkeypatch.setattr(ray_pool, "_make_shards", make_on_both)
    extract_on_ray(wanted, 1, cluster.address)
    assert "Ray: 2 actors (2 per GPU), threads each: 2; found GPU: 1, CPU: 2\n" in capsys.readouterr().out
    assert tree_digest(wanted.cache) == tree_digest(place / "cache")


def test_a_gpu_that_torch_does_not_find_is_an_error(cluster: Any, place: Path, tmp_path: Path) -> None:
    said = run(*words(place, tmp_path / "cache", *on(cluster, 1), "--device", "cuda:0"), expect=2)
    assert "Ray: 1 actors (1 per GPU)" in said and "error: --device cuda: expected a device of this machine" in said


def test_a_stop_ends_each_actor_at_a_shard_and_a_finished_cache_needs_no_cluster(
    cluster: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    process = start(place, cache, *on(cluster))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said = ended(process, 75)
    assert said.count("stopping: each actor finishes") == 1 and "stopped; the same command resumes" in said
    assert not list(tmp_path.rglob("*.partial"))  # the shards in work were finished
    run(*words(place, cache, *on(cluster, 1)))
    assert tree_digest(cache) == tree_digest(place / "cache")
    extract_on_ray(request(place, cache), 2, "127.0.0.1:1")
    said = capsys.readouterr().out
    assert "3 of 3 units complete" in said and "views/s" not in said


def test_the_first_error_stops_all_and_is_the_error_of_the_command(cluster: Any, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place, tmp_path / "place")
    tar = tmp_path / "place" / "dataset" / "train" / "000003.tar"
    tar.write_bytes(tar.read_bytes().replace(b"\xff\xda", b"\xff\xdb"))
    said = run(*words(tmp_path / "place", tmp_path / "cache", *on(cluster)), expect=4)
    assert f"{tar}: row 96: expected the crc32c" in said and said.count("error: ") == 1


@pytest.mark.parametrize(
    ("changes", "address", "said"),
    [
        ({"weights": "missing.pt"}, None, "missing.pt"),
        ({}, "here", "--ray-address here: expected a running cluster"),
        ({}, "127.0.0.1:99999", "--ray-address 127.0.0.1:99999: expected a running cluster"),
    ],
)
def test_errors_of_the_user_come_before_any_shard(
    changes: dict[str, object], address: str | None, said: str, place: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match=said):
        extract_on_ray(request(place, tmp_path / "cache", **changes), 1, address)
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("address", ["--ray-address", "RAY_ADDRESS"])
def test_an_address_where_nothing_runs_is_an_error_in_one_line(
    address: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1:{server.getsockname()[1]}"
    if address == "RAY_ADDRESS":
        monkeypatch.setenv(address, closed)
    more = [] if address == "RAY_ADDRESS" else [address, closed]
    said = run(*words(place, tmp_path / "cache", "--ray", 2, *more), expect=2)
    expected = f"error: --ray-address {closed}: expected a running cluster; [Errno 111] Connection refused"
    assert said.splitlines()[-1] == expected and "Failed to connect" not in said


NODES = [
    {"Alive": True, "Resources": {"CPU": 96.0, "GPU": 8.0}},
    {"Alive": True, "Resources": {"CPU": 64.0, "GPU": 4.0}},
    {"Alive": True, "Resources": {"CPU": 4.0}},
    {"Alive": False, "Resources": {"CPU": 4.0, "GPU": 4.0}},
]


@pytest.mark.parametrize(
    ("given", "nodes", "device", "processes", "threads", "needs"),
    [
        (WorkerInfo(threads=0, processes=0), NODES, "cuda", 10, 1, {"num_gpus": 0.1}),
        (WorkerInfo(threads=0, processes=6), NODES, "cuda", 6, 2, {"num_gpus": 0.1666}),
        (WorkerInfo(threads=3, processes=1), NODES, "cuda", 1, 3, {"num_gpus": 1.0}),
        (WorkerInfo(device="cpu", threads=0, processes=0), NODES, "cpu", 1, 1, {"num_cpus": 1.0}),
        (WorkerInfo(threads=2, processes=3), NODES[2:], "cpu", 3, 2, {"num_cpus": 2.0}),
        (WorkerInfo(device="cuda:1", threads=0, processes=0), NODES[2:], "cuda", 1, 1, {"num_gpus": 1.0}),
    ],
)
def test_the_poorest_node_decides_how_many_share_a_gpu(
    given: WorkerInfo, nodes: list[Any], device: str, processes: int, threads: int, needs: dict[str, float]
) -> None:
    worker, found = actor_share(given, nodes)
    assert worker == WorkerInfo(device=device, processes=processes, threads=threads) and found == needs


def test_other_launchers_are_refused(place: Path) -> None:
    with pytest.raises(UsageError, match="--ray 2: expected no --worker or launcher"):
        extract_command(str(place), place / "cache", teacher="timm:vit", weights="random", ray=2, worker=0, workers=2)


def test_a_second_driver_and_a_missing_package_are_errors(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(place, tmp_path / "cache")
    with try_lock(work_dir(wanted.cache) / "driver"), pytest.raises(UsageError, match="found one at work"):
        extract_on_ray(wanted, 1, None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'masked-channel-modeling\[ray\]'"):
        extract_on_ray(wanted, 1, None)
