"""The policy: a causal language model, its log-probs through the fused head, and its optimizer.

Shapes: B sequences, L padded length, N completion tokens of a micro-batch, D hidden size, V vocabulary. Sequences are
padded on the right, where causal attention never looks, so that no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from eepo_kernels import TokenStats, fused_linear_loss, linear_logprobs
from eepo_kernels.reference import LossFn
from torch import Tensor
from transformers import PreTrainedModel

from eepo_fast.config import OptimizerConfig
from eepo_fast.types import Rollout, UserError


@dataclass
class MicroBatch:
    """Some rollouts as tensors. The N completion tokens are in the order of the rollouts."""

    rollouts: list[Rollout]
    input_ids: Tensor  # [B, L]
    positions: Tensor  # [N] int64: where in the flattened [B * L] the hidden state stands that predicts each token
    targets: Tensor  # [N] int64
    starts: Tensor  # [N] int64: index in [0, N) of the first token of each token's own response

    def per_token(self, values: Sequence[float]) -> Tensor:
        """One value a rollout, repeated over its tokens: [N] fp32."""
        lengths = torch.tensor([r.num_tokens for r in self.rollouts])
        return torch.tensor(values, dtype=torch.float32).repeat_interleave(lengths).to(self.targets.device)

    def concatenate(self, values: Sequence[Sequence[float]]) -> Tensor:
        """Per-token lists of the rollouts, end to end: [N] fp32."""
        return torch.tensor([v for part in values for v in part], dtype=torch.float32, device=self.targets.device)

    def split(self, values: Tensor) -> list[list[float]]:
        """[N] back into one list a rollout."""
        return [part.tolist() for part in values.split([r.num_tokens for r in self.rollouts])]


def make_micro_batches(
    rollouts: Sequence[Rollout], max_tokens: int, pad_id: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Rollouts by length, in micro-batches of at most `max_tokens` padded tokens (one sequence may exceed it)."""
    order = sorted((r for r in rollouts if r.num_tokens), key=_input_length)
    chosen: list[Rollout] = []
    for rollout in order:
        if chosen and (len(chosen) + 1) * _input_length(rollout) > max_tokens:
            yield _collate(chosen, pad_id, device)
            chosen = []
        chosen.append(rollout)
    if chosen:
        yield _collate(chosen, pad_id, device)


def _input_length(rollout: Rollout) -> int:
    return len(rollout.prompt.token_ids) + rollout.num_tokens - 1  # the last token is predicted, never read


def _collate(rollouts: list[Rollout], pad_id: int, device: torch.device) -> MicroBatch:
    longest = max(map(_input_length, rollouts))
    input_ids, positions, targets, starts = [], [], [], []
    for row, rollout in enumerate(rollouts):
        ids = rollout.prompt.token_ids + rollout.token_ids[:-1]
        input_ids.append(ids + [pad_id] * (longest - len(ids)))
        first = row * longest + len(rollout.prompt.token_ids) - 1
        starts += [len(targets)] * rollout.num_tokens
        positions += range(first, first + rollout.num_tokens)
        targets += rollout.token_ids
    tensors = (torch.tensor(x, dtype=torch.int64, device=device) for x in (input_ids, positions, targets, starts))
    return MicroBatch(rollouts, *tensors)


class TorchPolicy:
    """One device: fp32 master weights, computed with in `compute_dtype` (autocast below fp32), AdamW."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype,
        temperature: float,
        micro_batch_tokens: int,
        pad_id: int,
        optimizer: OptimizerConfig | None = None,
        gradient_checkpointing: bool = False,
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.compute_dtype = compute_dtype
        self.temperature = temperature
        self.micro_batch_tokens = micro_batch_tokens
        self.pad_id = pad_id
        self.head = model.get_output_embeddings()
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()  # transformers checkpoints in training mode only; dropout, which that turns on, is taken out
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "attention_dropout"):
                    module.attention_dropout = 0.0
        self._check_head()
        if optimizer is not None:
            self.grad_clip = optimizer.grad_clip
            self.optimizer = torch.optim.AdamW(
                model.parameters(), lr=optimizer.learning_rate, weight_decay=optimizer.weight_decay
            )
            warmup = optimizer.warmup_steps
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1))
            )

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some families scale or cap their logits after the head; the fused head would miss that."""
        probe = torch.arange(4, device=self.device)[None]
        expected = self.model(probe).logits
        found = self.head(self.model.base_model(probe).last_hidden_state)
        if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"model.path: {type(self.model).__name__} changes its logits after the head (scaling or soft-capping), "
                "which is not supported; use a model whose logits are the head's output"
            )

    def micro_batches(self, rollouts: Sequence[Rollout]) -> Iterator[MicroBatch]:
        return make_micro_batches(rollouts, self.micro_batch_tokens, self.pad_id, self.device)

    def named_weights(self) -> dict[str, Tensor]:
        """Every weight once (a tied one under its first name), fp32."""
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def _autocast(self):
        low = self.compute_dtype != torch.float32
        return torch.autocast(self.device.type, self.compute_dtype) if low else nullcontext()

    def _head_inputs(self, batch: MicroBatch) -> dict:
        """The fused head's arguments. Its weight stays fp32: autocast rounds it for the products, and its gradient,
        summed in fp32, reaches the master without another rounding."""
        hidden = self.model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.positions]
        tensors = {"hidden": hidden, "weight": self.head.weight, "targets": batch.targets, "bias": self.head.bias}
        return tensors | {"temperature": self.temperature}

    def loss(self, batch: MicroBatch, loss_fn: LossFn) -> tuple[Tensor, TokenStats]:
        """Sum of `loss_fn` over the micro-batch's tokens, with its graph, and the detached statistics [N]."""
        with self._autocast():
            return fused_linear_loss(**self._head_inputs(batch), loss_fn=loss_fn)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        """(log-probs, entropy) of every completion's tokens at the sampling temperature, by id() of the rollout."""
        logprobs, entropy = {id(r): [] for r in rollouts}, {id(r): [] for r in rollouts}
        for batch in self.micro_batches(rollouts):
            with self._autocast():
                stats = linear_logprobs(**self._head_inputs(batch))
            columns = (batch.split(stats.logprobs), batch.split(stats.entropy))
            for rollout, *values in zip(batch.rollouts, *columns, strict=True):
                logprobs[id(rollout)], entropy[id(rollout)] = values
        return logprobs, entropy

    def step(self) -> tuple[float, bool]:
        """Clip and apply the accumulated gradient. (its norm before clipping, applied); a non-finite one is dropped."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip))
        finite = norm == norm and norm != float("inf")
        if finite:
            self.optimizer.step()
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, finite
