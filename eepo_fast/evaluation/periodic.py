"""Evaluates the policy while it trains, every `evaluation.every` iterations and after the last.

    RUN/evaluations/step_000050/NAME.jsonl     every completion
    RUN/evaluations/step_000050/results.*      the tables
    RUN/evaluations/step_000050/sets.json      a digest a set: one whose problems or prompts have changed is begun again

The engine is given the policy's weights first, so that forgetful ones are never evaluated.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from eepo_fast.config import Config, RewardConfig
from eepo_fast.data.problems import Found
from eepo_fast.data.prompts import make_prompts
from eepo_fast.distributed import World
from eepo_fast.evaluation.samples import Sampler, sample_set
from eepo_fast.evaluation.sets import EvalSet, digest, load_set
from eepo_fast.evaluation.tables import make_results, write_results
from eepo_fast.policy.module import Policy
from eepo_fast.rewards import make_answer_grader, why_unreadable
from eepo_fast.rollout.engine import OnProgress, RolloutEngine, Sampling
from eepo_fast.types import Prompt, UserError, WeightsVersion


def load_sets(config: Config) -> list[EvalSet]:
    """Returns the sets; UserError, before anything is sampled, where one of them cannot be used."""
    return [load_set(name, spec, config.data) for name, spec in config.evaluation.data.items()]


def readable_sets(
    sets: Sequence[EvalSet], reward: RewardConfig, max_bad: float, world: World, say: Callable[[str], None]
) -> list[EvalSet]:
    """Returns the sets without problems whose answers cannot be read, on every rank; UserError where they are too many.
    say: is given lines on what is left out."""
    found = []
    with world.agree():
        if world.is_main:
            for eval_set in sets:
                with closing(make_answer_grader(eval_set.task, reward)) as grader:
                    unreadable = grader.unreadable([p.answer for p in eval_set.problems])
                read = Found(eval_set.problems, list(eval_set.left_out)).without(unreadable, why_unreadable)
                for line in read.checked(f"evaluation data {eval_set.name}", max_bad):
                    say(line)
                found.append(read.problems)
    shared = world.gather([[p.id for p in problems] for problems in found])[0]
    kept = [set(ids) for ids in shared]
    return [replace(s, problems=[p for p in s.problems if p.id in ids]) for s, ids in zip(sets, kept, strict=True)]


def make_eval_prompts(eval_set: EvalSet, config: Config, tokenizer: Any, longest: int | None) -> list[Prompt]:
    """Returns every problem as a prompt; none is left out for its length. longest: tokens that the model can read,
    prompt and completion together."""
    whole = config.data.model_copy(update={"max_prompt_tokens": sys.maxsize})
    prompts, _ = make_prompts(eval_set.problems, whole, tokenizer)
    room = None if longest is None else longest - config.rollout.max_new_tokens
    for prompt in prompts:
        if room is not None and len(prompt.token_ids) > room:
            raise UserError(
                f"rollout.max_new_tokens: problem {prompt.id} of {eval_set.name} has {len(prompt.token_ids)} tokens; "
                f"with {config.rollout.max_new_tokens} more it passes the {longest} positions of the model; lower it"
            )
    return prompts


class PeriodicEvaluation:
    def __init__(self, config: Config, sets: Sequence[EvalSet], tokenizer: Any, stops: Sequence[int], longest):
        """Makes the prompts of all sets. longest: see `make_eval_prompts`."""
        self.config, self.tokenizer = config, tokenizer
        self.sampling = Sampling(1.0, config.rollout.max_new_tokens, tuple(stops))
        self.sets = [(s, make_eval_prompts(s, config, tokenizer, longest)) for s in sets]

    @property
    def prompts(self) -> list[Prompt]:
        return [p for _, prompts in self.sets for p in prompts]

    def due(self, step: int, total: int) -> bool:
        every = self.config.evaluation.every
        return bool(every) and (step % every == 0 or step == total)

    def is_owed(self, step: int, total: int) -> bool:
        """Returns whether an evaluation was due after `step`, which is done, and is not there."""
        return step > 0 and self.due(step, total) and not is_done(self.config.run_dir, step)

    def run(
        self, policy: Policy, engine: RolloutEngine, version: int, step: int, *, progress: OnProgress | None = None
    ) -> dict[str, float]:
        """Returns the policy's metrics now, all ranks together. progress: told of sampling; may raise Interrupted."""
        started, evaluation = time.perf_counter(), self.config.evaluation
        engine.sync(policy.weights(), WeightsVersion(version, False))
        sampler = Sampler(
            engine, self.tokenizer, self.sampling, seed=0, world=policy.world,
            ranks_per_engine=self.config.rollout.tensor_parallel, progress=progress,
        )  # fmt: skip
        folder = evaluation_folder(self.config.run_dir, step)
        if policy.world.is_main:
            begin(folder, {s.name: digest(prompts) for s, prompts in self.sets})
        rows = {}
        for eval_set, prompts in self.sets:
            file = folder / f"{eval_set.name}.jsonl"
            with closing(make_answer_grader(eval_set.task, self.config.reward)) as grader:
                rows[eval_set.name] = sample_set(sampler, grader, prompts, evaluation.samples, file=file)
        settings = {
            "step": step, "samples": evaluation.samples, "temperature": self.sampling.temperature,
            "template": self.config.data.template, "max_new_tokens": self.sampling.max_new_tokens,
            "grading": self.config.reward.mode, "data": {s.name: s.sha256 for s, _ in self.sets},
        }  # fmt: skip
        results = make_results(self.config.run.name, settings, rows, evaluation.k)
        if policy.world.is_main:
            write_results(folder, results)
        metrics = {"time/evaluation_s": time.perf_counter() - started}
        for name, part in results["sets"].items():
            metrics |= {f"eval/{name}/{metric}": cell["value"] for metric, cell in part["metrics"].items()}
            metrics |= {f"eval/{name}/{key}": part[key] for key in ("length", "truncated_fraction")}
        return metrics


def evaluation_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "evaluations" / f"step_{step:06d}"


def begin(folder: Path, digests: dict[str, str]) -> None:
    """Makes the folder, and keeps of an interrupted evaluation the completions to what is still the same set."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "sets.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or cut short: then nothing is known of what lies here
        before = {}
    for name, value in digests.items():
        if before.get(name) != value:
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
    file.write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def is_done(run_dir: Path, step: int) -> bool:
    return (evaluation_folder(run_dir, step) / "results.json").is_file()


def remove_newer(run_dir: Path, step: int) -> None:
    """Removes evaluations after `step`, whose iterations a resumed run does again."""
    for folder in (run_dir / "evaluations").glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(folder)
