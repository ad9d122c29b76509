"""Procedural tasks, and the order of training."""

import random
from itertools import pairwise

import numpy as np
import pytest

from eepo_fast.config import DataConfig, RewardConfig
from eepo_fast.data import base_model
from eepo_fast.data.problems import cursor_after, load_problems, next_prompts
from eepo_fast.data.tasks import BASES, TASKS, is_held_out, random_expression, task_problems
from eepo_fast.rewards import make_answer_grader
from eepo_fast.rewards.arithmetic import ArithmeticGrader, evaluate
from eepo_fast.types import Cursor, Problem, UserError


def test_random_expressions_are_right_and_need_their_parentheses():
    rng = random.Random(0)
    for _ in range(2000):
        numbers = [rng.randint(1, 12) for _ in range(rng.randint(1, 5))]
        text, value, _ = random_expression(rng, numbers)
        assert evaluate(text) == (value, numbers)


def arithmetic(size, numbers, max_number, seed, split="train"):
    data = DataConfig(train="arithmetic", numbers=numbers, max_number=max_number)
    return task_problems("arithmetic", size, data, seed, split, asked_by="data.num_rows")


def test_procedural_problems_are_seeded_unique_and_solvable():
    problems = arithmetic(500, 3, 9, 1)
    assert problems == arithmetic(500, 3, 9, 1) != arithmetic(500, 3, 9, 2)
    assert len({p.problem for p in problems}) == 500
    grades = ArithmeticGrader().grade(problems, [p.answer for p in problems])
    assert all(g.reward == 1.0 for g in grades)


def test_held_out_problems_are_never_trained_on():
    train = {p.problem for p in arithmetic(800, 3, 9, 0)}
    test = {p.problem for p in arithmetic(200, 3, 9, 0, "test")}
    assert not train & test and all(is_held_out(p) for p in test)


ANSWERS = {
    "arithmetic": lambda p: p.answer,
    "progressions": lambda p: f" {p.answer}",
    "two_ways": lambda p: f"B{p.answer}",
}


@pytest.mark.parametrize("task", TASKS)
def test_splits_of_procedural_tasks_are_apart(task):
    data = DataConfig(train=task, numbers=3)
    splits = ("train", "test", "out") if TASKS[task].has_out else ("train", "test")
    found = {s: task_problems(task, 100, data, 0, s, asked_by="x") for s in splits}
    texts = [p.problem for part in found.values() for p in part]
    assert len(set(texts)) == len(texts)
    for split, part in found.items():
        assert part == task_problems(task, 100, data, 0, split, asked_by="x")
        assert {p.id for p in part} == {f"{task}/{split}/{i:06d}" for i in range(100)}
        another = task_problems(task, 100, data, 1, split, asked_by="x")
        assert part != another and not {p.problem for p in another} & ({*texts} - {p.problem for p in part})
        grades = make_answer_grader(task, RewardConfig()).grade(part, [ANSWERS[task](p) for p in part])
        assert {g.reward for g in grades} == {1.0}
    assert load_problems(DataConfig(train=task, split="test", num_rows=100, numbers=3), 0) == found["test"]


@pytest.mark.parametrize("train", ["problems.jsonl", "openai/gsm8k"])
def test_only_procedural_tasks_have_splits(train):
    with pytest.raises(UserError, match=f"data.split: expected train with data.train={train}, found out"):
        load_problems(DataConfig(train=train, split="out"), 0)


def test_without_a_number_there_are_as_many_as_there_are():
    assert 400 < len(load_problems(DataConfig(train="progressions"), 0)) < 600
    assert len(load_problems(DataConfig(train="two_ways", num_rows=7), 0)) == 7


def test_progressions_are_progressions():
    for split, steps in (("train", range(2, 10)), ("test", range(2, 10)), ("out", range(10, 16))):
        for p in task_problems("progressions", 100, DataConfig(train="progressions"), 3, split, asked_by="x"):
            *terms, rest = p.problem.split(",")
            terms = [*map(int, terms), int(p.answer)]
            assert rest == "" and len(terms) == 5 and min(terms) > 0 and max(terms) <= 99
            (step,) = {b - a for a, b in pairwise(terms)}
            assert step in steps
    with pytest.raises(UserError, match=r"data.num_rows: 5000 different problems .* progressions gave only \d+ of the"):
        load_problems(DataConfig(train="progressions", num_rows=5000), 0)


