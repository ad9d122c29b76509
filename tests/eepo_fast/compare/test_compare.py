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
from functools import partial

import pytest
import yaml

from eepo_fast.cli import main
from eepo_fast.compare import runs as runs_module
from eepo_fast.compare.numbers import interval, paired, read_results, student_quantile, value_of, verdict
from eepo_fast.compare.plan import Claim, Measure, read_plan, run_config
from eepo_fast.config import dump_config, make_config
from eepo_fast.config.files import read_override
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
        assert "no worse" in text and "Minus grpo" in text and "one stage" in text
        assert "missing" not in text.rpartition("</style>")[2]
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

    other = write_plan(overrides=["optimizer.learning_rate=0.002"])
    assert "grpo-3.json: its run had another optimizer.learning_rate than the plan" in complaint(
        capsys, other, "--out", out
    )


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
        ({"base": ["none.yaml"]}, "no file none.yaml, neither in"),
        ({"overrides": ["eepo.no=1"]}, "config key eepo.no: unknown"),
        ({"methods": {"a": {}}}, "methods: Dictionary should have at least 2 items"),
        ({"methods": {"a b": {}, "grpo": {}}}, "methods: expected names of letters, digits, _ and -, found 'a b'"),
        ({"sets": {"test": "no-such-file.jsonl"}}, "evaluation data test: no file no-such-file.jsonl"),
        ({"overrides": ["train.iterations=null"]}, "expected train.iterations, found none"),
        (
            {"overrides": ["run.seed=7"]},
            "overrides: found 'run.seed=7': seeds, sets, k, num_samples and every say that",
        ),
        ({"claims": [{**CLAIM, "margin": math.nan}]}, "claims.0.margin: expected a finite number"),
        ({"seeds": [1, -2]}, "run.seed: expected greater than or equal to 0, found -2"),
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
    assert "bare.jsonl, line 1: no column 'answer'" in line and not (tmp_path / "out").exists()


def test_files_that_are_no_plan(tmp_path, capsys):
    assert (
        "plan " in complaint(capsys, tmp_path / "none.yaml", "--out", tmp_path)
        and not (tmp_path / "README.md").exists()
    )
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "found a list" in complaint(capsys, tmp_path / "list.yaml", "--out", tmp_path)
    assert "--jobs: expected at least 1, found 0" in complaint(capsys, "x.yaml", "--out", tmp_path, "--jobs", "0")


def result(values):
    return {"rows": [{"step": i + 1, "m": v} for i, v in enumerate(values)]}


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


M = partial(value_of, measure=Measure(metric="m"))


def test_pairs_are_of_one_seed():
    ours, others = {0: result([1.0]), 1: result([5.0]), 2: result([7.0])}, {1: result([4.0]), 0: result([0.5])}
    found = paired(ours, others, M)
    assert found.mean == pytest.approx(0.75) and found.num_values == 2
    assert paired(ours, {9: result([1.0])}, M) is None


def test_a_claim_holds_where_its_whole_interval_does(write_plan):
    def found(differences, margin=0.0, claims=1):
        claim = Claim(says="x", measure="m", method="eepo", against="grpo", margin=margin)
        plan = read_plan(write_plan(claims=[])).model_copy(
            update={"measures": {"m": Measure(metric="m")}, "claims": [claim] * claims}
        )
        results = {"eepo": {i: result([d]) for i, d in enumerate(differences)},
                   "grpo": {i: result([0.0]) for i in range(len(differences))}}  # fmt: skip
        return verdict(claim, plan, results, 1)[1:]

    assert found([1.0, 1.1, 0.9]) == ("yes", "yes")
    assert found([1.0, 1.1, 0.9], margin=2.0) == ("no", "no")
    assert found([1.0, -1.0, 0.5]) == ("not shown", "not shown")
    assert found([1.0, 1.4, 0.8], claims=40) == ("yes", "not shown"), "of forty claims one holds by chance"
    assert found([1.0]) == ("one pair says nothing", "") and found([]) == ("no pair yet", "")


