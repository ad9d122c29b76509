"""The live panel, rendered to text; and the plain lines where there is no terminal."""

import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from eepo_fast.run.display import BLOCKS, UNTAKEN, Display, LivePanel, sparkline, summary, untaken_step
from eepo_fast.run.loop import Loop


def make_row(step, metric_keys, eepo=True):
    row = {key: 0.5 for key in metric_keys}
    row |= {"step": step, "time/iteration_s": 4.0, "time/update_s": 1.0, "time/rollout_stage1_s": 2.0}
    row |= {
        "reward/stage1": step / 10,
        "reward/mean": step / 10,
        "unlearn/retention": 0.987,
        "tokens/per_second": 1234.0,
    }
    if not eepo:
        row |= {key: math.nan for key in row if "stage2" in key or key.startswith("unlearn/")}
    return row


def untaken_row(step, metric_keys, key):
    """An iteration whose forget step did nothing, for this reason."""
    flags = {name: float(name == key) for name, *_ in UNTAKEN} | {"unlearn/applied": 0.0, "unlearn/retention": math.nan}
    return make_row(step, metric_keys) | flags | {"unlearn/skipped": float(key != "unlearn/resampled")}


@pytest.mark.parametrize("key, why, remedy", UNTAKEN)
def test_a_forget_step_that_did_nothing_is_said_at_once(metric_keys, key, why, remedy):
    """In the line, in the panel, and as a warning when it happens three times running."""
    row = untaken_row(1, metric_keys, key)
    assert untaken_step(row) == (why, remedy) and f"step {why}" in summary(row)
    panel = LivePanel(make_display(200), "my-run", 0, 40)
    panel.iteration(row)
    assert f"forget step {why}" in rendered(panel)
    said = []
    loop = Loop(*[None] * 7)
    loop.meeting = type("Meeting", (), {"display": type("Display", (), {"warn": staticmethod(said.append)})})
    taken = make_row(3, metric_keys) | {"unlearn/applied": 1.0}
    for row in [*[untaken_row(i, metric_keys, key) for i in (1, 2)], taken, make_row(4, metric_keys, eepo=False)]:
        loop._warn_of_untaken_steps(row)
    assert said == [], "not three running"
    for i in range(5, 11):
        loop._warn_of_untaken_steps(untaken_row(i, metric_keys, key))
    assert len(said) == 1 and "iteration 7: forget step " + why in said[0] and remedy in said[0]


def test_a_run_that_waits_says_so_once(metric_keys, test_config):
    """And what would help has been tried: its config is one that can be run."""

    def lines(config, shares, num_prompts=12):
        said, loop = [], Loop(*[None] * 7)
        loop.meeting = SimpleNamespace(display=SimpleNamespace(say=said.append))
        loop.trainer = SimpleNamespace(config=config, prompts=range(num_prompts))
        for step, share in enumerate(shares):
            times = {"time/rollout_stage1_s": 3.0, "time/rollout_stage2_s": 2.0, "time/iteration_s": 10.0}
            loop._advise_of_waiting(make_row(step, metric_keys) | times | {"time/waiting_s": 5 * share})
        return said

    vllm = {"engine": "vllm"}
    (line,) = lines(test_config(rollout=vllm), [0.4, 0.2, 0.3, 0.3, 0.38, 0.5, 0.5, 0.1, 0.5, 0.5, 0.5])
    assert line == (
        "iteration 4: sampling waits 38% of its time for the last tenth of the answers, 3 times running; "
        "rollout.carry=1 rollout.quorum=0.75 rollout.in_flight=1 would save up to 19% of an iteration"
    )
    assert lines(test_config(rollout=vllm), [0.3, 0.3, 0.2] * 3) == []
    for sections in (
        {"rollout": {"carry": 1, "quorum": 0.9}},
        {"aepo": {"enabled": True}},
        {"eepo": {"reduction": "prompt_sum"}},
        {"eepo": {"direction": "temperature"}},
        {"grpo": {"ratio": "policy"}},
    ):
        config = test_config(**{**sections, "rollout": {**sections.get("rollout", {}), **vllm}})
        assert lines(config, [0.5] * 5) == []
    assert lines(test_config(), [0.5] * 5) == [], "a step of the embedded engine on a CPU takes longer with every row"
    assert lines(test_config(rollout=vllm), [0.5] * 5, num_prompts=7) == [], "too few to begin some ahead"


