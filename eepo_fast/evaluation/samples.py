"""Samples and grades a set: every completion is kept, and an interrupted evaluation goes on where it stopped.

A completion's row has id, sample (None: greedy), completion, num_tokens, finished, reward (None: missing), status.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eepo_fast.data.prompts import completion_text
from eepo_fast.distributed import World
from eepo_fast.rewards import Grader
from eepo_fast.rollout.engine import OnProgress, RolloutEngine, Sampling, make_requests
from eepo_fast.rollout.exchange import generate_everywhere
from eepo_fast.types import Prompt, Rollout

EVALUATION_STAGE = 0  # no training stage has this number, and so none has an evaluation's seeds
COMPLETIONS_AT_ONCE = 2048  # graded and written together: what an interruption may cost

Row = dict[str, Any]


@dataclass(frozen=True)
class Sampler:
    engine: RolloutEngine
    tokenizer: Any
    sampling: Sampling
    """How samples are drawn; the greedy completion differs in its temperature, 0."""
    seed: int
    world: World = field(default_factory=World)
    ranks_per_engine: int = 1
    progress: OnProgress | None = None
    """Called with the engine's progress while it samples; may raise Interrupted."""

    def decode(self, rollout: Rollout) -> str:
        return completion_text(self.tokenizer, rollout.token_ids, self.sampling.stop_token_ids)

    def sample(self, prompts: Sequence[Prompt], num_samples: int, greedy: bool) -> list[Rollout]:
        """Returns num_samples of each prompt, or its greedy completion; the same on every rank."""
        assert not self.engine.weights_version.forgotten, "an evaluation must never see forgetful weights"
        return generate_everywhere(
            self.engine,
            make_requests(prompts, EVALUATION_STAGE, range(1 if greedy else num_samples), self.seed, 0),
            replace(self.sampling, temperature=0.0) if greedy else self.sampling,
            expected_tokens=[len(p.token_ids) for p in prompts],
            world=self.world,
            ranks_per_engine=self.ranks_per_engine,
            decode=self.decode,
            progress=self.progress,
        )


def sample_set(
    sampler: Sampler,
    grader: Grader,
    prompts: Sequence[Prompt],
    num_samples: int,
    *,
    file: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Returns a greedy completion and `num_samples` samples of every prompt, graded; on every rank. With a `file`, rows
    that it holds are kept, and the rest is added to it, some prompts at a time."""
    rows = _resume(file, prompts, num_samples) if file and sampler.world.is_main else []
    rows = sampler.world.gather(rows)[0]
    done = {row["id"] for row in rows}
    rest = [p for p in prompts if p.id not in done]
    at_once = max(1, COMPLETIONS_AT_ONCE // (1 + num_samples))
    if progress:
        progress(len(prompts) - len(rest), len(prompts))
    for start in range(0, len(rest), at_once):
        fresh = list(_graded(sampler, grader, rest[start : start + at_once], num_samples))
        rows += fresh
        if file and sampler.world.is_main:
            append_rows(file, fresh)
        if progress:
            progress(len(prompts) - len(rest) + start + min(at_once, len(rest) - start), len(prompts))
    return rows


def _graded(sampler: Sampler, grader: Grader, prompts: Sequence[Prompt], num_samples: int) -> Iterator[Row]:
    rollouts = sampler.sample(prompts, num_samples, greedy=True)
    kinds: list[int | None] = [None] * len(rollouts)
    if num_samples:
        sampled = sampler.sample(prompts, num_samples, greedy=False)
        rollouts, kinds = rollouts + sampled, kinds + [r.sample_index for r in sampled]
    world = sampler.world
    mine = rollouts[world.rank :: world.size]
    graded = grader.grade([r.prompt.problem for r in mine], [r.completion for r in mine])
    grades: list = [None] * len(rollouts)
    for rank, share in enumerate(world.gather(graded)):
        grades[rank :: world.size] = share
    for rollout, kind, grade in zip(rollouts, kinds, grades, strict=True):
        yield {
            "id": rollout.prompt.id,
            "sample": kind,
            "completion": rollout.completion,
            "num_tokens": rollout.num_tokens,
            "finished": rollout.finished,
            "reward": grade.reward if grade.status not in ("timeout", "error") else None,
            "status": grade.status,
        }


def _resume(file: Path, prompts: Sequence[Prompt], num_samples: int) -> list[Row]:
    """Returns the rows of the prompts that `file` holds in full, and rewrites it without the others."""
    if not file.is_file():
        return []
    rows = []
    for line in file.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:  # cut short when the evaluation was interrupted, perhaps inside a character
            continue
    counts, wanted = Counter(row["id"] for row in rows), {p.id for p in prompts}
    rows = [row for row in rows if row["id"] in wanted and counts[row["id"]] == 1 + num_samples]
    temporary = file.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    append_rows(temporary, rows)
    temporary.replace(file)
    return rows


def append_rows(file: Path, rows: Sequence[Row]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        out.flush()
        os.fsync(out.fileno())
