"""Grading: answers found, compared, timed out; the grade command."""

import json
import time

import pytest

from eepo_fast.cli import main
from eepo_fast.rewards import MathGrader
from eepo_fast.rewards.answers.extract import extract_answer
from eepo_fast.rewards.answers.normalise import normalise
from eepo_fast.rewards.arithmetic import ArithmeticGrader, evaluate
from eepo_fast.types import Problem

ENDLESS = "10^{10^{10^{10}}}"


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(num_workers=2)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("so \\boxed{3} or rather \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("The answer is 42.", "42"),
        ("the final answer is: $x+1$. Done", "x+1"),
        ("first 3, then 1,234 apples", "1,234"),
        ("\\boxed{}", None),
        ("\\boxed{3", "3"),
        ("no idea", None),
    ],
)
def test_the_last_answer_is_found(completion, answer):
    assert extract_answer(completion) == answer


def test_looking_for_a_box_takes_one_pass():
    """A quadratic search would take minutes here, outside of any worker's clock."""
    start = time.monotonic()
    assert extract_answer("\\boxed{" * 200_000) is None
    assert extract_answer("{" * 200_000 + "\\boxed{7}" + "}" * 10) == "7"
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "gold, answer, reward",
    [
        ("72", "72", 1),
        ("72", "73", 0),
        ("1234", "1,234", 1),
        ("72", "72.0", 1),
        ("\\frac{1}{2}", "0.5", 1),
        ("\\frac{1}{2}", "\\dfrac12", 1),
        ("\\frac{1}{2}", "\\frac{1}{3}", 0),
        ("x+1", "1 + x", 1),
        ("(1,2)", "(1, 2)", 1),
        ("(1,2)", "(2, 1)", 0),
        ("\\sqrt{8}", "2\\sqrt{2}", 1),
        ("\\text{Tuesday}", "Tuesday", 1),
        ("-5", "5", 0),
        ("12", "1 2", 0),
        ("11/2", "1 1/2", 0),
        ("3/2", "1 1/2", 1),
        ("42", "**42**", 1),
        ("5", "\\[ 5 \\]", 1),
        ("(2,100)", "2100", 0),
        ("\\text{Tuesday}", "Monday", 0),
    ],
)
def test_answers_are_compared(grader, gold, answer, reward):
    (grade,) = grader.grade_answers([gold], [answer])
    assert (grade.reward, grade.status) == (reward, "ok")


def test_statuses(grader):
    golds = ["1", "1", "1", "", "\\frac{", "\\frac{1}{2}"]
    answers = [None, "  ", "9" * 5000, "1", "3", ENDLESS]
    start = time.monotonic()
    grades = grader.grade_answers(golds, answers)
    assert [g.status for g in grades] == ["no_answer", "no_answer", "too_large", "error", "error", "timeout"]
    assert all(g.reward == 0 for g in grades)
    assert grades[-1].seconds < 5 and time.monotonic() - start < 60
    assert grader.grade_answers(["\\sqrt{8}"], ["2\\sqrt{2}"])[0].reward == 1  # and the worker's place is taken


@pytest.mark.parametrize(
    "gold",
    ["\\log_2 3", "\\gcd(a,b)", "\\vec{v}", "\\mathcal{O}(n^2)", "\\det A", "\\Re(z)", "\\mathbb{R}^+",
     "\\begin{cases} x & x>0 \\\\ 0 & x\\le 0 \\end{cases}", "\\|v\\|", "P(A \\cap B)", "x \\mid y", "A^\\top",
     "p \\to q",
     "\\mathbb{R}\\setminus\\mathbb{Q}",
     "]0,1[", "12元", "三角形", "\\left\\{\\begin{array}{l} x=1 \\\\ y=2 \\end{array}\\right."],
)  # fmt: skip
def test_ordinary_golds_are_readable(grader, gold):
    assert grader.unreadable([gold]) == []
    grades = grader.grade_answers([gold] * 3, [f"$ {gold} $", "7919", "\\sqrt{7919}\\zeta"])
    assert [(g.reward, g.status) for g in grades] == [(1, "ok"), (0, "ok"), (0, "ok")]


def test_broken_golds_are_unreadable(grader):
    broken = [
        "",
        " ",
        "\\frac{",
        "{1",
        "1}",
        "\x01",
        "\\frac{1}",
        "2^",
        "(1,2",
        "18+",
        "\\begin{cases} 1",
        "?",
        "x" * 2001,
    ]
    assert grader.unreadable([*broken, "1"]) == list(range(len(broken)))
    assert {g.status for g in grader.grade_answers(broken, ["3"] * len(broken))} == {"error"}


