"""Storage: a file is whole or absent, a published one is never replaced, a lock dies with its holder."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cache_tools.errors import CorruptionError, IdentityError
from cache_tools.storage import (
    AtomicFile,
    append_line,
    file_sha256,
    keep_lines,
    publish,
    publish_folder,
    read_at,
    read_into,
    temp_folder,
    try_lock,
    write_atomic,
)


def test_atomic_file_is_whole_hashed_and_fsynced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    with AtomicFile(tmp_path / "x") as file:
        file.write(b"ab")
        file.write(memoryview(b"cd"))
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"abcd" and file.bytes == 4
    assert file.sha256 == file_sha256(tmp_path / "x")
    assert events == ["fsync", "rename", "fsync"]  # the file, its name, the folder


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"old")
    with pytest.raises(RuntimeError), AtomicFile(tmp_path / "x") as file:
        file.write(b"new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_publish_never_replaces(tmp_path: Path) -> None:
    publish(tmp_path / "x", b"one")
    publish(tmp_path / "x", b"one")
    with pytest.raises(IdentityError, match="another"):
        publish(tmp_path / "x", b"two")
    publish(tmp_path / "x", b"two", compare=False)
    assert (tmp_path / "x").read_bytes() == b"one"


def test_read_at_names_what_is_short_or_missing(tmp_path: Path) -> None:
    write_atomic(tmp_path / "x", b"0123456789")
    assert read_at(tmp_path / "x", 3, 4) == b"3456"
    with pytest.raises(CorruptionError, match="expected 4 bytes at 8; found 2"):
        read_at(tmp_path / "x", 8, 4)
    with pytest.raises(CorruptionError, match="expected 4 bytes at 8; found 2"):
        read_into(tmp_path / "x", 8, memoryview(bytearray(4)))
    with pytest.raises(CorruptionError, match="missing"):
        read_at(tmp_path / "y", 0, 1)


def test_a_lock_is_exclusive_and_dies_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    code = f"""
from pathlib import Path
from cache_tools.storage import try_lock
with try_lock(Path({str(lock)!r})) as held:
    print(held, flush=True)
    input()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    with try_lock(lock) as held:
        assert not held
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with try_lock(lock) as held:
        assert held


def test_logs_lose_a_torn_tail_only(tmp_path: Path) -> None:
    for line in ("1", "2", "3"):
        append_line(tmp_path / "log", line)
    with open(tmp_path / "log", "a") as file:
        file.write("torn")
    keep_lines(tmp_path / "log", lambda line: line != "2\n")
    assert (tmp_path / "log").read_text() == "1\n3\n"


def test_a_folder_is_published_once(tmp_path: Path) -> None:
    for expected in (None, IdentityError):
        temp = temp_folder(tmp_path / "final")
        write_atomic(temp / "x", b"1")
        if expected is None:
            publish_folder(temp, tmp_path / "final")
        else:
            with pytest.raises(expected):
                publish_folder(temp, tmp_path / "final")
    assert (tmp_path / "final" / "x").read_bytes() == b"1"


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"mine")
    (tmp_path / ".x.partial").symlink_to("elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        write_atomic(tmp_path / "x", b"data")
    assert (tmp_path / "elsewhere").read_bytes() == b"mine" and not (tmp_path / "x").exists()


def test_a_write_that_fails_on_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_atomic(tmp_path / "x", b"data")
        assert not list(tmp_path.iterdir()), name


def test_files_beyond_what_one_call_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reads 2 GiB a call at most: the optimizer of a ViT-L is larger."""
    data = bytes(range(256)) * 8
    (tmp_path / "x").write_bytes(data)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 1000), offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:700]], offset))
    assert read_at(tmp_path / "x", 3, 2000) == data[3:2003]
    out = bytearray(2000)
    read_into(tmp_path / "x", 3, memoryview(out))
    assert out == data[3:2003]
