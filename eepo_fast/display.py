"""What a run shows while it goes: a progress bar on a terminal, one line an iteration elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def summary(row: dict[str, float]) -> str:
    """The iteration in one line."""
    parts = [
        f"reward {row['reward/mean']:.3f}",
        f"entropy {row['entropy/policy']:.3f}",
        f"length {row['length/mean']:.0f}",
    ]
    if row["entropy/stage2"] == row["entropy/stage2"]:
        parts[1] = f"entropy {row['entropy/stage1']:.3f} | {row['entropy/stage2']:.3f}"
        parts.append(f"gate {row['unlearn/active_fraction']:.0%}")
    if row["unlearn/retention"] == row["unlearn/retention"]:
        parts.append(f"retention {row['unlearn/retention']:.3f}")
    parts.append(f"{row['time/iteration_s']:.1f} s")
    return "  ".join(parts)


class Training:
    def __init__(self, display: Display, bar: Progress | None, name: str, done: int, total: int):
        self.display, self.bar, self.name, self.total = display, bar, name, total
        if bar is not None:
            self.task = bar.add_task(name, total=total, completed=done, text="")

    def completions(self, done: int, asked: int) -> None:
        if self.bar is not None and done < asked:
            self.bar.update(self.task, text=f"sampling {done}/{asked}")

    def iteration(self, row: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=row["step"], text=summary(row))
        elif row["step"] == 1 or row["step"] % max(1, self.total // 20) == 0 or row["time/iteration_s"] > 5:
            self.display.say(f"{self.name} {row['step']}/{self.total}  {summary(row)}")


class Display:
    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)

    @classmethod
    def silent(cls) -> Display:
        """For every rank but the first."""
        return cls(Console(quiet=True))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(text, style="yellow", markup=False)

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[text]}"), console=self.console)

    @contextmanager
    def training(self, name: str, done: int, total: int) -> Iterator[Training]:
        if not self.console.is_terminal:
            yield Training(self, None, name, done, total)
            return
        with self._bar() as bar:
            yield Training(self, bar, name, done, total)

    @contextmanager
    def task(self, name: str) -> Iterator[Callable[[int, int, str], None]]:
        """Progress of one long step: the function it yields takes (done, total, text)."""
        if not self.console.is_terminal:
            self.say(name)
            yield lambda done, total, text: self.say(f"{name}: {text}") if done == total else None
            return
        with self._bar() as bar:
            task = bar.add_task(name, total=None, text="")
            yield lambda done, total, text: bar.update(task, completed=done, total=total, text=text)