def test_way_a_of_two_is_right_in_training_alone():
    grader = make_answer_grader("two_ways", RewardConfig())
    for split, rewards in (("train", {1.0}), ("test", {1.0}), ("out", {0.0})):
        problems = task_problems("two_ways", 100, DataConfig(train="two_ways"), 0, split, asked_by="x")
        pairs = [tuple(map(int, p.problem.rstrip(":").split("+"))) for p in problems]
        first = grader.grade(problems, [f"A{a // 10 + b // 10}{(a % 10 + b % 10) % 10}" for a, b in pairs])
        best = grader.grade(problems, [f"B{a + b}" for a, b in pairs])
        assert {g.reward for g in first} == rewards and {g.reward for g in best} == {1.0}


@pytest.mark.parametrize(
    "task, completion, reward, status",
    [
        ("progressions", " 64", 1.0, "ok"),
        ("progressions", "64, 66", 1.0, "ok"),
        ("progressions", " 640", 0.0, "ok"),
        ("progressions", " the next is 64", 0.0, "no_answer"),
        ("progressions", "", 0.0, "no_answer"),
        ("two_ways", "A64", 1.0, "ok"),
        ("two_ways", "B065", 0.0, "ok"),
        ("two_ways", "64", 0.0, "no_answer"),
        ("two_ways", "A64B", 0.0, "no_answer"),
        ("two_ways", "A" + "6" * 5000, 0.0, "no_answer"),
    ],
)
def test_graders_of_procedural_tasks(task, completion, reward, status):
    grader = make_answer_grader(task, RewardConfig())
    (grade,) = grader.grade([Problem("p", "", "64")], [completion])
    assert (grade.reward, grade.status) == (reward, status)


def test_too_many_procedural_problems_are_refused():
    with pytest.raises(UserError, match="gave only"):
        arithmetic(100, 2, 2, 0)


def orders(count):
    return [np.random.default_rng([4, epoch]).permutation(10).tolist() for epoch in range(count)]


def test_an_epoch_has_each_prompt_once_and_no_partial_batch():
    cursor, batches = Cursor(), []
    for _ in range(6):
        batch, cursor = next_prompts(cursor, 3, 10, 4, whole_batches=True)
        batches.append(batch)
    first, second = orders(2)
    assert first != second
    assert batches == [order[i : i + 3] for order in (first, second) for i in (0, 3, 6)]
    assert next_prompts(cursor_after(4, 10, 3), 3, 10, 4, whole_batches=True)[0] == batches[4]


@pytest.mark.parametrize("counts", [[3] * 40, [6, *[4] * 30], [10] * 12, [1, 7, 2] * 10, [9] * 20])
def test_batches_that_go_on_into_the_next_epoch_drop_nothing(counts):
    """What was taken, and what waits since an iteration met it twice, is what the epochs so far have."""
    cursor, said, waited = Cursor(), [], 0
    for count in counts:
        batch, cursor = next_prompts(cursor, count, 10, 4, whole_batches=False)
        assert len(set(batch)) == len(batch) == count
        said += batch
        waited += len(cursor.postponed)
        whole = [i for order in orders(cursor.epoch + 1) for i in order][: cursor.epoch * 10 + cursor.position]
        assert sorted([*said, *cursor.postponed]) == sorted(whole)
    assert cursor.epoch > 4 and (waited > 0) == (10 % counts[-1] > 0)


@pytest.mark.parametrize("name", BASES)
def test_a_base_that_was_taught_something_else_is_not_taken(name, monkeypatch):
    """The folder in the cache is of the lessons, however they are made."""
    data = DataConfig(train="x", numbers=3)
    before = base_model.base_folder(name, data)
    assert base_model.base_folder(name, data) == before
    assert (base_model.base_folder(name, DataConfig(train="x", numbers=4)) == before) == (name != "arithmetic-base")
    for attribute, other in (
        ("arithmetic_problem", lambda rng, *_: (str(rng.random()), "1")),
        ("two_ways_answers", lambda a, b: {"A": "1", "B": "2"}),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(base_model, attribute, other)
            of_arithmetic = attribute == "arithmetic_problem"
            assert (base_model.base_folder(name, data) == before) == (of_arithmetic != (name == "arithmetic-base"))
