"""Sends metrics to TensorBoard, W&B and trackio, when asked to. metrics.jsonl is written whatever becomes of them.

Each tracker is spoken to by a thread of its own: one that fails or hangs is reported once and left behind; the
run never waits for it. A package that is asked for and not installed is the user's mistake, named at the start.
"""

import importlib
import importlib.util
import math
import queue
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from eepo_fast.config import Config
from eepo_fast.types import UserError

LAST_WORDS_S = 20.0  # at the end of a run, for a tracker to send what it still has
BEHIND = 10_000  # rows that a tracker may be behind before the rest are dropped


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, config: Config, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # a resumed run writes what came after its checkpoint again
        self.writer = SummaryWriter(config.run_dir / "tensorboard", purge_step=step + 1)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Hosted:
    """Logs to W&B, or to trackio, which has the same functions."""

    def __init__(self, config: Config, step: int, *, module: str, project: str):
        self.module = importlib.import_module(module)
        # W&B has one page for a run, however often it is resumed
        more = {"id": _run_id(config.run_dir), "dir": str(config.run_dir)} if module == "wandb" else {}
        settings = config.model_dump()
        self.module.init(project=project, name=config.run.name, config=settings, resume="allow", **more)

    def log(self, values: dict[str, float], step: int) -> None:
        self.module.log(values, step=step)

    def close(self) -> None:
        self.module.finish()


def _run_id(run_dir: Path) -> str:
    """Returns the id that was drawn once for a run's folder."""
    path = run_dir / "wandb_id"
    if not path.is_file():
        path.write_text(secrets.token_hex(6) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def chosen(config: Config) -> dict[str, Callable[[int], Tracker]]:
    """Returns what the config asks for: a name, and how it is started for a run after `step` iterations. UserError
    where a package is missing."""
    log = config.log
    found: dict[str, Callable[[int], Tracker]] = {}
    if log.tensorboard:
        found["tensorboard"] = partial(TensorBoard, config)
    for module, project in (("wandb", log.wandb), ("trackio", log.trackio)):
        if project:
            found[module] = partial(Hosted, config, module=module, project=project)
    for module in found:
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:  # a folder of that name, such as W&B leaves, is no package
            raise UserError(f"log.{module}: the package {module} is not installed; pip install {module}, or unset it")
    return found


class Trackers:
    """Speaks to all trackers that are chosen; used as a context, which gives them `LAST_WORDS_S` to end."""

    def __init__(self, trackers: dict[str, Callable[[int], Tracker]], step: int, warn: Callable[[str], None]):
        """Starts them. trackers: what `chosen` has found; none on any rank but the first. step: iterations done."""
        self._threads = [_Thread(name, partial(start, step), warn) for name, start in trackers.items()]

    def log(self, row: dict[str, Any], step: int) -> None:
        values = {k: float(v) for k, v in row.items() if isinstance(v, int | float) and math.isfinite(v)}
        for thread in self._threads:
            thread.send((values, step))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:
            for thread in self._threads:
                stack.callback(thread.join)


class _Thread:
    def __init__(self, name: str, start: Callable[[], Tracker], warn: Callable[[str], None]):
        self.name, self.warn = name, warn
        self.rows: queue.Queue = queue.Queue(BEHIND)
        self.num_dropped, self.failed = 0, False
        self.thread = threading.Thread(target=self._work, args=(start,), name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def send(self, row: tuple[dict[str, float], int]) -> None:
        try:
            self.rows.put_nowait(row)
        except queue.Full:
            self.num_dropped += 1

    def _work(self, start: Callable[[], Tracker]) -> None:
        try:
            tracker = start()
            while (row := self.rows.get()) is not None:
                tracker.log(*row)
            tracker.close()
        except BaseException as error:  # some leave with SystemExit where they have no login
            reason = " ".join(str(error).split())[:300]
            self.failed = True
            self.warn(f"{self.name}: {type(error).__name__}: {reason}; the run goes on without it")

    def join(self) -> None:
        deadline = time.monotonic() + LAST_WORDS_S
        with suppress(queue.Full):
            self.rows.put(None, timeout=LAST_WORDS_S)
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self.warn(f"{self.name} still hangs after {LAST_WORDS_S:.0f} s; the run ends without it")
        elif self.num_dropped and not self.failed:
            self.warn(f"{self.name} was too slow: {self.num_dropped} iterations were not sent to it")
