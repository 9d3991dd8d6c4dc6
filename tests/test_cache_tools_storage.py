"""Storage: a file is whole or absent, a published one is never replaced, a lock dies with its holder."""

import errno
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import another_process
from test_mcm_checkpoint import save

from cache_tools import storage
from cache_tools.errors import CorruptionError, IdentityError
from cache_tools.remote import read_at, read_into
from cache_tools.storage import (
    atomic_file,
    atomic_folder,
    file_sha256,
    locks_work,
    publish,
    settle,
    try_lock,
    write_atomic,
)
from mcm.run_dir import run_lock


def test_atomic_file_is_whole_hashed_and_fsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    with atomic_file(tmp_path / "x") as file:
        file.write(b"ab")
        file.write(memoryview(b"cd"))
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"abcd" and file.bytes == 4
    assert file.sha256 == file_sha256(tmp_path / "x")
    assert events == ["fsync", "rename", "fsync"]  # the file, its name, the folder


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "x") as file:
        file.write(b"new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["x" * 255, "\u4e2d" * 85])
def test_a_name_may_have_255_bytes(tmp_path: Path, name: str) -> None:
    write_atomic(tmp_path / name, b"a")
    assert (tmp_path / name).read_bytes() == b"a"


def test_publish_never_replaces(tmp_path: Path) -> None:
    publish(tmp_path / "x", b"one")
    publish(tmp_path / "x", b"one")
    with pytest.raises(IdentityError, match="found other bytes"):
        publish(tmp_path / "x", b"two")
    publish(tmp_path / "x", b"two", compare=False)
    assert (tmp_path / "x").read_bytes() == b"one"


def test_read_at_names_what_is_short_or_missing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"0123456789")
    assert read_at(tmp_path / "x", 3, 4) == b"3456"
    with pytest.raises(CorruptionError, match="expected 4 bytes at offset 8; found 2"):
        read_at(tmp_path / "x", 8, 4)
    with pytest.raises(CorruptionError, match="expected 4 bytes at offset 8; found 2"):
        read_into(tmp_path / "x", 8, memoryview(bytearray(4)))
    with pytest.raises(CorruptionError, match="found nothing"):
        read_at(tmp_path / "y", 0, 1)


def test_a_lock_is_exclusive_and_dies_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with another_process(f"held = try_lock(Path({str(lock)!r}))\nassert held.__enter__()") as holder:
        with try_lock(lock) as held:
            assert not held
        holder.kill()
        holder.wait()
        with try_lock(lock) as held:
            assert held


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_the_next_run_removes_what_a_killed_writer_left(tmp_path: Path, kind: str) -> None:
    final = tmp_path / "x"
    code = f"writer = {kind}(Path({str(final)!r}))\nwriter.__enter__()"

    def start_again() -> int:
        if kind == "atomic_file":
            settle(tmp_path)
        else:
            with pytest.raises(ZeroDivisionError), atomic_folder(final):
                _ = 1 // 0
        return len(list(tmp_path.iterdir()))

    with another_process(code) as writer:
        assert start_again() == 1  # of the living writer
        writer.kill()
        writer.wait()
        assert start_again() == 0


def test_a_file_of_another_host_stays_while_it_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a lock is local to a host: this one sees no lock of the writer."""
    with atomic_file(tmp_path / "x") as file:
        (temp,) = tmp_path.iterdir()
        with monkeypatch.context() as patch:
            patch.setattr(storage, "HOST", "0" * 8)
            patch.setattr(storage, "_flock", lambda *_: True)
            settle(tmp_path)
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    temp.write_bytes(b"left by a host that is no more")
    monkeypatch.setattr(storage, "HOST", "0" * 8)
    settle(tmp_path)
    assert temp.exists()
    os.utime(temp, (time.time() - 3601,) * 2)
    settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_without_flock_every_process_gets_the_lock_and_a_run_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with run_lock(tmp_path):
        assert capsys.readouterr().out == ""
    monkeypatch.setattr("fcntl.flock", flock)
    with run_lock(tmp_path), try_lock(tmp_path / ".run" / "lock") as held:
        assert held and not locks_work(tmp_path)
    assert "has no locks; do not train twice in" in capsys.readouterr().out


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as first:
        first.write(b"first")
        with atomic_file(tmp_path / "x") as second:
            second.write(b"2")
        assert (tmp_path / "x").read_bytes() == b"2"
    assert (tmp_path / "x").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_two_publishers_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:  # as on exFAT
        monkeypatch.setattr(os, "link", raising(errno.EPERM))
    late = atomic_file(tmp_path / "x", replace="none")
    with pytest.raises(IdentityError, match="another process wrote others, which stay"), late as file:
        file.write(b"late")
        publish(tmp_path / "x", b"first")
    assert (tmp_path / "x").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with try_lock(tmp_path / "locks" / "lock"):
            write_atomic(tmp_path / "file", b"")
            publish(tmp_path / "published", b"")
        assert locks_work(tmp_path)
        with atomic_folder(tmp_path / "folder"):
            pass
        save(tmp_path / "run", 1)  # safetensors' own files too
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {name: mode for name, mode in modes.items() if mode not in (0o664, 0o775)} == {} and len(modes) == 12


def test_a_folder_appears_once_and_filled(tmp_path: Path) -> None:
    for expected in (None, IdentityError):
        with pytest.raises(expected) if expected else nullcontext(), atomic_folder(tmp_path / "final") as folder:
            write_atomic(folder / "x", b"1")
            assert expected or not (tmp_path / "final").exists()
    assert (tmp_path / "final" / "x").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1


def raising(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_write_that_fails_on_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, raising(errno.ENOSPC))
            with pytest.raises(OSError, match="No space"):
                write_atomic(tmp_path / "x", b"data")
        assert not list(tmp_path.iterdir()), name


def test_a_failed_write_names_its_own_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, atomic_file(tmp_path / "outer") as outer, atomic_file(tmp_path / "inner"):
        outer._file = open("/dev/full", "wb", buffering=0)
        outer.write(b"x")
    outer._file.close()
    assert caught.value.filename == str(tmp_path / "outer") and not list(tmp_path.iterdir())
