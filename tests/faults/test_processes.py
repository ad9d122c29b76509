"""Processes: asked to leave, killed, hung. Forked where one process is enough, under torchrun where ranks meet."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eepo_fast import checkpoint
from eepo_fast.checkpoint import folder as folders
from eepo_fast.cli import main
from eepo_fast.config import dump_config

HERE = Path(__file__).parent


def forked(config, tmp_path, *arguments, patch=lambda: None):
    """`eepo-fast train` in a child of this process; (its pid, the file of its stderr)."""
    path, errors = tmp_path / "config.yaml", tmp_path / "stderr"
    path.write_text(dump_config(config))
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            sys.stderr = errors.open("w", buffering=1)  # pytest has put its own in the place of fd 2's
            patch()
            code = main(["train", str(path), *arguments])
        finally:
            os._exit(code)
    return pid, errors


def wait_for_rows(run_dir, count):
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def long_run(make_run):
    return make_run("train.iterations=100000", "train.epochs=100000", "checkpoint.every=0")


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(long_run, make_run, go, outcome, tmp_path, name):
    pid, errors = forked(long_run, tmp_path)
    wait_for_rows(long_run.run_dir, 2)
    os.kill(pid, getattr(signal, name))
    started = time.monotonic()
    os.kill(pid, getattr(signal, name))  # as a launcher passes it on: still one request
    assert code_of(pid) == 128 + getattr(signal, name) and time.monotonic() - started < 10
    assert f"left on {name}, everything saved" in errors.read_text()
    ending = json.loads((long_run.run_dir / "ended.json").read_text())
    step = ending["step"]
    assert ending["reason"] == name and checkpoint.newest_valid(long_run.run_dir)[0].name == f"step_{step:06d}"
    rows = outcome(long_run.run_dir)[0]
    assert len(rows) == step
    more = [f"train.iterations={step + 2}", "train.epochs=100000", "checkpoint.every=0"]
    assert outcome(go(make_run(*more), resume=True)) == outcome(go(make_run(*more, root="whole")))


def test_without_listening_a_signal_loses_the_run(long_run, tmp_path, monkeypatch):
    """Negative control."""
    from contextlib import contextmanager

    from eepo_fast import run
    from eepo_fast.signals import Request

    @contextmanager
    def deaf():
        yield Request()

    monkeypatch.setattr(run, "listening", deaf)
    pid, _ = forked(long_run, tmp_path)
    wait_for_rows(long_run.run_dir, 2)
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == -signal.SIGTERM and checkpoint.newest_valid(long_run.run_dir)[0] is None


def test_a_second_signal_leaves_at_once(long_run, tmp_path, monkeypatch):
    from eepo_fast import signals
    from eepo_fast.checkpoint import writer

    monkeypatch.setattr(signals, "ONE_REQUEST_S", 0.2)
    monkeypatch.setattr(writer.CheckpointWriter, "_write_files", lambda *args: time.sleep(60))
    pid, _ = forked(long_run, tmp_path)
    wait_for_rows(long_run.run_dir, 1)
    os.kill(pid, signal.SIGTERM)
    time.sleep(1)
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == 128 + signal.SIGTERM and time.monotonic() - started < 2
    assert not (long_run.run_dir / "ended.json").exists()


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(make_run, go, outcome, tmp_path, monkeypatch):
    from eepo_fast.evaluation import periodic

    settings = ("train.iterations=3", "evaluation.every=2", "evaluation.data.held=arithmetic:3:9:8")
    whole = outcome(go(make_run(*settings, root="whole")))
    config, real = make_run(*settings), periodic.sample_set

    def slow(sampler, *args, **kwargs):
        (tmp_path / "evaluating").touch()
        time.sleep(1)
        return real(sampler, *args, **kwargs)

    monkeypatch.setattr(periodic, "sample_set", slow)
    pid, _ = forked(config, tmp_path)
    while not (tmp_path / "evaluating").exists():
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == 128 + signal.SIGTERM
    assert json.loads((config.run_dir / "ended.json").read_text())["step"] == 2
    assert "eval/held/greedy" not in (config.run_dir / "metrics.jsonl").read_text()
    monkeypatch.undo()
    assert outcome(go(config, resume=True)) == whole


@pytest.mark.fault(13)
@pytest.mark.parametrize("moment", ["forget", "generate", "grade", "update"])
def test_a_crash_while_the_engine_is_forgetful_loses_nothing(make_run, go, outcome, tmp_path, moment):
    """Killed between the forget step of iteration 3 and the next sync: no forgetful weight is on disk, and the resumed
    run ends in the same bits."""
    whole = outcome(go(make_run(root="whole")))
    config = make_run()

    def patch():
        from eepo_fast import trainer

        names = {"forget": "_went_too_far", "generate": "_generate", "grade": "_grade", "update": "_update"}
        original = getattr(trainer.Trainer, names[moment])

        def die(self, *args, **kwargs):
            if self.state.step == 2 and self.engine.weights_version.forgotten:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)

        setattr(trainer.Trainer, names[moment], die)

    pid, _ = forked(config, tmp_path, patch=patch)
    assert code_of(pid) == -signal.SIGKILL
    assert [folders.step_of(f) for f in folders.folders(config.run_dir)][-1] in (1, 2)
    assert outcome(go(config, resume=True)) == whole


def test_saving_the_engine_instead_would_be_noticed(make_run, go, outcome, monkeypatch):
    """Negative control: the forgetful weights are others than the policy's."""
    from eepo_fast.policy.plain import TorchPolicy

    whole = outcome(go(make_run(root="whole")))
    engines = []
    from eepo_fast.rollout.hf import HfEngine

    original = HfEngine.__init__
    monkeypatch.setattr(HfEngine, "__init__", lambda self, *a, **k: engines.append(self) or original(self, *a, **k))
    monkeypatch.setattr(TorchPolicy, "masters", lambda self: iter(engines[-1].weights.items()))
    assert outcome(go(make_run()))[1] != whole[1]


