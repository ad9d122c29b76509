"""`eepo-fast eval`, `data prepare` and evaluation while training, as a user calls them."""

import csv
import errno
import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from eepo_fast.cli import main
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.run.evaluate import family_template

ROOT = Path(__file__).parents[3]
PLAIN = ["data.template=plain", "rollout.max_new_tokens=12", "data.numbers=3", "data.max_number=9"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder that answers at random."""
    from eepo_fast.config import load_config
    from eepo_fast.data.base_model import train_base

    folder = tmp_path_factory.mktemp("base")
    model, tokenizer = train_base(load_config([str(ROOT / "configs/demo.yaml")], []).data, steps=25, batch=32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(base, out, *more, data="test=arithmetic:3:9:20"):
    return main(["eval", "--model", str(base), "--data", data, *PLAIN, "--out", str(out), *map(str, more)])


def complaint(capsys):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("eepo-fast: "), error
    return error


def test_an_evaluation_its_tables_and_its_resumption(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(base, out, "--k", "1,2", "--n", "4") == 0
    results = json.loads((out / "results.json").read_text())
    part = results["sets"]["test"]
    assert part["num_problems"] == 20 and part["num_samples"] == 4
    assert set(part["metrics"]) == {"greedy", "pass@1", "pass@2", "unique"}
    rows = rows_of(out / "completions" / "test.jsonl")
    assert len(rows) == 100
    right = sum(row["reward"] for row in rows if row["sample"] is not None) / 80
    assert part["metrics"]["pass@1"]["value"] == pytest.approx(right)
    cell = part["metrics"]["unique"]
    assert cell["low"] <= cell["value"] <= cell["high"]
    table = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert {row["set"] for row in table} == {"test", "average"}
    assert "| greedy pass@1 | " in capsys.readouterr().out and (out / "results.md").is_file()

    whole = {name: (out / name).read_text() for name in ("results.json", "results.csv", "results.md")}
    lines = (out / "completions" / "test.jsonl").read_text().splitlines()
    order = sorted(range(100), key=lambda i: rows[i]["id"])
    (out / "completions" / "test.jsonl").write_text("\n".join(lines[i] for i in order[:48]))  # nine whole, one cut
    assert evaluate(base, out, "--k", "1,2", "--n", "4") == 0
    assert {name: (out / name).read_text() for name in whole} == whole, "the same numbers after an interruption"

    assert evaluate(base, out, "--k", "1,2", "--n", "4", "--seed", "1") == 2
    assert "holds another evaluation: seed is 1 here and 0 there" in complaint(capsys)
    assert evaluate(base, out, "--k", "1,2", "--n", "4", "data.template=question_answer") == 2
    assert "holds another evaluation: template is 'question_answer' here and 'plain' there" in complaint(capsys)
    spelt = f"{base.parent}/./{base.name}/"
    assert evaluate(spelt, out, "--k", "1,2", "--num-samples", "4") == 0, "the same, however it is spelt"


def test_a_chat_template_that_has_changed_is_another_evaluation(base, tmp_path, capsys):
    model = shutil.copytree(base, tmp_path / "m")
    for content in ("{{ messages[0].content[:7] }}", "{{ messages[0].content[:5] }}"):
        (model / "chat_template.jinja").write_text(content)
        code = evaluate(model, tmp_path / "o", "data.template=chat")
    assert code == 2 and "holds another evaluation: prompts is {'test': " in complaint(capsys)


def test_the_procedural_task_is_asked_as_it_is_taught(base, tmp_path):
    """A tokenizer of 18 characters has no letters: question and answer would be the guess, and score 0."""
    data = ["t=arithmetic:3:9:5", f"a={problems(tmp_path / 'a.jsonl', '1')}"]
    short = ["rollout.max_new_tokens=4"]
    assert main(["eval", "--model", str(base), "--data", *data, *short, "--out", str(tmp_path / "o")]) == 0
    settings = json.loads((tmp_path / "o/evaluation.json").read_text())
    assert settings["template"] == "plain, question_answer"
    for more in (["data.template=plain"], []):
        out = tmp_path / f"p{len(more)}"
        assert main(["eval", "--model", str(base), "--data", data[0], *short, *more, "--out", str(out)]) == 0
    given, guessed = ((tmp_path / f"p{n}/evaluation.json").read_text() for n in (1, 0))
    assert given == guessed


def test_the_base_of_the_task_is_told_which_task(tmp_path, capsys):
    data = ["--data", "t=arithmetic:3:9:5", "--out", str(tmp_path / "o")]
    assert main(["eval", "--model", "arithmetic-base", *data, "data.numbers=3"]) == 2
    assert "--model: arithmetic-base is taught one task, and data.max_number is not given" in complaint(capsys)


def test_chatml_is_guessed_where_the_tokenizer_has_it(tokenizer):
    model = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
    assert family_template(model, tokenizer) == "question_answer"
    tokenizer = SimpleNamespace(get_vocab=lambda: {"<|im_start|>": 1}, chat_template="x")
    assert family_template(model, tokenizer) == "chatml"


def test_temperatures_that_vllm_does_not_have(base, tmp_path, capsys):
    more = ["--n", "2", "--k", "2", "--temperature", "0.001", "rollout.engine=vllm"]
    assert evaluate(base, tmp_path / "o", *more) == 2
    assert "--temperature: expected at least 0.01 with rollout.engine=vllm" in complaint(capsys)


def test_progress_is_told_inside_a_part(base, tmp_path, monkeypatch):
    told = []

    @contextmanager
    def task(self, name):
        yield lambda *update: told.append(update)

    monkeypatch.setattr("eepo_fast.run.display.Display.task", task)
    assert evaluate(base, tmp_path / "o") == 0
    assert told[0] == (0, 20, "0 of 20 problems") and told[-1] == (20, 20, "20 of 20 problems")
    assert (0, 20, "sampling, 20 of 20 completions finished") in told


@pytest.mark.parametrize("where", ["completions/test.jsonl", "results.csv"])
def test_what_cannot_be_written_is_one_line(base, tmp_path, capsys, where):
    (tmp_path / "o" / where).mkdir(parents=True)
    assert evaluate(base, tmp_path / "o") == 2
    assert f"--out: {tmp_path / 'o' / where} cannot be written: Is a directory; " in complaint(capsys)


def test_a_full_disk_is_one_line(base, tmp_path, capsys, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert evaluate(base, tmp_path / "o") == 2
    assert f"--out: {tmp_path / 'o'} cannot be written: No space left on device" in complaint(capsys)


def test_grading_is_set_by_mode_or_by_its_key(base, tmp_path):
    for more, expected in (([], "strict"), (["reward.mode=paper"], "paper"), (["--mode", "paper"], "paper")):
        out = tmp_path / f"{len(more)}{expected}"
        assert evaluate(base, out, *more) == 0
        assert json.loads((out / "evaluation.json").read_text())["grading"] == expected


def test_greedy_alone_is_the_default(base, tmp_path):
    assert evaluate(base, tmp_path / "o") == 0
    part = json.loads((tmp_path / "o" / "results.json").read_text())["sets"]["test"]
    assert set(part["metrics"]) == {"greedy"} and part["num_samples"] == 0


def test_a_run_its_evaluations_and_a_checkpoint(base, tmp_path, capsys):
    overrides = [
        f"model.path={base}", f"run.root={tmp_path}", "run.name=r", "train.iterations=3", "data.num_rows=64",
        "train.prompts_per_iteration=4", "train.prompts_per_update=4", "rollout.group_size=4", "checkpoint.every=1",
        "checkpoint.keep=9",
        "eepo.alpha=9",  # every token may be forgotten
        "evaluation.every=2", "evaluation.data.test=arithmetic:3:9:20", "evaluation.k=[1,2]",
    ]  # fmt: skip
    assert main(["train", str(ROOT / "configs/demo.yaml"), *overrides]) == 0
    run = tmp_path / "r"
    rows = rows_of(run / "metrics.jsonl")
    assert ["eval/test/greedy" in row for row in rows] == [False, True, True], "every second, and after the last"
    assert sorted(p.name for p in (run / "evaluations").iterdir()) == ["step_000002", "step_000003"]
    assert not any(row["unlearn/skipped"] for row in rows), "there were forgetful weights"
    kept = rows_of(run / "evaluations" / "step_000003" / "test.jsonl")
    assert len(kept) == 60
    capsys.readouterr()
    assert main(["tables", *(str(run / f"evaluations/step_00000{k}") for k in (2, 3)), "--metric", "pass@2"]) == 0
    assert "| r, step 2 | " in capsys.readouterr().out
    assert "grading strict" in (run / "evaluations/step_000003/results.md").read_text()
    # what the policy answered, not the forgetful engine: a fresh evaluation of its checkpoint says the same
    assert main(["eval", "--model", str(run), "--data", "test=arithmetic:3:9:20", "--k", "1,2", "--out",
                 str(tmp_path / "o")]) == 0  # fmt: skip
    fresh = rows_of(tmp_path / "o" / "completions" / "test.jsonl")
    assert [row["completion"] for row in fresh] == [row["completion"] for row in kept]
    settings = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert settings["run"] == "r" and settings["step"] == 3 and settings["max_new_tokens"] == 20
    # an interrupted evaluation goes on with its completions, but not where the set has changed since
    last = run / "evaluations" / "step_000003"
    sets = json.loads((last / "sets.json").read_text())
    changed = json.dumps({**kept[0], "completion": "1"}) + "\n" + "".join(json.dumps(r) + "\n" for r in kept[1:])
    for digest, first in ((sets["test"], "1"), ("another", kept[0]["completion"])):
        (last / "results.json").unlink()
        (last / "test.jsonl").write_text(changed)
        (last / "sets.json").write_text(json.dumps({"test": digest}))
        assert main(["train", str(ROOT / "configs/demo.yaml"), *overrides, "--resume"]) == 0
        assert rows_of(last / "test.jsonl")[0]["completion"] == first != ""
        assert json.loads((last / "sets.json").read_text()) == sets
    capsys.readouterr()
    assert main(["eval", "--model", str(run), "--data", "t=arithmetic", "--out", str(run)]) == 2
    assert f"--out: {run} is the folder of a run" in complaint(capsys) and not (run / "evaluation.json").exists()
    older = run / "checkpoints" / "step_000002"
    assert main(["eval", "--model", str(older), "--data", "test=arithmetic:3:9:20", "--out", str(tmp_path / "p")]) == 0
    assert json.loads((tmp_path / "p" / "evaluation.json").read_text())["step"] == 2
    (older / "model" / "config.json").write_text("{}")
    capsys.readouterr()
    assert main(["eval", "--model", str(older), "--data", "t=arithmetic", "--out", str(tmp_path / "q")]) == 2
    assert "is damaged" in complaint(capsys)


def problems(path, *answers, ids=None):
    rows = [{"id": f"p{i}", "problem": "?", "answer": a} for i, a in enumerate(answers)]
    for row, name in zip(rows, ids or [], strict=False):
        row["id"] = name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def responses(path, *pairs):
    path.write_text("".join(json.dumps({"id": i, "response": r}) + "\n" for i, r in pairs))
    return path


def grade(file, data, out, *more):
    return main(["eval", "--completions", str(file), "--data", *data, "--out", str(out), *more])


def test_completions_made_elsewhere(tmp_path):
    data = problems(tmp_path / "a.jsonl", "\\frac{1}{2}", "12")
    pairs = [("p0", "\\boxed{0.5}"), ("p1", "so \\boxed{12}"), ("p0", "the answer is 2"), ("p1", "\\boxed{12.0}")]
    file = responses(tmp_path / "r.jsonl", *pairs)
    assert grade(file, [f"a={data}"], tmp_path / "o", "--k", "1,2") == 0
    metrics = json.loads((tmp_path / "o" / "results.json").read_text())["sets"]["a"]["metrics"]
    assert metrics["pass@1"]["value"] == 0.75 and metrics["pass@2"]["value"] == 1.0
    assert len(rows_of(tmp_path / "o" / "completions" / "a.jsonl")) == 4


def test_numbers_and_rows_that_cannot_be_graded(tmp_path, capsys):
    """Ids and answers may be numbers; a row whose gold nobody can read is left out, and said."""
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps({"id": i, "response": r}) + "\n" for i, r in ((0, 5), (1, "7"), (2, "x"))))
    data = tmp_path / "a.jsonl"
    rows = [
        {"id": 0, "q": "2+3", "gold": 5},
        {"id": 1, "q": "3+3", "gold": 6},
        {"id": 2, "q": "?", "gold": "\\frac{1}{"},
    ]
    for names in (("q", "gold"), ("problem", "answer")):
        named = [{"id": r["id"], names[0]: r["q"], names[1]: r["gold"]} for r in rows]
        data.write_text("".join(json.dumps(row) + "\n" for row in named))
        if names[0] == "q":
            assert grade(file, [f"a={data}"], tmp_path / "o") == 2
            assert "line 1: no column 'problem'; found at that place: id, q, gold" in complaint(capsys)
    assert grade(file, [f"a={data}"], tmp_path / "o") == 0
    assert "evaluation data a: 1 of 3 rows cannot be used: left out; the first: 2: the" in capsys.readouterr().out
    assert json.loads((tmp_path / "o/results.json").read_text())["sets"]["a"]["metrics"]["pass@1"]["value"] == 0.5


@pytest.mark.slow
def test_completions_of_our_own_are_graded_again(tmp_path, capsys):
    """As what they were: a greedy one is no sample."""
    data, file = problems(tmp_path / "a.jsonl", "1", "2"), tmp_path / "r.jsonl"
    rows = [
        {"id": f"p{i}", "sample": k, "completion": text, "status": "ok"}
        for i, texts in enumerate((["1", "3", "1"], ["3", "2", "2"]))
        for k, text in zip((None, 0, 1), texts, strict=True)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert grade(file, [f"a={data}"], tmp_path / "o", "--k", "1,2") == 0
    metrics = json.loads((tmp_path / "o/results.json").read_text())["sets"]["a"]["metrics"]
    found = {name: cell["value"] for name, cell in metrics.items()}
    assert found == {"greedy": 0.5, "pass@1": 0.75, "pass@2": 1.0, "unique": 0.75}
    assert grade(tmp_path / "o/completions/a.jsonl", [f"a={data}"], tmp_path / "p", "--k", "1,2") == 0
    assert json.loads((tmp_path / "p/results.json").read_text())["sets"]["a"]["metrics"] == metrics
    capsys.readouterr()
    for more, message in ((["--k", "3"], "expected at most the 2"), ([], "expected one greedy completion of 'p0'")):
        assert grade(file, [f"a={data}"], tmp_path / "q", *more) == 2
        assert message in complaint(capsys)
        file.write_text("".join(json.dumps({**row, "sample": None}) + "\n" for row in rows))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows if row["sample"] is None))
    assert grade(file, [f"a={data}"], tmp_path / "r") == 0, "greedy ones alone"
    assert set(json.loads((tmp_path / "r/results.json").read_text())["average"]) == {"greedy"}


def evaluated(folder, model, values, **settings):
    """The results.json of an evaluation; values: of greedy, by set."""
    from eepo_fast.evaluation.tables import make_results, write_results

    rows = {
        name: [
            {"id": f"{name}{i}", "sample": sample, "completion": "", "num_tokens": 3, "finished": True, "status": "ok",
             "reward": float(i < value)}
            for i in range(8)
            for sample in (None, 0)
        ]
        for name, value in values.items()
    }  # fmt: skip
    data = {name: 64 * "0" for name in values}
    write_results(folder, make_results(model, {"data": data, "grading": "strict", **settings}, rows, [1]))
    return folder


def test_evaluations_side_by_side(tmp_path, capsys):
    first = evaluated(tmp_path / "a", "base", {"math500": 2, "amc23": 4})
    second = evaluated(tmp_path / "b", "eepo", {"amc23": 6, "math500": 3}, step=50)
    assert main(["tables", str(first), str(second)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| greedy pass@1, percent | math500 | amc23 | average |",
        "| --- | ---: | ---: | ---: |",
        "| base | 25.0 | 50.0 | 37.5 |",
        "| eepo, step 50 | 37.5 | 75.0 | 56.2 |",
    ]
    text = (second / "results.md").read_text()
    assert "| mean length of all completions, tokens | 3 | 3 | |" in text and "| cut off, of all completions |" in text
    assert ",length," in (second / "results.csv").read_text()
    assert main(["tables", str(first), str(second), "--format", "csv"]) == 0
    assert list(csv.reader(capsys.readouterr().out.splitlines())) == [
        ["greedy", "math500", "amc23", "average"], ["base", "0.25", "0.5", "0.375"],
        ["eepo, step 50", "0.375", "0.75", "0.5625"],
    ]  # fmt: skip
    assert main(["tables", str(first), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"model": "base", "greedy": {"math500": 0.25, "amc23": 0.5, "average": 0.375}}
    ]
    same = evaluated(tmp_path / "c", "base", {"math500": 8, "amc23": 8})
    assert main(["tables", str(first), str(same)]) == 0 and f"| base ({same}) | 100.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, settings, more, message",
    [
        ({"a": 1}, {"data": {"a": 64 * "1"}}, [], "cannot be compared: expected the same data, found {'a': '111111111"),
        ({"b": 1}, {}, [], "expected the same data, found {'b'"),
        ({"a": 1}, {"grading": "paper"}, [], "expected the same grading, found paper and strict"),
        ({"a": 1}, {"temperature": 0.6}, ["--metric", "pass@1"], "expected the same temperature, found 0.6 and 1.0"),
        ({"a": 1}, {}, ["--metric", "pass@8"], "--metric: "),
        (None, {}, [], "results.json cannot be read: No such file"),
        ({"a": 1}, {"data": None}, [], "is not the results of `eepo-fast eval`"),
    ],
)
def test_evaluations_that_cannot_be_compared(tmp_path, capsys, values, settings, more, message):
    first = evaluated(tmp_path / "a", "base", {"a": 2}, temperature=1.0)
    second = evaluated(tmp_path / "b", "eepo", values, **settings) if values else tmp_path / "none"
    assert main(["tables", str(first), str(second), *more]) == 2
    assert message in complaint(capsys)


@pytest.mark.parametrize(
    "pairs, more, message",
    [
        ([("p0", "1"), ("p1", "2")], ["--k", "2"], "--k: expected at most the 1 responses a problem"),
        ([("p0", "1")], [], "expected 1 responses to every problem of a, 0 of them greedy, found 0 and 0 to 'p1'"),
        ([("p0", "1"), ("p1", "2"), ("x", "3")], [], "id 'x' is in none of the sets"),
        ([], [], "found an empty file"),
        ([("p0", "\ud83d"), ("p1", "2")], [], "line 1: `response` holds half of a surrogate pair"),
        ([("p0", [3]), ("p1", "2")], [], "line 1: expected a string in `response`, found [3]"),
        ([("p0", "1"), ("p1", "2")], ["--k", "0"], "--k: expected whole numbers up to 100000 such as 1,8,32, found"),
        ([("p0", "1"), ("p1", "2")], ["--k", "100000000000"], "such as 1,8,32, found '100000000000'"),
        ([("p0", "1"), ("p1", "2")], ["--n", "1"], "--completions are sampled already: expected no --num-samples"),
        ([("p0", "1"), ("p1", "2")], ["--temperature", "1"], "expected no --temperature"),
        ([("p0", "1"), ("p1", "2")], ["--seed", "0"], "expected no --seed"),
    ],
)
def test_completions_that_do_not_fit(tmp_path, capsys, pairs, more, message):
    data, file = problems(tmp_path / "a.jsonl", "1", "2"), responses(tmp_path / "r.jsonl", *pairs)
    assert grade(file, [f"a={data}"], tmp_path / "o", *more) == 2
    assert message in complaint(capsys) and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "evaluation data a: expected problems, found none: it is empty"),
        (problems, "id 'same' was already used in line 1"),
        ("id,problem,answer", "line 1: not valid JSON: Expecting value: line 1 column 1 (char 0); expected JSON Lines"),
        (
            "\\frac{1}{",
            "1 of 1 rows cannot be used, and data.max_bad allows 1%; the first: p0: the answer '\\\\frac{1}{'",
        ),
    ],
)
def test_data_that_cannot_be_used(base, tmp_path, capsys, content, message):
    file = tmp_path / "a.jsonl"
    if content in ("", "id,problem,answer"):
        file.write_text(content)
    elif content is problems:
        problems(file, "1", "2", ids=["same", "same"])
    else:
        problems(file, content)
    assert evaluate(base, tmp_path / "o", data=f"a={file}") == 2
    assert message in complaint(capsys) and not (tmp_path / "o").exists()
    out, keys = tmp_path / "runs", [f"model.path={base}", "evaluation.every=1", f"evaluation.data.a={file}"]
    assert main(["train", str(ROOT / "configs/demo.yaml"), f"run.root={out}", *keys]) == 2
    assert message in complaint(capsys) and not out.exists()
    assert main(["train", str(ROOT / "configs/demo.yaml"), f"run.root={out}", f"data.train={file}", keys[0]]) == 2
    assert message.removeprefix("evaluation data a: ") in complaint(capsys) and not out.exists()


def test_no_sets_are_named_before_anything_is_sampled(base, tmp_path, capsys):
    assert evaluate(base, tmp_path / "o", data="data.numbers=3") == 2
    assert "--data: expected NAME=FILE.jsonl, such as math500=math500.jsonl, found none" in complaint(capsys)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--k", "1,8", "--n", "4"], "--k: expected at most the 4 samples of --n, found 8"),
        (["--n", "-1"], "--n: expected 0 to 100000 samples, found -1"),
        (["--n", "100001"], "--n: expected 0 to 100000 samples, found 100001"),
        (["model.path=other"], "override 'model.path=other': eval does not take this key; use --model"),
        (["data.train=other"], "use --data"),
        (["rollout.temperature=0.5"], "use --temperature"),
        (["--data", "math500.jsonl"], "--data: expected NAME=FILE.jsonl, such as math500=math500.jsonl, found 'math5"),
        (["--temperature", "nan"], "--temperature: expected a positive number, found nan"),
        (["--data", "a|b=arithmetic"], "a name has letters, digits, _ and -"),
        (["--data", "average=arithmetic"], "is not `average`"),
        (["data.template=chat"], "`chat` needs a tokenizer with a chat template"),
        (["train.iterations=3"], "eval takes keys of model, data, rollout, reward"),
        (["--data", "test=arithmetic"], "--data: test is given twice"),
        (["--data", "b=arithmetic:1:3:20"], "evaluation data b: 20 different problems were asked for, but 1 numbers"),
        (["--data", "b=arithmetic:3"], "expected arithmetic or arithmetic:NUMBERS:MAX_NUMBER[:ROWS]"),
        (["--data", "b=org/name"], "no file org/name, and no prepared data of that name"),
    ],
)
def test_settings_that_cannot_be(base, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate(base, tmp_path / "o", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o" / "completions" / "test.jsonl").exists()


CARD = "---\nlicense: mit\n---\n# A data set\n"


def test_data_is_prepared_pinned_and_found_again(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "README.md").write_text(CARD)
    rows = [{"question": f"q{i}", "answer": f"work #### {i}"} for i in range(3)]
    (source / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["data", "prepare", f"small={source}", "data.columns={problem: question, answer: answer}",
               "data.answer_marker='####'"]  # fmt: skip
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "3 rows" in said and "licence, as its card states it: mit" in said and "sha256: " in said
    assert [row["answer"] for row in rows_of(tmp_path / "data/small.jsonl")] == ["0", "1", "2"]
    manifest = json.loads((tmp_path / "data/small.manifest.json").read_text())
    assert manifest["licence"] == "mit" and manifest["rows"] == 3 and manifest["sha256"] in said
    assert main([*command, "data.template=chat"]) == 2
    assert (
        "expected keys of data.columns, data.files, data.answer_marker or data.max_bad, found 'data.temp"
        in complaint(capsys)
    )
    before = (tmp_path / "data/small.jsonl").read_bytes()
    assert main(command) == 0 and (tmp_path / "data/small.jsonl").read_bytes() == before

    pairs = [(f"small/{i:06d}", f"\\boxed{{{i}}}") for i in range(3)]
    file = responses(tmp_path / "r.jsonl", *pairs)
    assert grade(file, [f"s={source}"], tmp_path / "o") == 0, "by the name it was prepared from"
    assert json.loads((tmp_path / "o/results.json").read_text())["average"]["pass@1"]["value"] == 1.0

    (tmp_path / "data/small.jsonl").write_text(before.decode().replace('"2"', '"3"'))
    capsys.readouterr()
    assert grade(file, [f"s={source}"], tmp_path / "p") == 2 and "expected sha256" in complaint(capsys)

    rows[0]["answer"] = "#### 9"
    (source / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert main(command) == 2 and "gives other rows than when" in capsys.readouterr().err


def test_a_folder_of_other_things_is_refused(base, tmp_path, capsys):
    for content in ("", "[1]", "{"):
        (tmp_path / "evaluation.json").write_text(content)
        assert evaluate(base, tmp_path) == 2
        assert "is not the settings of an evaluation" in complaint(capsys)


def test_a_name_is_prepared_anew_from_ones_own_files(tmp_path, capsys):
    """Of whatever kind they are; what came from the hub is not replaced."""
    row, out = {"problem": "1+1", "answer": "2"}, tmp_path / "data"
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "b.csv").write_text("problem,answer\n1+1,2\n")
    for name in ("a.jsonl", "b.csv"):
        assert main(["data", "prepare", f"x={tmp_path / name}", "--out", str(out)]) == 0
    assert "prepared anew, from " in capsys.readouterr().out
    assert json.loads((out / "x.jsonl").read_text())["source"].endswith("b.csv@local")
    manifest = json.loads((out / "x.manifest.json").read_text())
    (out / "x.manifest.json").write_text(json.dumps({**manifest, "source": "org/name", "revision": "abc"}))
    assert main(["data", "prepare", f"x={tmp_path / 'b.csv'}", "--out", str(out)]) == 2
    assert "x was prepared from org/name, not from" in complaint(capsys)


def test_which_of_two_prepared_sets_is_meant(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text(json.dumps({"problem": split, "answer": "1"}) + "\n")
    for name, split in (("a", "train"), ("b", "test")):
        assert main(["data", "prepare", f"{name}={source}", "--split", split]) == 0
    file = responses(tmp_path / "r.jsonl", ("b/000000", "1"))
    assert grade(file, [f"b={source}"], tmp_path / "o") == 0, "the one of that name"
    capsys.readouterr()
    assert grade(file, [f"c={source}"], tmp_path / "p") == 2
    assert "is prepared as a (split train), b (split test)" in complaint(capsys)
    Path("data/b.manifest.json").rename("data/b.json")
    assert grade(file, [f"c={source}"], tmp_path / "q") == 2
    assert "c: " in (message := complaint(capsys)) and "is prepared as a, of split train; use that name" in message
    Path("data/b.json").rename("data/b.manifest.json")
    Path("data/foreign.manifest.json").write_text("{}")
    assert grade(file, [f"b={source}"], tmp_path / "o") == 0, "another program's file is passed over"
    Path("data/b.manifest.json").write_text("{")
    capsys.readouterr()
    assert grade(file, [f"b={source}"], tmp_path / "o") == 2
    assert "b.manifest.json: not a manifest of `eepo-fast data prepare`" in complaint(capsys)
    assert main(["data", "prepare", f"a={source}", "--split", "none"]) == 2
    assert f"data prepare: {source} has no split none, found train, test" in capsys.readouterr().err
    assert main(["data", "prepare", f"a={source}", "--revision", "abc"]) == 2
    assert "--revision: expected none for " in complaint(capsys)
    (tmp_path / "file").write_text("")
    assert main(["data", "prepare", f"a={source}", "--out", "file/x"]) == 2 and "cannot be written" in complaint(capsys)


def test_the_engine_is_given_the_weights_before_it_samples(base, tmp_path, monkeypatch):
    """An engine that starts empty, as vLLM does, refuses to sample."""
    calls = []
    for name in ("sync", "generate"):
        original = getattr(HfEngine, name)

        def noted(self, *args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(HfEngine, name, noted)
    assert evaluate(base, tmp_path / "o") == 0
    assert calls[0] == "sync" and calls.count("generate") == 2, "the trial's, and the evaluation's"
