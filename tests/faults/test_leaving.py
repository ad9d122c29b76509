"""Whichever way a rank leaves, it closes what it opened, and its exit code is the one that was meant."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eepo_fast import distributed
from eepo_fast.types import UserError

SCRIPT = Path(__file__).parent / "leaving.py"
CODES = {  # of rank 0, and of rank 1
    "it ends": (0, 0),
    "a user's error on all ranks": (2, 2),
    "a user's error on one rank": (1, 2),  # rank 0 loses it, and says so with a traceback
    "an exception": (1, 1),
    "an interrupt": (1, 130),
    "a signal": (143, 143),
    "sys.exit in a user's function": (1, 3),
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """(exit code, whether its group was closed) of each rank, by way; and what they said."""
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("leaving"))]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # two ranks, perhaps one GPU
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize("way", CODES)
def test_every_way_out_closes_the_process_group(left, way):
    ranks = left[0][way]
    assert tuple(code for code, _ in ranks) == CODES[way]
    assert [closed for _, closed in ranks] == [True, True]


def test_a_world_that_closes_nothing_is_noticed(left):
    """Negative control."""
    assert [closed for _, closed in left[0]["a world that closes nothing"]] == [False, False]


def test_nothing_meets_the_interpreters_end(left):
    """Each rank holds what would abort then. Negative control: a rank whose interpreter ends by itself."""
    found, _ = left
    assert [code for code, _ in found["an interpreter that ends by itself"]] == [-signal.SIGABRT] * 2
    assert found.keys() - CODES.keys() == {"a world that closes nothing", "an interpreter that ends by itself"}


def test_an_error_of_closing_does_not_hide_what_was_meant(monkeypatch):
    def fail(**options):
        raise RuntimeError("the network is gone")

    monkeypatch.setattr(distributed, "close_groups", fail)
    with pytest.raises(UserError, match="no such file"), distributed.World():
        raise UserError("no such file")
    with pytest.raises(RuntimeError, match="the network is gone"), distributed.World():
        pass


@pytest.mark.parametrize(("size", "on_gpu", "closed"), [(1, False, 1), (2, False, 1), (1, True, 1), (2, True, 0)])
def test_an_engine_over_gpus_is_left_to_the_abort(monkeypatch, size, on_gpu, closed):
    """Its orderly end would wait for ranks that have gone; after a block that ends well it is closed in any case."""
    calls = []
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: on_gpu)
    engine = SimpleNamespace(close=lambda: calls.append("closed"))
    world = distributed.World(0, size)
    with pytest.raises(KeyboardInterrupt), world.closing(engine):
        raise KeyboardInterrupt
    assert len(calls) == closed
    with world.closing(engine):
        pass
    assert len(calls) == closed + 1


def test_an_engine_that_cannot_close_hides_nothing():
    def fail():
        raise RuntimeError("a worker is gone")

    with pytest.raises(UserError, match="no such file"), distributed.World().closing(SimpleNamespace(close=fail)):
        raise UserError("no such file")
    with pytest.raises(RuntimeError, match="is gone"), distributed.World().closing(SimpleNamespace(close=fail)):
        pass


def test_a_world_that_cannot_be_whole_is_closed(monkeypatch):
    """Another rank leaves between the two groups."""
    closed = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)

    def lost(**options):
        raise RuntimeError("connection closed")

    monkeypatch.setattr(distributed.dist, "new_group", lost)
    monkeypatch.setattr(distributed, "close_groups", lambda **options: closed.append(options))
    with pytest.raises(RuntimeError, match="connection closed"), distributed.start_world():
        pass
    assert closed == [{"failed": True}]
