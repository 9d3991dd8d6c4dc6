"""Trackers: a training that is killed and resumed is one run of wandb (offline), MLflow (file store) and trackio."""

import json
import os
import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest
from conftest import command
from make_cache import make_cache
from test_mcm_pretrain import make_config

from cache_tools.errors import UsageError
from cache_tools.records import write_toml
from cache_tools.storage import write_atomic
from mcm import tracking
from mcm.engine import engine


@pytest.fixture
def trained_twice(tmp_path):
    """Kills a training at its fourth log line, runs the same command to its end, and returns its RUN."""
    cache = make_cache(tmp_path / "cache", 64, 32, 1).path
    write_atomic(tmp_path / "config.toml", write_toml(make_config(schedule={"epochs": 40})).encode())
    run = tmp_path / "one"
    line = command("mcm-train", "pretrain", tmp_path / "config.toml", "--cache", cache, "--out", run)

    def train(track, **variables):
        environment = os.environ | variables | {"OMP_NUM_THREADS": "1"}
        line.extend(["--set", f"train.track={track}", "--set", "train.eval_epochs=0"])
        process = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = run / "metrics.jsonl"
        while not (log.is_file() and log.read_bytes().count(b"\n") >= 4):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        first = json.loads((run / "tracker.json").read_bytes())[track]
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "resumes after step" in done.stdout, done.stderr
        assert json.loads((run / "tracker.json").read_bytes()) == {track: first}
        return run, first

    return train


@pytest.mark.slow
def test_wandb_offline_continues_one_run(trained_twice):
    pytest.importorskip("wandb")
    run, name = trained_twice("wandb", WANDB_MODE="offline")
    folders = sorted(path.name for path in (run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.endswith(f"-{name}") for folder in folders) and name.startswith("one-")


@pytest.mark.slow
def test_trackio_continues_one_run_and_has_every_step(trained_twice, tmp_path):
    pytest.importorskip("trackio")
    _, name = trained_twice("trackio", TRACKIO_DIR=str(tmp_path / "store"), HF_HUB_OFFLINE="1")
    with closing(sqlite3.connect(tmp_path / "store" / "masked-channel-modeling.db")) as store:
        found = store.execute("select run_name, min(step), max(step) from metrics group by run_name").fetchall()
    assert found == [(name, 1, 80)]


@pytest.mark.slow
def test_mlflow_continues_one_run_and_has_every_step(trained_twice, tmp_path):
    pytest.importorskip("mlflow")
    store = tmp_path / "store"
    run, name = trained_twice("mlflow", MLFLOW_TRACKING_URI=store.as_uri(), MLFLOW_ALLOW_FILE_STORE="true")
    (found,) = store.glob("*/*/meta.yaml")
    assert found.parent.name == name and "run_name: one" in found.read_text()
    steps = [int(line.split()[2]) for line in (found.parent / "metrics/train/loss").read_text().splitlines()]
    assert set(steps) == set(range(1, 81))
    assert (found.parent / "params" / "optim.lr").read_text() == "0.002"


def test_a_tracker_that_is_not_installed_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with (
        pytest.raises(UsageError, match=r"expected the package trackio; found none; .*\[track\]"),
        engine("fp32", "trackio"),
    ):
        pass
