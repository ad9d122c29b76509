"""The simulation of an iteration: seconds of its phases, from lengths of answers and what steps and passes cost.

Assumed: lengths are the same whoever samples; prompts are dealt to engines in turn; unlearning beside decoding gets
what decoding leaves of the GPU's multiplications, and slows it by INTERFERENCE. Left out: grading, the guard's scores
of a few answers, and the host's work beside a step's `fixed_s`.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from eepo_fast.rollout.engine import num_preemptible
from eepo_fast.rollout.exchange import shared_out

INTERFERENCE = 0.1  # decoding takes so much longer while unlearning goes on beside it


class Answer(NamedTuple):
    prompt: int
    """The number of its prompt."""
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class StepTime:
    """Holds what one decoding step takes, in seconds."""

    fixed_s: float
    sequence_s: float
    """Seconds a sequence: its token is multiplied with the weights."""
    cached_token_s: float
    """Seconds a token whose keys and values are read."""
    weights_s: float = 0.0
    """Seconds that reading the weights takes beside `fixed_s`."""
    overlapped: bool = False
    """Whether what is read and what is multiplied go on at once."""

    def __call__(self, sequences: float, cached: float) -> float:
        reading, multiplying = self.weights_s + self.cached_token_s * cached, self.sequence_s * sequences
        return self.fixed_s + (max(reading, multiplying) if self.overlapped else reading + multiplying)

    def busy(self, sequences: float, cached: float) -> float:
        """Returns the share of a step in which something is multiplied."""
        return self.sequence_s * sequences / self(sequences, cached)


@dataclass(frozen=True)
class Costs:
    step: StepTime
    prefill_token_s: float
    forward_token_s: float
    """Seconds of one token of the batch, all ranks at work."""
    train_token_s: float
    """Seconds of such a token forward and backward."""
    reference_token_s: float = 0.0
    """Seconds of such a token in the reference of the KL term."""
    update_s: float = 0.0
    """Seconds an update takes beside the tokens: gradients and weights on the wire, the optimizer."""
    unlearn_s: float = 0.0
    """The same of the unlearning pass."""
    sync_s: float = 0.0
    forget_s: float = 0.0
    first_step_s: float = 0.0
    """Seconds that a stage's beginning costs beside its prefill."""


@dataclass(frozen=True)
class Setup:
    prompts: int
    group_size: int
    updates: int
    engines: int
    max_sequences: int
    stream_tokens: int
    static: bool = False
    """Whether it is the embedded engine: a batch begins together, and rows are dropped when half of them have ended."""


@dataclass
class Stage:
    seconds: float = 0.0
    ends: list[tuple[float, Answer, float]] = field(default_factory=list)
    """(time, answer, how busy the GPU's multipliers were) of the answers that ended, in order."""
    left: list[tuple[Answer, int]] = field(default_factory=list)
    """(which, tokens so far) of those that were preempted."""
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    """(how many alike, sequences, cached tokens)."""
    running: list[tuple[float, int]] = field(default_factory=list)
    """(time, how many answers were being written)."""


class Waits(NamedTuple):
    """Says which answers a stage waits for beside its quorum, and which the quorum is a share of, by their `id`s."""

    must: Collection[int] = ()
    counts: Collection[int] | None = None
    """None: all."""

    def preemptible(self, answers: Sequence[Answer], quorum: float) -> int:
        return num_preemptible(self.counted(answers), quorum)

    def counted(self, answers: Iterable[Answer]) -> int:
        return sum(self.counts is None or id(a) in self.counts for a in answers)

    def are_over(self, running: Sequence[Answer], preemptible: int) -> bool:
        if self.counts is None and len(running) > preemptible:
            return False
        return self.counted(running) <= preemptible and not any(id(a) in self.must for a in running)


ALL = Waits()


