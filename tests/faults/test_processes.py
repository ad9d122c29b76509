"""Processes: asked to leave, killed, hung. Forked where one process is enough, under torchrun where ranks meet."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from eepo_fast import checkpoint
from eepo_fast.checkpoint import folder as folders
from eepo_fast.config import dump_config
from eepo_fast.run import watchdog

HERE = Path(__file__).parent


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(
    start, code_of, long_run, make_run, complete, outcome, name, times, figure, wait_for_rows
):
    for turn in range(times(1, 10)):
        shutil.rmtree(long_run.run_dir, ignore_errors=True)
        pid, errors = start(long_run)
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
    assert outcome(complete(make_run(*more))) == outcome(complete(make_run(*more, root="whole")))


def test_without_listening_a_signal_loses_the_run(start, code_of, long_run, wait_for_rows):
    """Negative control."""
    pid, _ = start(long_run, "deaf")
    wait_for_rows(long_run.run_dir, 2)
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == -signal.SIGTERM and checkpoint.newest_valid(long_run.run_dir)[0] is None


def test_a_second_signal_leaves_at_once(start, code_of, long_run, wait_for_rows):
    pid, _ = start(long_run, "never_written")
    wait_for_rows(long_run.run_dir, 1)
    os.kill(pid, signal.SIGTERM)
    time.sleep(1)
    started = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == 128 + signal.SIGTERM and time.monotonic() - started < 20, "writing takes 60 s"
    ending = json.loads((long_run.run_dir / "ended.json").read_text())
    assert ending["reason"] == "error" and "second SIGTERM, without saving" in ending["message"]


def test_a_signal_in_an_evaluation_leaves_it_to_the_resumed_run(start, code_of, make_run, complete, outcome, tmp_path):
    settings = ("train.iterations=3", "evaluation.every=2", "evaluation.data.held=arithmetic:3:9:8")
    whole = outcome(complete(make_run(*settings, root="whole")))
    config, marker = make_run(*settings), tmp_path / "evaluating"
    pid, _ = start(config, "slow_evaluation", marker=str(marker))
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == 128 + signal.SIGTERM
    assert json.loads((config.run_dir / "ended.json").read_text())["step"] == 2
    assert "eval/held/greedy" not in (config.run_dir / "metrics.jsonl").read_text()
    assert outcome(complete(config)) == whole


PHASES = (
    "sync", "rollout_stage1", "unlearn", "forget", "rollout_stage2", "kl_guard", "reward", "old_logprobs",
    "ref_logprobs", "update", "checkpoint", "evaluation",
)  # fmt: skip
CARRY = ("rollout.quorum=0.4", "rollout.carry=1", "rollout.in_flight=1", "rollout.max_new_tokens=30")


def counted(run_dir):
    """How many completions the rollout log has; each once, or the test fails."""
    lines = [line for path in sorted((run_dir / "rollouts").glob("step_*.jsonl")) for line in path.open()]
    places = Counter((r["begun"], r["prompt_id"], r["sample_index"]) for r in map(json.loads, lines))
    assert set(places.values()) == {1}
    return len(places)


@pytest.mark.fault(13)
@pytest.mark.parametrize("carry", [(), CARRY], ids=["", "carry"])
def test_a_crash_while_the_engine_is_forgetful_loses_nothing(
    start, code_of, make_run, complete, outcome, times, figure, carry
):
    """No forgetful weight is saved or evaluated, and the resumed run ends in the same bits. With carry no answer is
    lost, and none is counted twice."""
    settings = (*carry, "log.rollouts=true", "evaluation.every=2", "evaluation.data.held=arithmetic:3:9:8")
    run_dir = complete(make_run(*settings, root="whole"))
    whole, size = outcome(run_dir), counted(run_dir)
    assert any(row["rollout/carried_fraction"] for row in whole[0]) == bool(carry)
    generator, n, lost = random.Random(7), times(6, 50), 0
    for i in range(n):
        config, step = make_run(*settings, root=f"killed{i}"), generator.randrange(1, 5)
        pid, _ = start(config, "die_while_forgetful", step=step, life=generator.randrange(1, 16))
        assert code_of(pid) == -signal.SIGKILL
        newest = [folders.step_of(f) for f in folders.folders(config.run_dir)]
        assert not newest or newest[-1] in (step - 1, step, step + 1)
        run_dir = complete(config)
        lost += outcome(run_dir) != whole or counted(run_dir) != size
    figure("forgetful weights saved, evaluated or broadcast, over kills", lost, n)
    assert not lost


@pytest.mark.fault(13)
def test_no_answer_is_lost_over_a_run_killed_in_every_phase(start, code_of, make_run, complete, times, figure):
    """Nor doubled: counted in its rollout log."""
    iterations, generator, kills = times(24, 1000), random.Random(5), Counter()
    config = make_run(
        *CARRY, f"train.iterations={iterations}", "train.epochs=100000", "log.rollouts=true", "checkpoint.every=2",
        "checkpoint.keep=2", "evaluation.every=3", "evaluation.data.held=arithmetic:3:9:8", "rollout.carry=2",
    )  # fmt: skip
    for phase in itertools.cycle(PHASES):
        done = checkpoint.newest_valid(config.run_dir)[0]
        step = folders.step_of(done) if done else 0
        iteration, seconds = step + generator.randrange(1, 2 + iterations // times(6, 40)), generator.random() / 50
        pid, errors = start(config, "die_in_phase", phase=phase, iteration=iteration, seconds=seconds)
        if (code := code_of(pid)) == 0:
            break
        assert code == -signal.SIGKILL, errors.read_text()
        kills[phase] += 1
    found, expected = counted(config.run_dir), iterations * 16
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, iterations + 1)]
    assert any(row["rollout/carried_fraction"] > 0 for row in rows) and len(kills) > 4
    figure(f"answers in the log of a run with carry, killed {kills.total()} times", found, expected)
    assert found == expected


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
@pytest.mark.parametrize(("method", "phase"), [("generate", "rollout_stage1"), ("_grade", "reward")])
def test_what_hangs_is_named_and_ended(start, code_of, make_run, method, phase):
    config = make_run("run.timeout_s=3")
    pid, errors = start(config, "hang", method=method, phase=phase)
    started = time.monotonic()
    assert code_of(pid) == 70 and time.monotonic() - started < 40
    line = errors.read_text()
    assert f"eepo-fast: {phase} of iteration 2 hangs: nothing has moved (run.timeout_s=3)" in line
    assert "Thread" in line and "hang" in line, "and where"
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "hung"


def test_without_the_watchdog_it_hangs(start, code_of, make_run, wait_for_rows):
    """Negative control."""
    config = make_run("run.timeout_s=1")
    pid, _ = start(config, "hang_unwatched", method="_grade", phase="reward")
    wait_for_rows(config.run_dir, 1)
    time.sleep(4)
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)
    assert code_of(pid) == -signal.SIGKILL


def test_slow_sampling_that_moves_is_not_ended(start, code_of, make_run):
    pid, errors = start(make_run("run.timeout_s=3", "train.iterations=1"), "slow_sampling", seconds=0.6)
    assert code_of(pid) == 0, errors.read_text()


@pytest.fixture
def torchrun(make_run, tmp_path):
    """worker.py on two ranks: (config, exit code, what was printed, seconds from the misdeed to the iteration that it
    hit being done after all, and to the end)."""

    def run(kind, *overrides, restarts=0, iteration=3, root="runs", signal_after=None):
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
                if signal_after and rows.exists() and rows.read_bytes().count(b"\n") >= signal_after:
                    process.send_signal(signal.SIGTERM)
                    signal_after = None
                if recovered is None and (tmp_path / "done").exists() and rows.exists():
                    recovered = time.time() if rows.read_bytes().count(b"\n") >= iteration else None
        misdeed = float((tmp_path / "done").read_text()) if (tmp_path / "done").exists() else time.time()
        seconds = [(t or time.time()) - misdeed for t in (recovered, None)]
        return config, process.returncode, (tmp_path / "printed").read_text(), *seconds

    return run


@pytest.mark.slow
@pytest.mark.fault(2)
def test_a_rank_killed_in_its_step_restarts_to_the_same_bits(torchrun, outcome, tmp_path, times, figure):
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


@pytest.mark.slow
@pytest.mark.fault(3)
@pytest.mark.parametrize("kind", ["hang reward", "hang update", "stop rollout"])
def test_a_rank_that_hangs_is_named(torchrun, kind):
    config, code, printed, _, seconds = torchrun(kind, "run.timeout_s=8")
    assert code != 0 and seconds < 80, "from the misdeed on"
    said = re.findall(r"eepo-fast: (.*)", printed)
    assert len(said) == 1, printed[-3000:]
    assert re.match(r"rank 1 hangs in \w+ of iteration 3 \(run\.timeout_s=8\); 1 of 2 ranks wait for it", said[0])
    assert json.loads((config.run_dir / "ended.json").read_text())["reason"] == "hung"


class Notes(dict):
    """A store of the ranks, as torch's is used."""

    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]

    def check(self, keys):
        return all(key in self for key in keys)

    def add(self, key, amount):
        self[key] = self.get(key) + amount if key in self else amount
        return self[key]


