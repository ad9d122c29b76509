"""Iterations with rollout.carry beside those without: `bench_iteration.py --carry`.

Four trainers in turns, GRPO and EEPO, each with and without; one policy and one engine for all, since lengths are fixed
and nothing depends on what is learnt. Each draws its prompts from as many as EPOCH iterations train on, so that sums
over EPOCH rounds are of the same prompts. carried_simulation.py, calibrated on GRPO's iterations without
carry, foretells the seconds of sampling of the others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
from bench_iteration import Trainer, fix_lengths, make_config, make_prompts, make_trainer, timed
from carried_simulation import CarriedRun
from check_simulation import non_negative_fit
from common import record
from simulation import Answer, Costs, Setup, StepTime, iteration, sample_continuous, sample_static

from eepo_fast.data.problems import next_prompts
from eepo_fast.types import Cursor, Prompt

NAMES = ("grpo", "grpo_carry", "eepo", "eepo_carry")
EPOCH = 4
WARM_UP = 4
GOAL, GOAL_OF_SIMULATION = 0.85, 0.15


def order_of(prompts: Sequence[Prompt], size: int) -> Iterator[Prompt]:
    """Yields prompts as a run begins them."""
    cursor = Cursor()
    while True:
        chosen, cursor = next_prompts(cursor, size, len(prompts), 0, whole_batches=True)
        yield from (prompts[i] for i in chosen)


def sampling(row: dict[str, float]) -> float:
    return row["time/rollout_stage1_s"] + row.get("time/rollout_stage2_s", 0.0)


class Bench:
    def __init__(self, args: argparse.Namespace, model, tokenizer, pairs: Sequence[Sequence[int]]):
        self.args, self.lengths = args, [n for _, n in pairs]
        self.prompts = make_prompts([p for p, _ in pairs], EPOCH * args.prompts, model.config.vocab_size)
        fix_lengths(self.lengths, self.prompts, args.group_size)
        self.place = {p.id: i for i, p in enumerate(self.prompts)}
        self.trainers: dict[str, Trainer] = {}
        for name in args.only or NAMES:
            carry = {"quorum": args.quorum, "carry": 1, "in_flight": args.in_flight} if "carry" in name else {}
            config = make_config(
                eepo="eepo" in name, engine=args.engine, prompts=args.prompts, group_size=args.group_size,
                longest=max(self.lengths), micro_batch_tokens=args.micro_batch_tokens, **({"quorum": 1.0} | carry),
            )  # fmt: skip
            if not self.trainers:
                first = make_trainer(config, model, tokenizer, self.prompts, checkpointing=args.checkpointing)
            shared = {key: getattr(first, key) for key in ("policy", "engine", "reference", "grader", "prompts")}
            self.trainers[name] = Trainer(config, **shared, tokenizer=tokenizer, stop_token_ids=[])
        self.static = args.engine == "hf"
        engines, most = 1, first.config.rollout.max_sequences
        self.setup = Setup(args.prompts, args.group_size, 2, engines, most, args.micro_batch_tokens, self.static)
        self.rounds = 0
        self.rows: dict[str, list[dict[str, float]]] = {name: [] for name in self.trainers}
        self.ticks: list[list[float]] = []

    def round(self, number: int) -> None:
        for name in list(self.trainers)[:: 1 if number % 2 else -1]:
            ticks = [time.perf_counter()]
            row = timed(self.trainers[name], lambda *_, ticks=ticks: ticks.append(time.perf_counter()))
            self.rows[name].append(row)
            if name == "grpo":
                self.ticks.append(ticks)
        self.rounds += 1
        seconds = {name: f"{rows[-1]['seconds']:.1f}, {sampling(rows[-1]):.1f}" for name, rows in self.rows.items()}
        print(number, seconds, flush=True)

    def group(self, prompt: Prompt) -> list[tuple[int, int]]:
        size = self.args.group_size
        first = self.place[prompt.id] * size
        return [(len(prompt.token_ids), self.lengths[(first + k) % len(self.lengths)]) for k in range(size)]

    def answers(self, number: int) -> list[Answer]:
        """Returns those of an iteration without carry."""
        order, size = order_of(self.prompts, self.args.prompts), self.args.prompts
        groups = [next(order) for _ in range((number + 1) * size)][number * size :]
        return [Answer(i, *drawn) for i, prompt in enumerate(groups) for drawn in self.group(prompt)]

    def calibrated(self) -> Costs:
        """Returns what GRPO's sampling without carry costs: a step by its rows and cached tokens, and its beginning."""
        anything = Costs(StepTime(1.0, 0.0, 0.0), 0.0, 0.0, 0.0)
        features, durations, firsts, prompt_tokens = [], [], [], []
        for number in range(WARM_UP, len(self.ticks)):
            answers = self.answers(number)
            stage = (sample_static if self.static else sample_continuous)(answers, anything, self.setup)
            steps = [[1.0, rows, at + rows * (k - n / 2)] for n, rows, at in stage.steps for k in range(n)]
            found = np.diff(self.ticks[number])[: len(steps)]
            features += steps[1 : len(found)]
            durations += found[1:].tolist()
            firsts.append(float(found[0]))
            prompt_tokens.append(sum(a.prompt_tokens for a in answers[:: self.args.group_size]))
        fixed, row, cached = non_negative_fit(np.array(features), np.array(durations))
        prefill = statistics.median(firsts) / statistics.mean(prompt_tokens)
        return Costs(StepTime(float(fixed), float(row), float(cached)), prefill, 0.0, 0.0)

    def foretold(self, name: str, costs: Costs) -> list[float]:
        """Returns the simulated seconds of sampling of the measured iterations."""
        eepo, rounds = "eepo" in name, range(WARM_UP, len(self.ticks))
        if "carry" not in name:
            found = [iteration(self.answers(n), costs, self.setup, eepo=eepo).phases for n in rounds]
        else:
            order = order_of(self.prompts, self.args.prompts)
            run = CarriedRun(
                lambda number: self.group(next(order)), costs, self.setup, eepo=eepo, quorum=self.args.quorum,
                in_flight=self.args.in_flight,
            )  # fmt: skip
            found = [run.iteration().phases for _ in range(len(self.ticks))][WARM_UP:]
        return [sum(phases.get(f"stage {s}", 0.0) for s in (1, 2)) for phases in found]

    def ratio(self, one: str, other: str, seconds) -> dict[str, float]:
        """Returns the ratio of sums over all rounds, and the lowest and highest of sums over EPOCH rounds."""

        def of(begin: int, end: int) -> float:
            return sum(map(seconds, self.rows[one][begin:end])) / sum(map(seconds, self.rows[other][begin:end]))

        parts = [of(k, k + EPOCH) for k in range(WARM_UP, self.rounds, EPOCH)]
        return {"ratio": of(WARM_UP, self.rounds), "lowest": min(parts), "highest": max(parts)}

    def result(self) -> dict:
        found: dict = {"rounds": self.rounds - WARM_UP}
        for part, seconds in (("sampling", sampling), ("iteration", lambda row: row["seconds"])):
            for one, other in (
                ("eepo_carry", "eepo"),
                ("grpo_carry", "grpo"),
                ("eepo_carry", "grpo"),
                ("eepo_carry", "grpo_carry"),
                ("eepo", "grpo"),
            ):
                if {one, other} <= self.rows.keys():
                    found[f"{part}: {one} over {other}"] = self.ratio(one, other, seconds)
        costs = self.calibrated() if self.ticks else None  # from GRPO's
        found |= {"step": vars(costs.step)} if costs else {}
        for name, rows in self.rows.items():
            measured = sum(map(sampling, rows[WARM_UP:]))
            carried = {
                key: statistics.mean(row[key] for row in rows[WARM_UP:])
                for key in ("rollout/carried_fraction", "rollout/held_groups", "rollout/staleness_mean")
                if "carry" in name
            }
            found[name] = {
                "seconds": statistics.mean(row["seconds"] for row in rows[WARM_UP:]),
                "sampling_s": measured / found["rounds"],
            } | carried
            if costs:
                foretold = sum(self.foretold(name, costs))
                found[name] |= {"foretold_s": foretold / found["rounds"], "error": foretold / measured - 1}
        return found


def run(args: argparse.Namespace, model, tokenizer, pairs: Sequence[Sequence[int]]) -> None:
    bench = Bench(args, model, tokenizer, pairs)
    for number in range(WARM_UP + args.pairs * EPOCH):
        bench.round(number)
    row = bench.result()
    top = {"eepo_carry_over_eepo_sampling": row["sampling: eepo_carry over eepo"]["ratio"], "goal": GOAL}
    if bench.ticks:
        worst = max(abs(row[name]["error"]) for name in bench.trainers)
        top |= {"worst_error": worst, "goal_error": GOAL_OF_SIMULATION}
    record([row], args.out, **top)
