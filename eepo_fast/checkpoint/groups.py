"""Keeps the groups in flight in one file of a checkpoint: columns over all tokens, and what those are, as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eepo_fast.types import Group, Problem, Prompt, Rollout, Segment, WeightsVersion

FILE = "in_flight.safetensors"
FOUND_OUT = (
    "ref_logprobs",
    "gate",
    "forget_change",
)  # of a completion that has ended, and true in later iterations too


def save_groups(groups: Sequence[Group], path: Path) -> None:
    rollouts = [r for group in groups for r in group.rollouts]
    columns = {
        "tokens": torch.tensor([t for r in rollouts for t in r.token_ids], dtype=torch.int32),
        "rollout_logprobs": _column(r.rollout_logprobs for r in rollouts),
        **{name: _column(getattr(r, name) or [] for r in rollouts) for name in FOUND_OUT},
    }
    described = [
        {"prompt": _plain(g.prompt), "begun": g.begun, "rollouts": [_describe(r) for r in g.rollouts]} for g in groups
    ]
    columns["groups"] = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    save_file(columns, path)


def _plain(prompt: Prompt) -> dict[str, Any]:
    """Returns a prompt without the columns of its row, which may be of any type: the run that goes on has them."""
    return asdict(replace(prompt, problem=replace(prompt.problem, columns={})))


def load_groups(path: Path, prompts: Sequence[Prompt] = ()) -> list[Group]:
    """Returns what `save_groups` was given; none where there is no such file. prompts: of the run, which are taken for
    those of the groups."""
    if not path.is_file():
        return []
    columns = load_file(path)
    described = json.loads(columns.pop("groups").numpy().tobytes())
    rows = {name: iter(column.tolist()) for name, column in columns.items()}

    def next_of(name: str, count: int) -> list[Any]:
        return [next(rows[name]) for _ in range(count)]

    def rollout(prompt: Prompt, row: dict[str, Any]) -> Rollout:
        segments = [
            Segment(next_of("tokens", count), next_of("rollout_logprobs", count), WeightsVersion(*version), stage)
            for version, stage, count in row.pop("segments")
        ]
        num_tokens = sum(len(segment.tokens) for segment in segments)
        row |= {name: next_of(name, num_tokens) for name in row.pop("found_out")}
        return Rollout(prompt, segments=segments, **row)

    known = {prompt.id: prompt for prompt in prompts}
    groups = []
    for group in described:
        of = group["prompt"]
        prompt = Prompt(Problem(**of["problem"]), of["text"], of["token_ids"])
        if (mine := known.get(prompt.id)) and mine.token_ids == prompt.token_ids:
            prompt = mine
        groups.append(Group(prompt, group["begun"], [rollout(prompt, row) for row in group["rollouts"]]))
    return groups


def _describe(r: Rollout) -> dict[str, Any]:
    kept = ("stage", "sample_index", "finished", "completion", "reward", "status", "preempted", "begun")
    return {
        **{name: getattr(r, name) for name in kept},
        "segments": [[s.weights_version, s.stage, len(s.tokens)] for s in r.segments],
        "found_out": [name for name in FOUND_OUT if getattr(r, name) is not None],
    }


def _column(values: Any) -> Tensor:
    return torch.tensor([v for row in values for v in row], dtype=torch.float64)
