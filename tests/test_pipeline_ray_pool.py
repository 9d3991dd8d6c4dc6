"""Extraction on a real Ray cluster of this machine: the bytes of one process, though actors and nodes are killed."""

import os
import shutil
import signal
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
from pipeline.cli import extract_command
from pipeline.ray_pool import extract_on_ray

pytestmark = pytest.mark.slow
__all__ = ["place"]  # a fixture

CPUS = {"num_cpus": 2, "object_store_memory": 100 << 20}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Any]:
    """A head without CPUs, and one node for two actors."""
    Cluster = pytest.importorskip("ray.cluster_utils").Cluster
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # as a token of this user would enable it in drivers alone
        cluster = Cluster(initialize_head=True, head_node_args=CPUS | {"num_cpus": 0})
        cluster.add_node(**CPUS)
        yield cluster
        cluster.shutdown()


def on(cluster: Any, actors: int = 2) -> tuple[object, ...]:
    return "--ray", actors, "--ray-address", cluster.address


def kill_an_actor(cluster: Any) -> None:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        if path.read_bytes().startswith(b"ray::ShardActor.shard"):
            os.kill(int(path.parent.name), signal.SIGKILL)
            return
    pytest.fail("no actor is at work")


def replace_the_node(cluster: Any) -> None:
    (node,) = cluster.worker_nodes
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(**CPUS)


@pytest.mark.parametrize("disturb", [kill_an_actor, replace_the_node])
def test_the_bytes_are_those_of_one_process(
    disturb: Callable[[Any], None],
    cluster: Any,
    place: Path,
    tmp_path: Path,
    how_many: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    for trial in range(how_many(1, 5)):
        cache = tmp_path / f"cache{trial}"
        process = start(place, cache, *on(cluster))
        assert process.poll() is None
        disturb(cluster)
        said = ended(process, 0)
        assert said.count("teacher open_clip") == 1 and "440/440 views" in said and "3 of 3 units complete" in said
        assert tree_digest(cache) == tree_digest(place / "cache")
    tally(f"Ray: {disturb.__name__}", runs=trial + 1, failures=0)


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
    ],
)
def test_errors_of_the_user_come_before_any_shard(
    changes: dict[str, object], address: str | None, said: str, place: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        extract_on_ray(request(place, tmp_path / "cache", **changes), 1, address)
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.parametrize("flags", [{"processes": 2}, {"worker": 0, "workers": 2}])
def test_other_launchers_are_refused(flags: dict[str, int], place: Path) -> None:
    with pytest.raises(UsageError, match="--ray 2: expected no --processes, --worker or a launcher"):
        extract_command(str(place), place / "cache", teacher="timm:vit", weights="random", ray=2, **flags)


def test_a_second_driver_and_a_missing_package_are_errors(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = request(place, tmp_path / "cache")
    with try_lock(work_dir(wanted.cache) / "driver"), pytest.raises(UsageError, match="found one at work"):
        extract_on_ray(wanted, 1, None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'masked-channel-modeling\[ray\]'"):
        extract_on_ray(wanted, 1, None)
