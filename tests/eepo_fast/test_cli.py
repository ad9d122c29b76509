"""The command line: a run's folder, resuming, and one line for every mistake. One run is a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eepo_fast.cli import main

ROOT = Path(__file__).parents[2]


def run_as_process(*args):
    command = [sys.executable, "-m", "eepo_fast.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture
def run(capfd):
    """The same in this process, which has imported everything."""

    def call(*args):
        capfd.readouterr()
        code = main([str(a) for a in args])
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder that answers at random, and the override that uses it."""
    from eepo_fast.config import load_config
    from eepo_fast.data.base_model import train_base

    folder = tmp_path_factory.mktemp("base")
    data = load_config([str(ROOT / "configs/demo.yaml")], []).data
    model, tokenizer = train_base(data, steps=25, batch=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(base, root, *more):
    small = ["data.num_rows=64", "train.prompts_per_iteration=4", "train.prompts_per_update=2", "rollout.group_size=4"]
    return [
        "train", ROOT / "configs/demo.yaml", f"model.path={base}", f"run.root={root}", "run.name=r", "eepo.alpha=3.0",
        "checkpoint.every=2", "checkpoint.keep=9", "train.iterations=4", *small, *more,
    ]  # fmt: skip


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_its_folder_and_its_resumption(run, base, tmp_path, metric_keys):
    done = run_as_process(*arguments(base, tmp_path))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "r"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["eepo"]["alpha"] == 3.0 and config["eepo"]["prob_floor"] == 1e-4, "resolved, with defaults"
    rows = read(folder / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and metric_keys <= set(rows[0])
    assert rows[0]["unlearn/retention"] == pytest.approx(1, abs=1e-3)
    assert sorted(p.name for p in (folder / "rollouts").iterdir()) == [f"step_{i:06d}.jsonl" for i in (1, 2, 3, 4)]
    lines = read(folder / "rollouts" / "step_000002.jsonl")
    assert len(lines) == 16
    keys = {"prompt_id", "stage", "weights_version", "completion", "reward", "status", "advantage", "num_tokens"}
    for line in lines:
        assert keys <= set(line)
        per_token = [line[k] for k in ("tokens", "token_ids", "rollout_logprobs", "entropy", "policy_logprobs")]
        assert {len(v) for v in per_token} == {line["num_tokens"]}
        assert line["weights_version"] == [2, line["stage"] == 2]
        assert line["segments"] == [[*line["weights_version"], line["num_tokens"]]]
        assert ("gate" in line) == (line["stage"] == 1)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000004"]

    again = run(*arguments(base, tmp_path))
    assert again.returncode == 2 and "is not empty; add --resume" in again.stderr and again.stderr.count("\n") == 1
    finished = run(*arguments(base, tmp_path, "--resume"))
    assert finished.returncode == 0 and "is finished" in finished.stdout

    other = run(*arguments(base, tmp_path, "--resume", "eepo.alpha=0.1", "run.seed=9"))
    assert other.returncode == 2 and "differs from the run's own in run.seed, eepo.alpha" in other.stderr

    # lose the last checkpoint, as a crash would: the resumed run repeats iterations 3 and 4 exactly
    for path in sorted((folder / "checkpoints" / "step_000004").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "checkpoints" / "step_000004").rmdir()
    resumed = run(*arguments(base, tmp_path, "--resume"))
    assert resumed.returncode == 0 and "going on after iteration 2 of 4" in resumed.stdout, resumed.stderr
    repeated = read(folder / "metrics.jsonl")
    assert [r["step"] for r in repeated] == [1, 2, 3, 4]
    for old, new in zip(rows, repeated, strict=True):
        assert {k: v for k, v in old.items() if not k.startswith(("time", "tokens/per"))} == {
            k: v for k, v in new.items() if not k.startswith(("time", "tokens/per"))
        }


def test_resume_starts_where_there_is_nothing(run, base, tmp_path):
    done = run(*arguments(base, tmp_path, "--resume", "train.iterations=1"))
    assert done.returncode == 0 and "no checkpoint yet" in done.stdout


def test_dry_run_prints_the_config_and_the_plan(run, tmp_path):
    for name, completions in [("demo", "256"), ("qwen2.5-3b", "1,024"), ("llama-3.2-3b-instruct", "1,024")]:
        done = run("train", ROOT / f"configs/{name}.yaml", f"run.root={tmp_path}", "--dry-run")
        assert done.returncode == 0, done.stderr
        assert "prob_ceiling_gap: 0.0001" in done.stdout
        (line,) = [x for x in done.stdout.splitlines() if x.startswith("completions an iteration:")]
        assert line.split()[-1] == completions
        assert "stage sizes:" in done.stdout and "4 + 4" in done.stdout and "micro-batches an update" in done.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_knows_what_is_left_out_and_what_is_not_there(run):
    """Groups that are made up for; and a function that the config names."""
    command = ("train", ROOT / "configs/demo.yaml", "--dry-run", "eepo.enabled=false")
    plain, dynamic = run(*command), run(*command, "grpo.dynamic_sampling=true")
    lines = [line for done in (plain, dynamic) for line in done.stdout.splitlines() if "sampled tokens" in line]
    most = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert most[1] == 2 * most[0] and "left out, at most:" in dynamic.stdout
    done = run(*command, "grpo.loss=none.py:fn")
    assert done.returncode == 2 and "grpo.loss: none.py:fn cannot be imported" in done.stderr


GOOD = '{"id": "a", "problem": "1,2,3=6:", "answer": "1+2+3"}'


@pytest.mark.parametrize(
    "overrides, content, words",
    [
        (["eepo.alfa=1"], None, "did you mean eepo.alpha?"),
        (["data.train=none.jsonl"], None, "no file none.jsonl"),
        (["rollout.group_size=3"], None, "even number, found 3"),
        (["rollout.top_p=0.95"], None, "biases the probability ratio"),
        (["data.train=d.jsonl"], f"{GOOD}\n{{broken", "d.jsonl, line 2: not valid JSON"),
        (["data.train=d.jsonl"], f"{GOOD}\n{GOOD}", "line 2: id 'a' was already used in line 1"),
        (["data.train=d.jsonl"], b"\xff\xfe", "line 1: not UTF-8"),
        (["data.train=d.jsonl"], "", "it is empty"),
        (["data.train=d.jsonl"], GOOD.replace("1,2,3=6:", " "), "line 1: no text in 'problem'"),
        (["data.train=d.jsonl"], GOOD, "expected at most the 1 prompts"),
        (["model.path=./nowhere"], None, "nothing at ./nowhere"),
        (["grpo.advantage=none.py:fn"], None, "grpo.advantage: none.py:fn cannot be imported (FileNotFoundError"),
        (["grpo.loss=os:nothing"], None, "grpo.loss: os:nothing cannot be imported (AttributeError"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run(base, tmp_path, monkeypatch, capsys, overrides, content, words):
    if content is not None:
        (tmp_path / "d.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.chdir(tmp_path)
    assert main([str(a) for a in arguments(base, tmp_path / "runs", *overrides)]) == 2
    complaint = capsys.readouterr().err
    assert words in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_refused_run_leaves_no_grading_process(tmp_path, monkeypatch):
    """The grader proves itself before the model is loaded, and is gone when the model then cannot be."""
    from eepo_fast.rewards import MathGrader

    started = []
    original = MathGrader.start
    monkeypatch.setattr(MathGrader, "start", lambda self: (original(self), started.extend(self.pool.workers)))
    (tmp_path / "d.jsonl").write_text(GOOD)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    overrides = [f"data.train={tmp_path / 'd.jsonl'}", f"run.root={tmp_path / 'runs'}"]
    assert main([str(a) for a in arguments(tmp_path / "m", tmp_path / "runs", *overrides)]) == 2
    assert started and all(worker.process.poll() is not None for worker in started)


def test_a_tokenizer_that_does_not_fit_leaves_no_run(run, base, tmp_path):
    import shutil

    shutil.copytree(base, tmp_path / "m")
    content = json.loads((tmp_path / "m/tokenizer.json").read_text())
    content["model"]["vocab"]["1"] = 999
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(content))
    done = run(*arguments(tmp_path / "m", tmp_path / "runs"))
    assert done.returncode == 2 and "do not fit" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_help_has_an_example_for_every_command():
    for command in ("train", "grade", "demo"):
        assert "example: eepo-fast" in run_as_process(command, "--help").stdout


def test_iterations_beyond_the_epochs_are_said(run, base, tmp_path):
    """And the epochs that are named are those it takes."""
    done = run(*arguments(base, tmp_path, "train.iterations=35", "train.epochs=1"))
    assert done.returncode == 0 and "allow 16 iterations in train.epochs=1, and the run ends" in done.stdout
    assert "set train.epochs=3 for all 35" in done.stdout
    enough = run(*arguments(base, tmp_path, "train.iterations=18", "train.epochs=3", "--resume"))
    assert enough.returncode == 0 and "allow" not in enough.stdout, "negative control"


@pytest.mark.parametrize("command", ["train", "eval", "grade", "data"])
@pytest.mark.parametrize("place", ["/proc", "/sys"])  # where nobody makes a folder
def test_a_folder_that_is_read_only_is_one_line(run, base, tmp_path, command, place):
    check_refused(run, base, tmp_path, Path(place), command)


@pytest.mark.parametrize("command", ["train", "eval", "grade", "data"])
def test_a_file_in_the_way_of_a_folder_is_one_line(run, base, tmp_path, command):
    """Also where the user may write everything, as root."""
    (tmp_path / "ro").write_text("")
    check_refused(run, base, tmp_path, tmp_path / "ro", command)


def check_refused(run, base, tmp_path, place, command):
    (tmp_path / "d.jsonl").write_text(GOOD)
    (tmp_path / "g.jsonl").write_text('{"id": "a", "gold": "1", "answer": "1"}')
    arguments_of = {
        "train": arguments(base, place),
        "eval": ["eval", "--model", base, "--data", "t=arithmetic:3:9:4", "--out", place / "x"],
        "grade": ["grade", "--in", tmp_path / "g.jsonl", "--out", place / "x.jsonl"],
        "data": ["data", "prepare", f"t={tmp_path / 'd.jsonl'}", "--out", place / "x"],
    }
    done = run(*arguments_of[command])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", ["eval", "data"])
def test_a_folder_that_is_written_is_refused(run, base, tmp_path, command):
    from eepo_fast.disk import locked

    (tmp_path / "d.jsonl").write_text(GOOD)
    out = tmp_path / "out"
    given, name = {
        "eval": (["eval", "--model", base, "--data", "t=arithmetic:3:9:4", "--out", out], ".lock"),
        "data": (["data", "prepare", f"t={tmp_path / 'd.jsonl'}", "--out", out], ".t.lock"),
    }[command]
    with locked(out / name, "x", "y"):
        done = run(*given)
        assert done.returncode == 2 and f"--out: {out}: in use by process {os.getpid()} on host" in done.stderr
        assert os.listdir(out) == [name]
    assert not out.exists()