@pytest.mark.fault(3)
@pytest.mark.fault(20)
@pytest.mark.parametrize(("method", "phase"), [("_generate", "rollout_stage1"), ("_grade", "reward")])
def test_what_hangs_is_named_and_ended(make_run, tmp_path, method, phase):
    config = make_run("run.timeout_s=4")

    def patch():
        from eepo_fast import trainer

        original = getattr(trainer.Trainer, method)

        def hang(self, *args, **kwargs):
            if self.state.step == 1:
                with self._timed(phase):
                    time.sleep(3600)
            return original(self, *args, **kwargs)

        setattr(trainer.Trainer, method, hang)

    pid, errors = forked(config, tmp_path, patch=patch)
    started = time.monotonic()
    assert code_of(pid) == 70 and time.monotonic() - started < 30
    line = errors.read_text()
    assert f"eepo-fast: {phase} of iteration 2 hangs: nothing has moved (run.timeout_s=4)" in line
    assert "Thread" in line and "hang" in line, "and where"
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "hung"


def test_without_the_watchdog_it_hangs(make_run, tmp_path):
    """Negative control."""

    def patch():
        from eepo_fast import trainer, watchdog

        watchdog.Watchdog._watch = lambda self: None
        trainer.Trainer._grade = lambda self, rollouts: time.sleep(3600)

    pid, _ = forked(make_run("run.timeout_s=4"), tmp_path, patch=patch)
    time.sleep(10)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_slow_sampling_that_moves_is_not_ended(make_run, tmp_path):
    def patch():
        from eepo_fast.rollout import hf

        original = hf.sample

        def slow(*args):
            time.sleep(0.25)
            return original(*args)

        hf.sample = slow

    config = make_run("run.timeout_s=4", "train.iterations=1")
    pid, errors = forked(config, tmp_path, patch=patch)
    assert code_of(pid) == 0, errors.read_text()


@pytest.fixture
def torchrun(make_run, tmp_path):
    """worker.py on two ranks; (exit code, what it printed, seconds from the misdeed to the end)."""

    def run(kind, *overrides, restarts=0):
        config, path = make_run("train.engine=deepspeed", *overrides), tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={restarts}", str(HERE / "worker.py"), kind, str(tmp_path)]
        done = subprocess.run(
            [*command, "train", str(path), "--resume"], env=environment, capture_output=True, text=True, timeout=240
        )
        misdeed = float((tmp_path / "done").read_text()) if (tmp_path / "done").exists() else time.time()
        return config, done, time.time() - misdeed

    return run


@pytest.mark.fault(2)
def test_a_rank_killed_in_its_step_is_restarted_and_ends_in_the_same_bits(torchrun, outcome, tmp_path):
    config, done, _ = torchrun("kill update", restarts=2)
    assert done.returncode == 0 and (tmp_path / "done").exists(), done.stderr[-3000:]
    found = outcome(config.run_dir)
    (config.run_dir).rename(tmp_path / "killed")
    config, done, _ = torchrun("nothing")
    assert done.returncode == 0 and outcome(config.run_dir) == found, "the control: a run that nothing happened to"


@pytest.mark.fault(3)
@pytest.mark.parametrize("kind", ["hang reward", "stop rollout"])
def test_a_rank_that_hangs_is_named(torchrun, kind):
    """The phase is the last that it entered: of a stopped rank, the one before."""
    config, done, seconds = torchrun(kind, "run.timeout_s=8")
    assert done.returncode != 0 and seconds < 80
    said = re.findall(r"eepo-fast: (.*)", done.stderr)
    assert len(said) == 1, done.stderr[-3000:]
    assert re.fullmatch(r"rank 1 hangs in \w+ of iteration 3 \(run\.timeout_s=8\); 1 of 2 ranks wait for it", said[0])
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "hung"