def test_settings_are_all_that_numbers_depend_on(write_plan, tmp_path):
    plan = read_plan(write_plan())
    config = run_config(plan, "grpo", 3, tmp_path / "a")[0]
    saved = json.loads(json.dumps(config.model_dump(mode="json")))
    assert runs_module.differing(saved, run_config(plan, "grpo", 3, tmp_path / "b")[0]) == []
    assert runs_module.differing(saved, run_config(plan, "grpo", 4, tmp_path / "a")[0]) == ["run.name", "run.seed"]
    for override, key in (
        ("optimizer.learning_rate=1", "optimizer.learning_rate"), ("train.iterations=3", "train.iterations"),
        ("grpo.ratio=policy", "grpo.ratio"), ("checkpoint.every=5", None), ("log.rollouts=false", None),
        ("run.timeout_s=9", None), ("train.micro_batch_tokens=9", None),
    ):  # fmt: skip
        if override.startswith("run."):
            other = config.model_copy(update={"run": config.run.model_copy(update={"timeout_s": 9.0})})
        else:
            other = run_config(read_plan(write_plan(overrides=[override])), "grpo", 3, tmp_path / "a")[0]
        assert runs_module.differing(saved, other) == ([key] if key else []), override
    del saved["grpo"]["ratio"]  # as an older version wrote it, which had no such key
    assert runs_module.differing(saved, config) == []


def test_a_set_whose_problems_have_changed_is_noticed(write_plan, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "1", "problem": "1+1", "answer": "2"}\n')
    plan, out = read_plan(write_plan(sets={"test": str(rows)}, claims=[])), tmp_path / "out"
    finished(plan, out, "grpo", 3)
    runs_module.take_up(plan, out, ("grpo", 3))
    assert runs_module.is_done(plan, out, ("grpo", 3))
    rows.write_text('{"id": "1", "problem": "1+2", "answer": "3"}\n')
    with pytest.raises(UserError, match=r"another evaluation set test \(its problems\)"):
        runs_module.is_done(plan, out, ("grpo", 3))