# of each rank: phases entered, does it wait, seconds since it last showed life, do its notes stand still
HANGS = {
    "one works and shows no life": ([(3, 1, 9, 0), (3, 0, 9, 0), (3, 1, 8, 0)], "rank 1 hangs in p3"),
    "it came late": ([(3, 1, 9, 0), (2, 0, 9, 0), (3, 0, 9, 0)], "rank 1 hangs in p2"),
    "two": ([(2, 0, 9, 0), (3, 1, 9, 0), (2, 0, 9, 0)], "rank 0, 2 hangs in p2"),
    "the others still work": ([(3, 0, 1, 0), (2, 0, 9, 0), (3, 1, 9, 0)], None),
    "one is slow and alive": ([(3, 1, 9, 0), (3, 0, 0.5, 0), (3, 1, 9, 0)], None),
    "one is stopped": ([(3, 1, 9, 0), (3, 0, 0.5, 1), (3, 1, 9, 0)], "rank 1 hangs in p3"),
    "all wait": ([(3, 1, 9, 0), (3, 1, 9, 0), (3, 1, 9, 0)], "all 3 ranks hang in p3"),
}


@pytest.mark.parametrize("case", HANGS)
def test_who_hangs_and_who_does_not(monkeypatch, case):
    ranks, said = HANGS[case]
    store = Notes()
    monkeypatch.setattr(watchdog, "GRACE_S", 0.3)
    monkeypatch.setattr(watchdog.Watchdog, "_watch", lambda self: None)
    waiting = [bool(waits) for _, waits, _, _ in ranks]
    monkeypatch.setattr(watchdog, "_in_communication", lambda rank: rank < 3 and waiting[rank])
    dogs = [watchdog.Watchdog(rank, 3, store, 5, lambda text: None) for rank in range(3)]
    for dog in dogs:
        dog._main = dog.rank  # in place of its thread
    stop = threading.Event()

    def beat():  # the notes of a rank, in place of its thread's
        while not stop.wait(0.05):
            for dog, (_, waits, age, still) in zip(dogs, ranks, strict=True):
                waiting[dog.rank], dog._since = bool(waits), time.monotonic() - age
                if not still:
                    dog._write_note()

    for dog, (count, *_) in zip(dogs, ranks, strict=True):
        for i in range(count):
            dog.enter(f"p{i + 1}")
        dog._since = time.monotonic() - ranks[dog.rank][2]
        dog._write_note()
    thread = threading.Thread(target=beat)
    thread.start()
    asking = dogs[2] if ranks[2][2] > 5 else dogs[0]
    complaint = asking._complaint()
    stop.set()
    thread.join()
    assert (complaint or "").partition(" (")[0] == (said or "").partition(" (")[0]
    assert [dog._may_speak() for dog in dogs] == [True, False, False], "the first says it, once"


