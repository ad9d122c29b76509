"""Has the embedded engine: a transformers model with a KV cache, on CPU or GPU.

Shapes: R prompts of a batch, B sequences (samples of these prompts), L padded prompt length, T new tokens, V words.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from eepo_kernels import ForgetStats, checksums, forget, linear_logprobs, sync, tensor_key
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from eepo_fast.rollout.engine import Named, OnProgress, SampleRequest, Sampling, num_preemptible
from eepo_fast.rollout.families import Memory, after_head, choose_attention, decoder_of, memory_of
from eepo_fast.types import EngineError, Rollout, Segment, WeightsVersion

SCORE_TOKENS = 8192  # scored at once


class HfEngine:
    """Samples from a copy of a model in `dtype`; prompts are prefilled once a stage for all their samples."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        max_sequences: int,
        pad_id: int,
        device: torch.device | None = None,
    ):
        """Copies the model to the device: its own where none is given."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        choose_attention(self.model)  # the policy's may be for packed sequences, which these are not
        for parameter in self.model.parameters():  # not .to(dtype): buffers such as rotary frequencies stay in fp32
            parameter.data = parameter.data.to(dtype)
            parameter.grad = None
        self.device = device or next(self.model.parameters()).device
        self.model.to(self.device)
        self.weights = dict(self.model.named_parameters())
        self.memory, self.after_head = memory_of(self.model), after_head(self.model)
        self.max_sequences = max_sequences
        self.pad_id = pad_id
        self.weights_version = WeightsVersion(0, False)
        self._expected: Tensor | None = self._checksums()  # what an update must have left; None while it is under way

    def sync(self, weights: Iterable[Named], version: WeightsVersion) -> None:
        self._expected = None  # a mixture, if it is interrupted
        sums: dict[str, Tensor] = {}
        for bucket in weights:
            sources = list(bucket.values())
            sync([self.weights[name] for name in bucket], sources)
            dtypes = [self.weights[name].dtype for name in bucket]
            sums.update(zip(bucket, checksums(sources, dtypes), strict=True))
        missing = self.weights.keys() - sums.keys()
        assert not missing, f"a sync without {min(missing)}"
        self.weights_version = version
        self._expected = torch.stack([sums[name] for name in self.weights]).to(self.device)

    def forget(
        self, gradient: Named, *, eta: float, rounding: str, seed: int, step: int, norm: float | None = None
    ) -> ForgetStats:
        assert gradient.keys() == self.weights.keys() and not self.weights_version.forgotten
        # from here on the weights are no longer the policy's, even if the update is interrupted
        self.weights_version, self._expected = self.weights_version._replace(forgotten=True), None
        stats = forget(
            [p.data for p in self.weights.values()],
            [gradient[name] for name in self.weights],
            eta=eta,
            keys=[tensor_key(name) for name in self.weights],
            offsets=[0] * len(self.weights),
            rounding=rounding,
            seed=seed,
            step=step,
        )
        self._expected = self._checksums()
        return stats

    def _checksums(self) -> Tensor:
        return checksums([p.data for p in self.weights.values()])

    def _check_weights(self) -> None:
        """Raises an EngineError where the weights are not, bit for bit, what the last update must have left."""
        if self._expected is None:
            raise EngineError("generate: the last update of the engine's weights did not finish")
        if different := (self._checksums() != self._expected).nonzero().flatten().tolist():
            raise EngineError(
                f"generate: {len(different)} of {len(self.weights)} weights of the engine are not what the last update "
                f"left, the first of them {list(self.weights)[different[0]]}"
            )

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: OnProgress | None = None,
        finished: Callable[[Rollout], None] | None = None,
        quorum: float = 1.0,
    ) -> list[Rollout]:
        self._check_weights()
        # similar lengths side by side, to pad little; the result keeps the order of the requests
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
        samples = [(i, k) for i in order for k in range(len(requests[i].seeds))]
        total = len(samples)
        results: dict[tuple[int, int], Rollout] = {}
        for rows in self._batches(requests, samples):
            tick = partial(progress, len(results), total) if progress else None
            results.update(self._generate_batch(requests, rows, sampling, tick, finished, quorum))
        if progress:
            progress(total, total)
        return [results[i, k] for i, request in enumerate(requests) for k in range(len(request.seeds))]

    def _batches(
        self, requests: Sequence[SampleRequest], samples: list[tuple[int, int]]
    ) -> Iterator[list[tuple[int, int]]]:
        """Yields samples that run side by side: as many as may, and of one length where padding would be read."""
        kinds = [None if self.memory.padded else len(requests[i].token_ids) for i, _ in samples]
        start = 0
        for end in range(1, len(samples) + 1):  # a batch may divide a request
            if end == len(samples) or end - start == self.max_sequences or kinds[end] != kinds[start]:
                yield samples[start:end]
                start = end

    def _generate_batch(
        self,
        requests: Sequence[SampleRequest],
        rows: list[tuple[int, int]],
        sampling: Sampling,
        tick: Callable[[], None] | None,
        finished: Callable[[Rollout], None] | None,
        quorum: float,
    ) -> dict[tuple[int, int], Rollout]:
        """Samples the rows at once."""
        distinct = list(dict.fromkeys(i for i, _ in rows))
        prompts = [requests[i].token_ids for i in distinct]
        expand = torch.tensor([distinct.index(i) for i, _ in rows], device=self.device)
        limits = [requests[i].limit(k, sampling) for i, k in rows]
        roles = [(requests[i].counts, requests[i].must_end) for i, _ in rows]
        generators = [np.random.Generator(np.random.Philox(key=requests[i].seeds[k])) for i, k in rows]
        uniforms = torch.stack([torch.from_numpy(generator.random(max(limits))) for generator in generators])
        results: dict[tuple[int, int], Rollout] = {}

        def take(row: int, tokens: list[int], logprobs: list[float], ended: bool) -> None:
            i, k = rows[row]
            preempted = not ended and len(tokens) < limits[row]
            segment = Segment(tokens, logprobs, self.weights_version)
            results[i, k] = requests[i].rollout(k, segment, finished=ended, preempted=preempted)
            if finished and not preempted:
                finished(results[i, k])

        self._sample_tokens(prompts, expand, uniforms, limits, roles, sampling, tick, take, quorum)
        return results

    def _sample_tokens(
        self,
        prompts: list[list[int]],
        expand: Tensor,
        uniforms: Tensor,
        limits: list[int],
        roles: list[tuple[bool, bool]],
        sampling: Sampling,
        tick: Callable[[], None] | None,
        take: Callable[[int, list[int], list[float], bool], None],
        quorum: float,
    ) -> None:
        """Calls `tick` after each token, and `take` with a sequence's row, tokens, log-probs and whether it has ended,
        as soon as it does; with the others at the end. roles: whether it counts for the quorum, and must end."""
        num_rows, limit = uniforms.shape
        length = max(map(len, prompts))
        input_ids = torch.tensor([[self.pad_id] * (length - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        reader = Reader(self.model, self.memory, mask, limit)
        logits = reader.begin(input_ids)[expand]
        reader.keep(expand)
        uniforms = uniforms.to(self.device)
        stops = torch.tensor(sampling.stop_token_ids, device=self.device)
        tokens = torch.zeros(num_rows, limit, dtype=torch.int64, device=self.device)
        logprobs = torch.zeros(num_rows, limit, device=self.device)
        most = torch.tensor(limits, device=self.device)
        rows = torch.arange(num_rows, device=self.device)  # which sequence each row of the running batch is
        running = torch.ones(num_rows, dtype=torch.bool, device=self.device)
        num_running = num_rows
        still_counted, still_due = sum(counts for counts, _ in roles), sum(must_end for _, must_end in roles)
        preemptible = num_preemptible(still_counted, quorum)
        for t in range(limit):
            token, logprob = sample(logits, sampling.temperature, uniforms[rows, t])
            tokens[rows, t], logprobs[rows, t] = token, logprob
            stopped = torch.isin(token, stops)
            ended = (stopped | (most[rows] <= t + 1)) & running
            running &= ~ended
            were_running, num_running = num_running, int(running.sum())
            if num_running < were_running:  # a step in which none ends reads one number, and no more
                for row, by_itself in zip(rows[ended].tolist(), stopped[ended].tolist(), strict=True):
                    still_counted -= roles[row][0]
                    still_due -= roles[row][1]
                    take(row, tokens[row, : t + 1].tolist(), logprobs[row, : t + 1].tolist(), by_itself)
            if tick:
                tick()
            if still_counted <= preemptible and not still_due:
                break
            if num_running <= len(rows) // 2:  # drop the finished rows; more often, and copying the cache costs more
                keep = running.nonzero().squeeze(1)
                reader.keep(keep)
                rows, token, running = rows[keep], token[keep], running[keep]
            logits = reader.read(token)
        for row in rows[running].tolist():
            take(row, tokens[row, : t + 1].tolist(), logprobs[row, : t + 1].tolist(), False)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[list[float]]:
        self._check_weights()
        results: list[list[float]] = [[] for _ in rollouts]
        head = self.model.get_output_embeddings()
        for chosen in self._score_batches(rollouts):
            rows = [torch.tensor(rollouts[i].prompt.token_ids + rollouts[i].token_ids) for i in chosen]
            # padded on the right, where causal attention never looks from a token that counts
            ids = pad_sequence(rows, batch_first=True, padding_value=self.pad_id).to(self.device)
            hidden = decoder_of(self.model)(ids, use_cache=False).last_hidden_state
            starts = [len(rollouts[i].prompt.token_ids) - 1 for i in chosen]
            spans = [slice(start, len(row) - 1) for start, row in zip(starts, rows, strict=True)]
            states = torch.cat([hidden[k, span] for k, span in enumerate(spans)])
            targets = torch.cat([ids[k, 1:][span] for k, span in enumerate(spans)])
            options: Any = {"temperature": temperature, **self.after_head._asdict()}
            found = linear_logprobs(states, head.weight, targets, bias=head.bias, **options).logprobs
            for i, part in zip(chosen, found.cpu().split([s.stop - s.start for s in spans]), strict=True):
                results[i] = part.tolist()
        return results

    def _score_batches(self, rollouts: Sequence[Rollout]) -> Iterator[list[int]]:
        """Yields indices in batches of at most `SCORE_TOKENS`, padding included, or of one."""
        lengths = [len(r.prompt.token_ids) + r.num_tokens for r in rollouts]
        batch: list[int] = []
        for i in sorted(range(len(rollouts)), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > SCORE_TOKENS:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def sleep(self) -> None:
        """Keeps its weights: the embedded engine has no cache between stages."""

    def close(self) -> None:
        del self.model, self.weights


class Reader:
    """Reads sequences token by token, and gives the logits [B, V] of what comes next."""

    def __init__(self, model: PreTrainedModel, memory: Memory, mask: Tensor, limit: int):
        """Takes mask [B, L], 0 at the padding on the left of what is read first; up to `limit` tokens follow."""
        self.model, self.memory, self.length = model, memory, mask.shape[1]
        self.positions = (mask.cumsum(1) - 1).clamp_min(0)
        self.mask = torch.nn.functional.pad(mask, (0, limit), value=1)
        self.ids: Tensor | None = None
        """All that was read, where the model does not remember it."""
        self.cache: Any = None

    def begin(self, input_ids: Tensor) -> Tensor:
        """Reads input_ids [B, L]."""
        self.ids = input_ids if self.memory.argument is None else None
        logits, self.positions = self._forward(input_ids), self.positions[:, -1:]
        return logits

    def read(self, token: Tensor) -> Tensor:
        """Reads one token [B] more of each."""
        self.length, self.positions = self.length + 1, self.positions + 1
        if self.ids is None:
            return self._forward(token[:, None])
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        return self._forward(self.ids)

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows [B'], of which one may be meant several times."""
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        if self.ids is not None:
            self.ids = self.ids[rows]
        if self.cache is not None:
            self.cache.reorder_cache(rows)

    def _forward(self, input_ids: Tensor) -> Tensor:
        options: dict[str, Any] = {"attention_mask": self.mask[:, : self.length]}
        if self.memory.argument is None:  # sequences of one length: a model's own positions are right
            return self.model(input_ids, use_cache=False, **options).logits[:, -1]
        if self.memory.takes_positions:
            options["position_ids"] = self.positions
        if self.cache is not None:
            options[self.memory.argument] = self.cache
        out = self.model(input_ids, use_cache=True, logits_to_keep=1, **options)
        self.cache = out[self.memory.argument]
        return out.logits[:, -1]


def sample(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (token [B] int64, its log-prob [B] fp32): inverts the distribution function at `uniform` [B] float64 in
    [0, 1). Temperature 0 takes the most likely token and reports its log-prob at temperature 1."""
    logprobs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logprobs.argmax(-1)
    else:
        cumulative = logprobs.exp().double().cumsum(-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)
