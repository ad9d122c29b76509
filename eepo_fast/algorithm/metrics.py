"""The numbers of an iteration, under the keys that `metrics.jsonl` keeps, and the run's log files.

NaN where a number does not exist (retention without a forget step); JSON has no NaN, so it is written as null.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from eepo_kernels import ForgetStats, TokenStats
from torch import Tensor

from eepo_fast.algorithm.forget import Unlearning
from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.algorithm.losses import PolicyTokens, low_variance_kl
from eepo_fast.algorithm.ratio import has_finite_logprobs, is_cut
from eepo_fast.config import Config
from eepo_fast.data.problems import token_texts
from eepo_fast.distributed import World
from eepo_fast.policy.micro_batches import MicroBatch
from eepo_fast.types import AEPO_STAGE, Rollout, RolloutBatch

LOGGED_COLUMNS = {  # of the rollout log, with `log.token_details`: fields of a Rollout
    "policy_logprobs": "prox_logprobs",
    "entropy": "entropy",
    "gate": "gate",
    "forget_change": "forget_change",
}


@dataclass
class _Mean:
    """A mean, on the device until `settle`: a micro-batch's statistics are no reason to wait for its backward pass."""

    total: Tensor | float = 0.0
    count: Tensor | int = 0

    def add(self, values: Tensor, kept: Tensor) -> None:
        """Adds the values that are kept (bool)."""
        self.total = self.total + torch.where(kept, values, 0.0).sum(dtype=torch.float64)
        self.count = self.count + kept.sum()

    def settle(self) -> None:
        self.total, self.count = float(self.total), int(self.count)

    @property
    def value(self) -> float:
        return float(self.total) / int(self.count) if self.count else math.nan


@dataclass
class UpdateStats:
    """Sums over the micro-batches of an iteration's updates. Stages by the weights that sampled: stage 2 is θ'."""

    loss: Tensor | float = 0.0
    non_finite_losses: Tensor | int = 0
    """Micro-batches whose loss is not finite."""
    grad_norms: list[float] = field(default_factory=list)
    skipped: int = 0
    means: dict[str, _Mean] = field(default_factory=dict)

    def add_micro_batch(
        self,
        config: Config,
        micro: MicroBatch,
        tokens: PolicyTokens,
        stats: TokenStats,
        loss: Tensor,
        first_update: bool,
    ) -> None:
        self.loss = self.loss + loss.double()
        self.non_finite_losses = self.non_finite_losses + ~loss.isfinite()
        kept = tokens.weights > 0
        rows = torch.arange(len(stats.logprobs), device=kept.device)
        ratio = tokens.log_ratio(stats.logprobs, rows).exp()
        stage = micro.concatenate([r.token_stages for r in micro.rollouts])
        cut = is_cut(ratio, tokens.advantages, config.grpo)
        self._add("entropy/policy", stats.entropy, kept)
        for s in (1, 2):
            chosen = kept & (stage == s)
            self._add(f"policy/clip_fraction_stage{s}", cut.float(), chosen)
            self._add(f"policy/ratio_mean_stage{s}", ratio, chosen)
        if tokens.ref_logprobs is not None:
            self._add("policy/kl", low_variance_kl(stats.logprobs, tokens.ref_logprobs), kept)
        if first_update:  # the weights are still θ, so these compare θ with the engine
            sampled = micro.concatenate([r.rollout_logprobs for r in micro.rollouts])
            forgotten = micro.concatenate([[v.forgotten for v in r.token_versions] for r in micro.rollouts]).bool()
            self._add("unlearn/kl", sampled - stats.logprobs, forgotten)
            # AEPO's samples carry log-probs at their own temperature
            self._add("rollout/logprob_gap", (sampled - stats.logprobs).abs(), ~forgotten & (stage < AEPO_STAGE))

    def add(self, other: UpdateStats) -> None:
        """Adds those of another mini-batch."""
        self.loss = self.loss + other.loss
        self.non_finite_losses = self.non_finite_losses + other.non_finite_losses
        for name, mean in other.means.items():
            mine = self.means.setdefault(name, _Mean())
            mine.total, mine.count = mine.total + mean.total, mine.count + mean.count

    def add_other_ranks(self, world: World) -> None:
        """Puts the sums over all ranks, as plain numbers, in the place of this rank's own."""
        self.loss, self.non_finite_losses = float(self.loss), int(self.non_finite_losses)
        for mean in self.means.values():
            mean.settle()
        if world.size == 1:
            return
        self.loss, bad = world.total([self.loss, self.non_finite_losses])
        self.non_finite_losses = int(bad)
        mine = {name: (mean.total, mean.count) for name, mean in self.means.items()}
        self.means = {}
        for part in world.gather(mine):
            for name, (total, count) in part.items():
                mean = self.means.setdefault(name, _Mean())
                mean.total, mean.count = mean.total + total, mean.count + count

    def _add(self, name: str, values: Tensor, kept: Tensor) -> None:
        self.means.setdefault(name, _Mean()).add(values, kept)

    def mean(self, name: str) -> float:
        return self.means[name].value if name in self.means else math.nan