def one_step(answers: Sequence[Answer], costs: Costs) -> Stage:
    """Samples one token of each, which is what an engine does that waits for none of its own."""
    cached = sum(a.prompt_tokens for a in answers)
    seconds = costs.first_step_s + cached * costs.prefill_token_s + costs.step(len(answers), cached)
    stage = Stage(seconds, steps=[(1, len(answers), cached)], running=[(0.0, len(answers)), (seconds, 0)])
    stage.ends = [(seconds, a, 0.0) for a in answers if a.tokens == 1]
    stage.left = [(a, 1) for a in answers if a.tokens > 1]
    return stage


def sample_continuous(
    answers: Sequence[Answer], costs: Costs, setup: Setup, quorum: float = 1.0, waits: Waits = ALL
) -> Stage:
    """Samples as an engine does whose rows are taken by the next answer as soon as they are free."""
    stage, waiting = Stage(), list(answers)[::-1]
    preemptible, steps_done, cached, seen = waits.preemptible(answers, quorum), 0, 0.0, set()
    ends: list[tuple[int, int, Answer]] = []  # (step, number, which)
    stage.seconds = costs.first_step_s
    if waits.are_over(answers, preemptible):
        return one_step(answers, costs)
    while waiting or ends:
        while waiting and len(ends) < setup.max_sequences:
            answer = waiting.pop()
            if answer.prompt not in seen:  # one prefill for all its samples
                seen.add(answer.prompt)
                stage.seconds += answer.prompt_tokens * costs.prefill_token_s
            heapq.heappush(ends, (steps_done + answer.tokens, len(waiting), answer))
            cached += answer.prompt_tokens
        stage.running.append((stage.seconds, len(ends)))
        step, _, answer = heapq.heappop(ends)
        count, rows = step - steps_done, len(ends) + 1
        at = cached + rows * count / 2
        stage.seconds += count * costs.step(rows, at)
        stage.steps.append((count, rows, at))
        cached += rows * count - answer.prompt_tokens - answer.tokens
        steps_done = step
        stage.ends.append((stage.seconds, answer, costs.step.busy(rows, at)))
        tied = ends and ends[0][0] == steps_done  # ends in the same step
        if waiting or tied or (waits.counts is None and len(ends) > preemptible):
            continue
        if waits.are_over([a for *_, a in ends], preemptible):
            stage.left = [(a, a.tokens - (end - steps_done)) for end, _, a in ends]
            break
    stage.running.append((stage.seconds, 0))
    return stage


def sample_static(
    answers: Sequence[Answer], costs: Costs, setup: Setup, quorum: float = 1.0, waits: Waits = ALL
) -> Stage:
    stage = Stage()
    ordered = sorted(answers, key=lambda a: a.prompt_tokens)
    for start in range(0, len(ordered), setup.max_sequences):
        batch = ordered[start : start + setup.max_sequences]
        widest = max(a.prompt_tokens for a in batch)
        stage.seconds += costs.first_step_s + len({a.prompt for a in batch}) * widest * costs.prefill_token_s
        rows, preemptible, done = len(batch), waits.preemptible(batch, quorum), 0
        if waits.are_over(batch, preemptible):
            step = one_step(batch, costs)
            stage.seconds, stage.left = stage.seconds + step.seconds, [*stage.left, *step.left]
            stage.ends += step.ends
            continue
        by_length = sorted(batch, key=lambda a: a.tokens)
        for i, answer in enumerate(by_length):
            stage.running.append((stage.seconds, len(batch) - i))
            count, at = answer.tokens - done, rows * (widest + (done + answer.tokens) / 2)
            stage.seconds += count * costs.step(rows, at)
            stage.steps.append((count, rows, at))
            done, running = answer.tokens, len(batch) - i - 1
            stage.ends.append((stage.seconds, answer, costs.step.busy(rows, at)))
            if running and by_length[i + 1].tokens == done:  # ends in the same step
                continue
            if waits.are_over(by_length[i + 1 :], preemptible):
                stage.left += [(a, done) for a in by_length[i + 1 :]]
                break
            if running <= rows // 2:
                rows = running
    stage.running.append((stage.seconds, 0))
    return stage


