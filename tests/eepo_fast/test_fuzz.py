"""Any bytes as a data file, any words on the command line: problems, a config, or one line that says what is wrong.

500 inputs of each; 10,000 where slow tests run.
"""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eepo_fast.cli import main
from eepo_fast.config import DataConfig, load_config
from eepo_fast.config.schema import ColumnsConfig, Config
from eepo_fast.data.problems import find_problems
from eepo_fast.types import Problem, UserError

FEW, MANY = 500, 10_000
quiet = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
few, many = settings(quiet, max_examples=FEW), settings(quiet, max_examples=MANY)

NAMES = ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "a=b.jsonl", "#1", "d"]
cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
rows = st.dictionaries(st.sampled_from(["id", "problem", "answer", "prompt", "source", "ü"]), cells, max_size=5)
contents = st.one_of(
    st.binary(max_size=200),
    st.lists(rows, max_size=6).map(lambda some: "\n".join(map(json.dumps, some)).encode()),
    st.lists(rows, max_size=6).map(lambda some: json.dumps(some).encode()),
    st.lists(st.lists(st.text(max_size=8), max_size=4), max_size=5).map(
        lambda lines: "\n".join(",".join(line) for line in [["problem", "answer"], *lines]).encode("utf-8", "replace")
    ),
    st.binary(max_size=60).map(lambda tail: b"PAR1" + tail),
    st.binary(max_size=60).map(lambda tail: b"\x1f\x8b" + tail),
)


def one_line(error):
    text = str(error)
    assert text and "\n" not in text.strip(), text


def read_anything(folder, name, content, column, marker, for_function):
    path = folder / name
    path.write_bytes(content)
    config = DataConfig(train=str(path), columns=ColumnsConfig(problem=column), answer_marker=marker)
    try:
        found = find_problems(config, 0, for_function=for_function)
        found.checked(name, 0.5)
        assert all(isinstance(p, Problem) and p.id and p.problem.strip() for p in found.problems)
        assert len({p.id for p in found.problems}) == len(found.problems)
    except UserError as error:
        one_line(error)


files = given(
    st.sampled_from(NAMES), contents, st.sampled_from(["problem", "prompt", "prompt.0.content", "a.b", ""]),
    st.sampled_from(["", "#", "####", "x"]), st.booleans(),
)  # fmt: skip


@few
@files
def test_any_bytes_are_problems_or_one_line(tmp_path_factory, name, content, column, marker, for_function):
    read_anything(tmp_path_factory.getbasetemp(), name, content, column, marker, for_function)


@pytest.mark.slow
@many
@files
def test_many_bytes_are_problems_or_one_line(tmp_path_factory, name, content, column, marker, for_function):
    read_anything(tmp_path_factory.getbasetemp(), name, content, column, marker, for_function)


KEYS = [f"{s}.{k}" for s in Config.model_fields for k in Config.model_fields[s].annotation.model_fields]
words = st.text(max_size=20).filter(lambda text: "\0" not in text)
values = words | st.sampled_from(
    [
        "####",
        "#",
        "007",
        "null",
        "2024-01-01",
        "1e3",
        "nan",
        "[1",
        "{a: b}",
        "yes",
        "*x",
        "&x y",
        "!!python/object:os.system",
        "-",
        "'",
        '"',
    ]
)
overrides = st.lists(
    st.tuples(st.sampled_from(KEYS) | words, values).map("=".join) | words, max_size=4
)  # fmt: skip


def parse_anything(given):
    try:
        config = load_config([], ["model.path=m", "data.train=arithmetic", *given])
        assert config.model_dump()
    except UserError as error:
        one_line(error)


@few
@given(overrides)
def test_any_override_is_a_config_or_one_line(given):
    parse_anything(given)


@pytest.mark.slow
@many
@given(overrides)
def test_many_overrides_are_a_config_or_one_line(given):
    parse_anything(given)


COMMANDS = ["train", "eval", "grade", "tables", "data", "prepare", "checkpoint", "list", "report", "compare", "profile"]
OPTIONS = [
    "--out",
    "--data",
    "--in",
    "--k",
    "--model",
    "--resume",
    "--dry-run",
    "--completions",
    "--n",
    "--seed",
    "--jobs",
]
arguments = st.tuples(
    st.sampled_from(COMMANDS),
    st.lists(words | st.sampled_from(OPTIONS + COMMANDS) | st.sampled_from(["t=none.jsonl", "x=y", "."]), max_size=6),
)


@few
@given(arguments)
def test_any_command_line_ends_in_a_line_or_the_usage(tmp_path_factory, capsys, given):
    """Nothing of what is named is there, so that no command gets to its work."""
    folder = tmp_path_factory.getbasetemp() / "empty"
    folder.mkdir(exist_ok=True)
    before = os.getcwd()
    os.chdir(folder)
    try:
        code = main([given[0], *given[1]])
    except SystemExit as error:  # argparse: a usage, or --help
        code = error.code
    finally:
        os.chdir(before)
    assert code in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["####", "#", "007", "null", "2024-01-01", "1e3", "yes"])
def test_text_keys_keep_what_was_typed(text):
    config = load_config([], ["model.path=m", "data.train=x.jsonl", f"data.answer_marker={text}"])
    assert config.data.answer_marker == text
