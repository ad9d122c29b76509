"""However a run ends, it says so and keeps its work: signals, errors of a user's function, rewards that never come."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from eepo_fast import checkpoint
from eepo_fast.run.build import train
from eepo_fast.run.display import Display
from eepo_fast.types import UserError


def ending(run_dir):
    return json.loads((run_dir / "ended.json").read_text())


def newest(run_dir):
    folder, _ = checkpoint.newest_valid(run_dir)
    return folder and int(folder.name.removeprefix("step_"))


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_a_lost_terminal_or_an_interrupt_saves(start, code_of, long_run, name, wait_for_rows):
    pid, errors = start(long_run, "at_a_terminal")
    wait_for_rows(long_run.run_dir, 2)
    os.kill(pid, getattr(signal, name))
    assert code_of(pid) == 128 + getattr(signal, name)
    assert f"left on {name}, everything saved" in errors.read_text()
    found = ending(long_run.run_dir)
    assert found["reason"] == name and newest(long_run.run_dir) == found["step"] > 0
    assert not (long_run.run_dir / ".lock").exists()


def test_under_nohup_a_lost_terminal_is_nothing(start, code_of, long_run, wait_for_rows):
    """Negative control, and what nohup is for."""
    pid, _ = start(long_run, "without_a_terminal")
    wait_for_rows(long_run.run_dir, 1)
    os.kill(pid, signal.SIGHUP)
    wait_for_rows(long_run.run_dir, len((long_run.run_dir / "metrics.jsonl").read_text().splitlines()) + 2)
    assert not (long_run.run_dir / "ended.json").exists()
    os.kill(pid, signal.SIGTERM)
    assert code_of(pid) == 128 + signal.SIGTERM and ending(long_run.run_dir)["reason"] == "SIGTERM"


def test_a_second_interrupt_leaves_at_once(start, code_of, long_run, wait_for_rows):
    pid, _ = start(long_run, "at_a_terminal_never_written")
    wait_for_rows(long_run.run_dir, 1)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.7)
    started = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert code_of(pid) == 130 and time.monotonic() - started < 20, "writing takes 60 s"
    assert "second SIGINT" in ending(long_run.run_dir)["message"]


REWARDS = """\
import sys
calls = []
def at(error, first):
    def grade(problem, completion):
        calls.append(1)
        if len(calls) > first:
            raise error
        return float(len(completion) % 2)
    return grade
leaves = at(SystemExit(3), 40)
interrupts = at(KeyboardInterrupt(), 40)
returns = at(GeneratorExit(), 40)
fails_late = at(TypeError("no tolerance"), 32)
def never(problem, completion):
    raise TypeError("no such argument")
def seldom(problem, completion):
    calls.append(1)
    if 16 < len(calls) <= 48:
        raise TypeError("the judge is away")
    return float(len(completion) % 2)
def tolerant(problem, completion):
    return float(problem.columns["tolerance"])
"""


@pytest.fixture
def rewarded(make_run, tmp_path, monkeypatch):
    """The config of a run with a function of REWARDS: 16 completions an iteration."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    return lambda name, *more: make_run(f"reward.function=my_rewards:{name}", "checkpoint.every=0", *more)


@pytest.mark.parametrize(
    ("name", "kind"), [("leaves", UserError), ("returns", UserError), ("interrupts", KeyboardInterrupt)]
)
def test_a_function_that_leaves_ends_with_a_word(rewarded, go, name, kind):
    """In the third iteration: the two before it are kept."""
    config = rewarded(name)
    with pytest.raises(kind):
        go(config)
    found = ending(config.run_dir)
    assert found["reason"] == "error" and found["step"] == 2 and newest(config.run_dir) == 2
    words = {"leaves": "SystemExit: 3", "returns": "GeneratorExit", "interrupts": "KeyboardInterrupt"}
    assert words[name] in found["message"]


def test_what_calls_sys_exit_is_named(make_run, go, monkeypatch):
    config = make_run("checkpoint.every=0")
    monkeypatch.setattr("eepo_fast.run.loop.log_files.append_metrics", lambda *args: sys.exit("no reason"))
    with pytest.raises(UserError, match=r"after iteration 1 by SystemExit\(no reason\) in .*test_endings.py, line"):
        go(config)
    assert ending(config.run_dir)["reason"] == "error"
    assert newest(config.run_dir) is None, "what is not logged is not saved"


