"""The simulation of a run with rollout.carry, iteration after iteration, as eepo_fast/algorithm/in_flight.py and
stages.py have it; what a stage and its passes cost is simulation.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from simulation import Answer, Costs, Setup, Stage, Waits, one_stage, streamed_unlearning


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
    """Simulates one run."""

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