def finished(plan, out, method, seed, *, overrides=(), steps=(1, 2)):
    """A run's folder as it is when it has ended, without its having run."""
    config = run_config(plan, method, seed, out)[0]
    config.run_dir.mkdir(parents=True)
    changed = make_config(config.model_dump(), *map(read_override, overrides))
    (config.run_dir / "config.yaml").write_text(dump_config(changed))
    lines = [json.dumps({"step": s, "eval/test/greedy": 0.5 + seed / 100, "entropy/policy": 1.0}) for s in steps]
    (config.run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (config.run_dir / "ended.json").write_text(json.dumps({"reason": "finished"}))
    return config.run_dir


def test_runs_of_other_settings_are_not_taken_up(write_plan, tmp_path, capsys):
    path, out = write_plan(seeds=[3]), tmp_path / "out"
    plan = read_plan(path)
    finished(plan, out, "grpo", 3)
    finished(plan, out, "eepo", 3, overrides=["eepo.learning_rate=0.9"])
    line = complaint(capsys, path, "--out", out, "--page")
    assert "eepo-3: its run had another eepo.learning_rate than the plan has now" in line
    assert [p.stem for p in (out / "results").glob("*")] == ["grpo-3"]


def test_a_folder_in_which_two_have_trained_is_refused(write_plan, tmp_path, capsys):
    path, out = write_plan(seeds=[3]), tmp_path / "out"
    finished(read_plan(path), out, "grpo", 3, steps=(1, 1, 2, 2))
    assert "expected every iteration once and in order" in complaint(capsys, path, "--out", out, "--page")


def test_a_second_comparison_in_one_folder_is_refused(write_plan, tmp_path, capsys):
    path, out = write_plan(), tmp_path / "out"
    out.mkdir()
    with runs_module.locked(out) as lock:
        assert "another comparison, or a run that it has begun, is at work" in complaint(capsys, path, "--out", out)
        child = subprocess.Popen(["sleep", "30"], pass_fds=[lock])
    try:  # the one that held it is gone, its run is not
        assert "is at work" in complaint(capsys, path, "--out", out)
    finally:
        child.kill()
        child.wait()
    with runs_module.locked(out):
        pass


def page(out):
    return (out / "README.md").read_text()


def test_what_was_declared_stays(write_plan, tmp_path, capsys):
    """From the first run on, also of runs that nobody has taken up yet."""
    out, arguments = tmp_path / "out", ("--out", tmp_path / "out", "--page")

    def ask(**changes):
        return main(["compare", str(write_plan(**changes)), *map(str, arguments)])

    assert ask() == 0 and "before the first run." in page(out) and "Changed" not in page(out)
    assert ask(claims=[{**CLAIM, "margin": -2.0}]) == 0
    assert "before the first run: claims." in page(out) and "(declared" not in page(out)
    finished(read_plan(write_plan()), out, "grpo", 3)
    line = complaint(capsys, write_plan(claims=[{**CLAIM, "margin": -99.0}]), *arguments)
    assert "expected the margin -2 on 'test greedy', as declared 20" in line and "found the margin -99 or" in line
    assert "found no such claim" in complaint(capsys, write_plan(claims=[]), *arguments)
    other = {"test greedy": {"metric": "tokens/generated"}, "entropy": {"metric": "entropy/policy"}}
    claims = [{**CLAIM, "margin": -2.0}]
    assert "or another measure" in complaint(capsys, write_plan(measures=other, claims=claims), *arguments)
    stamps = json.loads((out / "stamps.json").read_text())
    assert len(stamps) == 2, "what was refused has left no trace"
    twice = [*claims, {**CLAIM, "margin": 0.0}]
    for _ in range(2):  # two claims in the same words
        assert ask(claims=twice, seeds=[3]) == 0
    assert "after runs were there: seeds, 2 to 1, claims." in page(out)
    assert page(out).count("no worse (declared after runs were there)") == 1 and page(out).count("| no worse |") == 1
    (out / "stamps.json").unlink()
    assert ask() == 0 and "after runs were there." in page(out)
    (out / "stamps.json").write_text("[")
    assert "is cut off" in complaint(capsys, write_plan(), *arguments)


def test_the_same_plan_elsewhere_is_the_same_plan(write_plan, tmp_path, monkeypatch, capsys):
    path, out = write_plan(), tmp_path / "out"
    for folder in (tmp_path, tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        (folder / "base.yaml").exists() or (folder / "base.yaml").write_text("no: plan's")
        assert main(["compare", str(path), "--out", str(out), "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[:4] == lines[4:] and f"run.root={out / 'runs'}" in lines[0]
    assert len(json.loads((out / "stamps.json").read_text())) == 1


def test_a_measure_that_no_run_has_is_said(write_plan, tmp_path):
    measures = {"ours": {"metric": "eval/test/gredy"}, "entropy": {"metric": "entropy/policy"}}
    path, out = write_plan(measures=measures, claims=[], about="two\nlines"), tmp_path / "out"
    for seed in (3, 4):
        finished(read_plan(path), out, "grpo", seed)
    assert main(["compare", str(path), "--out", str(out), "--page"]) == 0
    assert "No run has: ours. Is the metric's name right?" in page(out) and "two lines" in page(out)


def test_a_measure_added_later_is_taken_of_finished_runs(write_plan, tmp_path):
    out = tmp_path / "out"
    folder = finished(read_plan(write_plan(claims=[])), out, "grpo", 3)
    assert main(["compare", str(write_plan(claims=[])), "--out", str(out), "--page"]) == 0
    (folder / "evaluations/step_000002").mkdir(parents=True)
    (folder / "evaluations/step_000002/test.jsonl").write_text('{"completion": "2*3", "sample": 0}\n')
    plan = write_plan(claims=[], measures={"P(2)": {"set": "test", "begins_with": "2", "percent": True}})
    assert main(["compare", str(plan), "--out", str(out), "--page"]) == 0
    assert "| grpo | 1 | 100.0 |" in page(out)


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
    (tmp_path / "out/results/eepo-4.json").write_text(json.dumps(result([1.0])))
    assert read_results(tmp_path / "out", plan) == {"grpo": {}, "eepo": {4: result([1.0])}}
    (tmp_path / "out/results/eepo-4.json").write_text("[")
    with pytest.raises(UserError, match=r"eepo-4.json: is cut off"):
        read_results(tmp_path / "out", plan)