def test_a_note_that_cannot_be_written_keeps_nobody_alive(start, code_of, make_run):
    """The disk may be what hangs."""
    config = make_run("run.timeout_s=3")
    pid, errors = start(config, "hang_without_disk", method="_grade", phase="reward")
    assert code_of(pid) == 70 and "reward of iteration 2 hangs" in errors.read_text()


def test_a_hang_that_keeps_the_interpreter_is_ended(start, code_of, make_run):
    """No Python thread runs then: C's does."""
    pid, errors = start(make_run("run.timeout_s=4"), "hang_locked")
    assert code_of(pid) == 1 and "Timeout" in errors.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("carry", [(), CARRY], ids=["", "carry"])
def test_a_signal_to_two_ranks_saves_one_iteration_to_go_on_from(torchrun, outcome, tmp_path, make_run, carry):
    settings = ("train.iterations=100000", "train.epochs=100000", "checkpoint.every=0", *carry)
    config, code, printed, *_ = torchrun("nothing", *settings, signal_after=2)
    ending = json.loads((config.run_dir / "ended.json").read_text())
    step = ending["step"]
    assert code != 0 and ending["reason"] == "SIGTERM" and f"step_{step:06d}" in str(list(config.run_dir.glob("*/*")))
    assert printed.count("left on SIGTERM, everything saved") == 1
    more = (f"train.iterations={step + 2}", *settings[1:])
    _, code, printed, *_ = torchrun("nothing", *more)
    assert code == 0, printed[-2000:]
    whole, code, printed, *_ = torchrun("nothing", *more, root="whole")
    assert code == 0 and outcome(config.run_dir) == outcome(whole.run_dir), "bit for bit, on two ranks"


@pytest.mark.parametrize("closed", [False, True])
def test_a_stderr_without_a_file_keeps_the_watch(monkeypatch, closed):
    """A notebook's, and one that was closed before Python began."""
    import io

    monkeypatch.setattr(sys, "stderr", None if closed else io.StringIO())
    if closed:
        monkeypatch.setattr(sys, "__stderr__", None)
    said = []
    dog = watchdog.Watchdog(0, 1, None, 0.4, said.append)
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)
    dog.stop()
    assert said == ["starting hangs: nothing has moved (run.timeout_s=0.4)"]
