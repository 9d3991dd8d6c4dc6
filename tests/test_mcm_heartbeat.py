import os
import signal

import pytest
from make_cache import make_cache
from test_mcm_pretrain import command, make_config, process_ids, start, wait_for

from cache_tools.records import read_record
from mcm.run_folder import ExitRecord

LONG = make_config(schedule={"epochs": 10_000})
BUG = """
    from mcm.task import Task
    def loss(self, wrapped, batch, real=Task.loss):
        assert os.environ["RANK"] == "0" or batch["epoch"] < 2, "a bug of rank 1"
        return real(self, wrapped, batch)
    Task.loss = loss
"""
# What is done to a rank: a signal and its number, or code that runs first; and the record of it.
FAILURES = {
    "stopped": ((1, signal.SIGSTOP), "", 7, "rank 1 is gone: silent for "),
    "killed": ((0, signal.SIGKILL), "", 7, "rank 0 is gone: silent for "),
    "bug": (None, BUG, 1, "rank 1: AssertionError: a bug of rank 1"),
    "damage": (None, "", 4, ": CorruptionError: "),
}


def flip_a_bit(cache):
    """In a chunk, which one rank reads."""
    path = cache.path / "train/v0/features.zarr/patch/c.1.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(process, run) of each failure, all at once, as it is waiting that takes the time."""
    found, folder = {}, tmp_path_factory.mktemp("heartbeat")
    for name, (_, before, _, _) in FAILURES.items():
        cache = make_cache(folder / f"cache of {name}", views=1, val_rows=0)
        if name == "damage":
            flip_a_bit(cache)
        run = folder / name
        found[name] = start(command(LONG, cache, run, world=2, before=before)), run
    for name, (process, run) in found.items():
        wait_for(4, process, run)
        if signalled := FAILURES[name][0]:
            os.kill(process_ids(run)[signalled[0]], signalled[1])
    yield found
    for process, run in found.values():
        for pid in process_ids(run) if process.poll() is None else ():  # only where a test has failed
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", FAILURES)
def test_where_one_rank_fails_all_end_and_the_first_cause_is_said_last(launched, name):
    (process, run), (_, _, code, words) = launched[name], FAILURES[name]
    stderr = process.communicate(timeout=120)[1].decode()
    record = read_record(ExitRecord, run / "exit.json")
    assert process.returncode and record.code == code and words in record.message
    ours = [line for line in stderr.splitlines() if line.startswith(("error: ", "[rank"))]
    assert record.message.rpartition("Error: ")[2] in ours[-1], stderr
    for pid in process_ids(run):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
