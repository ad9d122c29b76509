"""Unbiased pass@k and the sampling that it is estimated from. Greedy accuracy and sampled pass@k are kept apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from eepo_fast.rewards import Grader
from eepo_fast.rollout.engine import RolloutEngine, Sampling, make_requests
from eepo_fast.types import Prompt

EVALUATION_STAGE = 0  # seeds of an evaluation never meet those of a training stage


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that k of n samples, c of them right, hold a right one."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k: expected k in [1, {num_samples}], found {k}")
    if num_samples - num_correct < k:
        return 1.0
    wrong = range(num_samples - num_correct + 1, num_samples + 1)
    return 1.0 - math.prod(1.0 - k / i for i in wrong)


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    grader: Grader,
    tokenizer,
    stop_token_ids: Sequence[int],
    *,
    num_samples: int,
    ks: Sequence[int],
    max_new_tokens: int,
    seed: int,
) -> dict[str, float]:
    """`greedy`, `pass@k` for every k, and `unique` (different completions a prompt), at temperature 1, as fractions."""
    assert not engine.weights_version.forgotten, "an evaluation must never see forgetful weights"
    greedy = _correct(engine, prompts, grader, tokenizer, Sampling(0.0, max_new_tokens, tuple(stop_token_ids)), 1, seed)
    sampling = Sampling(1.0, max_new_tokens, tuple(stop_token_ids))
    sampled = _correct(engine, prompts, grader, tokenizer, sampling, num_samples, seed)
    result = {"greedy": statistics.fmean(right for rights, _ in greedy for right in rights)}
    for k in ks:
        result[f"pass@{k}"] = statistics.fmean(pass_at_k(num_samples, int(sum(rights)), k) for rights, _ in sampled)
    result["unique"] = statistics.fmean(unique / num_samples for _, unique in sampled)
    return result


def _correct(
    engine, prompts, grader, tokenizer, sampling: Sampling, n: int, seed: int
) -> list[tuple[list[float], int]]:
    """For each prompt: the reward of its n samples, and how many different completions they are."""
    rollouts = engine.generate(make_requests(prompts, EVALUATION_STAGE, range(n), seed, 0), sampling)
    texts = [tokenizer.decode(r.token_ids, skip_special_tokens=True) for r in rollouts]
    grades = grader.grade([r.prompt.problem for r in rollouts], texts)
    return [([g.reward for g in grades[i : i + n]], len(set(texts[i : i + n]))) for i in range(0, len(rollouts), n)]
