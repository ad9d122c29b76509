"""Runs vLLM in this process as the rollout engine: its weights are updated in place, where its kernels read them.

The engine starts with no weights of its own; the first `sync` gives it the policy's. It samples only while the checksum
of what it holds is the one its last update must have left.

On a GPU vLLM schedules ahead: when `generate` returns, a batch is still in flight. It was launched before what comes
next, which waits for its stream (`running_on`), and its result is dropped with the requests that it was for.

Under torchrun every rank has an engine, or every group of `tensor_parallel` neighbouring ranks has one together: vLLM's
external launcher on the process group that is there. The ranks of a group make the same calls with the same arguments,
decide together, and return the same completions.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.distributed as dist
from eepo_kernels import ForgetStats, checksums
from torch import Tensor
from transformers import PreTrainedModel

from eepo_fast.rollout.engine import Named, OnProgress, SampleRequest, Sampling, num_preemptible
from eepo_fast.rollout.families import persistent_buffers
from eepo_fast.rollout.start_vllm import (
    capturing_on,
    engine_arguments,
    engine_stream,
    import_vllm,
    leave_alone,
    logits_dtype,
    on_own_stream,
    one_line_errors,
    running_on,
)
from eepo_fast.rollout.updates import InPlace, Reload, Updater
from eepo_fast.rollout.weights import PlanError, VllmModel, gather
from eepo_fast.types import EngineError, Rollout, Segment, WeightsVersion

log = logging.getLogger(__name__)

SEED_MASK = (1 << 63) - 1
INTENDED_TOLERANCE = 1e-3  # of ‖η∇L‖, which is summed in fp32 blocks
SMALLEST_NORM = 1e-12  # below it the squares are lost in fp32


class VllmEngine:
    """Samples with vLLM; see `RolloutEngine` for what each method promises."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        max_sequences: int,
        max_model_len: int,
        shapes: Mapping[str, torch.Size] | None = None,
        tensor_parallel: int = 1,
        gpu_memory_utilization: float = 0.4,
        enable_sleep: bool = False,
        deterministic: bool = False,
    ):
        """Takes the policy's model for its architecture, names and shapes only. shapes: of its weights, each once,
        where the model itself does not show them (a sharded one). deterministic: a sample's bits do not depend on what
        is sampled beside it, on a GPU neither."""
        vllm = import_vllm(deterministic=deterministic)
        self._vllm = vllm
        self.dtype = dtype
        self._shapes = dict(shapes or {name: p.shape for name, p in model.named_parameters()})
        self.stream = engine_stream()
        with one_line_errors(), running_on(self.stream), capturing_on(self.stream):
            arguments = engine_arguments(
                model,
                dtype=dtype,
                max_sequences=max_sequences,
                max_model_len=max_model_len,
                tensor_parallel=tensor_parallel,
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep=enable_sleep,
            )
            self.llm = vllm.LLM(**arguments)
        leave_alone(model)
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            self.logits_dtype = logits_dtype(self._model, dtype)
            self._group: dist.ProcessGroup | None = None
            """Ranks that this engine is spread over, for values on the CPU."""
            if tensor_parallel > 1:
                from vllm.distributed.parallel_state import get_tp_group

                self._group = get_tp_group().cpu_group
            self._asleep = False
            self._enable_sleep = enable_sleep
            self._expected: Tensor | None = None
            self._last_forget: tuple[float | None, ForgetStats] | None = None
            """Length that the last forget step was to have, where that is known, and what it did."""
            self._num_requests = 0
            self.weights_version = WeightsVersion(0, False)
            self._policy = model
            self._updater = self._choose_updater()
            on_failure.pop_all()

    @property
    def _model(self) -> VllmModel:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    # -- updates

    def _choose_updater(self) -> Updater:
        """Weights are updated in place where a plan of them holds; elsewhere a warning says why vLLM reloads them."""
        try:
            if buffers := persistent_buffers(self._policy):
                raise PlanError(f"the model has {len(buffers)} buffers beside its weights")
            self._refuse_other_layouts()
            return InPlace(self._model, self._shapes, self.dtype, self._group)
        except PlanError as error:
            log.warning("vLLM: weights cannot be updated in place, so they go through its layerwise reload: %s", error)
            return Reload(self.llm, self._model, self._policy, self._shapes, self.dtype, self.stream)

    def _refuse_other_layouts(self) -> None:
        """Raises a PlanError for layers whose kernels read another layout than the loader writes."""
        config = self.llm.llm_engine.model_config
        for name, found in (
            ("experts", config.get_num_experts()),
            ("multi-head latent attention", config.use_mla),
            ("quantised weights", config.quantization),
        ):
            if found:
                raise PlanError(f"the model has {name}")

    @torch.no_grad()
    def sync(self, weights: Iterable[Named], version: WeightsVersion) -> None:
        self._find_weights()
        # while it is under way, and if it is interrupted, the weights are nobody's
        self.weights_version, self._expected, self._last_forget = version, None, None
        self._finish_update(self._updater.sync(map(self._checked, weights)))

    @torch.no_grad()
    def forget(
        self, gradient: Named, *, eta: float, rounding: str, seed: int, step: int, norm: float | None = None
    ) -> ForgetStats:
        assert gradient.keys() == self._shapes.keys() and not self.weights_version.forgotten
        self._checked(gradient)
        if self._expected is None:
            raise EngineError("forget: the engine has never been synced with a policy, or not to the end")
        self._find_weights()
        # from here on the weights are no longer the policy's, even if the update is interrupted
        self.weights_version = self.weights_version._replace(forgotten=True)
        self._expected = None
        stats, expected = self._updater.forget(gradient, eta=eta, rounding=rounding, seed=seed, step=step)
        # read, and compared, when the engine is next asked to sample: nothing waits for it here
        self._last_forget = None if norm is None else eta * norm, stats
        self._finish_update(expected)
        return stats

    def _checked(self, tensors: Named) -> Named:
        """Returns the tensors as they are, once each is found to have the shape of its weight."""
        for name, tensor in tensors.items():
            assert tensor.shape == self._shapes[name], f"{name}: {tuple(tensor.shape)}, not {self._shapes[name]}"
        return tensors

    def _find_weights(self) -> None:
        """Wakes the engine, and finds its weights again where their memory has moved."""
        self.wake()
        self._updater.find_weights()

    def _finish_update(self, expected: Tensor) -> None:
        # keys and values of earlier weights: off by whole nats if they were used again
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("vLLM did not reset its prefix cache after an update of the weights")
        self._expected = expected  # last: whatever interrupts an update leaves an engine that refuses to sample

    def _check_weights(self) -> None:
        """Raises an EngineError, on all its ranks, where one does not hold what the last update must have left."""
        if complaints := [c for c in gather(self._complaint(), self._group) if c]:
            raise EngineError(f"generate: {complaints[0]}")

    def _complaint(self) -> str | None:
        if self._expected is None:
            return "the engine's weights were never synced, or their last update did not finish"
        if self._last_forget is not None:
            intended, stats = self._last_forget
            if missing := self._updater.num_weights - stats.num_weights:
                return f"the last forget step left out {missing} weights"
            applied = stats.intended_norm
            small = intended is not None and max(intended, applied) < SMALLEST_NORM
            if not (intended is None or small or math.isclose(applied, intended, rel_tol=INTENDED_TOLERANCE)):
                return f"expected a forget step of norm {intended:.6g} over all weights, found {applied:.6g}"
        names, held = zip(*self._updater.held(), strict=True)
        if different := (checksums(held) != self._expected.to(held[0].device)).nonzero().flatten().tolist():
            return (
                f"{len(different)} of {len(held)} tensors of the engine are not what the last update left, the first "
                f"of them {names[different[0]]}"
            )
        return None

    # -- sampling

    @on_own_stream
    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: OnProgress | None = None,
        finished: Callable[[Rollout], None] | None = None,
        quorum: float = 1.0,
    ) -> list[Rollout]:
        self._find_weights()
        self._check_weights()
        engine = self.llm.llm_engine
        preemptible = num_preemptible(sum(len(r.seeds) for r in requests if r.counts), quorum)
        # what a request has said so far is asked for step by step only where some may be preempted
        in_parts = preemptible > 0 or not all(r.counts for r in requests)
        partial: dict[str, tuple[list[int], list[float]]] = {}
        waiting: dict[str, tuple[int, int]] = {}
        results: dict[tuple[int, int], Rollout] = {}
        try:
            for i, request in enumerate(requests):
                for k, seed in enumerate(request.seeds):
                    self._num_requests += 1
                    waiting[str(self._num_requests)] = (i, k)
                    prompt = {"prompt_token_ids": request.token_ids}
                    params = self._sampling_params(sampling, seed, request.limit(k, sampling), in_parts=in_parts)
                    engine.add_request(str(self._num_requests), prompt, params)
            due = {name for name, (i, _) in waiting.items() if requests[i].must_end}
            counted = {name for name, (i, _) in waiting.items() if requests[i].counts}
            while waiting and (len(counted) > preemptible or due or not all(name in partial for name in waiting)):
                for output in engine.step():
                    part = output.outputs[0]
                    tokens, logprobs = partial.setdefault(output.request_id, ([], []))
                    tokens += part.token_ids
                    logprobs += part.logprobs.logprobs
                    if output.finished:
                        i, k = waiting.pop(output.request_id)
                        due.discard(output.request_id)
                        counted.discard(output.request_id)
                        segment, ended = self._segment(tokens, logprobs), part.finish_reason == "stop"
                        results[i, k] = requests[i].rollout(k, segment, finished=ended, preempted=False)
                        if finished:
                            finished(results[i, k])
                if progress:
                    progress(len(results), len(results) + len(waiting))
        finally:
            if waiting:  # preempted, or interrupted
                engine.abort_request(list(waiting))
        for name, (i, k) in waiting.items():
            segment = self._segment(*partial.get(name, ([], [])))
            results[i, k] = requests[i].rollout(k, segment, finished=False, preempted=True)
        return [results[i, k] for i, request in enumerate(requests) for k in range(len(request.seeds))]

    @on_own_stream
    def score(self, rollouts: Sequence[Rollout], temperature: float) -> list[list[float]] | None:
        if temperature != 1:
            return None  # vLLM scores at 1 only
        self._find_weights()
        self._check_weights()
        room = self.llm.llm_engine.model_config.max_model_len - 1  # vLLM scores what it reads, then samples a token
        sequences = [(r.prompt.token_ids + r.token_ids)[:room] for r in rollouts]
        params = self._vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": s} for s in sequences], params, use_tqdm=False)
        results = []
        for r, sequence, output in zip(rollouts, sequences, outputs, strict=True):
            first = len(r.prompt.token_ids)
            found = zip(sequence[first:], output.prompt_logprobs[first:], strict=True)
            known = [logprobs[token].logprob for token, logprobs in found]
            results.append(known + [math.nan] * (r.num_tokens - len(known)))
        return results

    def _sampling_params(self, sampling: Sampling, seed: int, limit: int, *, in_parts: bool):
        kinds = self._vllm.sampling_params.RequestOutputKind
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=limit,
            seed=seed & SEED_MASK,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the run's stop tokens are all there are
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=kinds.DELTA if in_parts else kinds.FINAL_ONLY,
        )

    def _segment(self, token_ids: list[int], logprobs: list[float]) -> Segment:
        assert len(logprobs) == len(token_ids), "one log-prob a sampled token"
        return Segment(token_ids, logprobs, self.weights_version)

    # -- memory

    @on_own_stream
    def sleep(self) -> None:
        """Gives the KV cache's memory back and moves the weights to the host, until the next update or generation."""
        if self._enable_sleep and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True

    @on_own_stream
    def wake(self) -> None:
        if self._asleep:
            # PyTorch still holds what the policy has let go of, and vLLM asks the driver; 0.26 makes no room itself
            torch.cuda.empty_cache()
            self.llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        vars(self).pop("_updater", None)  # none yet where the start has failed
