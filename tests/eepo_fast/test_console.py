"""Stdout and stderr are a convenience: no reader, no room and no letters beyond ASCII end no command."""

import io
import json
import subprocess
import sys

import pytest

from eepo_fast.console import Stream, forgiving
from eepo_fast.evaluation.tables import make_results, write_results

PRINTS = """
import sys
from rich.console import Console
from eepo_fast.console import forgiving
with forgiving() as out:
    for _ in range(3):
        print("x" * 100_000)
        Console(highlight=False, soft_wrap=True).print("ü" * 1000)
    print("done", file=sys.stderr)
    print(type(out.lost).__name__ if out else None, file=sys.stderr)
"""


def say(**options):
    with subprocess.Popen([sys.executable, "-c", PRINTS], stderr=subprocess.PIPE, text=True, **options) as process:
        if process.stdout is not None:
            process.stdout.close()
        errors = process.stderr.read()
    return process.returncode, errors.split()


def test_a_reader_that_has_gone(tmp_path):
    assert say(stdout=subprocess.PIPE) == (0, ["done", "BrokenPipeError"])


def test_a_full_disk_behind_it():
    with open("/dev/full", "w") as full:
        assert say(stdout=full) == (0, ["done", "OSError"])


def test_a_closed_stdout(tmp_path):
    done = subprocess.run(
        ["bash", "-c", 'exec "$0" -c "$1" >&-', sys.executable, PRINTS], stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr.split()) == (0, ["done", "None"])


def test_without_it_a_reader_that_has_gone_is_an_error():
    """Negative control."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print('x' * 100_000)"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert "BrokenPipeError" in process.stderr.read() and process.wait() != 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_cannot_be_shown_is_replaced(encoding):
    raw = io.BytesIO()
    stream = Stream(io.TextIOWrapper(raw, encoding=encoding))
    print("grün θ' \udcff", file=stream)
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert shown.startswith("gr") and shown.endswith("?\n") and stream.lost is None


def test_streams_are_put_back(capsys):
    before = sys.stdout
    with forgiving():
        print("said")
    assert sys.stdout is before and capsys.readouterr().out == "said\n"


@pytest.fixture
def tables(tmp_path):
    row = {
        "id": "a",
        "sample": None,
        "completion": "1",
        "reward": 1.0,
        "status": "ok",
        "num_tokens": 1,
        "finished": True,
    }
    settings = {"data": {"s": "0" * 64}, "grading": "strict", "temperature": 1.0}
    write_results(tmp_path, make_results("m", settings, {"s": [row]}, [1]))
    return [sys.executable, "-m", "eepo_fast.cli", "tables", str(tmp_path)]


def test_a_table_that_nobody_reads_is_no_success(tables):
    with subprocess.Popen(tables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
    assert json.loads(subprocess.run([*tables, "--format", "json"], capture_output=True, check=True).stdout)


def test_a_table_on_a_full_disk_is_one_line(tables):
    with open("/dev/full", "w") as full:
        done = subprocess.run(tables, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "tables: stdout cannot be written" in done.stderr and done.stderr.count("\n") == 1
