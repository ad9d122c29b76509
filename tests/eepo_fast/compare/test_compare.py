"""`eepo-fast compare`: the plan and its mistakes, runs that go on, margins that stay, intervals, and the page."""

import csv
import json
import math
import random
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from eepo_fast.cli import main
from eepo_fast.compare import runs as runs_module
from eepo_fast.compare.numbers import interval, paired, read_results, student_quantile, value_of, verdict
from eepo_fast.compare.plan import Claim, Measure, read_plan, run_config, settings_digest
from eepo_fast.types import UserError

CLAIM = {"says": "no worse", "measure": "test greedy", "method": "eepo", "against": "grpo", "margin": -1.0}


@pytest.fixture
def write_plan(tmp_path, tiny_model, tokenizer):
    """Writes a plan on a tiny model; keys of the plan are replaced by those given."""
    if not (tmp_path / "model").is_dir():
        tiny_model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    base = {
        "model": {"path": str(tmp_path / "model")},
        "data": {"train": "arithmetic", "numbers": 3, "num_rows": 64, "max_prompt_tokens": 32},
        "rollout": {"group_size": 4, "max_new_tokens": 6, "dtype": "float32"},
        "grpo": {"kl_coef": 0.0, "entropy_coef": 0.0},
        "train": {"iterations": 2, "prompts_per_iteration": 4, "prompts_per_update": 4},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 1},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**changes):
        plan = {
            "name": "a plan",
            "base": ["base.yaml"],
            "methods": {
                "grpo": {"overrides": ["eepo.enabled=false"], "about": "one stage"},
                "eepo": {"overrides": ["eepo.alpha=9.0", "eepo.learning_rate=0.05"]},
            },
            "baseline": "grpo",
            "seeds": [3, 4],
            "sets": {"test": "arithmetic:3:9:6"},
            "k": [1, 2],
            "claims": [CLAIM],
            "curves": ["reward/mean", "unlearn/kl"],
        }
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump({**plan, **changes}, sort_keys=False))
        return path

    return write


