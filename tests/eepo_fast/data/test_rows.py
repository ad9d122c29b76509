"""Files of rows, of every kind and with every mistake, and the problems that rows become."""

import csv
import gzip
import json
import math
import random

import pandas
import pytest

from eepo_fast.config import ColumnsConfig, DataConfig
from eepo_fast.data.problems import find_problems, load_problems
from eepo_fast.types import Problem, UserError

GOOD = {"id": "a", "problem": "1+1?", "answer": "2"}


def write(path, *rows):
    path.write_bytes(b"\n".join(r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows) + b"\n")
    return path


def found(path, columns=None, for_function=False, **data):
    columns = ColumnsConfig(**columns) if columns else ColumnsConfig()
    config = DataConfig(train=str(path), columns=columns, **data)
    return find_problems(config, 0, for_function=for_function)


def test_reads_what_it_should(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, b"", {**GOOD, "id": "b", "problem": "ü?", "level": 3, "source": "s"})
    first, second = found(path).problems
    assert first == Problem("a", "1+1?", "2") and second == Problem("b", "ü?", "2", "s")


ROWS = [{"id": str(i), "problem": f'{i}+1, "so", ü\nis?', "answer": f"0{i}"} for i in range(5)]


def as_csv(path, separator=","):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0].keys(), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "d.jsonl": lambda path: write(path, *ROWS),
    "no suffix": lambda path: write(path, *ROWS),
    "d.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: write(path, *ROWS),
    "array.jsonl": lambda path: path.write_text(json.dumps(ROWS)),
    "d.csv": as_csv,
    "d.tsv": lambda path: as_csv(path, "\t"),
    "d.parquet": lambda path: pandas.DataFrame(ROWS).to_parquet(path),
    "a=b.jsonl": lambda path: write(path, *ROWS),
    "a#b: c.jsonl": lambda path: write(path, *ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_file_gives_the_same_problems(tmp_path, name, zipped):
    """Text stays the text that it is: 03 is no 3."""
    path = tmp_path / name
    WRITERS[name](path)
    if zipped:
        if name == "d.parquet":
            return  # compressed within
        path.with_name(f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = path.with_name(f"{name}.gz")
    assert found(path).problems == [Problem(r["id"], r["problem"], r["answer"]) for r in ROWS]


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train-00000.parquet", "data/train.csv", "any.json"])
def test_folders_of_every_kind(tmp_path, name):
    folder = tmp_path / "set"
    path = folder / name
    path.parent.mkdir(parents=True)
    kind = next(kind for kind in ("jsonl", "json", "csv", "parquet") if f".{kind}" in name)
    plain = tmp_path / f"d.{kind}"
    WRITERS[plain.name](plain)
    path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith(".gz") else plain.read_bytes())
    (folder / "notes.txt").write_text("no data")
    if "any" not in name:
        write(path.parent / "test.jsonl", {**GOOD, "problem": "held out"})
    problems = found(folder).problems
    assert [(p.problem, p.answer) for p in problems] == [(r["problem"], r["answer"]) for r in ROWS]
    assert [p.id for p in problems][:2] == ["row/000000", "row/000001"]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([GOOD, b'{"id": "b", "problem"'], "line 2: not valid JSON"),
        ([GOOD, b"[1]"], "line 2: expected a JSON object, found a list"),
        ([GOOD, b"", GOOD], "line 3: id 'a' was already used in line 1"),
        ([GOOD, b'{"id": "b", "problem": "\xff", "answer": "1"}'], "line 2: not UTF-8"),
        ([{**GOOD, "problem": " "}], "1 of 1 rows cannot be used"),
        ([{"id": "a", "problem": "x"}], "line 1: no column 'answer'; found at that place: id, problem"),
        ([b""], "it is empty"),
        ([b"[" * 100_000], "not valid JSON"),
        ([b"[1, 2]"], "row 0: expected a JSON object, found a int"),
        ([b"no JSON"], "line 1: not valid JSON: .*; expected JSON Lines, a JSON array, .csv"),
        ([{**GOOD, "problem": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, words):
    path = write(tmp_path / "d.jsonl", *rows)
    with pytest.raises(UserError, match=rf"d\.jsonl.*{words}" if "d.jsonl" not in words else words):
        found(path).checked(str(path), 0.01)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("d.csv", b"problem,answer\n1+1,2,3\n", "row 0: more values than the 2 columns"),
        ("d.csv", b"problem,answer\n\xff,2\n", "not UTF-8"),
        ("d.csv", b"problem\n1+1\n", "no column 'answer'; found at that place: problem"),
        ("d.csv", b'problem,answer\n"1+1,2\n2+2,4\n', "not valid CSV: unexpected end of data"),
        ("d.tsv", b'problem\tanswer\n"1+1\t2\n2+2\t4\n', "not valid CSV: unexpected end of data"),
        ("d.csv", b"problem,answer,answer\n1+1,2,3\n", "column 'answer' is there twice"),
        ("d.jsonl.gz", gzip.compress(b'{"problem": "1+1"}\n' * 99, mtime=0)[:20] + b"xxxx" * 9, "is the file whole"),
        ("d.parquet", b"PAR1 and no more", "cannot be read as Parquet"),
        ("d.jsonl.gz", gzip.compress(b'{"problem": "1+1", "answer": "2"}\n' * 9, mtime=0)[:-9], "is the file whole"),
        ("d.jsonl", b"\x1f\x8bno gzip", "is the file whole"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        found(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    for name in ("none.jsonl", "none.parquet", "none.csv.gz", "./none"):
        with pytest.raises(UserError, match=rf"no file .*{name}"):
            load_problems(DataConfig(train=name if name[0] == "." else str(tmp_path / name)), 0)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="no data file in "):
        found(tmp_path / "set")
    (tmp_path / "set" / "notes.txt").write_text("no data")
    with pytest.raises(UserError, match=r"no data file in .*; expected JSON Lines"):
        found(tmp_path / "set")
    with pytest.raises(UserError, match=r"no file d.jsonl in "):
        found(tmp_path / "set", files="d.jsonl")


def test_numbers_and_missing_ids(tmp_path):
    """Ids are made where there are none; those that are there stay, as text."""
    rows = [{"problem": 7, "answer": 2.5}, {**GOOD, "id": 3, "answer": 4}, {**GOOD, "id": None, "answer": True}]
    read = found(write(tmp_path / "d.jsonl", *rows))
    assert [(p.id, p.problem, p.answer) for p in read.problems] == [
        ("row/000000", "7", "2.5"), ("3", "1+1?", "4"), ("row/000002", "1+1?", "True"),
    ]  # fmt: skip
    assert read.checked("d.jsonl", 0.01) == [
        "d.jsonl: 2 rows have no id of their own: they are numbered, from 000000 on"
    ]


def test_columns_and_marker_of_a_file(tmp_path):
    rows = [{"extra": {"question": "2+2?"}, "worked": "it is #### 1,004"}] * 3
    path = write(tmp_path / "d.jsonl", *rows, {"extra": {"question": "?"}, "worked": "nothing ####"})
    columns = {"problem": "extra.question", "answer": "worked"}
    read = found(path, columns, answer_marker="####")
    assert {(p.problem, p.answer) for p in read.problems} == {("2+2?", "1004")}
    line, _ = read.checked("data", 0.5)
    assert line == (
        f"data: 1 of 4 rows cannot be used: left out; the first: {path}, line 4: no answer in 'worked', or no '####' "
        "before one"
    )
    with pytest.raises(UserError, match=r"line 1: no column 'extra\.q'; found at that place: question"):
        found(path, {**columns, "problem": "extra.q"})


def test_a_file_without_the_columns_is_read_by_the_ordinary(tmp_path):
    """As a config for a hub data set is used with a file of one's own."""
    path = write(tmp_path / "d.jsonl", GOOD)
    read = found(path, {"problem": "question"}, answer_marker="####")
    assert [(p.problem, p.answer) for p in read.problems] == [("1+1?", "2")]
    (line,) = read.checked("d", 0.01)
    assert line == f"{path}: no row has a column 'question': read by its columns problem and answer instead"


TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]


def test_conversations_as_peers_have_them(tmp_path):
    """TRL's `prompt`, and verl's Parquet, whose answer is inside a record."""
    rows = [{"prompt": TALK, "reward_model": {"style": "rule", "ground_truth": "2"}}] * 2
    pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    answer = "reward_model.ground_truth"
    (first, _) = found(tmp_path / "d.parquet", {"problem": "prompt", "answer": answer}).problems
    assert first.problem == "1+1?" and first.answer == "2" and [m["content"] for m in first.messages] == [
        "be brief", "1+1?",
    ]  # fmt: skip
    parts = [{"type": "text", "text": "x"}]
    path = write(tmp_path / "d.jsonl", {"prompt": [{"role": "user", "content": parts}], "answer": "1"})
    assert found(path, {"problem": "prompt.0.content"}).problems[0].problem == "x"
    bad = write(tmp_path / "b.jsonl", {"prompt": [{"role": "assistant", "content": "x"}], "answer": "1"})
    assert "the last message is the assistant's" in found(bad, {"problem": "prompt"}).left_out[0]
    image = [{"role": "user", "content": [{"type": "image", "url": "u"}]}]
    bad = write(tmp_path / "c.jsonl", {"prompt": image, "answer": "1"})
    assert "a message with image" in found(bad, {"problem": "prompt"}).left_out[0]


@pytest.mark.parametrize(
    "answer, expected",
    [
        (math.nan, "nan is no number"),
        (math.inf, "inf is no number"),
        (["2", "3"], "2, 3"),
        (["4"], "4"),
        ([], None),
        (None, None),
        ([1, 2], "1, 2"),
        (3.0, "3.0"),
        (10**9, str(10**9)),
        ({"x": 1}, "expected text, a number or a list of them, found dict"),
        ([[1]], "found a list with a list"),
    ],
)
def test_answers_of_other_types(tmp_path, answer, expected):
    read = found(write(tmp_path / "d.jsonl", {**GOOD, "answer": answer}))
    if read.left_out:
        assert (expected or "no answer in 'answer'") in read.left_out[0]
    else:
        assert read.problems[0].answer == expected


def test_the_final_answer_is_what_follows_the_marker(tmp_path):
    marked = ["#### 1,004", "#### -$2,000.50", "#### (1,2)", "#### 12,34", "x #### 1, 2"]
    rows = [{"problem": "p", "answer": answer} for answer in marked]
    answers = [p.answer for p in found(write(tmp_path / "d.jsonl", *rows), answer_marker="####").problems]
    assert answers == ["1004", "-$2000.50", "(1,2)", "12,34", "1, 2"]


def test_more_bad_rows_than_allowed_refuse_the_run(tmp_path):
    def read(good, bad, max_bad):
        rows = [{"problem": "p", "answer": "1"}] * good + [{"problem": "p", "answer": ""}] * bad
        return found(write(tmp_path / "d.jsonl", *rows)).checked("data", max_bad)

    assert "1 of 3 rows" in read(2, 1, 0.01)[0], "one is left out, however few there are"
    assert "2 of 200 rows" in read(198, 2, 0.01)[0]
    for good, bad, max_bad in ((2, 2, 0.01), (197, 3, 0.01), (199, 1, 0.0)):
        with pytest.raises(
            UserError, match=rf"data: {bad} of .* rows cannot be used, .*; repair them, or raise data.max"
        ):
            read(good, bad, max_bad)
    with pytest.raises(UserError, match=r"1 of 1 rows cannot be used, .*; repair them$"):
        read(0, 1, 0.5)


def test_a_function_needs_no_answer_and_sees_the_row(tmp_path):
    path = write(tmp_path / "d.jsonl", {"problem": "p", "tolerance": 0.5}, {"problem": "p", "answer": "1"})
    first, second = found(path, for_function=True).problems
    assert (first.answer, first.columns["tolerance"], second.answer) == ("", 0.5, "1")
    assert not found(path).problems[0].columns, "nobody reads them"


def test_a_hub_data_set_by_columns(tmp_path, monkeypatch):
    """A folder with a card is loaded by the hub's own client, without a network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "some" / "set"
    folder.mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    write(folder / "train.jsonl", {"extra": {"question": "2+2?"}, "worked": "4", "id": 7})
    (problem,) = found(folder, {"problem": "extra.question", "answer": "worked"}, files="train.jsonl").problems
    assert (problem.id, problem.problem, problem.answer) == (f"{folder}/000000", "2+2?", "4")


def test_random_bytes_are_one_line_or_problems(tmp_path):
    rng = random.Random(0)
    pieces = [
        b"{",
        b"}",
        b"[",
        b"]",
        b'"problem"',
        b'"answer"',
        b":",
        b",",
        b"1",
        b"\n",
        b"\xff",
        b"\x1f\x8b",
        b"PAR1",
        b" ",
    ]
    for i in range(300):
        path = tmp_path / rng.choice(["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz", "d"])
        path.write_bytes(b"".join(rng.choices(pieces, k=i % 30)))
        try:
            found(path)
        except UserError as error:
            assert "\n" not in str(error)