def iteration_metrics(it: Iteration, batch: RolloutBatch, update: UpdateStats) -> dict[str, float]:
    """Returns the row that metrics.jsonl gets for an iteration, which is done."""
    rollouts, groups, unlearning = batch.rollouts, batch.groups(), it.unlearning
    stages = {s: batch.stage(s) for s in (1, 2)}
    it.times["iteration"] = time.perf_counter() - it.started
    num_tokens = sum(r.num_tokens for r in rollouts)
    statuses = [r.status for r in rollouts]
    result: dict[str, float] = {
        "step": it.seed[1] + 1,
        "policy_version": it.policy_version,
        "reward/mean": _mean(r.reward for r in rollouts),
        "reward/stage1": _mean(r.reward for r in stages[1]),
        "reward/stage2": _mean(r.reward for r in stages[2]),
        "reward/missing": sum(r.reward is None for r in rollouts),
        **{f"reward/status_{s}": statuses.count(s) for s in ("ok", "no_answer", "timeout", "too_large", "error")},
        "entropy/policy": update.mean("entropy/policy"),
        "entropy/stage1": _sampled_entropy(stages[1]),
        "entropy/stage2": _sampled_entropy(stages[2]),
        "unlearn/hidden_s": unlearning.hidden_s if unlearning else math.nan,
        "unlearn/stragglers": _mean(r.num_before > 0 for r in stages[1]),
        "length/mean": _mean(r.num_tokens for r in rollouts),
        "length/stage1": _mean(r.num_tokens for r in stages[1]),
        "length/stage2": _mean(r.num_tokens for r in stages[2]),
        "length/truncated_fraction": _mean(not r.finished for r in rollouts),
        "group/unique_fraction": _mean(len({r.completion for r in g}) / len(g) for g in groups),
        "group/all_equal_fraction": _mean(len({r.reward for r in g if r.reward is not None}) <= 1 for g in groups),
        **_unlearn_metrics(unlearning, it.forget_stats, it.config.eepo.learning_rate),
        "unlearn/kl": unlearning.kl if unlearning and unlearning.resampled else update.mean("unlearn/kl"),
        "policy/loss": float(update.loss) / max(1, len(update.grad_norms)),
        "policy/grad_norm": _mean(update.grad_norms),
        "policy/updates_skipped": update.skipped,
        "policy/non_finite_losses": int(update.non_finite_losses),
        "policy/out_of_memory": it.out_of_memory,
        "policy/kl": update.mean("policy/kl"),
        **{
            f"policy/{name}_stage{s}": update.mean(f"policy/{name}_stage{s}")
            for name in ("clip_fraction", "ratio_mean")
            for s in (1, 2)
        },
        "rollout/non_finite_logprobs": sum(not has_finite_logprobs(r) for r in rollouts),
        "rollout/logprob_gap": _logprob_gap(stages[1]) if unlearning else update.mean("rollout/logprob_gap"),
        **{f"time/{name}_s": value for name, value in it.times.items()},
        "tokens/generated": num_tokens,
        "tokens/per_second": num_tokens / it.times["iteration"],
        **it.ahead.metrics(),
    }
    for addition in it.additions:
        result |= addition.metrics()
    return result


