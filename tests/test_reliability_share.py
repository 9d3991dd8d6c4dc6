"""Push and pull, killed before any operation or at any moment: what is committed is whole, and the end is the same."""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest
import zygote
from conftest import tree_digest
from make_cache import make_cache
from s3_server import Server, s3_server
from test_mcm_pretrain import make_config, metrics
from test_reliability_kills import _straight, _trial

from cache_tools.errors import UsageError
from cache_tools.transfer import Part, pull, push
from cache_tools.verify import verify
from mcm.pretrain import pretrain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def s3() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, s3: Server) -> Path:
    """A CACHE of 4 shards, pushed once, and the environment of the server for other processes."""
    place = tmp_path_factory.mktemp("share")
    make_cache(place / "cache", rows=170, views=1)
    push(place / "cache", f"{s3.url}/cache")
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    (place / "environment.json").write_text(json.dumps(environment | {"TEST_BUCKET": s3.url}))
    return place


@pytest.mark.parametrize("run", [zygote.run_push, zygote.run_push_to_folder, zygote.run_pull])
def test_killed_and_resumed_ends_with_the_same_bytes(
    run: Callable[..., None],
    s3: Server,
    place: Path,
    tmp_path: Path,
    how_many: Callable[..., int],
    tally: Callable[..., None],
) -> None:
    def found(folder: Path) -> dict[str, str]:
        if run is zygote.run_push:
            return {name: hashlib.sha256(data).hexdigest() for name, data in s3.objects(f"{folder.name}/out/").items()}
        return tree_digest(folder / "out")

    ops, longest_s = _straight(run, place, tmp_path / "straight")
    expected, kills, trials, draw = found(tmp_path / "straight"), 0, 0, random.Random(run.__name__)
    cards = {} if run is zygote.run_pull else {name: expected.pop(name) for name in ("README.md", "files.json")}
    assert expected == tree_digest(place / "cache") and len(cards) in (0, 2)
    points = draw.sample(ops, min(len(ops), how_many(6, 60)))
    for point in (*points, *repeat("", 10**6)):
        if point == "" and kills >= how_many(20, 300):
            break
        (tmp_path / "trial").mkdir()
        kills, trials = kills + _trial(run, place, tmp_path / "trial", point, longest_s, draw, _whole(s3)), trials + 1
        left = {name: one for name, one in found(tmp_path / "trial").items() if name not in cards}
        assert left == expected, f"trial {trials}, first killed before {point or 'a random moment'!r}"
        shutil.rmtree(tmp_path / "trial")
        s3.clear("trial/")
    name = run.__name__.removeprefix("run_").replace("_", " ")
    tally(f"share: {name}", kills=kills, points=len(points), runs_compared=trials, failures=0)


def _whole(s3: Server) -> Callable[[Path], None]:
    """A check between a kill and the next run: every file of every commit is there, and whole."""

    def check(out: Path) -> None:
        if (out / "cache.json").is_file():
            assert not verify(out, quiet=True).problems
        objects = s3.objects(f"{out.parent.name}/out/")
        for name, data in objects.items():
            if "/commits/" in name:
                for file, entry in json.loads(data)["files"].items():
                    stored = objects[f"{name.partition('/commits/')[0]}/{file}"]
                    assert hashlib.sha256(stored).hexdigest() == entry["sha256"]

    return check


def test_what_was_pulled_trains_the_same(place: Path, s3: Server, tmp_path: Path) -> None:
    pull(f"{s3.url}/cache", tmp_path / "pulled")
    pull(f"{s3.url}/cache", tmp_path / "tenth", Part(first=0.1))
    pull(f"{s3.url}/cache", tmp_path / "features", Part(features_only=True))
    for cache in (place / "cache", tmp_path / "pulled", tmp_path / "tenth"):
        pretrain(make_config(), cache, tmp_path / f"run {cache.name}")
    assert metrics(tmp_path / "run pulled") == metrics(tmp_path / "run cache")
    assert len(metrics(tmp_path / "run tenth")) > 8
    with pytest.raises(UsageError, match="expected views; found features only"):
        pretrain(make_config(), tmp_path / "features", tmp_path / "run features")
