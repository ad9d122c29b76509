"""Turns rollouts into tensors, in micro-batches that fit a budget, as many and as heavy on one rank as on another.

Shapes: S sequences of a micro-batch; B rows and L columns of its input: padded, B = S and L the longest, padding on the
right, where causal attention never looks; packed, B = 1 and L the sum of the lengths, with attention that stays inside
each sequence. N completion tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eepo_fast.distributed import deal
from eepo_fast.types import Rollout


@dataclass(frozen=True)
class Batching:
    """Says how a policy cuts rollouts into micro-batches."""

    max_tokens: int
    pad_id: int
    packed: bool
    device: torch.device


@dataclass
class MicroBatch:
    """Holds some rollouts as tensors. The N completion tokens are in the order of the rollouts. Without rollouts it has
    one padding token and N = 0, for a rank that must do as many forward passes as the others."""

    rollouts: list[Rollout]
    input_ids: Tensor  # [B, L]
    position_ids: Tensor  # [B, L]
    boundaries: Tensor | None  # [S + 1] int32: where packed sequences begin and end; None where padded
    lengths: list[int]  # of the S sequences, as they are read
    positions: Tensor  # [N] int64: where in the flattened [B * L] the hidden state stands that predicts each token
    targets: Tensor  # [N] int64
    starts: Tensor  # [N] int64: index in [0, N) of the first token of each token's own response

    def per_token(self, values: Sequence[float]) -> Tensor:
        """Returns one value a rollout, repeated over its tokens: [N] fp32."""
        lengths = torch.tensor([r.num_tokens for r in self.rollouts], dtype=torch.int64)
        return move(torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths), self.targets.device)

    def concatenate(self, values: Sequence[Sequence[float]]) -> Tensor:
        """Returns per-token lists of the rollouts, end to end: [N] fp32."""
        return move(torch.tensor([v for part in values for v in part], dtype=torch.float32), self.targets.device)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Returns `values` [N] cut into one tensor [T] a rollout."""
        return values.split([r.num_tokens for r in self.rollouts]) if self.rollouts else ()


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to a GPU without waiting for what it is busy with."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def input_length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + rollout.num_tokens - 1  # the last token is predicted, never read


def plan_micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, num_ranks: int, packed: bool
) -> list[list[list[Rollout]]]:
    """Returns [rank][micro-batch][rollouts], as many micro-batches on each rank; empty rollouts are left out. A
    micro-batch has at most `max_tokens` tokens, padding included (one sequence may exceed it), and may be empty on a
    rank where there are too few rollouts to go round."""
    if not (chosen := [r for r in rollouts if r.num_tokens]):
        return [[] for _ in range(num_ranks)]
    bins = _pack(chosen, max_tokens, num_ranks) if packed else _pad(chosen, max_tokens, num_ranks)
    bins.sort(key=lambda members: -sum(map(input_length, members)))
    ranks: list[list[list[Rollout]]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(bins), num_ranks):
        # there and back, so that no rank gets the heaviest of every round
        order = range(num_ranks) if start // num_ranks % 2 == 0 else reversed(range(num_ranks))
        for rank, members in zip(order, bins[start : start + num_ranks], strict=True):
            ranks[rank].append(members)
    return ranks


def _pack(rollouts: list[Rollout], max_tokens: int, num_ranks: int) -> list[list[Rollout]]:
    """Returns as few bins as hold them, evenly filled; a sequence beyond the budget has a bin of its own."""
    bins = [[r] for r in rollouts if input_length(r) > max_tokens]
    rest = [r for r in rollouts if input_length(r) <= max_tokens]
    lengths = [input_length(r) for r in rest]
    total = len(bins) + -(-sum(lengths) // max_tokens)
    total = -(-total // num_ranks) * num_ranks
    while True:
        hands = deal(lengths, total - len(bins))
        if all(sum(lengths[i] for i in hand) <= max_tokens for hand in hands):
            return bins + [[rest[i] for i in sorted(hand)] for hand in hands]
        total += num_ranks


def _pad(rollouts: list[Rollout], max_tokens: int, num_ranks: int) -> list[list[Rollout]]:
    """Returns bins of similar lengths."""
    bins: list[list[Rollout]] = [[]]
    for rollout in sorted(rollouts, key=input_length):
        if bins[-1] and (len(bins[-1]) + 1) * input_length(rollout) > max_tokens:
            bins.append([])
        bins[-1].append(rollout)
    while len(bins) % num_ranks:
        largest = max((b for b in bins if len(b) > 1), key=lambda b: len(b) * input_length(b[-1]), default=None)
        if largest is None:
            bins.append([])
            continue
        half = len(largest) // 2
        bins.append(largest[half:])
        del largest[half:]
    return bins


def collate(rollouts: list[Rollout], pad_id: int, device: torch.device, packed: bool) -> MicroBatch:
    sequences = [r.prompt.token_ids + r.token_ids[:-1] for r in rollouts] or [[pad_id]]
    longest = max(map(len, sequences))
    input_ids, position_ids, first = [], [], []
    for ids in sequences:
        padding = 0 if packed else longest - len(ids)
        first.append(len(input_ids))
        input_ids += ids + [pad_id] * padding
        position_ids += range(len(ids) + padding)
    positions, targets, starts = [], [], []
    for begin, rollout in zip(first, rollouts, strict=False):
        begin += len(rollout.prompt.token_ids) - 1
        starts += [len(targets)] * rollout.num_tokens
        positions += range(begin, begin + rollout.num_tokens)
        targets += rollout.token_ids

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return move(torch.tensor(values, dtype=dtype), device)

    rows = 1 if packed else len(sequences)
    return MicroBatch(
        rollouts=rollouts,
        input_ids=tensor(input_ids).view(rows, -1),
        position_ids=tensor(position_ids).view(rows, -1),
        boundaries=tensor([*first, len(input_ids)], torch.int32) if packed else None,
        lengths=[len(ids) for ids in sequences],
        positions=tensor(positions),
        targets=tensor(targets),
        starts=tensor(starts),
    )
