"""Processes: asked to leave, killed, hung. Forked where one process is enough, under torchrun where ranks meet."""

import json
import os
import random
import re
import shutil
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
def test_a_signal_saves_and_leaves_and_the_run_goes_on(long_run, make_run, go, outcome, tmp_path, name, times, figure):
    for turn in range(times(1, 10)):
        shutil.rmtree(long_run.run_dir, ignore_errors=True)
        pid, errors = forked(long_run, tmp_path)
        wait_for_rows(long_run.run_dir, 2)
        time.sleep(0.05 * turn)
        os.kill(pid, getattr(signal, name))
        started = time.monotonic()
        os.kill(pid, getattr(signal, name))  # as a launcher passes it on: still one request
        code, seconds = code_of(pid), time.monotonic() - started
        figure("SIGTERM, SIGUSR1: saved and gone within 10 s", int(seconds < 10), 1, slowest_s=seconds)
        assert code == 128 + getattr(signal, name) and seconds < 10
        assert f"left on {name}, everything saved" in errors.read_text()
        ending = json.loads((long_run.run_dir / "ended.json").read_text())
        step = ending["step"]
        assert ending["reason"] == name and checkpoint.newest_valid(long_run.run_dir)[0].name == f"step_{step:06d}"
        assert len(outcome(long_run.run_dir)[0]) == step
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
def test_a_crash_while_the_engine_is_forgetful_loses_nothing(make_run, go, outcome, tmp_path, times, figure):
    """Killed at the nth sign of life (a phase, a token) after the forget step of an iteration, at the latest before the
    next sync: no forgetful weight is saved or evaluated, and the resumed run ends in the same bits."""
    settings = ("evaluation.every=2", "evaluation.data.held=arithmetic:3:9:8")
    whole = outcome(go(make_run(*settings, root="whole")))
    generator, n, lost = random.Random(7), times(6, 50), 0
    for i in range(n):
        config, step = make_run(*settings, root=f"killed{i}"), generator.randrange(1, 5)
        left = [generator.randrange(1, 16)]

        def patch(step=step, left=left):
            from eepo_fast import watchdog
            from eepo_fast.rollout.hf import HfEngine

            forgotten = []
            forget, sync, enter, alive = (
                HfEngine.forget,
                HfEngine.sync,
                watchdog.Watchdog.enter,
                watchdog.Watchdog.alive,
            )

            def die(*args, at_once=False):
                left[0] -= bool(forgotten)
                if forgotten and (left[0] < 1 or at_once):
                    os.kill(os.getpid(), signal.SIGKILL)

            def noted(self, *args, **kwargs):
                if kwargs["step"] == step:
                    forgotten.append(1)
                return forget(self, *args, **kwargs)

            HfEngine.forget = noted
            HfEngine.sync = lambda self, *a: (die(at_once=True), sync(self, *a))[1]
            watchdog.Watchdog.enter = lambda self, phase: (die(), enter(self, phase))[1]
            watchdog.Watchdog.alive = lambda self: (die(), alive(self))[1]

        pid, _ = forked(config, tmp_path, patch=patch)
        assert code_of(pid) == -signal.SIGKILL
        newest = [folders.step_of(f) for f in folders.folders(config.run_dir)]
        assert not newest or newest[-1] in (step - 1, step, step + 1)
        lost += outcome(go(config, resume=True)) != whole
    figure("forgetful weights saved, evaluated or broadcast, over kills", lost, n)
    assert not lost


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
    config = make_run("run.timeout_s=6")

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
    assert f"eepo-fast: {phase} of iteration 2 hangs: nothing has moved (run.timeout_s=6)" in line
    assert "Thread" in line and "hang" in line, "and where"
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "hung"


def test_without_the_watchdog_it_hangs(make_run, tmp_path):
    """Negative control."""

    def patch():
        from eepo_fast import trainer, watchdog

        watchdog.Watchdog._watch = lambda self: None
        trainer.Trainer._grade = lambda self, rollouts: time.sleep(3600)

    pid, _ = forked(make_run("run.timeout_s=6"), tmp_path, patch=patch)
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

    config = make_run("run.timeout_s=6", "train.iterations=1")
    pid, errors = forked(config, tmp_path, patch=patch)
    assert code_of(pid) == 0, errors.read_text()


