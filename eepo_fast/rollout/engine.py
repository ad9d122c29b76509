"""Says what the trainer asks of a rollout engine."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from eepo_kernels import ForgetStats
from torch import Tensor

from eepo_fast.types import Prompt, Rollout, Segment, WeightsVersion

OnProgress = Callable[[int, int], None]
"""Is called with (completions finished, completions asked for) while an engine samples; may raise Interrupted."""
Named = Mapping[str, Tensor]
"""Whole tensors by the names of the policy's weights."""


@dataclass(frozen=True)
class Sampling:
    temperature: float
    """It is 0 for greedy sampling."""
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class SampleRequest:
    """Asks for samples of one prompt: their places in its group and a seed for each; or for the rest of one."""

    prompt: Prompt
    stage: int
    """The one that the completions are counted in."""
    sample_indices: tuple[int, ...]
    seeds: tuple[int, ...]
    limits: tuple[int, ...] = ()
    """Most tokens of each whole completion, where that is less than the sampling's `max_new_tokens`."""
    begun: int = 0
    """The iteration in which the completions were begun."""
    before: tuple[Segment, ...] = ()
    """What the completion, which is one then, has said so far: it goes on behind it."""
    rest_stage: int | None = None
    """The stage in which it goes on."""
    must_end: bool = False
    """Whether it is waited for, whatever the quorum."""
    counts: bool = True
    """Whether it is one of those of which the quorum is a share."""

    @property
    def token_ids(self) -> list[int]:
        """What is read before the first token is sampled."""
        return self.prompt.token_ids + [token for segment in self.before for token in segment.tokens]

    def limit(self, k: int, sampling: Sampling) -> int:
        """Returns the most tokens that are sampled now."""
        most = min(self.limits[k], sampling.max_new_tokens) if self.limits else sampling.max_new_tokens
        return most - sum(len(segment.tokens) for segment in self.before)

    def rollout(self, k: int, segment: Segment, *, finished: bool, preempted: bool) -> Rollout:
        """Returns the completion, as far as it has come. segment: what was sampled now."""
        segments = [*self.before, replace(segment, stage=self.rest_stage)]
        index, begun = self.sample_indices[k], self.begun
        return Rollout(self.prompt, self.stage, index, segments, finished=finished, preempted=preempted, begun=begun)


class CanGenerate(Protocol):
    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: OnProgress | None = None,
        finished: Callable[[Rollout], None] | None = None,
        quorum: float = 1.0,
    ) -> list[Rollout]:
        """Returns all samples, in the order of the requests. A sample depends on its prompt, its seed and the weights,
        and on what is sampled beside it only by rounding: matrix products of another shape are added up in another
        order, on a GPU more than on a CPU, where no token was seen to change. vLLM's batch-invariant kernels
        (`rollout.deterministic`) rule it out on a GPU, too. finished: is given each that has ended, the very object
        that is returned, while others are still being sampled. quorum: when this share of those that count has ended,
        and all that must end, the others are preempted, and returned as they are; all have begun by then. An engine
        that samples in several batches does so in each."""


class RolloutEngine(CanGenerate, Protocol):
    @property
    def weights_version(self) -> WeightsVersion: ...

    def sync(self, weights: Iterable[Named], version: WeightsVersion) -> None:
        """Sets its weights ← nearest(weights), all of them, in place. They come in one bucket or several, each weight
        once; a bucket is read before the next is asked for. version: whose weights these are."""

    def forget(
        self, gradient: Named, *, eta: float, rounding: str, seed: int, step: int, norm: float | None = None
    ) -> ForgetStats:
        """Sets its weights ← round(its weights + eta·gradient), in place, once between two `sync`s. norm: ‖gradient‖
        where the caller has it; an engine may hold it against the length of the step it has made."""

    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[list[float]] | None:
        """Returns each completion token's log-prob under the engine's weights as they are now, in nats; NaN for a last
        token that the engine has no room for. None where the engine cannot say at this temperature."""

    def sleep(self) -> None:
        """Gives memory back until the next update or generation, if this engine was told to."""

    def close(self) -> None: ...


def num_preemptible(num_samples: int, quorum: float) -> int:
    """Returns how many of the samples need not be waited for."""
    return num_samples - math.ceil(quorum * num_samples - 1e-9)


def continuation(rollouts: Sequence[Rollout], stage: int, run_seed: int, step: int) -> list[SampleRequest]:
    """Asks for the rest of completions that were preempted, in `stage` of iteration `step`."""
    return [
        SampleRequest(
            r.prompt,
            r.stage,
            (r.sample_index,),
            (sample_seed(run_seed, step, f"{r.prompt.id}|{r.num_tokens}", r.stage, r.sample_index),),
            begun=r.begun,
            before=tuple(r.segments),
            rest_stage=stage,
        )
        for r in rollouts
    ]


def sample_seed(run_seed: int, step: int, prompt_id: str, stage: int, sample_index: int) -> int:
    """Returns the 64-bit seed of one sample."""
    text = f"{run_seed}|{step}|{prompt_id}|{stage}|{sample_index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def make_requests(
    prompts: Sequence[Prompt], stage: int, sample_indices: Sequence[int], run_seed: int, step: int
) -> list[SampleRequest]:
    indices = tuple(sample_indices)
    return [
        SampleRequest(
            p, stage, indices, tuple(sample_seed(run_seed, step, p.id, stage, i) for i in indices), begun=step
        )
        for p in prompts
    ]