def one_stage(
    answers: Sequence[Answer], costs: Costs, setup: Setup, quorum: float = 1.0, waits: Waits = ALL
) -> list[Stage]:
    """Samples one stage on every engine."""
    shares: list[list[Answer]] = [[] for _ in range(setup.engines)]
    for answer in answers:
        shares[answer.prompt % setup.engines].append(answer)
    sample = sample_static if setup.static else sample_continuous
    quorums = [quorum] * len(shares)
    if waits.counts is not None:
        counted = list(map(waits.counted, shares))
        parts = zip(shared_out(quorum, counted), counted, strict=True)
        quorums = [part / max(1, count) for part, count in parts]
    return [sample(share, costs, setup, q, waits) for share, q in zip(shares, quorums, strict=True) if share]


def streamed_unlearning(stages: Sequence[Stage], costs: Costs, setup: Setup) -> tuple[float, float]:
    """Returns (seconds left of the pass when the last answer has ended, by how much sampling took longer)."""
    ends = sorted((end for stage in stages for end in stage.ends), key=lambda end: end[0])
    over = max(stage.seconds for stage in stages)
    free = beside = late = tokens = 0.0
    for when, answer, busy in ends:
        tokens += answer.prompt_tokens + answer.tokens
        if tokens >= setup.stream_tokens and when < over:
            seconds, speed = tokens * costs.train_token_s, max(1e-3, 1 - busy)
            begin = max(free, when)
            free = begin + seconds / speed
            there = max(0.0, min(free, over) - begin)  # beside sampling
            beside, late = beside + there, late + seconds - there * speed  # the rest at full speed
            tokens = 0.0
    return late + tokens * costs.train_token_s, beside * INTERFERENCE


class Iteration(NamedTuple):
    phases: dict[str, float]
    """Seconds by phase."""
    stages: list[list[Stage]]
    """Each stage's engines."""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def iteration(
    answers: Sequence[Answer], costs: Costs, setup: Setup, *, eepo: bool, streamed: bool = False, quorum: float = 1.0
) -> Iteration:
    """Simulates an iteration. answers: of the whole batch, a prompt's own side by side."""
    tokens = sum(a.prompt_tokens + a.tokens for a in answers)
    found = {"sync": costs.sync_s}
    if not eepo:
        both = [one_stage(answers, costs, setup)]
        found["stage 1"] = max(s.seconds for s in both[0])
        # the first mini-batch is scored by its own update
        found["old log-probs"] = tokens * (1 - 1 / setup.updates) * costs.forward_token_s
    else:
        half = setup.group_size // 2
        first = [a for i, a in enumerate(answers) if i % setup.group_size < half]
        second = [a for i, a in enumerate(answers) if i % setup.group_size >= half]
        stages = one_stage(first, costs, setup, quorum)
        left = [one for stage in stages for one in stage.left]
        unfinished = {id(a) for a, _ in left}
        heard = sum(a.prompt_tokens + a.tokens for a in first if id(a) not in unfinished)
        rest, slower = streamed_unlearning(stages, costs, setup) if streamed else (heard * costs.train_token_s, 0.0)
        found["stage 1"] = max(s.seconds for s in stages) + slower
        found["unlearn"] = rest + costs.unlearn_s
        found["forget"] = costs.forget_s
        # stragglers: what they have said is read again as a prompt of their own
        more = [Answer(a.prompt, a.prompt_tokens + n, a.tokens - n) for a, n in left]
        shifted = [m._replace(prompt=m.prompt + (i + 1) * setup.prompts) for i, m in enumerate(more)]
        both = [stages, one_stage([*shifted, *second], costs, setup)]
        found["stage 2"] = max(s.seconds for s in both[1])
        late = sum(m.prompt_tokens + m.tokens for m in more) * (1 - 1 / setup.updates)
        found["old log-probs"] = late * costs.forward_token_s
    found["reference"] = tokens * costs.reference_token_s
    found["update"] = tokens * costs.train_token_s + setup.updates * costs.update_s
    return Iteration(found, both)