def _unlearn_metrics(found: Unlearning | None, stats: ForgetStats | None, eta: float) -> dict[str, float]:
    """Returns what forgetting did. Without EEPO every value but `skipped` is NaN; `strength` is η‖∇L‖², the first-order
    change of L."""
    nan = math.nan
    return {
        "unlearn/active_fraction": found.active_fraction if found else nan,
        "unlearn/loss": found.loss if found else nan,
        "unlearn/grad_norm": found.grad_norm if found else nan,
        "unlearn/strength": eta * found.grad_norm**2 if found else nan,
        "unlearn/retention": stats.retention if stats else nan,
        "unlearn/noise_ratio": stats.noise_ratio if stats else nan,
        "unlearn/skipped": float(found is not None and not found.apply),
        "unlearn/non_finite": float(found is not None and not found.finite),
        "unlearn/too_long": float(found is not None and found.too_long),
        "unlearn/resampled": float(found is not None and found.resampled),
    }


def _logprob_gap(stage1: list[Rollout]) -> float:
    """Returns mean |engine - policy| over what stage 1 has ended, where both hold the same weights."""
    return _mean(
        abs(a - b)
        for r in stage1
        if r.prox_logprobs is not None and len(r.segments) == 1
        for a, b in zip(r.rollout_logprobs, r.prox_logprobs, strict=True)
    )


def _sampled_entropy(rollouts: list[Rollout]) -> float:
    """Returns -mean log-prob of what was sampled before a completion went on under other weights, in nats."""
    return -_mean(value for r in rollouts for value in r.segments[0].rollout_logprobs)


def _mean(values: Iterable[float | None]) -> float:
    known = [float(v) for v in values if v is not None]
    return math.fsum(known) / len(known) if known else math.nan


def to_json(row: dict) -> str:
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def append_metrics(run_dir: Path, metrics: dict[str, float]) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(to_json(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())


def add_to_last(run_dir: Path, step: int, values: dict[str, float]) -> None:
    """Adds values to the row of iteration `step`, the last one."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[-1])
    assert row["step"] == step
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*lines[:-1], to_json({**row, **values})]) + "\n", encoding="utf-8")
    temporary.replace(path)


def log_rollouts(run_dir: Path, step: int, batch: RolloutBatch, token_details: bool, tokenizer) -> None:
    folder = run_dir / "rollouts"
    folder.mkdir(exist_ok=True)
    path = folder / f"step_{step:06d}.jsonl"
    with path.with_suffix(".tmp").open("w", encoding="utf-8", errors="replace") as file:
        for r in (*batch.rollouts, *batch.extra):
            row: dict[str, Any] = {
                "prompt_id": r.prompt.id,
                "prompt": r.prompt.text,
                "problem": r.prompt.problem.problem,
                "answer": r.prompt.problem.answer,
                "stage": r.stage,
                "sample_index": r.sample_index,
                "weights_version": [r.weights_version.policy_version, r.weights_version.forgotten],
                "completion": r.completion,
                "reward": r.reward,
                "status": r.status,
                "advantage": r.advantage,
                "num_tokens": r.num_tokens,
                "finished": r.finished,
                "num_before": r.num_before,
                "segments": [[*s.weights_version, len(s.tokens)] for s in r.segments],
            }
            if token_details:
                row["tokens"] = token_texts(tokenizer, r.token_ids)
                row["token_ids"] = r.token_ids
                row["rollout_logprobs"] = _without_nan(r.rollout_logprobs)
                columns = {name: getattr(r, field) for name, field in LOGGED_COLUMNS.items()}
                row |= {name: _without_nan(values) for name, values in columns.items() if values is not None}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    path.with_suffix(".tmp").replace(path)  # a report may be reading


def _without_nan(values: list[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]


def cut_back(run_dir: Path, step: int) -> None:
    """Removes what was logged after iteration `step`, so that a resumed run writes it once."""
    path = run_dir / "metrics.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):  # a line cut short by a crash belongs to an iteration not kept
                continue
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
    for file in (run_dir / "rollouts").glob("step_*.jsonl"):
        number = file.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            file.unlink()
