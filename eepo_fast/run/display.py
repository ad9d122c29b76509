"""Shows what a run does while it goes: one live panel on a terminal, one line an iteration elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from eepo_fast.report.panels import UNTAKEN

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKS = 32  # points of a sparkline; each is the mean of its share of the iterations
PHASE_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")
NUM_PHASES = len(PHASE_COLOURS)
NARROW = 66  # columns, below which there is no room for sparklines and times
SPEED_PERIOD_S = 24 * 3600.0  # the time left is estimated over a day: an iteration takes minutes

Row = dict[str, float]


def known(row: Row, key: str) -> bool:
    """Returns whether a value is neither missing nor NaN."""
    value = row.get(key)
    return value is not None and value == value


def untaken_step(row: Row) -> tuple[str, str] | None:
    """Returns why an iteration's forget step did nothing, and what to do; None where it was taken, or none is asked."""
    if not known(row, "unlearn/applied") or row["unlearn/applied"]:
        return None
    return next((why, remedy) for key, why, remedy in UNTAKEN if row[key])


def summary(row: Row) -> str:
    """Returns the iteration in one line."""
    parts = [
        f"reward {row['reward/mean']:.3f}",
        f"entropy {row['entropy/policy']:.3f}",
        f"length {row['length/mean']:.0f}",
    ]
    if known(row, "entropy/stage2"):
        parts[1] = f"entropy {row['entropy/stage1']:.3f} | {row['entropy/stage2']:.3f}"
    if known(row, "unlearn/active_fraction"):
        parts.append(f"gate {row['unlearn/active_fraction']:.0%}")
    if known(row, "unlearn/retention"):
        parts.append(f"retention {row['unlearn/retention']:.3f}")
    if untaken := untaken_step(row):
        parts.append(f"step {untaken[0]}")
    if known(row, "rollout/held_groups"):
        parts.append(f"carried {row['rollout/carried_fraction']:.0%}  held {row['rollout/held_groups']:.0f}")
    parts.append(f"{row['time/iteration_s']:.1f} s")
    return "  ".join(parts)


def sparkline(values: list[float], width: int = SPARKS) -> str:
    """Draws the values, from lowest to highest block; means of neighbours where there are more than `width`."""
    num = min(width, len(values))
    means = []
    for i in range(num):
        part = values[i * len(values) // num : (i + 1) * len(values) // num]
        means.append(sum(part) / len(part))
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return BLOCKS[0] * num
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int((v - low) / (high - low) * len(BLOCKS)))] for v in means)


