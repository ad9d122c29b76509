"""`eepo-fast report`: what it reads, what it draws, and the page in a real browser."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from eepo_fast.cli import main
from eepo_fast.report.panels import late_mean, panels_of, phases
from eepo_fast.report.rollouts import key_of, marks_of, pack, read_groups, rollout
from eepo_fast.report.runs import differing, group_runs, read_run, shared_name

sys.path.insert(0, str(Path(__file__).parent))
from report_data import HOSTILE, make_run


def write_runs(tmp_path, metric_keys):
    """Two seeds of EEPO and one GRPO run."""
    make = {"metric_keys": sorted(metric_keys), "evaluated": (3, 6)}
    return [
        make_run(tmp_path / "runs" / "eepo-seed0", seed=0, **make),
        make_run(tmp_path / "runs" / "eepo-seed1", seed=1, **make),
        make_run(tmp_path / "runs" / "grpo", eepo=False, details=False, **make),
    ]


@pytest.fixture
def runs(tmp_path, metric_keys):
    return write_runs(tmp_path, metric_keys)


def report(*runs, out=None):
    return main(["report", *map(str, runs), *([] if out is None else ["--out", str(out)])])


def page_text(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def page_data(folder):
    text = page_text(folder)
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))


def test_everything_is_written(runs, tmp_path, capsys):
    assert report(*runs, out=tmp_path / "page") == 0
    assert str(tmp_path / "page/index.html") in capsys.readouterr().out
    names = {p.name for p in (tmp_path / "page").iterdir()}
    assert {"index.html", "page.js", "page.css", "rollouts.js", "plotly.min.js", "rollouts"} <= names
    for picture in ("curves.png", "time.png", "pass_at_k.png"):
        assert (tmp_path / "page" / picture).read_bytes().startswith(b"\x89PNG")
    scripts = sorted(p.name for p in (tmp_path / "page/rollouts" / key_of(read_run(runs[0]))).iterdir())
    assert scripts == [f"step_{i:06d}.js" for i in range(1, 7)]
    data = page_data(tmp_path / "page")
    titles = [chart["title"] for chart in data["charts"]]
    for title in (
        "Reward",
        "Entropy",
        "Gate",
        "What arrived of the forget step",
        "Evaluation on test",
        "pass@k on test",
    ):
        assert title in titles
    reward = data["charts"][titles.index("Reward")]["curves"]
    assert [c["name"] for c in reward] == ["eepo: stage 1", "eepo: stage 2", "grpo: stage 1"]
    first = reward[0]
    assert first["y"][0] == pytest.approx(0.5105) and (first["low"][0], first["high"][0]) == pytest.approx(
        (0.51, 0.511)
    )
    assert "low" not in reward[2], "one run has no band"
    text = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert "eepo.enabled" in text and "What differs" in text and "Nothing but the names" not in text


def test_seeds_are_grouped_and_settings_are_not(runs):
    groups = group_runs([read_run(r) for r in runs])
    assert [(g.name, len(g.runs)) for g in groups] == [("eepo", 2), ("grpo", 1)]
    # of a method that is off nothing but that differs
    assert differing([g.runs[0] for g in groups]) == ["eepo.enabled", "log.token_details"]
    assert shared_name(["a-seed1", "a-seed12"]) == "a" and shared_name(["x", "y"]) == "x / y"
    steps, mean, low, high = groups[0].band("reward/stage1")
    assert steps == [1, 2, 3, 4, 5, 6] and mean[0] == pytest.approx(0.5105)
    assert low[0] == pytest.approx(0.51) and high[0] == pytest.approx(0.511)
    assert late_mean(groups[0], "reward/stage1") == pytest.approx(0.5605), "of the last fifth: one iteration of six"
    assert late_mean(groups[1], "reward/stage2") is None
    found = phases(groups[0])
    assert found["update"] == 1.0 and found["rollout_stage1"] == pytest.approx(0.6) and "iteration" not in found
    without_kl = [p.title for p in panels_of(groups[1:])]
    assert "Gate" not in without_kl and "Reward" in without_kl


def test_the_pictures_and_the_page_draw_the_same_curves(runs, tmp_path, monkeypatch):
    from eepo_fast.report import pictures

    drawn, draw = [], pictures.draw_trace

    def noted(axis, trace, label):
        drawn.append(trace)
        draw(axis, trace, label)

    monkeypatch.setattr(pictures, "draw_trace", noted)
    assert report(*runs, out=tmp_path / "page") == 0
    shown = [curve for chart in page_data(tmp_path / "page")["charts"] for curve in chart.get("curves", ())]
    assert [t.name for t in drawn] == [c["name"] for c in shown] and len(drawn) > 20
    for trace, curve in zip(drawn, shown, strict=True):
        assert (trace.x, trace.colour, trace.style) == (curve["x"], curve["colour"], curve["dash"])
        assert [v is None for v in trace.y] == [v is None for v in curve["y"]]
        assert (trace.band is not None, trace.sparse) == ("low" in curve, curve["sparse"])


def test_numbers_survive_packing(runs):
    import base64

    import numpy as np

    found = np.frombuffer(base64.b64decode(pack([0.0, -0.1234, 12.3456, -99.0, None, float("nan")])), "<i2")
    assert found.tolist() == [0, -123, 12346, -32000, -32768, -32768]
    row = json.loads((runs[0] / "rollouts/step_000001.jsonl").read_text().splitlines()[-1])
    assert row["stage"] == 2
    shown = rollout(row)
    change = np.frombuffer(base64.b64decode(shown["change"]), "<i2") / 1000
    expected = np.array(row["rollout_logprobs"]) - np.array(row["policy_logprobs"])
    assert np.abs(change - expected).max() < 6e-4, "stage 2: the forgetful weights against the policy"
    assert "gate" not in shown
    assert "change" not in rollout({**row, "weights_version": [1, False]}), "sampled from the policy after all"
    groups = read_groups(runs[0] / "rollouts/step_000001.jsonl")
    assert [g["id"] for g in groups] == ["p0", "p1", "p2", "p3"] and all(len(g["rows"]) == 4 for g in groups)
    assert groups[0]["rows"][0]["gate"] == "01010101"


def test_what_is_shown_of_a_carried_group(runs, tmp_path):
    """Two groups of one prompt are two; and only this iteration's forget step has a change to show."""
    import base64

    import numpy as np

    row = json.loads((runs[0] / "rollouts/step_000001.jsonl").read_text().splitlines()[-1])
    log, count = tmp_path / "log.jsonl", row["num_tokens"]
    log.write_text("".join(json.dumps({**row, "begun": begun}) + "\n" for begun in (1, 2, 1)))
    assert [len(group["rows"]) for group in read_groups(log)] == [2, 1]
    row["segments"] = [[0, False, 1], [0, True, 1], [1, False, 1], [1, True, count - 3]]
    assert marks_of(row["segments"]) == [
        (1, "went on after the forget step"),
        (2, "carried into the next iteration"),
        (3, "went on after the forget step"),
    ]
    assert marks_of([(1, True, 2), (1, False, 2)]) == [(2, "carried into the next iteration")], "an update was not made"
    change = np.frombuffer(base64.b64decode(rollout(row, 1)["change"]), "<i2")
    assert (change == -32768).tolist() == [True] * 3 + [False] * (count - 3)