def complaint(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.slow
def test_a_plan_is_carried_out_and_goes_on(write_plan, tmp_path, capsys):
    """All runs, side by side; a second call has nothing to do; what is removed is done again, to the same numbers."""
    plan, out = write_plan(), tmp_path / "out"
    assert main(["compare", str(plan), "--out", str(out), "--jobs", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 runs to do, 2 at a time" in said and f"page: {out / 'index.html'}" in said
    page, table = (out / "index.html").read_text(), (out / "README.md").read_text()
    for text in (page, table):
        assert "no worse" in text and "Minus grpo" in text and "one stage" in text and "missing" not in text
    assert (out / "curves.png").stat().st_size > 5000 and (out / "report" / "index.html").is_file()
    assert not list(out.glob("runs/*/checkpoints")) and len(list(out.glob("runs/*/rollouts/*"))) == 8
    rows = list(csv.DictReader((out / "measures.csv").open()))
    assert {(r["method"], r["seed"]) for r in rows} == {("grpo", "3"), ("grpo", "4"), ("eepo", "3"), ("eepo", "4")}
    assert {r["measure"] for r in rows} == {"test greedy", "test pass@1", "test pass@2", "entropy"}
    (difference,) = [r for r in csv.DictReader((out / "differences.csv").open()) if r["measure"] == "entropy"]
    values = {(r["method"], r["seed"]): float(r["value"]) for r in rows if r["measure"] == "entropy"}
    expected = sum(values["eepo", s] - values["grpo", s] for s in "34") / 2
    assert float(difference["difference"]) == pytest.approx(expected, rel=1e-4) and difference["pairs"] == "2"

    before = json.loads((out / "results/eepo-4.json").read_text())
    (out / "results/eepo-4.json").unlink()
    shutil.rmtree(out / "runs/eepo-4")
    assert main(["compare", str(plan), "--out", str(out), "--print"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("eepo-fast train ") and "run.name=eepo-4" in line and line.endswith("--resume")
    done = subprocess.run(
        [sys.executable, "-m", "eepo_fast.cli", *shlex.split(line)[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr  # as another machine would
    assert main(["compare", str(plan), "--out", str(out), "--page"]) == 0
    assert "missing" not in (out / "README.md").read_text()
    assert without_times(json.loads((out / "results/eepo-4.json").read_text())) == without_times(before)
    assert main(["compare", str(plan), "--out", str(out)]) == 0 and "0 of 4 runs to do" in capsys.readouterr().out

    changed = write_plan(claims=[{**CLAIM, "margin": -5.0}])
    line = complaint(capsys, changed, "--out", out)
    assert "claims: 'no worse': expected the margin -1, declared 20" in line and "found -5; put it back" in line
    assert "found no such claim" in complaint(capsys, write_plan(claims=[]), "--out", out)
    late = write_plan(claims=[CLAIM, {**CLAIM, "says": "seen first", "margin": 0.0}])
    assert main(["compare", str(late), "--out", str(out), "--page"]) == 0
    text = (out / "README.md").read_text()
    assert "seen first (declared after runs were there)" in text and "no worse (declared" not in text
    assert "after runs were there." in text
    capsys.readouterr()
    other = write_plan(
        overrides=["optimizer.learning_rate=0.002"], claims=[CLAIM, {**CLAIM, "says": "seen first", "margin": 0.0}]
    )
    line = complaint(capsys, other, "--out", out)
    assert "grpo-3.json: its run had other settings than the plan has now" in line


def without_times(result):
    timed = ("time/", "tokens/per", "unlearn/hidden")
    rows = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in result["rows"]]
    return {**result, "rows": rows}


def test_a_run_that_fails_is_named_and_the_others_are_done(write_plan, tmp_path, capsys, monkeypatch):
    plan, out, real = write_plan(seeds=[3]), tmp_path / "out", subprocess.Popen

    def start(process, **options):
        if any("run.name=eepo-3" in part for part in process):
            return real([sys.executable, "-c", "print('disk full'); raise SystemExit(5)"], **options)
        return real(process, **options)

    monkeypatch.setattr(runs_module.subprocess, "Popen", start)
    line = complaint(capsys, plan, "--out", out)
    assert line.startswith("eepo-fast: 1 runs failed: eepo-3") and "a second call goes on" in line
    assert [p.stem for p in (out / "results").glob("*.json")] == ["grpo-3"]
    assert "1 of 2 are missing (eepo-3)" in (out / "README.md").read_text()


@pytest.mark.slow
def test_told_to_leave_it_leaves_nothing_running(write_plan, tmp_path):
    """Its runs are told, too: they save and leave, and go on with the next call."""
    plan, out = write_plan(overrides=["train.iterations=5000"]), tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-m", "eepo_fast.cli", "compare", str(plan), "--out", str(out)])
    metrics, deadline = out / "runs/grpo-3/metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143
    ending = json.loads((out / "runs/grpo-3/ended.json").read_text())
    assert ending["reason"] == "SIGTERM" and not (out / "results").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"baseline": "ppo"}, "baseline: unknown method 'ppo'; known: grpo, eepo"),
        ({"seeds": [1, 2, 1]}, "seeds: 1 is given twice"),
        ({"seeds": []}, "seeds: List should have at least 1 item"),
        ({"sets": {}}, "sets: Dictionary should have at least 1 item"),
        ({"method": {}}, "method: unknown; known at the top: name, about"),
        ({"claims": [{**CLAIM, "method": "x"}]}, "claims: unknown method 'x'"),
        ({"claims": [{**CLAIM, "measure": "x"}]}, "claims: unknown measure 'x'; known: test greedy, test pass@1"),
        ({"claims": [{**CLAIM, "margin": "much"}]}, "claims.0.margin: expected a valid number, found 'much'"),
        ({"measures": {"a": {"percent": True}}}, "measures: a: expected either `metric`, or `set` with `begins_with`"),
        ({"measures": {"a": {"set": "x", "begins_with": "B"}}, "claims": []}, "measures: a: unknown set 'x'"),
        ({"base": ["none.yaml"]}, "no file none.yaml, neither here nor in"),
        ({"overrides": ["eepo.no=1"]}, "config key eepo.no: unknown"),
        ({"methods": {"a": {}}}, "methods: Dictionary should have at least 2 items"),
        ({"methods": {"a b": {}, "grpo": {}}}, "methods: expected names of letters, digits, _ and -, found 'a b'"),
        ({"sets": {"test": "no-such-file.jsonl"}}, "evaluation data test: no file no-such-file.jsonl"),
        ({"overrides": ["train.iterations=null"]}, "expected train.iterations, found none"),
        ({"k": [1, 8], "num_samples": 4}, "evaluation.k: expected at most evaluation.num_samples (4), found 8"),
    ],
)
def test_mistakes_of_a_plan_are_one_line(write_plan, tmp_path, capsys, changes, words):
    """And nothing is written."""
    assert words in complaint(capsys, write_plan(**changes), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_without_answers_is_named(write_plan, tmp_path, capsys):
    (tmp_path / "bare.jsonl").write_text('{"id": "1", "problem": "1+1"}\n')
    line = complaint(capsys, write_plan(sets={"test": str(tmp_path / "bare.jsonl")}), "--out", tmp_path / "out")
    assert "bare.jsonl, line 1: expected a non-empty string in `answer`" in line and not (tmp_path / "out").exists()


def test_files_that_are_no_plan(tmp_path, capsys):
    assert (
        "plan " in complaint(capsys, tmp_path / "none.yaml", "--out", tmp_path)
        and not (tmp_path / "README.md").exists()
    )
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "found a list" in complaint(capsys, tmp_path / "list.yaml", "--out", tmp_path)
    assert "--jobs: expected at least 1, found 0" in complaint(capsys, "x.yaml", "--out", tmp_path, "--jobs", "0")


def result(values, seed=0):
    return {"settings": "", "seed": seed, "rows": [{"step": i + 1, "m": v} for i, v in enumerate(values)]}


def test_measures():
    run = result([0.1, None, 0.3, 0.5])
    assert value_of(run, Measure(metric="m")) == 0.5
    assert value_of(run, Measure(metric="m", last=2, percent=True)) == pytest.approx(40)
    assert value_of(run, Measure(metric="m", last=9)) == pytest.approx(0.3)
    assert value_of(run, Measure(metric="other")) is None


T = [(1, 0.95, 12.7062), (7, 0.95, 2.36462), (15, 0.99, 2.94671), (7, 0.999, 5.4079)]  # of printed tables


@pytest.mark.parametrize("freedom, confidence, expected", T)
def test_quantiles_of_student(freedom, confidence, expected):
    assert student_quantile(freedom, confidence) == pytest.approx(expected, rel=1e-5)


def test_intervals_cover_what_they_should():
    """95% of them, over samples of five; the control: normal ones cover less."""
    rng, ours, normal = random.Random(0), 0, 0
    for _ in range(4000):
        values = [rng.gauss(0, 1) for _ in range(5)]
        found = interval(values)
        ours += found.low < 0 < found.high
        half = (found.high - found.mean) / student_quantile(4, 0.95) * 1.96
        normal += abs(found.mean) < half
    assert abs(ours / 4000 - 0.95) < 0.012 and normal / 4000 < 0.9
    assert interval([1.0]).low == -math.inf


def test_pairs_are_of_one_seed():
    ours, others = {0: result([1.0]), 1: result([5.0]), 2: result([7.0])}, {1: result([4.0]), 0: result([0.5])}
    found = paired(ours, others, Measure(metric="m"))
    assert found.mean == pytest.approx(0.75) and found.count == 2
    assert paired(ours, {9: result([1.0])}, Measure(metric="m")) is None


def test_a_claim_holds_where_its_whole_interval_does(write_plan):
    def found(differences, margin=0.0, claims=1):
        claim = Claim(says="x", measure="m", method="eepo", against="grpo", margin=margin)
        plan = read_plan(write_plan(claims=[])).model_copy(
            update={"measures": {"m": Measure(metric="m")}, "claims": [claim] * claims}
        )
        results = {"eepo": {i: result([d]) for i, d in enumerate(differences)},
                   "grpo": {i: result([0.0]) for i in range(len(differences))}}  # fmt: skip
        return verdict(claim, plan, results)[1:]

    assert found([1.0, 1.1, 0.9]) == ("yes", "yes")
    assert found([1.0, 1.1, 0.9], margin=2.0) == ("no", "no")
    assert found([1.0, -1.0, 0.5]) == ("not shown", "no")
    assert found([1.0, 1.4, 0.8], claims=40) == ("yes", "no"), "of forty claims one holds by chance"
    assert found([1.0]) == ("one pair says nothing", "") and found([]) == ("no pair yet", "")


def test_settings_are_all_that_numbers_depend_on(write_plan, tmp_path):
    plan = read_plan(write_plan())
    one, two = (settings_digest(run_config(plan, "grpo", 3, tmp_path / name)[0]) for name in "ab")
    assert one == two != settings_digest(run_config(plan, "grpo", 4, tmp_path / "a")[0])
    assert one != settings_digest(run_config(plan, "eepo", 3, tmp_path / "a")[0])


def test_beginnings_of_samples_are_counted(write_plan, tmp_path):
    measures = {"P(2)": {"set": "test", "begins_with": "2", "percent": True}}
    plan = read_plan(write_plan(measures=measures, claims=[], seeds=[3]))
    config = run_config(plan, "grpo", 3, tmp_path / "out")[0]
    folder = config.run_dir / "evaluations" / "step_000002"
    folder.mkdir(parents=True)
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    samples = [("2+3", 0), (" 2*3", 1), ("3+2", 0), ("", 1), ("2", None)]  # the last is greedy
    lines = [json.dumps({"completion": text, "sample": sample}) for text, sample in samples]
    (folder / "test.jsonl").write_text("\n".join(lines) + "\n")
    found = runs_module.read_run(config, plan)
    assert value_of(found, plan.all_measures()["P(2)"]) == 50.0 and found["rows"][0] == {"step": 1}


def test_results_are_read_by_method_and_seed(write_plan, tmp_path):
    plan = read_plan(write_plan())
    (tmp_path / "out/results").mkdir(parents=True)
    (tmp_path / "out/results/eepo-4.json").write_text(json.dumps(result([1.0], 4)))
    assert read_results(tmp_path / "out", plan) == {"grpo": {}, "eepo": {4: result([1.0], 4)}}
    with pytest.raises(UserError, match=r"other settings"):
        runs_module.is_done(plan, tmp_path / "out", ("eepo", 4))
