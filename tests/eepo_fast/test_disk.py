"""Locks, and what a disk refuses."""

import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from eepo_fast import disk
from eepo_fast.disk import InUse, disk_error, locked, writing
from eepo_fast.types import UserError

HOLD = """
import sys, time
from pathlib import Path
from eepo_fast.disk import InUse, locked
try:
    with locked(Path(sys.argv[1]), "x", "y"):
        time.sleep(float(sys.argv[2]))
    print("held")
except InUse as error:
    print(error)
"""


def hold(file, seconds):
    return subprocess.Popen([sys.executable, "-c", HOLD, str(file), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_of_two_at_the_same_instant_one_holds_it(tmp_path):
    both = [hold(tmp_path / "new/folder/.lock", 1.5) for _ in range(2)]
    said = sorted((process.communicate()[0].strip(), process.pid) for process in both)
    assert said[0][0] == "held"
    assert said[1][0].startswith(f"x: in use by process {said[0][1]} on host {socket.gethostname()} since ")
    assert list(tmp_path.iterdir()) == [], "neither leaves a folder that was not there"


def test_what_was_there_stays_and_so_does_what_is_written(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with locked(tmp_path / name / ".lock", "x", "y"):
            (tmp_path / name / "kept").touch()
        assert [p.name for p in (tmp_path / name).iterdir()] == ["kept"]


@pytest.mark.parametrize("content", ["", "{", '{"process": 1, "host": "elsewhere"}', "[1]"])
def test_a_file_that_nobody_holds_never_blocks(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with locked(tmp_path / ".lock", "x", "y"):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
        with pytest.raises(InUse, match=f"process {os.getpid()} "), locked(tmp_path / ".lock", "x", "y"):
            pass
    assert not (tmp_path / ".lock").exists()


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path):
    file = tmp_path / ".lock"
    with locked(file, "x", "y"):
        child = os.fork()
        if child == 0:
            time.sleep(5)
            os._exit(0)
    with locked(file, "x", "y"):
        pass
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_a_kept_lock_is_held_by_whom_it_was_passed_to(tmp_path):
    """Negative control of the child: a comparison passes it on with intent."""
    with locked(tmp_path / ".lock", "x", "y", keep=True) as descriptor:
        child = subprocess.Popen(["sleep", "30"], pass_fds=[descriptor])
    try:
        with pytest.raises(InUse), locked(tmp_path / ".lock", "x", "y"):
            pass
    finally:
        child.kill()
        child.wait()
    with locked(tmp_path / ".lock", "x", "y"):
        pass


def test_without_locks_the_named_process_counts(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    file = tmp_path / ".lock"
    living = subprocess.Popen(["sleep", "30"])
    file.write_text(json.dumps({"process": living.pid, "host": socket.gethostname(), "time": 0}))
    with pytest.raises(InUse, match=f"process {living.pid}"), locked(file, "x", "y"):
        pass
    living.kill()
    living.wait()
    with locked(file, "x", "y"):
        pass


def test_what_the_disk_refuses_is_one_line_and_all_else_raised(tmp_path):
    with (
        pytest.raises(UserError, match=r"^out cannot be written: p: No space left on device; go$"),
        writing("out", "go"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "p")
    SafetensorError = type("SafetensorError", (Exception,), {})
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert disk_error(error) == "No space left on device (os error 28)"
    assert disk_error(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    for other in (ValueError("no"), SafetensorError("header too large")):
        assert disk_error(other) is None
        with pytest.raises(type(other)), writing("out", "go"):
            raise other


def test_a_full_disk_leaves_no_lock_and_no_folder(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "pwrite", refuse)
    with (
        pytest.raises(UserError, match="x cannot be written: No space left"),
        locked(tmp_path / "a/b/.lock", "x", "y"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