def test_a_reward_that_never_works_ends_the_run(rewarded, capsys):
    for iterations, which in (6, "iterations 1 to 3"), (2, "iterations 1 to 2"), (1, "iteration 1 "):
        config = rewarded("never", f"train.iterations={iterations}", f"run.name=r{iterations}")
        with pytest.raises(UserError, match=f"{which}.*never, on .*TypeError: no such argument; mend"):
            train(config, display=Display())
        assert newest(config.run_dir) is None and ending(config.run_dir)["reason"] == "error"
    assert capsys.readouterr().out.count("could be graded") == 3, "warned of once a run"


def test_a_reward_that_stops_working_keeps_what_was_good(rewarded, go):
    config = rewarded("fails_late", "checkpoint.every=1")
    with pytest.raises(UserError, match=r"iterations 3 to 5.*no tolerance"):
        go(config)
    assert newest(config.run_dir) == 2, "no state is newer than the last reward"


def test_rewards_that_come_back_end_nothing(rewarded, go):
    """Negative control: missing in two iterations."""
    config = rewarded("seldom", "train.iterations=4")
    assert newest(go(config)) == 4 and ending(config.run_dir)["reason"] == "finished"
    rows = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/mean"] is None for row in rows] == [False, True, True, False]


def test_a_function_reads_the_columns_of_its_row(rewarded, go, tmp_path):
    lines = [{"id": str(i), "problem": "1,2,3=6:", "answer": "1+2+3", "tolerance": 0.25} for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = rewarded("tolerant", f"data.train={tmp_path / 'd.jsonl'}", "train.iterations=1")
    (row,) = [json.loads(line) for line in (go(config) / "metrics.jsonl").read_text().splitlines()]
    assert row["reward/mean"] == 0.25


def test_a_run_folder_has_one_run_at_a_time(make_run, go, start, code_of, long_run, wait_for_rows):
    pid, _ = start(long_run)
    wait_for_rows(long_run.run_dir, 1)
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"in use by process {pid} on host \S+ since .*; wait for its end"):
            go(long_run, resume=resume)
    os.kill(pid, signal.SIGKILL)
    code_of(pid)
    assert (long_run.run_dir / ".lock").exists(), "it could not remove it"
    more = make_run("train.iterations=1", "train.epochs=100000", "checkpoint.every=0")
    assert go(more, resume=True) and not (long_run.run_dir / ".lock").exists(), "nobody holds it"


def test_a_reader_that_goes_away_ends_nothing(make_run, tmp_path):
    config = make_run("train.iterations=3")
    from eepo_fast.config import dump_config

    (tmp_path / "c.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "eepo_fast.cli", "train", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0 and "Error" not in errors and "Exception" not in errors
    assert ending(config.run_dir)["reason"] == "finished" and newest(config.run_dir) == 3


def test_what_a_save_needs_is_tried_before(make_run, go, model_folder, monkeypatch):
    """Generation settings that transformers does not save stop no weights, and are kept as they were."""
    content = '{"eos_token_id": 1, "do_sample": false, "temperature": 0.9, "top_p": 0.6}'
    (model_folder / "generation_config.json").write_text(content)
    run_dir = go(make_run("train.iterations=1"))
    assert (checkpoint.newest_valid(run_dir)[0] / "model/generation_config.json").read_text() == content
    assert go(make_run("train.iterations=2"), resume=True) and newest(run_dir) == 2


@pytest.mark.parametrize(
    ("kind", "names"),
    [("PretrainedConfig", ["config.json"]), ("PreTrainedTokenizerBase", ["tokenizer.json", "tokenizer_config.json"])],
)
def test_what_cannot_be_saved_is_as_the_model_has_it(make_run, go, model_folder, monkeypatch, kind, names):
    import transformers

    def refuse(*args, **options):
        raise ValueError("some check of transformers'")

    monkeypatch.setattr(getattr(transformers, kind), "save_pretrained", refuse)
    folder = checkpoint.newest_valid(go(make_run("train.iterations=1")))[0] / "model"
    for name in names:
        assert (folder / name).read_bytes() == (model_folder / name).read_bytes()


def test_what_cannot_be_saved_at_all_is_said_before(tiny_model, tokenizer, monkeypatch):
    from eepo_fast.checkpoint.beside import files_beside

    monkeypatch.setattr(type(tiny_model.config), "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(UserError, match=r"the config of the model could not be saved.*division by zero; mend its file"):
        files_beside(tiny_model, tokenizer)


def test_a_disk_without_room_is_said_before(make_run, go, monkeypatch):
    from types import SimpleNamespace

    from eepo_fast.checkpoint import folder as folders

    config, usage = make_run("train.iterations=1"), SimpleNamespace(free=0)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"expected room for a checkpoint, .* GB .* found 0 GB free"):
        go(config)
    assert not config.run_dir.parent.exists()
    usage.free = 10**9  # negative control
    assert go(config) == config.run_dir
