"""Data files and their mistakes, templates, the procedural task, and the order of training."""

import copy
import json
import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eepo_fast.config import DataConfig, RewardConfig
from eepo_fast.data import base_model
from eepo_fast.data.problems import (
    cursor_after,
    load_problems,
    make_prompts,
    next_prompts,
    read_jsonl,
    render,
    stop_token_ids,
    token_texts,
)
from eepo_fast.data.tasks import BASES, TASKS, is_held_out, random_expression, task_problems
from eepo_fast.rewards import make_answer_grader
from eepo_fast.rewards.arithmetic import ArithmeticGrader, evaluate
from eepo_fast.types import Cursor, Problem, UserError

GOOD = {"id": "a", "problem": "1+1?", "answer": "2"}


def write(path, *rows):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n")
    return path


def test_reads_what_it_should(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, b"", {**GOOD, "id": "b", "problem": "ü?", "level": 3, "source": "s"})
    first, second = read_jsonl(path)
    assert first == Problem("a", "1+1?", "2") and second == Problem("b", "ü?", "2", "s")


@pytest.mark.parametrize(
    "rows, words",
    [
        ([GOOD, b'{"id": "b", "problem"'], "line 2: not valid JSON"),
        ([GOOD, b"[1]"], "line 2: expected a JSON object, found a list"),
        ([GOOD, b"", GOOD], "line 3: id 'a' was already used in line 1"),
        ([GOOD, b'{"id": "b", "problem": "\xff", "answer": "1"}'], "line 2: not UTF-8"),
        ([{**GOOD, "problem": " "}], "line 1: expected a non-empty string in `problem`, found ' '"),
        ([{"id": "a", "problem": "x"}], "line 1: expected a non-empty string in `answer`, found nothing"),
        ([{**GOOD, "answer": 2}], "line 1: expected a non-empty string in `answer`, found 2"),
        ([b""], "found an empty file"),
        ([b"[" * 100_000], "line 1: not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, words):
    with pytest.raises(UserError) as error:
        read_jsonl(write(tmp_path / "d.jsonl", *rows))
    assert words in str(error.value) and "d.jsonl" in str(error.value)


def test_a_missing_file_is_named(test_config, tmp_path):
    config = test_config(data={"train": str(tmp_path / "none.jsonl")}).data
    with pytest.raises(UserError, match=r"no file .*none\.jsonl"):
        load_problems(config, 0)


def test_a_hub_data_set_by_columns(test_config, tmp_path, capsys):
    """A folder with a data file is loaded by the hub's own client, without a network."""
    folder = tmp_path / "some" / "set"
    folder.mkdir(parents=True)
    rows = [
        {"extra": {"question": "2+2?"}, "worked": "it is #### 1,004"},
        {"extra": {"question": "?"}, "worked": "nothing ####"},
    ]
    write(folder / "train.jsonl", *rows)
    columns = {"problem": "extra.question", "answer": "worked"}
    values = {"train": str(folder), "files": "train.jsonl", "columns": columns, "answer_marker": "####"}
    (problem,) = load_problems(test_config(data=values).data, 0)
    assert (problem.problem, problem.answer) == ("2+2?", "1004")
    assert "1 of 2 rows have no problem or no answer (or no '####' before one): left out" in capsys.readouterr().out
    values["columns"] = {"problem": "extra.q", "answer": "worked"}
    with pytest.raises(UserError, match=r"no column 'extra\.q'; found at that place: question"):
        load_problems(test_config(data=values).data, 0)


@pytest.fixture
def hub_answers(test_config, tmp_path, monkeypatch):
    """Answers as read from a hub data set of these, a problem each."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def read(*answers, marker=""):
        (tmp_path / "set").mkdir()
        rows = [{"problem": f"p{i}", "answer": answer} for i, answer in enumerate(answers)]
        write(tmp_path / "set" / "train.jsonl", *rows)
        values = {"train": str(tmp_path / "set"), "files": "train.jsonl", "answer_marker": marker}
        return [p.answer for p in load_problems(test_config(data=values).data, 0)]

    return read


@pytest.mark.parametrize(
    "answers, expected",
    [
        ([["2", "3"], ["4"], [], None], ["2, 3", "4"]),
        ([[1, 2]], ["1, 2"]),
        ([2.5, 3.0], ["2.5", "3.0"]),
        ([True], ["True"]),
    ],
)
def test_answers_of_other_types_are_written_as_people_do(hub_answers, answers, expected):
    assert hub_answers(*answers) == expected


@pytest.mark.parametrize("answer, found", [({"x": 1}, "dict"), ([[1], [2]], "a list with a list")])
def test_an_answer_that_is_no_text_is_refused(hub_answers, answer, found):
    with pytest.raises(UserError, match=rf"set, row 0, column 'answer': expected text.*found {found}"):
        hub_answers(answer)


def test_the_final_answer_is_what_follows_the_marker(hub_answers, capsys):
    marked = ["#### 1,004", "#### -$2,000.50", "#### (1,2)", "#### 12,34", "x #### 1, 2", "no marker: 7"]
    assert hub_answers(*marked, marker="####") == ["1004", "-$2000.50", "(1,2)", "12,34", "1, 2"]
    assert "1 of 6 rows have no problem or no answer (or no '####' before one)" in capsys.readouterr().out


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


def test_templates():
    assert render("plain", "1+1?", None) == "1+1?"
    assert render("chatml", "1+1?", None) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1+1?\nPlease reason step by "
        "step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render("question_answer", "1+1?", None) == "Question:\n1+1?\nAnswer:\nLet's think step by step.\n"


def test_long_prompts_are_left_out_and_counted(test_config, tokenizer):
    problems = [Problem("a", "1,1=2:", "1+1"), Problem("b", "1,1,1,1=4:", "1+1+1+1")]
    prompts, left_out = make_prompts(problems, test_config(data={"max_prompt_tokens": 6}).data, tokenizer)
    assert [p.id for p in prompts] == ["a"] and left_out == 1
    with pytest.raises(UserError, match="all 2 prompts are longer than 3 tokens"):
        make_prompts(problems, test_config(data={"max_prompt_tokens": 3}).data, tokenizer)


def test_a_template_that_the_tokenizer_lacks_is_named(test_config, tokenizer):
    with pytest.raises(UserError, match="chat template"):
        make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chat"}).data, tokenizer)


def test_a_template_that_cannot_render_is_named(test_config, tokenizer):
    broken = copy.deepcopy(tokenizer)
    for content, reason in (("{{ raise_exception('a system turn first') }}", "a system turn first"), ("{% if %}", "")):
        broken.chat_template = content
        with pytest.raises(UserError, match=f"data.template: .* cannot render .*{reason}.*; use another"):
            make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chat"}).data, broken)


def test_chat_templates_write_the_same_day_always(test_config, tokenizer):
    """Llama 3's asks for the day; a run that goes on tomorrow must read today's prompts."""
    dated = copy.deepcopy(tokenizer)
    for content, day in (("{{ strftime_now('%d%m%y') }}", "260724"), ("{{ date_string[:2] }}", "26")):
        dated.chat_template = content
        prompts, _ = make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chat"}).data, dated)
        assert prompts[0].text == day


def test_chatml_needs_its_tokens(test_config, tokenizer):
    with pytest.raises(UserError, match="`chatml` needs a tokenizer with "):
        make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chatml"}).data, tokenizer)


def test_an_empty_prompt_is_named(test_config):
    empty = lambda text, add_special_tokens: {"input_ids": []}  # noqa: E731
    with pytest.raises(UserError, match="problem a gives an empty prompt"):
        make_prompts([Problem("a", "1", "1")], test_config().data, empty)


def test_stop_tokens():
    vocabulary = {"<|im_end|>": 5, "</s>": 7, "x": 1}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=9)
    assert stop_token_ids(tokenizer, [3, 5]) == [3, 5, 7, 9]
    assert stop_token_ids(tokenizer, None) == [5, 7, 9]


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


def test_texts_of_tokens_are_the_completion(tokenizer):
    ids = tokenizer("12+3*(4)")["input_ids"]
    assert token_texts(tokenizer, ids) == list("12+3*(4)") and token_texts(tokenizer, []) == []


def test_a_character_over_several_tokens_is_the_last_ones():
    """A byte-level tokenizer, for which an umlaut is two tokens and an emoji four."""
    byte_level = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    whole = SimpleNamespace(decode=byte_level.decode)
    ids = byte_level.encode("aü 🙂!").ids
    assert token_texts(whole, ids) == ["a", "", "ü", " ", "", "", "", "🙂", "!"]
    assert token_texts(whole, ids[:-2]) == ["a", "", "ü", " ", "", "", "\ufffd"], "cut off inside a character"


def test_texts_of_a_byte_fallback_vocabulary_are_the_completion():
    """Llama's and Gemma's kind: bytes in the vocabulary, a leading space that decoding takes away; any sequence."""
    bytes_of = [f"<0x{i:02X}>" for i in range(256)]
    vocab = {token: i for i, token in enumerate(["<unk>", *bytes_of, "▁", "a", "▁the", "ü", "🙂"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    whole = SimpleNamespace(decode=tokenizer.decode)
    assert token_texts(whole, [vocab[t] for t in ("▁the", "<0xC3>", "<0xBC>", "▁the")]) == ["the", "", "ü", " the"]
    rng = random.Random(0)
    for _ in range(200):
        texts = token_texts(whole, [rng.randrange(len(vocab)) for _ in range(12)])
        assert len(texts) == 12
    valid = [vocab[t] for t in ("a", "▁the", "ü", "🙂", "<0x0A>", "▁")]
    for _ in range(200):
        ids = [rng.choice(valid) for _ in range(12)]
        assert "".join(token_texts(whole, ids)) == tokenizer.decode(ids)


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
