"""Writes metrics.jsonl and the rollout log of a run, and cuts them back when it is resumed.

JSON has no NaN, so it is written as null.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from eepo_fast.data.prompts import token_texts
from eepo_fast.types import RolloutBatch

LOGGED_COLUMNS = {  # of the rollout log, with `log.token_details`: fields of a Rollout
    "policy_logprobs": "prox_logprobs",
    "entropy": "entropy",
    "gate": "gate",
    "forget_change": "forget_change",
}


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
                "begun": r.begun + 1,
                "segments": r.spans,
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