class Training:
    """Tells, line by line, how a run goes."""

    def __init__(self, display: "Display", name: str, done: int, total: int):
        self.display, self.name, self.total = display, name, total

    def phase(self, name: str) -> None:
        """Hears that a phase of an iteration begins."""

    def completions(self, done: int, asked: int) -> None:
        """Hears how many completions of the stage that is being sampled are finished."""

    def iteration(self, row: Row) -> None:
        due = row["step"] == 1 or row["step"] % max(1, self.total // 20) == 0 or row["time/iteration_s"] > 5
        if due or untaken_step(row):
            self.display.say(f"{self.name} {row['step']}/{self.total}  {summary(row)}")


class LivePanel(Training):
    """Shows progress, both stages with sparklines, the forget step, speed, and where the last iteration's time went."""

    def __init__(self, display: "Display", name: str, done: int, total: int):
        super().__init__(display, name, done, total)
        self.rows: list[Row] = []
        self.doing = ""
        columns = [TextColumn("iteration"), BarColumn(bar_width=None), MofNCompleteColumn()]
        if display.console.width >= NARROW:
            columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left")]
        self.progress = Progress(*columns, console=display.console, expand=True, speed_estimate_period=SPEED_PERIOD_S)
        self.task = self.progress.add_task(name, total=total, completed=done)
        self.live = Live(get_renderable=self.render, console=display.console, refresh_per_second=4)

    def phase(self, name: str) -> None:
        self.doing = name.replace("_", " ")

    def completions(self, done: int, asked: int) -> None:
        if done < asked:
            self.doing = f"sampling, {done} of {asked} completions finished"

    def iteration(self, row: Row) -> None:
        self.rows.append(row)
        self.doing = ""
        self.progress.update(self.task, completed=row["step"])

    def render(self) -> Panel:
        parts: list[RenderableType] = [self.progress]
        if self.rows:
            parts += [self._curves(), self._facts(), self._times()]
        return Panel(Group(*parts), title=self.name, subtitle=self.doing or None, title_align="left", expand=True)

    def _curves(self) -> Table:
        table = Table(box=None, expand=True, pad_edge=False)
        two_stages, narrow = known(self.rows[-1], "entropy/stage2"), self.display.console.width < NARROW
        table.add_column("")
        for name in ("stage 1", "stage 2") if two_stages else ("all",):
            table.add_column(name, justify="right", no_wrap=True)
            if not narrow:
                table.add_column("", no_wrap=True, ratio=1, style="cyan" if name != "stage 2" else "magenta")
        width = min(SPARKS, (self.display.console.width - 40) // (2 if two_stages else 1))
        for name, form in (("reward", ".3f"), ("entropy", ".3f"), ("length", ".0f")):
            cells = []
            for key in (f"{name}/stage1", f"{name}/stage2") if two_stages else (f"{name}/stage1",):
                values = [row[key] for row in self.rows if known(row, key)]
                cells += [format(values[-1], form) if values else "", *([] if narrow else [sparkline(values, width)])]
            table.add_row(name, *cells)
        return table

    def _facts(self) -> Columns:
        row = self.rows[-1]
        shown = [
            ("gate open", "unlearn/active_fraction", ".0%"),
            ("retention", "unlearn/retention", ".3f"),
            ("KL(θ'‖θ)", "unlearn/kl", ".4f"),
            ("η", "unlearn/learning_rate", ".2g"),
            ("different answers", "group/unique_fraction", ".0%"),
            ("cut off", "length/truncated_fraction", ".0%"),
            ("carried", "rollout/carried_fraction", ".0%"),
            ("groups held", "rollout/held_groups", ".0f"),
            ("tokens a second", "tokens/per_second", ",.0f"),
        ]
        facts = [f"{name} {row[key]:{form}}" for name, key, form in shown if known(row, key)]
        if untaken := untaken_step(row):
            facts.append(f"forget step {untaken[0]}")
        evaluations = next((r for r in reversed(self.rows) if any(k.startswith("eval/") for k in r)), {})
        facts += [f"{key[5:]} {evaluations[key]:.1%}" for key in evaluations if key.endswith(("/greedy", "/pass@1"))]
        return Columns([Text(fact, no_wrap=True) for fact in facts], padding=(0, 2))

    def _times(self) -> Text:
        """Draws the last iteration's phases, the longest first, as shares of a bar."""
        row = self.rows[-1]
        whole = row["time/iteration_s"]
        phases = {k[5:-2]: v for k, v in row.items() if k.startswith("time/") and k not in NOT_PHASES and v}
        longest = sorted(phases.items(), key=lambda item: -item[1])[:NUM_PHASES]
        bar, legend = Text(), Text(f"{whole:.1f} s: ")
        width = max(20, self.display.console.width - 6)
        for (name, seconds), colour in zip(longest, PHASE_COLOURS, strict=False):
            bar.append("█" * round(width * seconds / whole), style=colour)
            legend.append(f"{name.replace('_', ' ')} {seconds / whole:.0%}  ", style=colour)
        return Text("\n").join([bar, legend])


NOT_PHASES = ("time/iteration_s", "time/evaluation_s", "time/waiting_s")


class Display:
    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)

    @classmethod
    def silent(cls) -> "Display":
        """Returns the display of every rank but the first."""
        return cls(Console(quiet=True))

    @property
    def is_live(self) -> bool:
        """Is true on a terminal that can move its cursor. A quiet console is none: what it redirects would be lost."""
        return self.console.is_interactive and self.console.file.isatty() and not self.console.quiet

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False)

    @contextmanager
    def training(self, name: str, done: int, total: int) -> Iterator[Training]:
        if not self.is_live:
            yield Training(self, name, done, total)
            return
        panel = LivePanel(self, name, done, total)
        with panel.live:
            yield panel

    @contextmanager
    def task(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """Shows the progress of one long step: the function it yields takes (done, total, text)."""
        if not self.is_live:
            self.say(name)
            yield lambda done, total, text: self.say(f"{name}: {text}") if done == total else None
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        text = TextColumn("{task.fields[text]}")
        with Progress(*columns, TimeRemainingColumn(), text, console=self.console, transient=True) as bar:
            task = bar.add_task(name, total=None, text="")
            yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)