def test_a_forget_step_that_was_taken_is_not_complained_of(metric_keys):
    for row in (make_row(1, metric_keys) | {"unlearn/applied": 1.0}, make_row(1, metric_keys, eepo=False), {}):
        assert untaken_step(row) is None


class Screen(io.StringIO):
    def isatty(self):
        return True


def make_display(width=110, terminal=True, **options):
    settings = {"file": Screen() if terminal else io.StringIO(), "color_system": None, **options}
    return Display(Console(width=width, force_terminal=terminal, **settings))


def rendered(panel):
    with panel.display.console.capture() as capture:
        panel.display.console.print(panel.render())
    return capture.get()


@pytest.mark.parametrize("width", [34, 50, 70, 110, 200])
@pytest.mark.parametrize("eepo", [True, False])
def test_the_panel_shows_what_goes_on(metric_keys, width, eepo):
    panel = LivePanel(make_display(width), "my-run", 0, 40)
    assert "0/40" in rendered(panel), "before the first iteration"
    for step in range(1, 9):
        panel.iteration(make_row(step, metric_keys, eepo) | ({"eval/test/greedy": 0.25} if step == 5 else {}))
    panel.phase("rollout_stage1")
    panel.completions(3, 16)
    text = rendered(panel)
    for part in ("my-run", "8/40", "reward", "0.800", "entropy", "length", "tokens a second 1,234", "stage1 50%"):
        assert part in text, part
    assert "test/greedy 25.0%" in text
    if width >= 66:
        assert "sampling, 3 of 16 completions finished" in text
        assert sparkline([i / 10 for i in range(1, 9)]) in text
    assert ("stage 2" in text) == eepo and ("retention 0.987" in text) == eepo and "nan" not in text
    assert max(map(len, text.splitlines())) <= width


def test_sparklines():
    assert sparkline([]) == "" and sparkline([0.3, 0.3]) == BLOCKS[0] * 2
    assert sparkline(list(range(8))) == BLOCKS
    long = sparkline([i / 1000 for i in range(1000)], width=16)
    assert len(long) == 16 and list(long) == sorted(long) and long[0] == BLOCKS[0] and long[-1] == BLOCKS[-1]


def test_plain_lines_without_a_terminal(metric_keys):
    display = make_display(terminal=False)
    with display.training("r", 0, 40) as show:
        show.phase("sync")
        show.completions(1, 2)
        for step in range(1, 41):
            show.iteration(make_row(step, metric_keys) | {"time/iteration_s": 1.0})
    lines = display.console.file.getvalue().splitlines()
    assert len(lines) == 21 and lines[0].startswith("r 1/40  reward 0.100") and "\x1b" not in "".join(lines)


def test_the_panel_is_live_on_terminals_and_other_ranks_silent(metric_keys):
    display = make_display()
    with display.training("r", 3, 40) as show:
        assert isinstance(show, LivePanel)
        display.warn("a warning above the panel")
        show.iteration(make_row(4, metric_keys))
    text = display.console.file.getvalue()
    assert "a warning above the panel" in text and "4/40" in text


def test_what_cannot_be_drawn_on_gets_lines(monkeypatch):
    """Other ranks, whose quiet console would swallow what others print; a dumb terminal; colours forced into a file."""
    silent = make_display(quiet=True)
    forced = make_display(file=io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    dumb = make_display()
    for display in (silent, forced, dumb):
        assert not display.is_live
        with display.training("r", 0, 4) as show:
            assert not isinstance(show, LivePanel)
    assert Display.silent().console.quiet


def test_the_time_left_of_iterations_that_take_minutes(metric_keys, monkeypatch):
    panel = LivePanel(make_display(), "r", 0, 100)
    clock = [0.0]
    panel.progress.get_time = lambda: clock[0]
    for task in panel.progress.tasks:
        task._get_time = panel.progress.get_time
        task.start_time = 0.0
    for step in range(1, 11):
        clock[0] += 90
        panel.iteration(make_row(step, metric_keys))
    assert "2:15:00 left" in rendered(panel), "90 iterations of 90 s"
