"""The small runs that the reliability harnesses break, and real processes for them, one fork each.

One server process imports torch and all of stage one (6 s), computes nothing and forks the others. A process has one
forkserver, and its first start decides what it imports. So `_server` replaces the one that a decode pool started.
"""

import json
import multiprocessing
import os
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from conftest import ROOT
from disk import DIE, Disk
from make_extract import request
from make_parquet import from_folder
from make_scenes import make_ade, make_coco
from make_teacher import make_teacher
from test_pipeline_shard import make_source

from cache_tools import storage
from cache_tools.console import guarded
from cache_tools.transfer import pull, push
from pipeline import extract as extract_module
from pipeline.shard import shard

SERVER = multiprocessing.get_context("forkserver")


def make_place(root: Path, train: int = 36) -> Path:
    """Pictures of two splits (shards of 16), their DATASET, a teacher; what is made from them goes beside."""
    make_source(root / "pictures", train=train, val=4)
    from_folder(root / "pictures", root / "hub", per_file=20)
    make_ade(root / "ade", train, 4)
    make_coco(root / "coco", train, 4)
    make_teacher(root / "clip")
    run_shard(root, root / "dataset")
    return root


def run_shard(place: Path, out: Path) -> None:
    shard(place / "pictures", out, rows_per_shard=16, workers=2)


def run_parquet(place: Path, out: Path) -> None:
    shard(place / "hub", out, rows_per_shard=16, workers=2)


def run_scenes(place: Path, out: Path) -> None:
    shard(place / "ade", out, rows_per_shard=16, workers=2)


def run_boxes(place: Path, out: Path) -> None:
    shard(place / "coco", out, rows_per_shard=16, workers=2)


def run_extract(place: Path, cache: Path, views: int = 1, worker: int = 0, workers: int = 1) -> None:
    extract_module.extract(request(place, cache, worker=(worker, workers), views=views))


def run_unlocked(place: Path, cache: Path, host: str, views: int) -> None:
    """As on a host that sees no lock of another one, or with a flock that does nothing."""
    with patch.object(storage, "HOST", host), patch("fcntl.flock", lambda *_: None):
        run_extract(place, cache, views)


def run_push(place: Path, out: Path) -> None:
    """Push to the S3 server with the environment in PLACE, below the last two names of `out`."""
    os.environ |= json.loads((place / "environment.json").read_text())
    push(place / "cache", f"{os.environ['TEST_BUCKET']}/{out.parent.name}/{out.name}")


def run_push_to_folder(place: Path, out: Path) -> None:
    push(place / "cache", str(out))


def run_pull(place: Path, out: Path) -> None:
    os.environ |= json.loads((place / "environment.json").read_text())
    pull(f"{os.environ['TEST_BUCKET']}/cache", out)


@cache
def _server() -> None:
    """Start the forkserver that has imported this file; one that runs already ends."""
    forkserver._forkserver._stop()
    SERVER.set_forkserver_preload(["zygote"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for this file when it starts
        places = (ROOT / "tests" / "helpers", ROOT / "tests", ROOT)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
        forkserver.ensure_running()


def start(run: Callable[..., None], place: Path, out: Path, log: Path, at: str = "", **options: Any) -> BaseProcess:
    """A process that does `run(place, out, **options)` as the command line would, and dies before operation `at`."""
    _server()
    process = SERVER.Process(target=_work, args=(run, place, out, log, at), kwargs=options)
    process.start()
    return process


def _work(run: Callable[..., None], place: Path, out: Path, log: Path, at: str, **options: Any) -> None:
    with open(f"{log}.out", "a") as said, Disk(out.parent, at, DIE, log).installed():
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        guarded(run)(place, out, **options)
