"""A clean process that has imported eepo-fast and forks a child for each run: `eepo-fast train`, misbehaving as told.

Requests on stdin, answers on stdout, a JSON object a line: {"train": arguments, "patch": name, "options": {…},
"stderr": file} gives {"pid": …}; {"wait": pid} gives {"code": …}. A test that has computed with threads of its own
cannot fork: the child would wait for threads that it does not have.
"""

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from killing import die_in_phase  # noqa: F401  # a patch like those below
from patience import watch_from

from eepo_fast import cli
from eepo_fast.algorithm import iteration, trainer
from eepo_fast.checkpoint import writer
from eepo_fast.evaluation import periodic
from eepo_fast.rollout import hf
from eepo_fast.run import build, signals, watchdog


def nothing():
    pass


def without_a_terminal():
    """Started by nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def at_a_terminal():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def at_a_terminal_never_written():
    at_a_terminal()
    writer.CheckpointWriter._write_files = lambda *args: time.sleep(60)


def deaf():
    """No signal is listened to."""

    @contextmanager
    def listening():
        yield signals.LeaveRequest()

    build.listening, build.leaving_at_once = listening, nullcontext


def never_written():
    """A checkpoint takes for ever, and signals count as two after a moment."""
    signals.ONE_REQUEST_S = 0.2
    writer.CheckpointWriter._write_files = lambda *args: time.sleep(60)


def slow_evaluation(marker):
    original = periodic.sample_set

    def slow(*args, **kwargs):
        Path(marker).touch()
        time.sleep(1)
        return original(*args, **kwargs)

    periodic.sample_set = slow


def die_while_forgetful(step, life):
    """At the sign of life (a phase, a token) number `life` after the forget step of iteration step + 1, at the latest
    before the next sync."""
    forgotten, left = [], [life]
    forget, sync = hf.HfEngine.forget, hf.HfEngine.sync
    enter, alive = watchdog.Watchdog.enter, watchdog.Watchdog.alive

    def die(*args, at_once=False):
        left[0] -= bool(forgotten)
        if forgotten and (left[0] < 1 or at_once):
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(self, *args, **kwargs):
        if kwargs["step"] == step:
            forgotten.append(1)
        return forget(self, *args, **kwargs)

    hf.HfEngine.forget = noted
    hf.HfEngine.sync = lambda self, *a: (die(at_once=True), sync(self, *a))[1]
    watchdog.Watchdog.enter = lambda self, phase: (die(), enter(self, phase))[1]
    watchdog.Watchdog.alive = lambda self: (die(), alive(self))[1]


def hang(method, phase):
    """In iteration 2."""
    watch_from(2)
    owner = iteration.Iteration if hasattr(iteration.Iteration, method) else trainer.Trainer
    original = getattr(owner, method)

    def call(self, *args, **kwargs):
        it = self if owner is iteration.Iteration else args[0]
        if it.setup.state.step == 1:
            with it.phase(phase):
                time.sleep(3600)
        return original(self, *args, **kwargs)

    setattr(owner, method, call)


def hang_without_disk(method, phase):
    def note(*args):
        raise OSError(30, "Read-only file system")

    build.write_ending = note
    hang(method, phase)


def hang_locked():
    """In a call that keeps the interpreter."""
    watchdog.LOCKED_S = 2.0
    watch_from(2)
    original = trainer.Trainer._grade

    def grade(self, *args):
        if self.state.step == 1:
            time.sleep(2 * watchdog.NOTE_S)  # it sets C's clock again once a second
            ctypes.PyDLL(None).sleep(60)
        return original(self, *args)

    trainer.Trainer._grade = grade


def hang_unwatched(method, phase):
    hang(method, phase)
    watchdog.Watchdog._watch = lambda self: None


def slow_sampling(seconds):
    original, calls = hf.sample, []
    watch_from(1)

    def slow(*args):
        calls.append(1)
        time.sleep(seconds if len(calls) > 20 else 0)  # not while it loads
        return original(*args)

    hf.sample = slow


def child(request):
    code = 99
    try:
        sys.stderr = open(request["stderr"], "w", buffering=1)  # noqa: SIM115
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        torch.set_num_threads(1)
        globals()[request["patch"]](**request["options"])
        code = cli.main(["train", *request["train"]])
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                child(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
