"""The simulation of an iteration: seconds of its phases, from lengths of answers and what steps and passes cost.

Assumed: lengths are the same whoever samples; prompts are dealt to engines in turn; unlearning beside decoding gets
what decoding leaves of the GPU's multiplications, and slows it by INTERFERENCE. Left out: grading, the guard's scores
of a few answers, and the host's work beside a step's `fixed_s`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
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


# Iterations with rollout.carry


@dataclass(eq=False)
class Flying:
    """Holds an answer as far as it has come."""

    prompt: int
    """The number of its group, of all that the run begins."""
    prompt_tokens: int
    tokens: int
    begun: int
    """The iteration in which it was begun."""
    said: list[tuple[int, int]] = field(default_factory=list)
    """(iteration, how many tokens) of each stage that it was written in."""

    @property
    def num_said(self) -> int:
        return sum(count for _, count in self.said)

    @property
    def has_ended(self) -> bool:
        return self.num_said == self.tokens


class Carried(NamedTuple):
    """Says what one of a run's iterations with carry is like."""

    phases: dict[str, float]
    tokens: int
    """That are trained on, prompts included."""
    staleness: float
    """Mean age of a token that is trained on, in iterations."""
    carried: float
    """Share of the answers worked on that go on in the next iteration."""
    held: int
    """Groups that are kept."""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


Draw = Callable[[int], Sequence[tuple[int, int]]]
"""Gives (prompt tokens, answer tokens) of the samples of the run's nth group."""


@dataclass
class CarriedRun:
    """Simulates iteration after iteration of one run, as eepo_fast/algorithm/in_flight.py and stages.py have it."""

    draw: Draw
    costs: Costs
    setup: Setup
    eepo: bool
    quorum: float = 0.9
    carry: int = 1
    in_flight: float = 0.5
    streamed: bool = False
    groups: list[list[Flying]] = field(default_factory=list)
    step: int = 0
    begun: int = 0
    """How many groups the run has begun."""

    def write(
        self,
        flying: Sequence[Flying],
        quorum: float,
        must: Iterable[Flying] = (),
        counts: Iterable[Flying] | None = None,
    ) -> list[Stage]:
        """Samples one stage, and notes what it has written."""
        answers = []
        for number, f in enumerate(flying):
            # what is read again is a prompt of its own, on the same engine
            own = f.prompt if not f.said else f.prompt + (number + 1) * self.setup.engines * 10**6
            answers.append(Answer(own, f.prompt_tokens + f.num_said, f.tokens - f.num_said))
        pairs = list(zip(answers, flying, strict=True))
        new = {id(a) for a, f in pairs if not f.said}

        def of(chosen: Iterable[Flying]) -> set[int]:
            known = set(map(id, chosen))
            return {id(a) for a, f in pairs if id(f) in known}

        waits = Waits(of(must), None if counts is None else of(counts))
        stages = one_stage(answers, self.costs, self.setup, quorum, waits)
        written = {id(a): n for stage in stages for a, n in stage.left}
        for answer, f in pairs:
            f.said.append((self.step, written.get(id(answer), answer.tokens)))
        for stage in stages:
            stage.ends = [end for end in stage.ends if id(end[1]) in new]  # those alone are unlearned
        return stages

    def last_stage(self, flying: Sequence[Flying]) -> float:
        """Returns the seconds of the iteration's last stage."""
        size = self.setup.prompts
        if len(self.groups) <= size:
            return slowest(self.write(flying, 1.0))
        seconds = slowest(self.write(flying, self.quorum, [f for f in flying if self.step - f.begun >= self.carry]))
        while (found := self.nearest(size))[0]:
            rest = [f for f in flying if not f.has_ended]
            seconds += slowest(self.write(rest, found[1], counts=found[0]))
        return seconds

    def nearest(self, size: int) -> tuple[list[Flying], float]:
        """Returns answers of which a share has to end yet for so many groups to be whole; and that share."""
        unended = [[f for f in group if not f.has_ended] for group in self.groups]
        if (missing := size - unended.count([])) <= 0:
            return [], 0.0
        fewest = sorted(len(fs) for fs in unended if fs)[missing - 1]
        found = [f for fs in unended if len(fs) <= fewest for f in fs]
        return found, missing / len(found)

    def iteration(self) -> Carried:
        costs, size, group_size = self.costs, self.setup.prompts, self.setup.group_size
        count = size + math.ceil(self.in_flight * size - 1e-9) - len(self.groups)
        carried = [f for group in self.groups for f in group if not f.has_ended]
        new = []
        for number in range(self.begun, self.begun + count):
            new.append([Flying(number, asked, tokens, self.step) for asked, tokens in self.draw(number)])
        self.begun += count
        self.groups += new
        phases, unlearned = {"sync": costs.sync_s}, []
        if not self.eepo:
            flying = [*carried, *(f for group in new for f in group)]
            phases["stage 1"] = self.last_stage(flying)
        else:
            half = group_size // 2
            first = [f for group in new for f in group[:half]]
            stages = self.write([*carried, *first], self.quorum)
            unlearned = [f for f in first if f.has_ended]
            rest, slower = count_tokens(unlearned) * costs.train_token_s, 0.0
            if self.streamed:
                rest, slower = streamed_unlearning(stages, costs, self.setup)
            phases |= {"stage 1": slowest(stages) + slower, "unlearn": rest + costs.unlearn_s, "forget": costs.forget_s}
            cut = [f for f in (*carried, *first) if not f.has_ended]
            flying = [*carried, *(f for group in new for f in group)]
            phases["stage 2"] = self.last_stage([*cut, *(f for group in new for f in group[half:])])
        trained = [group for group in self.groups if all(f.has_ended for f in group)][:size]
        gone = set(map(id, trained))
        self.groups = [group for group in self.groups if id(group) not in gone]
        answers = [f for group in trained for f in group]
        tokens, known = count_tokens(answers), count_tokens(set(unlearned).intersection(answers))
        phases["old log-probs"] = (tokens - known) * (1 - 1 / self.setup.updates) * costs.forward_token_s
        phases["reference"] = tokens * costs.reference_token_s
        phases["update"] = tokens * costs.train_token_s + self.setup.updates * costs.update_s
        ages = [(self.step - step, n) for f in answers for step, n in f.said]
        staleness = sum(age * n for age, n in ages) / sum(n for _, n in ages)
        left = sum(not f.has_ended for group in self.groups for f in group)
        self.step += 1
        return Carried(phases, tokens, staleness, left / len(flying), len(self.groups))


def count_tokens(flying: Iterable[Flying]) -> int:
    return sum(f.prompt_tokens + f.tokens for f in flying)


def slowest(stages: Iterable[Stage]) -> float:
    return max((stage.seconds for stage in stages), default=0.0)


def carried_iterations(run: CarriedRun, warm_up: int, count: int) -> Iterator[Carried]:
    """Yields iterations of a run that has become steady."""
    for _ in range(warm_up):
        run.iteration()
    for _ in range(count):
        yield run.iteration()