def test_a_worker_that_died_idle_costs_no_answer(grader):
    assert grader.grade_answers(["\\sqrt{8}"], ["2\\sqrt{2}"])[0].reward == 1
    for worker in [w for w in grader.pool.workers if w.ready]:
        worker.process.kill()
        worker.process.wait()
    grades = grader.grade_answers(["\\sqrt{8}"] * 6, [f"{n}\\sqrt{{8}}/{n}" for n in range(2, 8)])
    assert [(g.reward, g.status) for g in grades] == [(1.0, "ok")] * 6


def test_a_worker_that_dies_at_its_job_is_an_error_not_a_zero(grader, monkeypatch):
    def send_and_die(worker, job):
        worker.process.kill()
        worker.process.wait()
        original(worker, job)

    original = type(grader.pool.workers[0]).send
    monkeypatch.setattr(type(grader.pool.workers[0]), "send", send_and_die)
    assert [g.status for g in grader.grade_answers(["\\sqrt{8}"], ["2\\sqrt{2}"])] == ["error"]
    monkeypatch.undo()
    assert grader.grade_answers(["\\sqrt{8}"], ["2\\sqrt{2}"])[0].reward == 1


def test_nothing_in_an_answer_is_executed(grader, tmp_path):
    target = tmp_path / "written"
    code = f"__import__('pathlib').Path('{target}').touch()"
    completions = [f"\\boxed{{{code}}}", f'\\boxed{{exec("{code}")}}', f"the answer is {code}"]
    grader.grade([Problem(str(i), "?", "\\frac{1}{2}") for i in range(3)], completions)
    assert not target.exists()


def test_grade_command(tmp_path, capsys):
    rows = [
        {"id": "a", "gold": "\\frac{1}{2}", "answer": "0.5"},
        {"id": "b", "gold": "7", "response": "thus \\boxed{8}"},
        {"id": "c", "gold": "7"},
        {"id": 4, "gold": 7, "answer": 7},
        {"id": "e", "gold": "", "answer": "1"},
        {"id": "f", "gold": None, "answer": "None"},
        {"id": "\ud800", "gold": [1], "answer": [1]},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*map(json.dumps, rows), "broken {"]))
    assert main(["grade", "--in", str(source), "--out", str(target)]) == 0
    out = [json.loads(line) for line in target.read_text().splitlines()]
    assert [r["id"] for r in out] == ["a", "b", "c", 4, "e", "f", "\ud800", "line 8"]
    assert [r["reward"] for r in out] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert [r["status"] for r in out] == ["ok", "ok", "error", "ok", *["error"] * 4]
    assert all(set(r) == {"id", "reward", "status", "seconds"} for r in out)
    assert "ok 3" in capsys.readouterr().out


def test_grade_refuses_a_missing_file(tmp_path, capsys):
    assert main(["grade", "--in", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, result",
    [
        ("1+2*3", (7, [1, 2, 3])),
        ("(1+2)*3", (9, [1, 2, 3])),
        ("8-3-2", (3, [8, 3, 2])),
        ("2*(3-(4+1))", (-4, [2, 3, 4, 1])),
        ("1+", None),
        ("(1+2", None),
        ("1 2", None),
        ("1**2", None),
        ("__import__", None),
        ("-1", None),
        ("", None),
    ],
)
def test_expressions_are_read(text, result):
    assert evaluate(text) == result


@pytest.mark.parametrize(
    "completion, reward, status",
    [
        ("2*3+1", 1.0, "ok"),
        ("1+3*2", 1.0, "ok"),
        ("2*3+2", 0.0, "ok"),  # reaches 8
        ("7", 0.0, "ok"),  # not the given numbers
        ("2*3+1+0", 0.0, "ok"),
        ("", 0.0, "no_answer"),
        ("1" * 500, 0.0, "too_large"),
        ("(" * 150, 0.0, "ok"),
    ],
)
def test_arithmetic_verifier(completion, reward, status):
    (grade,) = ArithmeticGrader().grade([Problem("a", "1,2,3=7:", "2*3+1")], [completion])
    assert (grade.reward, grade.status) == (reward, status)


def test_normalise():
    assert normalise("$1{,}234.$") == "1234" and normalise("\\left( 1,\\; 2 \\right)") == "(1,2)"
