"""Writes the rollout browser's data: one script an iteration, which the page loads when it is asked for.

A page opened from disk may not fetch the files beside it, but may load them as scripts: each calls
`rollouts(run, step, groups)`. Per-token numbers are thousandths as 16-bit integers, little-endian, in base64.
"""

import base64
import json
import shutil
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eepo_fast.report.runs import Run
from eepo_fast.types import AEPO_STAGE, UserError

SCALE, MISSING = 1000, -32768
LIMIT = 32_000  # thousandths: log-probs below -32 are as good as -32


def key_of(run: Run) -> str:
    """Returns the name of the folder of a run's scripts, which is the same in every report."""
    return f"{run.name}-{zlib.crc32(str(run.folder.resolve()).encode()):08x}"


def write_rollouts(runs: list[Run], folder: Path) -> None:
    """Writes folder/KEY/step_000012.js and so on. What an earlier report has left of other runs is removed, and a
    script that is newer than its log is kept."""
    keys = [key_of(run) for run in runs]
    for old in folder.glob("*"):
        if old.name not in keys:
            shutil.rmtree(old)
    for key, run in zip(keys, runs, strict=True):
        target = folder / key
        target.mkdir(parents=True, exist_ok=True)
        scripts = {target / f"step_{step:06d}.js": step for step in run.rollouts}
        versions = dict(zip(run.steps, run.values("policy_version"), strict=True))
        for old in target.glob("step_*.js"):
            if old not in scripts:
                old.unlink()
        for script, step in scripts.items():
            log = run.rollouts[step]
            if script.exists() and script.stat().st_mtime_ns > log.stat().st_mtime_ns:
                continue
            text = json.dumps(read_groups(log, versions.get(step)), ensure_ascii=False, separators=(",", ":"))
            # a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark
            script.write_bytes(f"rollouts({json.dumps(key)},{step},{text})\n".encode(errors="replace"))


def read_groups(log: Path, policy_version: float | None = None) -> list[dict[str, Any]]:
    """Returns a rollout log's groups, in the order of their prompts; a group has its prompt's AEPO samples, too.
    policy_version: of the iteration, where it is known."""
    groups: dict[tuple, dict[str, Any]] = {}
    with log.open(encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                asked = {"problem": row.get("problem", row["prompt"]), "answer": row.get("answer")}
                group = {"id": row["prompt_id"], "prompt": row["prompt"], **asked, "rows": []}
                rows = groups.setdefault((row.get("begun"), row["prompt_id"]), group)["rows"]
                rows.append(rollout(row, policy_version))
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"report: {log}, line {place}: expected a rollout as JSON, found {line[:60]!r}; remove the file, "
                    "or resume the run, which writes it again"
                ) from None
    return list(groups.values())


def rollout(row: dict[str, Any], policy_version: float | None = None) -> dict[str, Any]:
    """Returns what the page shows of a completion. `change` is what the iteration's forget step did to its tokens'
    log-probs: measured in the engine for stage 1, and for stage 2 how far the weights that sampled it were from the
    policy's."""
    found = {
        "stage": row["stage"],
        "reward": row["reward"],
        "advantage": round(row["advantage"], 3),
        "length": row["num_tokens"],
        "status": row["status"],
        "finished": row["finished"],
        "text": row["completion"],
    }
    segments = row.get("segments") or [[*row["weights_version"], row["num_tokens"]]]
    if marks := marks_of(segments):
        found["marks"] = marks
    if "tokens" not in row:
        return found
    change = row.get("forget_change")
    forgetful = [
        forgotten and policy_version in (version, None) for version, forgotten, count in segments for _ in range(count)
    ]
    if change is None and row["stage"] < AEPO_STAGE and any(forgetful):
        pairs = zip(row["rollout_logprobs"], row["policy_logprobs"], forgetful, strict=True)
        change = [a - b if f and a is not None and b is not None else None for a, b, f in pairs]
    logprobs = row.get("policy_logprobs") or row["rollout_logprobs"]
    columns = {"logprob": logprobs, "entropy": row.get("entropy"), "change": change}
    found["tokens"] = [token or "" for token in row["tokens"]]
    found |= {name: pack(values) for name, values in columns.items() if values is not None}
    if "gate" in row:
        found["gate"] = "".join("1" if g else "0" for g in row["gate"])
    return found


def marks_of(segments: Sequence[tuple[int, bool, int]]) -> list[tuple[int, str]]:
    """Returns at which tokens other weights went on with a completion, and which. segments: (policy version, forgotten,
    number of tokens) of each."""
    found, at = [], 0
    for (version, before, count), (later, forgotten, _) in pairwise(segments):
        at += count
        if later != version or before > forgotten:  # the policy's weights again, after an update that was not made
            found.append((at, "carried into the next iteration" + ", and on after its forget step" * forgotten))
        elif forgotten > before:
            found.append((at, "went on after the forget step"))
    return found


def pack(values: list[float | None]) -> str:
    numbers = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    scaled = np.clip(np.round(numbers * SCALE), -LIMIT, LIMIT)
    packed = np.where(np.isfinite(numbers), scaled, MISSING).astype("<i2")
    return base64.b64encode(packed.tobytes()).decode("ascii")


def summaries(run: Run) -> dict[str, Any]:
    """Returns what the page needs to list a run's iterations without loading them."""
    known = dict(zip(run.steps, run.values("reward/mean"), strict=True))
    return {
        "key": key_of(run),
        "name": run.name,
        "steps": list(run.rollouts),
        "rewards": [known.get(step) for step in run.rollouts],
        "alpha": run.settings.get("eepo.alpha") if run.settings.get("eepo.enabled") else None,
        "details": bool(run.settings.get("log.token_details")),
    }
