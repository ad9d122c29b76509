"""Runs iteration after iteration, until the end or a signal to leave: logging, evaluation, checkpoints."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from eepo_fast.algorithm.trainer import Trainer
from eepo_fast.checkpoint import CheckpointWriter
from eepo_fast.config import Config, make_config
from eepo_fast.distributed import World, default_device
from eepo_fast.evaluation.periodic import PeriodicEvaluation
from eepo_fast.run import log_files
from eepo_fast.run.display import Display, Training, untaken_step
from eepo_fast.run.plan import num_iterations
from eepo_fast.run.signals import LeaveRequest
from eepo_fast.run.trackers import Trackers
from eepo_fast.run.watchdog import Watchdog
from eepo_fast.types import Interrupted, RolloutBatch, UserError

ENDING = "ended.json"
RUNNING = 3  # iterations in a row in which a forget step does nothing, or sampling waits, before it is said
QUORUM, IN_FLIGHT = 0.75, 1.0  # that are advised: simulated, the most is saved so (docs/scaling.md)
WAITS = 0.25  # share of sampling that is waiting for the last answers, from which on it is said


def write_ending(
    run_dir: Path, reason: str, message: str = "", *, step: int | None = None, total: int | None = None
) -> None:
    """Notes why the run is not going on: `finished`, the name of a signal after a clean save, `hung`, or `error`. Of
    several ranks' notes the first stays; a run that was killed leaves none, nor one whose disk is full."""
    content = {"reason": reason, "step": step, "total": total, "message": message, "time": time.time()}
    with suppress(OSError), (run_dir / ENDING).open("x", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


@dataclass
class Meeting:
    """Tells all ranks whether any was told to leave, and whether a checkpoint is on disk."""

    world: World
    writer: CheckpointWriter
    request: LeaveRequest
    display: Display
    failures: int = field(default=0, init=False)
    """How many checkpoints could not be written."""

    def __call__(self) -> None:
        """Meets: all ranks call this at the same points; Interrupted, on all of them, where one was told to leave."""
        everyone = self.world.gather((self.request.name, self.writer.outcome))
        self.report(self.writer.settle([outcome for _, outcome in everyone]))
        if any(name for name, _ in everyone):
            raise Interrupted

    def report(self, complaint: str | None) -> None:
        if complaint is not None:
            self.failures += 1
            self.display.warn(complaint)

    def who_asked(self) -> str:
        return next(name for name in self.world.gather(self.request.name) if name)


@dataclass
class Loop:
    trainer: Trainer
    evaluation: PeriodicEvaluation
    writer: CheckpointWriter
    meeting: Meeting
    watchdog: Watchdog
    trackers: Trackers
    total: int
    untaken: int = field(default=0, init=False)
    """How many forget steps in a row were not taken, or taken back."""
    waiting: int = field(default=0, init=False)
    """How many iterations in a row waited long for their last answers; beyond RUNNING once it is said."""
    unrewarded: int = field(default=0, init=False)
    """How many iterations in a row no completion could be graded in."""
    was_rewarded: bool = field(default=False, init=False)
    """Whether some iteration had a reward."""
    whole: bool = field(default=True, init=False)
    """Whether the policy is as `state` says, and all of that is logged: whether it could be saved now."""

    def entered(self, phase: str) -> None:
        """Hears that a phase of an iteration begins."""
        self.whole = self.whole and phase != "update"

    def graded(self, batch: RolloutBatch) -> None:
        """Looks at an iteration's rewards before the policy is updated. UserError where no completion could be graded,
        the third time running or in all of the run; what the run had learned is saved then."""
        if any(r.reward is not None or r.status not in ("timeout", "error") for r in batch.rollouts):
            self.unrewarded, self.was_rewarded = 0, True
            return
        self.unrewarded += 1
        step, meeting = self.trainer.state.step, self.meeting
        why = self._why_not_graded(batch)
        if self.unrewarded == 1:
            meeting.display.warn(
                f"iteration {step + 1}: no completion could be graded: {why}; {RUNNING} such iterations running end "
                "the run"
            )
            if self.was_rewarded and self.writer.saved_step != step:  # as far as it was good
                self._entering("checkpoint")
                meeting.report(self.writer.finish())
                self.writer.start(self.trainer.state)
        if self.unrewarded == RUNNING or (step + 1 == self.total and not self.was_rewarded):
            which = f"iteration {step + 1}"
            if self.unrewarded > 1:
                which = f"iterations {step + 2 - self.unrewarded} to {step + 1}"
            function = self.trainer.config.reward.function
            what = f"{function}, or the data it needs" if function else "the data, or raise reward.step_seconds"
            raise UserError(
                f"reward: expected rewards, found that no completion of {which} could be graded: {why}; mend {what}, "
                "and give the same command with --resume",
                shared=True,
            )

    def _why_not_graded(self, batch: RolloutBatch) -> str:
        """Returns what a grader has said, on some rank, or else the status that most completions have."""
        said = self.trainer.world.gather(getattr(self.trainer.grader, "complaint", ""))
        status, count = Counter(r.status for r in batch.rollouts).most_common(1)[0]
        return next(filter(None, said), f"{count} of {len(batch.rollouts)} have status {status}")

    def run(self, show: Training) -> None:
        """Runs until `total` iterations are done. Raises Interrupted(signal's name) where it was told to leave; the
        state it had is saved then, and, where that can be, when an error ends it."""
        state, run_dir = self.trainer.state, self.trainer.config.run_dir
        self.was_rewarded = state.step > 0  # before it was resumed
        try:
            self._evaluate_late(show)
            while state.step < self.total:
                self._iteration(show)
                self.meeting()
        except Interrupted:
            self._save_and_leave()
        except BaseException as error:
            self._keep(isinstance(error, UserError) and error.shared)
            raise
        if self.trainer.world.is_main:
            write_ending(run_dir, "finished", step=state.step, total=self.total)

    def _iteration(self, show: Training) -> None:
        trainer, config = self.trainer, self.trainer.config
        batch, row = trainer.iteration(lambda done, asked: self._progress(show, done, asked))
        step, left = trainer.state.step, False
        self.whole = False  # until it is logged
        row["checkpoint/failures"] = self.meeting.failures
        if self.evaluation.due(step, self.total):
            try:
                row |= self._evaluate(show)
            except Interrupted:  # the resumed run will evaluate
                left = True
            except BaseException:  # and here, too
                self._log(batch, row)
                raise
        self._log(batch, row)
        show.iteration(row)
        self._warn_of_untaken_steps(row)
        self._advise_of_waiting(row)
        if left:
            raise Interrupted
        if step == self.total:
            self._entering("checkpoint")
            self.whole = False  # what cannot be saved now is not tried again
            self.writer.save(trainer.state, row)
            self.whole = True
        elif config.checkpoint.every and step % config.checkpoint.every == 0 and not self.unrewarded:
            self._entering("checkpoint")
            self.meeting.report(self.writer.finish())
            self.writer.start(trainer.state, row)

    def _log(self, batch: RolloutBatch, row: dict[str, float]) -> None:
        trainer, config, step = self.trainer, self.trainer.config, self.trainer.state.step
        if trainer.world.is_main:
            with one_line_errors(config.run_dir):
                if config.log.rollouts:
                    log_files.log_rollouts(config.run_dir, step, batch, config.log.token_details, trainer.tokenizer)
                log_files.append_metrics(config.run_dir, row)
                self.trackers.log(row, step)
        self.whole = True

    def _keep(self, shared: bool) -> None:
        """Saves what an error would lose, where all ranks meet it and the policy is whole. That it cannot be saved is
        said beside the error, and not in its place. shared: all ranks raise the error."""
        state = self.trainer.state
        if not (shared or self.trainer.world.size == 1):
            return
        try:
            self._entering("checkpoint")
            self.meeting.report(self.writer.finish())  # what is being written becomes a checkpoint first
            if self.whole and not self.unrewarded and state.step and self.writer.saved_step != state.step:
                self.writer.save(state)
        except Exception as error:
            self.meeting.display.warn(f"what the run had done since its last checkpoint is lost: {error}")

    def _warn_of_untaken_steps(self, row: dict[str, float]) -> None:
        """Says, the third time running, that forgetting does nothing, and what to do."""
        found = untaken_step(row)
        self.untaken = self.untaken + 1 if found else 0
        if found and self.untaken == RUNNING:
            why, remedy = found
            self.meeting.display.warn(
                f"iteration {row['step']}: forget step {why}, {RUNNING} times running, and such an iteration is "
                f"GRPO's at a higher price; {remedy}"
            )

    def _advise_of_waiting(self, row: dict[str, float]) -> None:
        """Says, the third time running, how long the last answers were waited for, and what would save that."""
        sampling = sum(seconds for key, seconds in row.items() if key.startswith("time/rollout_stage"))
        share = row["time/waiting_s"] / sampling
        if self.waiting <= RUNNING:
            self.waiting = self.waiting + 1 if share > WAITS else 0
        if self.waiting == RUNNING and can_carry(self.trainer.config, len(self.trainer.prompts)):
            self.waiting += 1
            saved = row["time/waiting_s"] / row["time/iteration_s"]
            self.meeting.display.say(
                f"iteration {row['step']}: sampling waits {share:.0%} of its time for the last tenth of the answers, "
                f"{RUNNING} times running; rollout.carry=1 rollout.quorum={QUORUM} rollout.in_flight={IN_FLIGHT:g} "
                f"would save up to {saved:.0%} of an iteration"
            )

    def _progress(self, show: Training, done: int, asked: int) -> None:
        """Hears from an engine while it samples."""
        self.watchdog.alive()
        if self.trainer.config.rollout.tensor_parallel == 1:  # else ranks of one engine wait for one another in it
            self.meeting.request.raise_if_asked()
        show.completions(done, asked)

    def _entering(self, phase: str) -> None:
        self.watchdog.enter(f"{phase} after iteration {self.trainer.state.step}")

    def _evaluate(self, show: Training) -> dict[str, float]:
        trainer = self.trainer
        self._entering("evaluation")
        return self.evaluation.run(
            trainer.policy,
            trainer.engine,
            trainer.state.policy_version,
            trainer.state.step,
            progress=lambda done, asked: self._progress(show, done, asked),
        )

    def _evaluate_late(self, show: Training) -> None:
        """Does the evaluation that an interrupted run still owes."""
        state, world = self.trainer.state, self.trainer.world
        if world.gather(self.evaluation.is_owed(state.step, self.total))[0]:
            values = self._evaluate(show)
            if world.is_main:
                log_files.add_to_last(self.trainer.config.run_dir, state.step, values)
                self.trackers.log(values, state.step)

    def _save_and_leave(self) -> None:
        name, state = self.meeting.who_asked(), self.trainer.state
        self._entering("checkpoint")
        self.meeting.report(self.writer.finish())
        if state.step and self.writer.saved_step != state.step:
            self.writer.save(state)
        owed = self.trainer.world.gather(self.evaluation.is_owed(state.step, self.total))[0]
        if state.step == self.total and not owed:
            return  # the signal came as the run ended
        if self.trainer.world.is_main:
            write_ending(self.trainer.config.run_dir, name, step=state.step, total=self.total)
        raise Interrupted(name)


def can_carry(config: Config, num_prompts: int) -> bool:
    """Returns whether the run may have `rollout.carry`, which it has not, and would gain by it: not where each sequence
    makes a step longer."""
    if config.rollout.engine == "hf" and default_device().type == "cpu":
        return False
    try:
        changed = make_config(config.model_dump(), {"rollout": {"carry": 1, "quorum": QUORUM, "in_flight": IN_FLIGHT}})
        num_iterations(changed, num_prompts)
    except UserError:
        return False
    return not config.rollout.carry


@contextmanager
def one_line_errors(run_dir: Path) -> Iterator[None]:
    """Makes a user's mistake, in one line, of a full or broken disk."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run folder {run_dir}: cannot be written: {error.strerror or error}; make room, and --resume"
        ) from None


def ending_of(error: BaseException) -> tuple[str, str]:
    """Returns (reason, message) for the marker of a run that an error has ended."""
    return "error", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
