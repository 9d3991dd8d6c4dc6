"""The list of runs: each state of a real run, told apart without a lock or a write."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import command, run, tree_digest
from make_cache import make_cache
from make_run import make_run
from test_mcm_pretrain import make_config

from cache_tools.errors import UsageError
from cache_tools.records import encode_record, write_toml
from cache_tools.storage import append_line, write_atomic
from mcm.run_dir import ExitRecord
from mcm.runs import lines, runs


@pytest.mark.slow
def test_running_killed_and_done(tmp_path):
    cache = make_cache(tmp_path / "cache", 64, 32, 1).path
    config = make_config(schedule={"epochs": 200}, train={"eval_epochs": 1, "checkpoint_steps": 20})
    write_atomic(tmp_path / "config.toml", write_toml(config).encode())
    out = tmp_path / "deep" / "er" / "one"
    start = ("pretrain", tmp_path / "config.toml", "--cache", cache, "--out", out)
    process = subprocess.Popen(command("mcm-train", *start), stdout=subprocess.DEVNULL)
    try:
        while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_bytes()) < 2000:
            assert process.poll() is None
            time.sleep(0.05)
        assert runs(tmp_path)[0]["state"] == "running"
        run("mcm-train", "report", out, "--out", tmp_path / "report.html")
        assert b"<meta http-equiv=refresh content=30>" in (tmp_path / "report.html").read_bytes()
    finally:
        process.kill()
        process.wait()
    digest = tree_digest(tmp_path)
    (killed,) = runs(tmp_path)
    assert tree_digest(tmp_path) == digest
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (killed["state"], killed["kind"], killed["step"], killed["steps"]) == (
        "killed",
        "pretrain",
        log[-1]["step"],
        400,
    )
    r2 = [line["eval"]["r2_masked"] for line in log if "eval" in line]
    assert killed["best"]["r2_masked"] == max(r2) and killed["images_per_s"] > 0 and killed["age_s"] < 600
    run("mcm-train", *start, "--set", "train.eval_epochs=0")
    run("mcm-train", "report", out, "--out", tmp_path / "report.html")
    assert b"http-equiv" not in (tmp_path / "report.html").read_bytes()
    (done,) = json.loads(run("mcm-train", "runs", tmp_path, "--json"))
    assert (done["state"], done["step"], done["message"]) == ("done", 400, "complete")
    printed = run("mcm-train", "runs", tmp_path)
    assert f"| {out} " in printed and "400/400" in printed and "r2_masked" in printed


def test_how_a_run_ended_and_what_is_damaged(tmp_path):
    full = f"OSError: full {'x' * 200}"
    for name, code, message in (("a", 75, "stopped after step 3"), ("b", 7, full), ("c", 0, "complete")):
        write_atomic(make_run(tmp_path / name) / "exit.json", encode_record(ExitRecord(code=code, message=message)))
    make_run(tmp_path / "d")
    write_atomic(make_run(tmp_path / "e") / "metrics.jsonl", b"{\n")
    write_atomic(make_run(tmp_path / "f") / "run.json", b"{")
    make_cache(tmp_path / "cache", 32, 16, 1)
    os.utime(tmp_path / "a" / "exit.json", (1, 1))
    found = runs(tmp_path)
    states = {Path(facts["run"]).name: facts["state"] for facts in found}
    assert states == {"a": "stopped", "b": "failed", "c": "done", "d": "killed", "e": "damaged", "f": "damaged"}
    assert "metrics.jsonl: line 1: expected" in found[4]["message"] and "run.json: expected" in found[5]["message"]
    table = lines(found)
    assert table[2][1:] == ["failed", "pretrain", "0/?", "-", f"{full[:100]} ...", table[2][-1]]
    append_line(tmp_path / "b" / "metrics.jsonl", '{"step": 0, "eval": {"knn_full": 0.5}}')
    assert lines(runs(tmp_path))[2][5] == f"{full[:100]} ...", "a score does not hide why a run failed"
    shutil.rmtree(tmp_path / "d")
    with pytest.raises(UsageError, match="expected a RUN"):
        runs(tmp_path / "cache")
