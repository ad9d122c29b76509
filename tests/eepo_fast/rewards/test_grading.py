"""The suites of grading/: right and wrong answers, hostile ones; and what the grader promises around them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eepo_fast.cli import main
from eepo_fast.config import RewardConfig
from eepo_fast.rewards import MathGrader, make_grader
from eepo_fast.rewards.answers.choices import chosen
from eepo_fast.rewards.answers.extract import extract_answer
from eepo_fast.rewards.answers.normalise import normalise
from eepo_fast.rewards.answers.texts import same_text
from eepo_fast.rewards.math import MODES
from eepo_fast.rewards.paper import extract_paper_answer
from eepo_fast.rewards.pool import Job
from eepo_fast.types import Problem

FOLDER = Path(__file__).parent / "grading"
NUM_ENDLESS = 5  # each takes a worker's life


def rows(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def text(row):
    return row["answer"] + row.get("repeated", "") * row.get("times", 0) + row.get("end", "")


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(num_workers=2)
    grader.start()
    yield grader
    grader.close()


def test_right_and_wrong_answers(grader):
    cases = rows("cases.jsonl")
    assert len(cases) >= 300 and 300 < sum(case["reward"] for case in cases) < len(cases) - 300
    grades = grader.grade_answers([c["gold"] for c in cases], [c["answer"] for c in cases])
    wrong = [
        (case, grade)
        for case, grade in zip(cases, grades, strict=True)
        if grade.reward != case["reward"] or grade.status not in ("ok", "no_answer")
    ]
    assert not wrong, wrong


def test_completions_without_a_box(grader):
    cases = rows("completions.jsonl")
    problems = [Problem(str(i), "", case["gold"], "") for i, case in enumerate(cases)]
    grades = grader.grade(problems, [case["completion"] for case in cases])
    wrong = [(c, g) for c, g in zip(cases, grades, strict=True) if g.reward != c["reward"]]
    assert len(cases) >= 40 and not wrong, wrong


HOSTILE = "hostile answers executed, past the deadline or silently zero"


def check_hostile(cases, answer_seconds, folder, monkeypatch):
    """How many did harm; it fails where any did."""
    monkeypatch.chdir(folder)
    grader = MathGrader(num_workers=2, answer_seconds=answer_seconds)
    grader.start()
    files, late = os.listdir(folder), 0
    answers = [text(case).replace("CANARY", str(folder / "canary")) for case in cases]
    for i in range(0, len(cases), 2):  # two workers: no answer waits for another
        start = time.monotonic()
        grades = grader.grade_answers([c["gold"] for c in cases[i : i + 2]], answers[i : i + 2])
        spent = time.monotonic() - start
        for answer, grade in zip(answers[i : i + 2], grades, strict=True):
            assert grade.reward == 0, answer[:100]
            # one that outgrows its worker's memory before its time is up is an error
            harmless = ("ok", "no_answer", "timeout", "too_large", *(["error"] if cases[i].get("endless") else []))
            assert grade.status in harmless, (answer[:100], grade)
            late += grade.seconds >= 5
        assert spent < 30, answers[i : i + 2]  # with new workers starting, on a busy machine
    grader.close()
    harm = len(set(os.listdir(folder)) - set(files)) + late
    assert harm == 0
    return harm


@pytest.mark.slow
@pytest.mark.chaos
def test_hostile_answers(tmp_path, monkeypatch, figure):
    cases = rows("hostile.jsonl")
    assert len(cases) >= 100
    endless = [case for case in cases if case.get("endless")]
    quick = [case for case in cases if not case.get("endless")]
    cases = quick + endless[:: len(endless) // NUM_ENDLESS][:NUM_ENDLESS]
    figure(HOSTILE, check_hostile(cases, 2.0, tmp_path, monkeypatch), len(cases))


@pytest.mark.slow
@pytest.mark.chaos
def test_endless_answers_at_full_time(tmp_path, monkeypatch, figure):
    endless = [case for case in rows("hostile.jsonl") if case.get("endless")]
    figure(HOSTILE, check_hostile(endless, 4.5, tmp_path, monkeypatch), len(endless))


def test_normalising_and_extracting_are_linear():
    """Ten times the text takes about ten times as long; a quadratic pattern would take a hundred times."""
    pieces = [
        "\\boxed{", "the answer is ", "1,234,", "final    ", "-", "{", "$", "=", "a ", "\\frac{1}{", "1.", "- ",
        "9" * 50, "\\text{and} ", " . ", "the answer is:    ", "\\frac{11", "1e", "1\\times 10^{", "\\boxed{1}",
        "**Answer:** (", "\nAnswer: A. ", "{x|", "(1;", "]0,", "\\log_{2}{", "\\left\\{\\begin{array}", "1 м ", "={1,",
        "\\text{元",
    ]  # fmt: skip
    for piece in pieces:
        seconds = []
        for size in (20_000, 200_000):
            start = time.process_time()
            extract_answer(piece * (size // len(piece)))
            extract_paper_answer(piece * (size // len(piece)))
            seconds.append(time.process_time() - start)
        assert seconds[1] < 40 * max(seconds[0], 0.005), piece
        start = time.process_time()
        normalise(piece * (2000 // len(piece)))
        chosen("B", "A. " + piece * (1990 // len(piece)))
        same_text(piece * (2000 // len(piece)), piece)
        assert time.process_time() - start < 0.5, piece


@pytest.mark.parametrize(
    "completion, answer",
    [
        ("the answer is 9 months * $2680 = $23600", "$23600"),
        ("So x = -\\frac{1}{2}", "-\\frac{1}{2}"),
        ("which makes 4.5 \\times 10^{33} in all", "4.5 \\times 10^{33}"),
        ("it is 3/4 of them", "3/4"),
        ("x = \\boxed{5}, no: \\boxed{}", None),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("The answer is 12. The answer is 13.", "13"),
        ("The final answer is: **7**", "7"),
        ("The answer is $\\frac{3}{4}$.", "\\frac{3}{4}"),
        ("so 1,234 apples, 2,000 in all", "2,000"),
        ("costs $5.50 each", "5.50"),
        ("\\fbox{8}", "8"),
        ("it's 5 - 3", "3"),
        ("so x = - 3", "-3"),
        ("so 3 1/2 cups", "3 1/2"),
        ("so $-3\\frac{1}{2}$", "-3\\frac{1}{2}"),
        ("at 7:30", "7:30"),
        ("we get 10^5", "10^5"),
        ("we get 2^{10}", "2^{10}"),
        ("The answer is therefore 18", "18"),
        ("The correct answer is B", "B"),
        ("The answer is $x=3$ or $x=-3$.", "$x=3$ or $x=-3$"),
    ],
)
def test_answers_are_extracted(completion, answer):
    assert extract_answer(completion) == answer


def test_a_worker_runs_no_text(grader):
    """The road that sympy takes from a string to Python's eval, and the interpreter's own."""
    from eepo_fast.rewards import sandbox

    for harmful in ("__import__('os')", "1+1", "x", "1;2", "9**9"):
        with pytest.raises(ValueError):
            sandbox.read_digits(harmful)
    assert sandbox.read_digits("12") == 12 and str(sandbox.read_digits("1.5")).startswith("1.5")
    for event in ("os.system", "subprocess.Popen", "socket.connect"):
        with pytest.raises(PermissionError):
            sandbox.refuse(event, ())
    with pytest.raises(PermissionError):
        sandbox.refuse("exec", (compile("1", "<string>", "eval"),))
    sandbox.refuse("exec", (compile("1", __file__, "eval"),))  # a module's file


def test_a_worker_is_short_of_memory_files_and_processes(tmp_path):
    """What sandbox.enter shuts, tried from inside."""
    kept = str(tmp_path / "kept")
    Path(kept).write_text("kept")
    new = repr(str(tmp_path / "x"))
    attempts = ("bytearray(2 << 30)", f"open({new}, 'w').write('1' * 9999)", "eval('1')",
                "subprocess.run(['true'])", "os.system('true')", f"open({kept!r}, 'w')", f"open({kept!r}, 'r+')",
                f"os.open({kept!r}, os.O_TRUNC)", f"os.mkdir({new})", f"os.truncate({kept!r}, 0)",
                f"os.symlink({kept!r}, {new})", f"os.link({kept!r}, {new})", f"os.chmod({kept!r}, 0)",
                f"os.rename({kept!r}, {new})", f"os.remove({kept!r})", f"os.rmdir({new})")  # fmt: skip
    program = "\n".join(
        [
            "import os, subprocess, sys",
            "from eepo_fast.rewards import sandbox",
            *(f"def attempt{i}(): {code}" for i, code in enumerate(attempts)),
            "sandbox.enter(1 << 30)",
            f"for attempt in ({''.join(f'attempt{i},' for i in range(len(attempts)))}):",
            "    try: attempt()",
            "    except BaseException as error: print(type(error).__name__)",
            "    else: print('done')",
        ]
    )
    (tmp_path / "program.py").write_text(program)
    run = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["MemoryError"] + ["PermissionError"] * (len(attempts) - 1), run.stderr
    assert sorted(os.listdir(tmp_path)) == ["kept", "program.py"] and Path(kept).read_text() == "kept"


def test_workers_are_recycled_without_a_stall():
    grader = MathGrader(num_workers=1, recycle_after=5)
    grader.start()
    first = grader.pool.workers[0].process
    jobs = [Job(i, "strict", "x+1", f"x+{i}") for i in range(8)]
    grades = grader.pool.run(jobs)
    assert [grades[i].reward for i in range(8)] == [0, 1, 0, 0, 0, 0, 0, 0]
    deadline = time.monotonic() + 60
    while grader.pool.workers[0].process is first and time.monotonic() < deadline:
        assert grader.grade_answers(["x+1"], [f"1+x+{time.monotonic()}"])[0].status == "ok"
    assert first.poll() is not None and len(grader.pool.workers) == 1
    grader.close()


def test_a_call_has_a_budget():
    grader = make_grader("numbers.jsonl", RewardConfig(step_seconds=1.0))
    grader.start()
    start = time.monotonic()
    answers = ["9^{9^{9}}", "9^{9^{8}}", "9^{8^{9}}", "8^{9^{9}}", "9^{9^{7}}", "7^{9^{9}}", "3"]
    grades = grader.grade([Problem(str(i), "?", "3") for i in range(7)], [f"\\boxed{{{a}}}" for a in answers])
    assert [g.status for g in grades] == ["timeout"] * 6 + ["ok"] and grades[-1].reward == 1
    assert time.monotonic() - start < 15  # and not six times 4.5 s
    grader.close()


@pytest.mark.parametrize("mode", MODES)
def test_both_modes_pass_their_self_test(mode):
    grader = make_grader("x.jsonl", RewardConfig(mode=mode))
    grader.start()
    grades = grader.grade([Problem("a", "?", "\\frac{1}{2}")] * 2, ["it is \\boxed{0.5}", "it is \\boxed{0.6}"])
    assert [(g.reward, g.status) for g in grades] == [(1, "ok"), (0, "ok")]
    grader.close()


def test_paper_mode_grades_as_the_recipe_with_its_errors():
    grader = MathGrader("paper", num_workers=2)
    cases = rows("paper.jsonl")
    grades = grader.grade_answers([c["gold"] for c in cases], [c["answer"] for c in cases])
    wrong = [(c, g) for c, g in zip(cases, grades, strict=True) if (g.reward, g.status) != (c["reward"], "ok")]
    grader.close()
    assert not wrong, wrong


@pytest.mark.parametrize(
    "completion, answer",
    [("\\boxed{42}", "42"), ("he answer is 5.", "5"), ("1,000 or 2,000", "2000"), ("\\boxed{x=3}", "3"), ("none", None),
     ("\\boxed{\\dfrac12}", "\\frac{1}{2}"), ("\\boxed{90^\\circ}", "90"), ("\\boxed{}", None), ("boxed", None)],
)  # fmt: skip
def test_paper_mode_extracts_as_the_recipe(completion, answer):
    assert extract_paper_answer(completion) == answer


def test_grade_command_names_its_mode(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"id": 1, "gold": "4.5e33", "answer": "4.5 \\times 10^{33}"}) + "\n")
    rewards = []
    for mode in MODES:
        assert main(["grade", "--in", str(source), "--out", str(target), "--mode", mode]) == 0
        assert f"mode {mode}: ok 1" in capsys.readouterr().out
        rewards.append(json.loads(target.read_text())["reward"])
    assert rewards == [1.0, 0.0]
