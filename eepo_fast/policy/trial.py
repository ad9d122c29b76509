"""Tries a model before training on a few short sequences: whether everything that computes log-probs of them agrees.

What is compared with the model's own logits, each sequence alone, as it was loaded: the policy with each sequence alone
(its fused head, its dtype, gradient checkpointing, Liger), and the policy with all of them in one micro-batch (packed,
or padded). The rollout engine samples a few tokens, and is compared with the policy. What only makes a family slower is
done by itself and said: sequences that are padded, an engine that reads prompts of one length at a time, or everything
again for each token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from eepo_kernels.reference import token_stats
from transformers import PreTrainedModel

from eepo_fast.distributed import World
from eepo_fast.policy.attention import num_windowed, use_packed_attention, windows_asked_for
from eepo_fast.policy.loading import positions
from eepo_fast.policy.micro_batches import collate
from eepo_fast.policy.module import Policy, PolicyModule
from eepo_fast.rollout.engine import RolloutEngine, SampleRequest, Sampling
from eepo_fast.rollout.families import Memory, check_head, choose_attention
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import EngineError, Problem, Prompt, Rollout, Segment, UserError, WeightsVersion

LENGTHS = (9, 39, 16)  # 64 tokens; the longest not last, so that something stands behind it
PROMPT = 3  # tokens of each that are the prompt
SAMPLED = 16  # tokens that the engine samples after a part of each
EXACT = 2e-3  # nats a token between two ways to compute the same in fp32
LARGEST_GAP = 0.5  # nats: far above what 16-bit arithmetic does, far below what a wrong weight does


class Trial(NamedTuple):
    """Holds the sequences, and what the model as it was loaded says of them, one number a token."""

    rollouts: list[Rollout]
    logprobs: list[list[float]]
    temperature: float


@contextmanager
def one_line_errors(kind: str, what: str, remedy: str) -> Iterator[None]:
    """Makes one line of whatever a model's own code raises where it is asked for something that it does not foresee."""
    try:
        yield
    except (UserError, EngineError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(f"{what}: {kind} cannot be run: {type(error).__name__}: {reason}; {remedy}") from None


def make_trial(model: PreTrainedModel, prompts: Sequence[Prompt], temperature: float) -> Trial:
    """Runs the model, in fp32 and where it was loaded, on tokens of the prompts and on random ones. UserError where it
    cannot be run, or its logits are not made as `check_head` expects."""
    with one_line_errors(type(model).__name__, "model.path", "use a model of another family"):
        choose_attention(model)
        check_head(model)
        rows = model.get_output_embeddings().weight.shape[0]
        known = [token for prompt in prompts[:8] for token in prompt.token_ids]
        random = np.random.default_rng(0).integers(0, rows, sum(LENGTHS)).tolist()
        tokens = [known[i % len(known)] if i % 2 else token for i, token in enumerate(random)]
        rollouts = []
        for length in (min(length, positions(model) or length) for length in LENGTHS):
            ids, tokens = tokens[:length], tokens[length:]
            segment = Segment(ids[PROMPT:], [0.0] * (length - PROMPT), WeightsVersion(0, False))
            rollouts.append(Rollout(_prompt(ids[:PROMPT]), 1, 0, [segment], finished=True))
        return Trial(rollouts, own_logprobs(model, rollouts, temperature), temperature)


def _prompt(token_ids: list[int]) -> Prompt:
    return Prompt(Problem("trial", "", ""), "", token_ids)


@torch.no_grad()
def own_logprobs(model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float) -> list[list[float]]:
    """Returns what the model's own logits say of the rollouts' tokens, each rollout alone."""
    results = []
    for r in rollouts:
        ids = torch.tensor([r.prompt.token_ids + r.token_ids], device=model.device)
        logits = model(ids, use_cache=False).logits[0, len(r.prompt.token_ids) - 1 : -1]
        targets = ids[0, len(r.prompt.token_ids) :]
        results.append(token_stats(logits.double() / temperature, targets).logprobs.tolist())
    return results


def gap(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Returns the largest mean distance of two sequences' log-probs, in nats a token; infinity where one is no number.
    A mean over all would hide one sequence that is wrong beside long ones that are not."""
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)]
    found = [sum(abs(a - b) for a, b in pair) / len(pair) for pair in pairs]
    return max(value if math.isfinite(value) else math.inf for value in found)


@torch.no_grad()
def _score(model: PreTrainedModel, trial: Trial, rollouts: list[Rollout], *, packed: bool) -> list[list[float]]:
    batch = collate(rollouts, 0, model.device, packed=packed)
    module: Any = PolicyModule(model, temperature=trial.temperature, autocast=None)
    return [part.tolist() for part in batch.split(module(batch).logprobs)]


def why_not_packed(model: PreTrainedModel, trial: Trial) -> str | None:
    """Returns why the model cannot compute packed sequences, tried as it was loaded; None where it can. The model is
    left with the attention of padded ones."""
    try:
        use_packed_attention(model)
        with windows_asked_for() as windows:
            together = _score(model, trial, trial.rollouts, packed=True)
        if sum(window is not None for window in windows) < num_windowed(model):
            return "its layers do not say how far back they look"
    except UserError as error:
        return str(error).partition(": ")[2].partition(";")[0]
    except Exception as error:  # a model's own code does not foresee attention of ours: whatever it raises then
        reason = f": {str(error).splitlines()[0]}" if str(error) else ""
        return f"its forward pass fails: {type(error).__name__}{reason}"
    finally:
        choose_attention(model)
    if (apart := gap(together, trial.logprobs)) > EXACT:
        return f"its log-probs are {apart:.2g} nats apart from those of each sequence alone"
    return None


def check_padded(model: PreTrainedModel, trial: Trial) -> None:
    """Raises a UserError where a sequence is computed otherwise beside longer ones, tried as the model was loaded."""
    kind = type(model).__name__
    with one_line_errors(kind, "model.path", "use a model of another family"):
        apart = gap(_score(model, trial, trial.rollouts, packed=False), trial.logprobs)
        alone = [_score(model, trial, [r], packed=False)[0] for r in trial.rollouts] if not apart <= EXACT else []
    if alone and not gap(alone, trial.logprobs) <= EXACT:
        raise UserError(
            f"model.path: {kind}: expected its hidden states and head to give the model's own log-probs, found them "
            f"{gap(alone, trial.logprobs):.2g} nats a token apart; use a model of another family"
        )
    if alone:
        raise UserError(
            f"train.micro_batch_tokens: {kind} computes a sequence otherwise beside longer ones, {apart:.2g} nats a "
            "token apart; set train.micro_batch_tokens=1, which gives each sequence a pass of its own"
        )


def check_policy(policy: Policy, trial: Trial, *, exact: bool) -> str:
    """Raises a UserError, on all ranks, that names what differs; returns a line that says how far things are apart.
    exact: the policy computes in fp32."""
    kind = type(policy.model).__name__
    with one_line_errors(kind, "model.path", "use a model of another family"):
        alone = [policy.score([r]).logprobs[0] for r in trial.rollouts]
        together = policy.score(trial.rollouts).logprobs
    own, beside = gap(alone, trial.logprobs), gap(together, alone)
    allowed = (EXACT if exact else LARGEST_GAP) / min(1.0, trial.temperature)  # which logits are divided by
    if not own <= allowed:
        tried = "; set train.gradient_checkpointing=false" if policy.model.is_gradient_checkpointing else ""
        raise UserError(
            f"model.path: {kind}: expected the policy's log-probs to be those of the model's own logits, found them "
            f"{own:.2g} nats a token apart{tried or '; use model.dtype=float32, or a model of another family'}",
            shared=True,
        )
    if not beside <= allowed:
        raise UserError(
            f"train.packing: {kind}: expected the policy's log-probs of sequences together to be those of each alone, "
            f"found them {beside:.2g} nats a token apart; set train.packing=false, or train.micro_batch_tokens=1",
            shared=True,
        )
    return f"the policy {own:.1g} nats a token from the model's own logits, together {beside:.1g} from alone"


def check_engine(
    engine: RolloutEngine,
    score: Callable[[list[Rollout]], list[list[float]]],
    trial: Trial,
    world: World,
    *,
    kind: str,
    exact: bool,
    most: int,
) -> tuple[float, str]:
    """Has every engine sample after prompts of several lengths, and compares its log-probs with those of `score`, all
    ranks together. Returns (nats a token that they are apart, a line to say where the engine is slower for it). An
    embedded engine that is wrong tries slower ways. UserError, on all ranks, where none is right. exact: both compute
    in fp32; most: tokens of a prompt and its answer together that the engine was made for.
    """
    allowed = (EXACT if exact else LARGEST_GAP) / min(1.0, trial.temperature)
    sampled = min(SAMPLED, most - 1)
    remedy = "use rollout.engine=" + ("vllm" if isinstance(engine, HfEngine) else "hf")
    requests = [
        SampleRequest(_prompt((r.prompt.token_ids + r.token_ids)[: min(4 + 5 * i, most - sampled)]), 1, (0,), (i,))
        for i, r in enumerate(trial.rollouts)
    ]
    complaint = ""
    for memory, slower in _ways(engine):
        if isinstance(engine, HfEngine) and memory is not None:
            engine.memory = memory
        mine: list[Rollout] | str
        try:
            with one_line_errors(kind, "rollout.engine", remedy):
                mine = engine.generate(requests, Sampling(trial.temperature, sampled, ()))
        except UserError as error:
            mine = str(error)
        everyone = world.gather(mine)
        if failed := next((part for part in everyone if isinstance(part, str)), None):
            complaint = failed
            continue
        for rank, rollouts in enumerate(everyone):
            apart = gap(score(rollouts), [r.rollout_logprobs for r in rollouts])
            if not apart <= allowed:
                complaint = (
                    f"rollout.engine: expected the engine's log-probs to be the policy's, found them {apart:.2g} nats "
                    f"apart on average, on rank {rank}: this engine does not run {kind} rightly; {remedy}"
                )
                break
        else:
            return apart, f"rollout.engine: {kind} is sampled slower: {slower}" if slower else ""
    raise UserError(complaint, shared=True)


def _ways(engine: RolloutEngine) -> Iterator[tuple[Memory | None, str]]:
    """Yields ways to run an engine, the fastest first: how it remembers, None where that is its own affair; and what is
    slower."""
    if not isinstance(engine, HfEngine):
        yield None, ""
        return
    by_length = "prompts of one length at a time"
    yield engine.memory, "" if engine.memory.padded else by_length
    if engine.memory.padded:
        yield engine.memory._replace(padded=False), by_length
    yield Memory(None, False), "everything read again for each token, which is slow"
