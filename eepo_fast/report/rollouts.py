"""The rollout browser's data: one script an iteration, which the page loads when it is asked for.

A page opened from disk may not fetch the files beside it, but may load them as scripts: each calls
`rollouts(run, step, groups)`. Per-token numbers are thousandths as 16-bit integers, little-endian, in base64.
"""

from __future__ import annotations

import base64
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from eepo_fast.report.runs import Run
from eepo_fast.types import UserError

SCALE, MISSING = 1000, -32768
LIMIT = 32_000  # thousandths: log-probs below -32 are as good as -32


def write_rollouts(runs: list[Run], folder: Path) -> None:
    """folder/run-0/step_000012.js and so on. Those newer than their log are kept."""
    for place, run in enumerate(runs):
        target = folder / f"run-{place}"
        target.mkdir(parents=True, exist_ok=True)
        wanted = {f"step_{step:06d}.js" for step in run.rollouts}
        for old in target.glob("step_*.js"):
            if old.name not in wanted:
                old.unlink()
        for step, log in run.rollouts.items():
            groups = read_groups(log)
            text = json.dumps(groups, ensure_ascii=False, separators=(",", ":"))
            (target / f"step_{step:06d}.js").write_text(f"rollouts({place},{step},{text})\n", encoding="utf-8")


def read_groups(log: Path) -> list[dict[str, Any]]:
    """A rollout log's groups, in the order of their prompts; AEPO's extra samples are with their prompt's group."""
    groups: dict[str, dict[str, Any]] = {}
    with log.open(encoding="utf-8") as file:
        for place, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                group = groups.setdefault(
                    row["prompt_id"],
                    {
                        "id": row["prompt_id"],
                        "prompt": row["prompt"],
                        "problem": row.get("problem", row["prompt"]),
                        "answer": row.get("answer"),
                        "rows": [],
                    },
                )
                group["rows"].append(rollout(row))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"report: {log}, line {place}: expected a rollout as JSON, found {line[:60]!r}; remove the file, "
                    "or resume the run, which writes it again"
                ) from None
    return list(groups.values())


def rollout(row: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a completion; `change` is what the forget step did to its tokens' log-probs: measured in
    the engine for stage 1, and for stage 2 how far the weights that sampled it were from the policy's."""
    found = {
        "stage": row["stage"],
        "reward": row["reward"],
        "advantage": round(row["advantage"], 3),
        "length": row["num_tokens"],
        "status": row["status"],
        "finished": row["finished"],
        "text": row["completion"],
    }
    if "tokens" not in row:
        return found
    change = row.get("forget_change")
    if change is None and row["stage"] == 2 and row["weights_version"][1]:
        sampled, policy = row["rollout_logprobs"], row["policy_logprobs"]
        change = [None if a is None or b is None else a - b for a, b in zip(sampled, policy, strict=True)]
    columns = {
        "logprob": row.get("policy_logprobs") or row["rollout_logprobs"],
        "entropy": row.get("entropy"),
        "change": change,
    }
    found["tokens"] = row["tokens"]
    found |= {name: pack(values) for name, values in columns.items() if values is not None}
    if "gate" in row:
        found["gate"] = "".join("1" if g else "0" for g in row["gate"])
    return found


def pack(values: list[float | None]) -> str:
    numbers = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    scaled = np.clip(np.round(numbers * SCALE), -LIMIT, LIMIT)
    packed = np.where(np.isfinite(numbers), scaled, MISSING).astype("<i2")
    return base64.b64encode(packed.tobytes()).decode("ascii")


def summaries(run: Run) -> dict[str, Any]:
    """What the page needs to list a run's iterations without loading them."""
    known = dict(zip(run.steps, run.values("reward/mean"), strict=True))
    return {
        "name": run.name,
        "steps": list(run.rollouts),
        "rewards": [known.get(step) for step in run.rollouts],
        "alpha": run.settings.get("eepo.alpha") if run.settings.get("eepo.enabled") else None,
        "details": bool(run.settings.get("log.token_details")),
        "entropy": statistics.fmean([v for v in run.values("entropy/policy") if v is not None] or [0.0]),
    }