def test_what_a_run_says_is_text_on_the_page(runs, tmp_path):
    settings = runs[2] / "config.yaml"
    settings.write_text(settings.read_text().replace("path: m", "path: '<img src=x onerror=alert(1)>'"))
    ending = {"reason": "error", "step": 3, "total": 6, "message": HOSTILE}
    (runs[2] / "ended.json").write_text(json.dumps(ending))
    assert report(*runs, out=tmp_path / "page") == 0
    text = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text and "&lt;img src=x" in text
    assert text.count("<script") == 4 and "window.owned=1</script>" not in text
    page_data(tmp_path / "page")


@pytest.mark.slow
def test_a_run_that_goes_on_can_be_drawn(runs, tmp_path):
    with (runs[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "reward/me')
    (runs[0] / "ended.json").unlink()
    assert report(runs[0]) == 0
    text = (runs[0] / "report/index.html").read_text(encoding="utf-8")
    assert "running, or killed" in text
    log = runs[0] / "rollouts/step_000007.jsonl"
    log.write_text('{"prompt_id": "p0", "prom')
    (runs[0] / "ended.json").write_text('{"reason": "fini')
    with (runs[0] / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe")
    (runs[0] / "rollouts/step_000002.jsonl").unlink()
    assert report(runs[0]) == 0, "and drawn again"
    assert not list((runs[0] / "report").rglob("step_000002.js"))
    assert page_data(runs[0] / "report")["runs"][0]["steps"] == [1, 3, 4, 5, 6]


def test_a_report_is_written_over_and_nothing_else(runs, tmp_path):
    out = tmp_path / "page"
    assert report(*runs, out=out) == 0 and (out / "pass_at_k.png").exists()
    kept = next((out / "rollouts").glob("eepo-seed0-*/step_000001.js"))
    stamp = kept.stat().st_mtime_ns
    for folder in (runs[0] / "evaluations",):
        shutil.rmtree(folder)
    assert report(runs[0], runs[0], out=out) == 0, "the same run twice is one run"
    assert [r["name"] for r in page_data(out)["runs"]] == ["eepo-seed0"] and "2 seeds" not in page_text(out)
    assert [p.name for p in (out / "rollouts").iterdir()] == [kept.parent.name] and not (out / "pass_at_k.png").exists()
    assert kept.stat().st_mtime_ns == stamp, "newer than its log: kept"
    log = runs[0] / "rollouts/step_000001.jsonl"
    log.write_text(log.read_text())
    assert report(runs[0], out=out) == 0 and kept.stat().st_mtime_ns > stamp
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/index.html").write_text("my own page")
    assert report(runs[0], out=tmp_path / "mine") == 2 and (tmp_path / "mine/index.html").read_text() == "my own page"


def test_runs_as_bare_or_as_odd_as_they_come(tmp_path, metric_keys):
    """One iteration with nothing in it; no text in UTF-8; surrogates; tokens without a text; many runs, odd names."""
    bare = make_run(tmp_path / "bare", steps=1, metric_keys=())
    (bare / "metrics.jsonl").write_text('{"step": 1}\n')
    row = json.loads((bare / "rollouts/step_000001.jsonl").read_text().split("\n")[0])
    row |= {"completion": "\ud800", "tokens": [None, *row["tokens"][1:]]}
    (bare / "rollouts/step_000001.jsonl").write_bytes(json.dumps(row).encode() + b"\n")
    assert report(bare) == 0
    names = ["_test", "訓練", *(f"lr{i}" for i in range(14))]
    many = [make_run(tmp_path / n, steps=2, groups=1, metric_keys=sorted(metric_keys)) for n in names]
    for i, run in enumerate(many):
        settings = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(settings.replace("alpha: 0.3", f"alpha: {0.3 + i / 10}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert report(*many, out=tmp_path / "page") == 0
    text = page_text(tmp_path / "page")
    assert "<h1>16 runs</h1>" in text and text.count("<span><i style=") == 16
    assert len({c["colour"] for c in page_data(tmp_path / "page")["charts"][0]["curves"]}) == 16


def test_alpha_is_drawn_where_it_is_used(runs, tmp_path):
    for run, levels in ((runs[0], [0.3]), (runs[2], [])):
        assert report(run) == 0
        (entropy,) = (c for c in page_data(run / "report")["charts"] if c["title"] == "Entropy")
        assert entropy["levels"] == levels


def test_trouble_is_shown(runs, tmp_path):
    rows = [json.loads(line) for line in (runs[2] / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"reward/missing": 2, "policy/updates_skipped": 0, "checkpoint/failures": 1}
    (runs[2] / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert report(runs[2], out=tmp_path / "page") == 0
    text = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert "(reward/missing)</th><td>12</td>" in text and "(checkpoint/failures)</th><td>1</td>" in text
    assert "(policy/updates_skipped)" not in text


def spoil_line(runs):
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines()
    (runs[0] / "metrics.jsonl").write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")


def spoil_rollout(runs):
    path = runs[0] / "rollouts/step_000002.jsonl"
    path.write_text('{"prompt_id": 1}\n' + path.read_text())


def spoil_results(runs):
    (runs[0] / "evaluations/step_000003/results.json").write_text('{"sets": {"te')


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda runs: (runs[0] / "config.yaml").unlink(), [0, "out"], "expected a run's folder with a config.yaml"),
        (lambda runs: (runs[0] / "config.yaml").write_text("{"), [0, "out"], "is not a run's settings"),
        (lambda runs: (runs[0] / "metrics.jsonl").write_text(""), [0, "out"], "no iteration is logged"),
        (spoil_line, [0, "out"], "metrics.jsonl, line 2: expected an iteration's metrics"),
        (spoil_rollout, [0, "out"], "step_000002.jsonl, line 1: expected a rollout"),
        (lambda runs: None, [0, 1], "expected --out DIR with several runs"),
        (lambda runs: None, [0, "run"], "expected a new folder or an earlier report"),
        (lambda runs: None, [0, "root"], "expected a new folder or an earlier report"),
        (spoil_results, [0, "out"], "results.json is not an evaluation's results"),
        (lambda runs: None, [0, "file"], "expected a folder, found the file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(runs, tmp_path, capsys, spoil, arguments, message):
    spoil(runs)
    (tmp_path / "file").write_text("")
    places = {"out": tmp_path / "page", "run": runs[1], "root": runs[0].parent, "file": tmp_path / "file"}
    chosen = [runs[a] for a in arguments if isinstance(a, int)]
    out = next((places[a] for a in arguments if isinstance(a, str)), None)
    assert report(*chosen, out=out) == 2
    complaint = capsys.readouterr().err
    assert message in complaint and complaint.count("\n") == 1


# -- in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    started.set_window_size(1400, 1000)
    yield started
    started.quit()


def wait(browser, script, expected=True):
    """Until the script gives what is expected."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30, poll_frequency=0.05).until(lambda b: b.execute_script(f"return {script}") == expected)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


@pytest.fixture(scope="module")
def page(tmp_path_factory, metric_keys):
    """One for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("report")
    assert report(*write_runs(folder, metric_keys), out=folder / "page") == 0
    return folder / "page/index.html"


@pytest.fixture
def opened(browser, page):
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(page.as_uri())
    wait(browser, "document.querySelectorAll('.plot[data-drawn]').length > 0")
    browser.execute_script("byId('rollouts').scrollIntoView()")
    wait(browser, "byId('groups').children.length", 4)
    yield browser
    assert browser.get_log("browser") == [], "nothing in the console"
    assert browser.execute_script("return window.owned") is None, "no completion is run"


COLOURS_OF_TOKENS = "return [...document.querySelectorAll('.tokens span')].map(s => s.style.background).join()"


def test_the_browser_steps_through_iterations_and_groups(opened):
    state = (
        "[byId('step').value, document.querySelectorAll('#groups [aria-selected=true] .prompt')[0].textContent].join()"
    )
    wait(opened, state, "6,Question 0?")
    press(opened, "j", "j")
    wait(opened, state, "6,Question 2?")
    press(opened, "k")
    wait(opened, state, "6,Question 1?")
    press(opened, "\ue012")  # left
    wait(opened, state, "5,Question 1?")
    press(opened, *["\ue012"] * 9)
    wait(opened, state, "1,Question 1?")
    opened.find_element("id", "later").click()
    wait(opened, state, "2,Question 1?")
    text = opened.find_element("id", "group").text
    assert "Stage 1, from the policy" in text and "Stage 2, after forgetting" in text
    assert "no reward: timeout" in text and "cut off" in text and "advantage" in text
    assert "log-prob of gated tokens −0.500, of the others +0.020" in text
    assert "× 0.15 as likely after forgetting" in text, "exp(4 · -0.5 + 4 · 0.02)"
    address = opened.execute_script("return location.hash")
    assert address == "#rollouts=0,2,1,forget"
    opened.refresh()
    wait(opened, state, "2,Question 1?")


def test_colours_change_with_what_is_asked(opened):
    press(opened, "j")
    found = {}
    for key in "12345":
        press(opened, key)
        wait(opened, f"byId('colours').children[{int(key) - 1}].getAttribute('aria-pressed')", "true")
        found[key] = opened.execute_script(COLOURS_OF_TOKENS)
    assert len(set(found.values())) == 5 and set(found["1"]) == {","}
    gate = found["3"].split(",rgba")
    assert len(gate) == 9, "every second of the eight tokens of two completions of stage 1"
    press(opened, "5")
    from selenium.webdriver.common.action_chains import ActionChains

    token = opened.find_elements("css selector", ".tokens span")[1]
    ActionChains(opened).move_to_element(token).perform()
    wait(opened, "byId('token').hidden", False)
    shown = opened.find_element("id", "token").text
    assert "probability" in shown and "gate open" in shown and "forgetting −0.500 nats, × 0.61" in shown


def test_tokens_can_be_reached_with_the_keyboard(opened):
    opened.execute_script("byId('groups').focus()")
    press(opened, "\ue015", "\ue015")  # down
    wait(opened, "document.querySelector('#groups [aria-selected=true] .prompt').textContent", "Question 2?")
    press(opened, "\ue004", "\ue014", "\ue014")  # tab, right, right
    wait(opened, "byId('token').hidden", False)
    assert "gate open" in opened.find_element("id", "token").text
    assert opened.execute_script("return byId('step').value") == "6", "the iteration stays"


def test_a_missing_reward_is_no_zero(opened):
    press(opened, "j")
    head = "document.querySelector('.stages .note').textContent"
    wait(opened, f"{head}.includes('1 without a reward')")
    assert opened.execute_script(f"return {head}").startswith("mean reward")
    dots = opened.execute_script("return document.querySelector('#groups [aria-selected=true] .dots').textContent")
    assert dots.startswith("?")


def test_a_script_in_a_completion_is_text(opened):
    assert HOSTILE.split("\u2028")[0].strip() in opened.find_element("css selector", ".tokens").text
    assert opened.execute_script("return document.querySelectorAll('#rollouts script, #rollouts img').length") == 0


def test_filters_and_search(opened):
    for name in ("mixed", "right", "wrong", "differ"):
        opened.execute_script(f"byId('filter').value='{name}'; byId('filter').dispatchEvent(new Event('change'))")
        dots = "[...g.querySelectorAll('.dots span span')].map(d => d.className)"
        for classes in opened.execute_script(f"return [...byId('groups').children].map(g => {dots})"):
            known = {c for c in classes if c != "missing"}
            expected = {"mixed": {"right", "wrong"}, "right": {"right"}, "wrong": {"wrong"}}
            assert known == expected.get(name, known)
    opened.execute_script("byId('filter').value='all'; byId('filter').dispatchEvent(new Event('change'))")
    search = opened.find_element("id", "search")
    search.send_keys("question 3")
    wait(opened, "byId('groups').children.length", 1)
    press(opened, "j", "3")
    assert search.get_attribute("value") == "question 3j3", "keys belong to the field"
    wait(opened, "byId('group').textContent", "No group here is like that.")


def test_another_run_and_one_without_details(opened):
    opened.execute_script("byId('run').value=2; byId('run').dispatchEvent(new Event('change'))")
    wait(opened, "document.querySelectorAll('.stage-head').length", 1)
    assert "log.token_details=true" in opened.find_element("id", "explanation").text
    assert opened.execute_script("return document.querySelectorAll('.tokens span').length") == 0


def test_curves_are_drawn_and_smoothed(opened):
    opened.execute_script("byId('curves').scrollIntoView()")
    wait(opened, "document.querySelectorAll('#charts-curves .plot[data-drawn]').length > 2")
    curve = "byId('charts-curves').querySelector('.plot').data.find(d => d.name === 'eepo: stage 1').y[0].toFixed(4)"
    wait(opened, curve, "0.5105")
    opened.execute_script("byId('window').value = 3; byId('window').dispatchEvent(new Event('input'))")
    wait(opened, curve, "0.5155")


def test_a_narrow_screen(opened):
    opened.set_window_size(500, 900)
    try:
        wait(opened, "document.documentElement.scrollWidth <= innerWidth")
        columns = "getComputedStyle(document.querySelector('.panes')).gridTemplateColumns.split(' ').length"
        assert opened.execute_script(f"return {columns}") == 1
    finally:
        opened.set_window_size(1400, 1000)


def test_a_missing_script_is_said(browser, runs, tmp_path):
    assert report(runs[0], out=tmp_path / "page") == 0
    next((tmp_path / "page").rglob("step_000006.js")).unlink()
    browser.get((tmp_path / "page/index.html").as_uri() + "#rollouts")
    browser.execute_script("byId('rollouts').scrollIntoView()")
    wait(browser, "byId('group').textContent.includes('step_000006.js is not there')")
    browser.get("about:blank")
    browser.get_log("browser")


def test_the_page_does_not_grow_with_the_completions(tmp_path, metric_keys):
    sizes = []
    for name, groups in (("few", 2), ("many", 32)):
        run = make_run(tmp_path / name, steps=3, groups=groups, metric_keys=sorted(metric_keys))
        assert report(run) == 0
        sizes.append((run / "report/index.html").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 200