@pytest.fixture
def torchrun(make_run, tmp_path):
    """worker.py on two ranks: (config, exit code, what was printed, seconds from the misdeed to the iteration that it
    hit being done after all, and to the end)."""

    def run(kind, *overrides, restarts=0, iteration=3, root="runs"):
        config, path = make_run("train.engine=deepspeed", *overrides, root=root), tmp_path / "config.yaml"
        path.write_text(dump_config(config))
        (tmp_path / "done").unlink(missing_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={restarts}", str(HERE / "worker.py"), kind, str(iteration), str(tmp_path)]
        with (tmp_path / "printed").open("w") as printed:
            process = subprocess.Popen(
                [*command, "train", str(path), "--resume"], env=environment, stdout=printed, stderr=printed
            )
            rows, recovered = config.run_dir / "metrics.jsonl", None
            while process.poll() is None:
                time.sleep(0.1)
                if recovered is None and (tmp_path / "done").exists() and rows.exists():
                    recovered = time.time() if rows.read_bytes().count(b"\n") >= iteration else None
        misdeed = float((tmp_path / "done").read_text()) if (tmp_path / "done").exists() else time.time()
        seconds = [(t or time.time()) - misdeed for t in (recovered, None)]
        return config, process.returncode, (tmp_path / "printed").read_text(), *seconds

    return run


@pytest.mark.fault(2)
def test_a_rank_killed_in_its_step_is_restarted_and_ends_in_the_same_bits(torchrun, outcome, tmp_path, times, figure):
    """Against a run that nothing happened to."""
    config, code, printed, *_ = torchrun("nothing", root="whole")
    assert code == 0, printed[-3000:]
    whole = outcome(config.run_dir)
    generator = random.Random(11)
    for i in range(times(1, 20)):
        kind = "kill " + generator.choice(["update", "rollout", "reward"])
        settings = dict(restarts=2, iteration=generator.randrange(2, 6), root=f"killed{i}")
        config, code, printed, recovered, _ = torchrun(kind, **settings)
        same = code == 0 and (tmp_path / "done").exists() and outcome(config.run_dir) == whole
        name = "rank killed mid-step under torchrun, recovered bitwise"
        figure(name, int(same), 1, slowest_recovery_s=recovered)
        assert same, (kind, settings, printed[-3000:])


@pytest.mark.fault(3)
@pytest.mark.parametrize("kind", ["hang reward", "stop rollout"])
def test_a_rank_that_hangs_is_named(torchrun, kind):
    """The phase is the last that it entered: of a stopped rank, the one before."""
    config, code, printed, _, seconds = torchrun(kind, "run.timeout_s=8")
    assert code != 0 and seconds < 80
    said = re.findall(r"eepo-fast: (.*)", printed)
    assert len(said) == 1, printed[-3000:]
    assert re.fullmatch(r"rank 1 hangs in \w+ of iteration 3 \(run\.timeout_s=8\); 1 of 2 ranks wait for it", said[0])
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "hung"


class Notes(dict):
    """A store of the ranks, as torch's is used."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)


@pytest.mark.parametrize(
    ("counts", "silent", "said"),
    [
        ([3, 2, 3], [], {0: "rank 1 hangs in p2 (run.timeout_s=9); 2 of 3 ranks wait for it", 1: None, 2: None}),
        ([2, 3, 2], [], {0: None, 1: "rank 0, 2 hangs in p2 (run.timeout_s=9); 1 of 3 ranks wait for it", 2: None}),
        ([3, 3, 3], [], {0: "all 3 ranks hang in p3 (run.timeout_s=9)", 1: None, 2: None}),
        ([3, 3, 3], [0], {1: "rank 0 hangs in p3 (run.timeout_s=9); 2 of 3 ranks wait for it", 2: None}),
    ],
)
def test_one_rank_names_those_that_the_others_wait_for(monkeypatch, counts, silent, said):
    from eepo_fast import watchdog

    store = Notes()
    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    monkeypatch.setattr(watchdog, "GRACE_S", 0.4)
    monkeypatch.setattr(watchdog.Watchdog, "_watch", lambda self: None)
    dogs = [watchdog.Watchdog(rank, 3, store, 9, lambda text: None) for rank in range(3)]
    for rank, dog in enumerate(dogs):
        for i in range(counts[rank]):
            dog.enter(f"p{i + 1}")
        if rank in silent:
            dog.stop()
    assert {rank: dogs[rank]._complaint() for rank in said} == said
    for dog in dogs:
        dog.stop()
