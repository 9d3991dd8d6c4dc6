import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cache_tools.errors import CorruptionError, IdentityError
from cache_tools.storage import file_sha256
from mcm import checkpoint


def trained(steps: int = 3, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save(run: Path, step: int, seed: int = 0) -> Path:
    model, optimizer = trained(step, seed)
    meta = {"window": [0.1, 1 / 3], "evaluated": False}
    return checkpoint.save(run, step, model.state_dict(), checkpoint.optimizer_tensors(model, optimizer), meta)


def test_everything_comes_back_by_name(tmp_path):
    path = save(tmp_path, 3)
    assert path == tmp_path / "checkpoints" / "step_000000003"
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    found = checkpoint.latest(tmp_path)
    assert (found.path, found.step, found.meta) == (path, 3, {"window": [0.1, 1 / 3], "evaluated": False})
    assert found.model_sha256 == file_sha256(path / "model.safetensors")
    assert "0.weight/exp_avg" in found.optimizer and "0.bias/exp_avg" not in found.optimizer
    expected_model, expected_optimizer = trained(5)
    model, optimizer = trained(0)
    trained(3)  # the draws of the first three steps
    checkpoint.restore(found, model, optimizer)
    for _ in range(2):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, theirs = model.state_dict(), expected_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours = checkpoint.optimizer_tensors(model, optimizer)
    theirs = checkpoint.optimizer_tensors(expected_model, expected_optimizer)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert checkpoint.latest(tmp_path, optimizer=False).optimizer == {}


def test_a_disk_that_takes_no_more_is_an_error_of_the_system_and_leaves_nothing(tmp_path):
    trained()  # what torch imports may write files
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*model\.safetensors"):
            save(tmp_path, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_another_model_is_refused(tmp_path):
    save(tmp_path, 1)
    model = nn.Linear(4, 8)
    with pytest.raises(IdentityError, match=r"step_000000001: expected the tensors of this model; 0\.bias"):
        checkpoint.restore(checkpoint.latest(tmp_path), model, torch.optim.AdamW(model.parameters()))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, capsys, name, damage):
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / name)
    assert checkpoint.latest(tmp_path).step == 1
    said = capsys.readouterr().out
    if (name, damage) == ("state.json", Path.unlink):  # then it is no checkpoint at all
        assert said == ""
    else:
        assert "warning:" in said and f"step_000000002/{name}" in said


def test_all_damaged_is_an_error_and_none_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2):
        flip(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(CorruptionError, match=r"step_000000001/model\.safetensors: expected .*no other checkpoint"):
        checkpoint.latest(tmp_path)


def test_a_renamed_folder_is_refused(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(checkpoint.folder(tmp_path, 1), checkpoint.folder(tmp_path, 7))
    with pytest.raises(CorruptionError, match=r"step_000000007/state\.json: expected the step of its folder; found 1"):
        checkpoint.load(checkpoint.folder(tmp_path, 7))


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [8]), (2, [3, 8]), (3, [2, 3, 8]), (9, [1, 2, 3, 8])])
def test_rotation_keeps_the_newest_that_led_here(tmp_path, keep_last, kept):
    for step in (1, 2, 3, 7, 9):
        save(tmp_path, step)
    for step in (7, 9):  # so training went on from 3
        flip(checkpoint.folder(tmp_path, step) / "model.safetensors")
    save(tmp_path, 8)
    (tmp_path / "checkpoints" / ".step_000000005.0a1b2c3d.partial").mkdir()
    checkpoint.rotate(tmp_path, 3, 8, keep_last)
    left = sorted((tmp_path / "checkpoints").iterdir())
    assert left == [checkpoint.folder(tmp_path, step) for step in kept]


def test_rotation_leaves_what_is_no_checkpoint(tmp_path):
    folder = save(tmp_path, 1).parent
    for name in (".DS_Store", ".nfs0000001", "notes", "step_000000004"):
        (folder / name).write_text("of the user")
    for name in ("best", "step_3", ".best.partial"):
        shutil.copytree(folder / "step_000000001", folder / name)
    shutil.copytree(folder / "step_000000001", tmp_path / "elsewhere")
    (folder / "step_000000002").symlink_to(tmp_path / "elsewhere")
    before = sorted(path for path in tmp_path.rglob("*") if "step_000000001" not in path.parts)
    save(tmp_path, 5)
    checkpoint.rotate(tmp_path, 1, 5, 1)
    after = [path for path in tmp_path.rglob("*") if "step_000000005" not in path.parts]
    assert sorted(after) == before


def test_saving_again_replaces_the_damaged_one(tmp_path):
    flip(save(tmp_path, 2) / "optimizer.safetensors")
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path).step == 2


KILLS = """
import os, signal, sys
from pathlib import Path
import torch
from cache_tools.storage import settle
from mcm import checkpoint
run, kills = Path(sys.argv[1]), int(sys.argv[2])
for step in range(1, kills + 1):
    child = os.fork()
    if not child:
        tensors = {f"t{i}": torch.full((300_000,), float(step)) for i in range(4)}
        if step > 1:  # the kernel ends it, no handler runs
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.08 * (step * 0.618 % 1))
        checkpoint.save(run, step, tensors, tensors, {})
        checkpoint.rotate(run, step - 1, step, 2)
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    settle(run)
    found = checkpoint.latest(run)
    whole = all(bool((t == found.step).all()) for t in (*found.model.values(), *found.optimizer.values()))
    print(int(died), int(found.step == step), int(whole), len(checkpoint.complete(run)))
"""


@pytest.mark.slow
def test_killed_while_saving_leaves_a_whole_checkpoint(tmp_path, how_many, tally):
    saves = how_many(24, 300)
    command = [sys.executable, "-c", KILLS, str(tmp_path), str(saves)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    died, arrived, whole, left = zip(*(map(int, line.split()) for line in lines), strict=True)
    assert len(lines) == saves and all(whole)
    assert all(dead or count <= 2 for dead, count in zip(died, left, strict=True))  # the next rotation catches up
    assert sum(died) >= 3 and all(a or d for a, d in zip(arrived, died, strict=True))
    tally("killed while it saves a checkpoint", kills=sum(died), failures=0)
