"""What comes in broken: data, tokenizers, a grader's workers."""

import json
import os
import signal
import time

import pytest

from eepo_fast.rewards import MathGrader
from eepo_fast.types import Problem, UserError

ROWS = [json.dumps({"id": f"p{i}", "problem": f"{i}+1=?", "answer": str(i + 1)}).encode() for i in range(16)]
BROKEN = {
    "truncated": (7, lambda rows: [*rows[:2], rows[2][:20], *rows[3:]], "line 3: not valid JSON"),
    "not UTF-8": (8, lambda rows: [*rows[:4], rows[4].replace(b"+", b"\xff"), *rows[5:]], "line 5: not UTF-8"),
    "duplicate ids": (8, lambda rows: [*rows, rows[0]], "line 17: id 'p0' was already used in line 1"),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.fault(v[0])) for k, v in BROKEN.items()])
def test_broken_data_is_named_by_its_line_before_training(make_run, go, tmp_path, kind):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(BROKEN[kind][1](ROWS)) + b"\n")
    config = make_run(f"data.train={path}", "train.iterations=1")
    with pytest.raises(UserError, match=BROKEN[kind][2]):
        go(config)
    assert not config.run_dir.exists()
    path.write_bytes(b"\n".join(ROWS) + b"\n")  # the control: the same file, whole
    go(config)


@pytest.mark.fault(24)
def test_a_tokenizer_of_another_model_is_refused(make_run, go, model_folder, monkeypatch):
    path = model_folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["1"] = 2000
    path.write_text(json.dumps(content))
    config = make_run("train.iterations=1")
    with pytest.raises(
        UserError, match=r"tokenizer and model do not fit: problem .* holds token 2000, and the model's embedding"
    ):
        go(config)
    assert not config.run_dir.exists()
    monkeypatch.setattr("eepo_fast.run.build.check_ids", lambda *args: [])  # the control: the model itself would fail
    with pytest.raises(UserError, match="cannot be run: IndexError"):
        go(config)


@pytest.fixture
def grader():
    grader = MathGrader(num_workers=1)
    grader.start()
    yield grader
    grader.close()


def stopped_at_its_job(grader, monkeypatch):
    """The worker is stopped when it is given an answer."""
    kind = type(grader.pool.workers[0])
    original = kind.send

    def send(worker, job):
        os.kill(worker.process.pid, signal.SIGSTOP)
        original(worker, job)

    monkeypatch.setattr(kind, "send", send)


@pytest.mark.fault(20)
def test_a_grader_that_hangs_is_killed_and_its_answer_missing(grader, monkeypatch):
    stopped_at_its_job(grader, monkeypatch)
    start = time.monotonic()
    grade = grader.grade([Problem("a", "?", "\\sqrt{8}")], ["\\boxed{2\\sqrt{2}}"])[0]
    assert grade.status == "timeout" and grade.seconds <= 5 and time.monotonic() - start < 6
    monkeypatch.undo()
    assert grader.grade([Problem("a", "?", "\\sqrt{8}")], ["\\boxed{2\\sqrt{2}}"])[0].reward == 1


@pytest.mark.fault(21)
def test_a_grader_that_dies_is_no_zero(grader, monkeypatch):
    kind = type(grader.pool.workers[0])
    original = kind.send

    def send(worker, job):
        worker.process.kill()
        worker.process.wait()
        original(worker, job)

    monkeypatch.setattr(kind, "send", send)
    grade = grader.grade([Problem("a", "?", "\\sqrt{8}")], ["\\boxed{2\\sqrt{2}}"])[0]
    assert grade.status == "error", "which the trainer takes for a missing reward (test_numbers.py)"
    monkeypatch.undo()  # the control
    assert grader.grade([Problem("a", "?", "\\sqrt{8}")], ["\\boxed{2\\sqrt{2}}"])[0].status == "ok"
