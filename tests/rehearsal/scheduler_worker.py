"""Run by test_scheduler.py in a process of its own: our engine over vLLM's own scheduler and engine core, set as on a
GPU (asynchronous, a queue of batches, prompts cut in pieces, too few blocks for all sequences), and in the place of the
model a function of what its keys and values say. Prints what was found, as JSON.

The stub keeps what a GPU keeps: the tokens that it has sampled itself, and in each slot of the cache a token and the
mark of the weights that wrote it. A batch is computed when it is launched, in order, and its result is given when it is
asked for. So a token that was drawn with other weights than its completion says, from keys and values of other weights,
or in a batch of an earlier call, is another token than it must be.
"""

import functools
import hashlib
import json
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.rollout import vllm as module
from eepo_fast.rollout.engine import SampleRequest, Sampling, continuation
from eepo_fast.rollout.weights import checksums
from eepo_fast.types import Problem, Prompt, WeightsVersion

vllm = module.import_vllm()

from vllm.config import VllmConfig  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.executor.abstract import Executor  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec  # noqa: E402
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput  # noqa: E402

V, BLOCK, NUM_BLOCKS = 203, 16, 40
STOPS = (7, 61, 99)
SAMPLING = Sampling(1.0, 90, STOPS)


def draw(read, mark, seed):
    """(token, log-prob) from what a sequence's slots say, the weights, and a seed: any change of one changes it."""
    digest = hashlib.blake2b(repr((read, mark, seed)).encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "little")
    return number % V, -((number >> 20) % 4096) / 4096


class Runner:
    """What a GPU's model runner keeps."""

    def __init__(self, model):
        self.model = model
        self.requests = {}
        self.slots = {}
        self.num_sampled = 0

    def get_model(self):
        return self.model

    def mark(self):
        return hash(tuple(checksums([p.data for p in self.model.parameters()]).tolist()))

    def run(self, scheduled):
        mark = self.mark()
        for name in scheduled.finished_req_ids:
            self.requests.pop(name, None)
        computed = {}
        for new in scheduled.scheduled_new_reqs:
            tokens = list(new.prefill_token_ids or new.prompt_token_ids)
            self.requests[new.req_id] = tokens, list(new.block_ids[0]), new.sampling_params.seed
            computed[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for name, blocks, count in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            tokens, held, seed = self.requests[name]
            if name in cached.resumed_req_ids:
                tokens, held = list(cached.all_token_ids[name]), []
            self.requests[name] = tokens, held + list(blocks[0] if blocks else []), seed
            computed[name] = count
        names = list(scheduled.num_scheduled_tokens)
        sampled = [self.advance(name, computed[name], scheduled.num_scheduled_tokens[name], mark) for name in names]
        rows = [pair or (0, 0.0) for pair in sampled]
        logprobs = LogprobsLists(
            np.array([[token] for token, _ in rows]), np.array([[p] for _, p in rows], np.float32),
            np.zeros(len(rows), np.int64),
        )  # fmt: skip
        places = {name: i for i, name in enumerate(names)}
        tokens = [[pair[0]] if pair else [] for pair in sampled]
        return ModelRunnerOutput(names, places, tokens, logprobs)

    def advance(self, name, start, count, mark):
        tokens, blocks, seed = self.requests[name]
        assert start + count <= len(tokens), "scheduled beyond what was sampled"

        def place(i):
            return blocks[i // BLOCK], i % BLOCK

        for i in range(start, start + count):
            self.slots[place(i)] = tokens[i], mark
        if start + count < len(tokens):
            return None  # part of a prompt
        token, logprob = draw([self.slots[place(i)] for i in range(len(tokens))], mark, seed)
        tokens.append(token)
        self.num_sampled += 1
        return token, logprob


class Late(Future):
    """A result that is there when it is asked for, and not before."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def result(self, timeout=None):
        if not self.done():
            self.set_result(self.value)
        return super().result(timeout)


class StubExecutor(Executor):
    def _init_executor(self):
        self.runner = Runner(stub_model())
        self.driver_worker = SimpleNamespace(worker=SimpleNamespace(model_runner=self.runner))
        self.launched = None

    def get_kv_cache_specs(self):
        shape = dict(num_kv_heads=1, head_size=8, dtype=torch.float32)
        return [{"model.layers.0.self_attn.attn": FullAttentionSpec(block_size=BLOCK, **shape)}]

    def get_supported_kv_cache_layouts(self):
        return [["NHD"]]

    def set_kv_cache_layout(self, layout_name):
        pass

    def determine_available_memory(self):
        return [1 << 24]

    def initialize_from_config(self, kv_cache_configs):
        pass

    def compile_or_warm_up_model(self):
        pass

    supported_tasks = ("generate",)

    def execute_model(self, scheduled, non_block=False):
        if not scheduled.total_num_scheduled_tokens:
            for name in scheduled.finished_req_ids:
                self.runner.requests.pop(name, None)
            return Late(EMPTY_MODEL_RUNNER_OUTPUT)
        self.launched = self.runner.run(scheduled)  # as kernels do, with the weights as they are when they are launched
        return Late(None)

    def sample_tokens(self, grammar_output, non_block=False):
        output, self.launched = self.launched, None
        return Late(output) if non_block else output

    def collective_rpc(self, method, timeout=None, args=(), kwargs=None, non_block=False, **more):
        expected = ("reset_mm_cache", "reset_encoder_cache", "synchronize_device")
        assert method in expected, f"nobody was expected to call {method}"

    def sleep(self, level=1):
        self.sleeping_tags = {"weights", "kv_cache"}
        self.runner.slots.clear()  # the cache's memory is given back, whatever the scheduler thinks is in it

    def wake_up(self, tags=None):
        self.sleeping_tags = set()

    def check_health(self):
        pass

    def shutdown(self):
        pass

    @classmethod
    def supports_async_scheduling(cls):
        return True


CONFIG = LlamaConfig(
    vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


def stub_model():
    model = LlamaForCausalLM(CONFIG).requires_grad_(False)

    def load_weights(weights):
        for name, weight in weights:
            dict(model.named_parameters())[name].data.copy_(weight)

    model.load_weights = load_weights
    return model


def as_on_gpu(model_runner):
    """Nothing of what vLLM changes for a CPU in its scheduler. model_runner: the version, which the scheduler speaks to
    differently; a function, asked when it is needed."""
    checked = CpuPlatform.check_and_update_config.__func__

    def keep_async(cls, config):
        wanted = config.scheduler_config.async_scheduling
        checked(cls, config)
        config.scheduler_config.async_scheduling = wanted

    CpuPlatform.check_and_update_config = classmethod(keep_async)
    VllmConfig._validate_v2_model_runner = lambda config: None  # that there is Triton to run
    VllmConfig.use_v2_model_runner = property(lambda config: model_runner() == "v2")
    arguments = module.engine_arguments

    @functools.wraps(arguments)
    def gpu_arguments(*given, **options):
        found = arguments(*given, **options)
        return found | {
            "distributed_executor_backend": StubExecutor,
            "enable_chunked_prefill": True,
            "max_num_batched_tokens": 64,
            "block_size": BLOCK,
            "num_gpu_blocks_override": NUM_BLOCKS,
        }

    module.engine_arguments = gpu_arguments


def prompt(i):
    return Prompt(Problem(f"p{i}", "", "1"), "", [10 + i, *range(20, 20 + 9 * i)])


def requests_for(first, count, stage=1):
    return [
        SampleRequest(
            Prompt(Problem(f"p{i}", "", "1"), "", [10 + i, *range(20, 20 + 9 * i)]), stage, (0, 1), (2 * i, 2 * i + 1)
        )
        for i in range(first, first + count)
    ]


def expected(token_ids, seed, mark, limit):
    """What one sequence alone says, under one set of weights."""
    tokens, logprobs = list(token_ids), []
    while len(logprobs) < limit and not (logprobs and tokens[-1] in STOPS):
        token, logprob = draw([(t, mark) for t in tokens], mark, seed & module.SEED_MASK)
        tokens.append(token)
        logprobs.append(logprob)
    return tokens[len(token_ids) :], logprobs


class Rehearsal:
    def __init__(self, fault):
        self.engine = module.VllmEngine(
            LlamaForCausalLM(CONFIG), dtype=torch.float32, max_sequences=12, max_model_len=256
        )
        self.core = self.engine.llm.llm_engine.engine_core.engine_core
        self.runner = self.core.model_executor.runner
        self.in_flight_at_reset = []
        self.wrong, self.num_preempted, self.num_cut = [], 0, 0
        self.engine._enable_sleep = True  # which a CPU's vLLM refuses
        self.watch(fault)

    def watch(self, fault):
        reset = self.engine.llm.reset_prefix_cache

        def noted(**options):
            self.in_flight_at_reset.append(len(self.core.batch_queue))
            return True if fault == "no reset" else reset(**options)

        self.engine.llm.reset_prefix_cache = noted
        if fault == "no abort":
            self.engine.llm.llm_engine.abort_request = lambda names: None
        preempt = self.core.scheduler._preempt_request

        def counted(*arguments, **options):
            self.num_preempted += 1
            return preempt(*arguments, **options)

        self.core.scheduler._preempt_request = counted

    def sync(self, version):
        torch.manual_seed(version)
        weights = {name: torch.randn(p.shape) for name, p in LlamaForCausalLM(CONFIG).named_parameters()}
        self.engine.sync([weights], WeightsVersion(version, False))
        return self.runner.mark()

    def forget(self):
        gradient = {name: torch.randn(p.shape) for name, p in LlamaForCausalLM(CONFIG).named_parameters()}
        self.engine.forget(gradient, eta=0.1, rounding="nearest", seed=0, step=0)
        return self.runner.mark()

    def check(self, what, requests, rollouts, mark, version, *, whole=True):
        for request, k, r in zip(
            [q for q in requests for _ in q.seeds], [k for q in requests for k in range(len(q.seeds))], rollouts,
            strict=True,
        ):  # fmt: skip
            limit = request.limit(k, SAMPLING)
            tokens, logprobs = expected(request.token_ids, request.seeds[k], mark, limit)
            *before, now = r.segments
            count = len(now.tokens)
            right = now.tokens == tokens[:count] and np.allclose(now.rollout_logprobs, logprobs[:count])
            right = right and before == list(request.before)
            right = right and (count == len(tokens) or (r.preempted and not whole))
            right = right and r.weights_version == version and r.finished == (r.token_ids[-1] in STOPS)
            if not right:
                self.wrong.append(f"{what}: {r.prompt.problem.id} {r.sample_index}")

    def iteration(self, version, interrupt=False):
        """sync → a stage with a quorum → forget → its stragglers and more → sync."""
        mark = self.sync(version)
        requests = requests_for(0, 9)
        rollouts = self.engine.generate(requests, SAMPLING, None, None, 0.6)
        self.check("stage 1", requests, rollouts, mark, (version, False), whole=False)
        cut = [r for r in rollouts if r.preempted]
        self.num_cut += len(cut)
        if version == 3:  # asleep with a batch in flight, and woken by sampling, then by an update
            self.engine.sleep()
            self.in_flight_asleep = len(self.core.batch_queue)
            again = self.engine.generate(requests, SAMPLING)
            self.check("woken", requests, again, mark, (version, False))
            self.engine.sleep()
        mark = self.forget()
        rest = continuation(cut, 2, 0, version)
        requests = [*rest, *requests_for(4, 6, stage=2)]
        if interrupt:
            self.interrupt(requests)
            mark = self.sync(version)
            rollouts = self.engine.generate(requests, SAMPLING)
            self.check("after the interruption", requests, rollouts, mark, (version, False))
            return
        rollouts = self.engine.generate(requests, SAMPLING)
        self.check("stage 2", requests, rollouts, mark, (version, True))

    def interrupt(self, requests):
        seen = []

        def progress(done, total):
            seen.append(done)
            if len(seen) == 9:
                raise KeyboardInterrupt

        try:
            self.engine.generate(requests, SAMPLING, progress)
        except KeyboardInterrupt:
            return
        raise AssertionError("nothing was interrupted")

    def run(self):
        for version, interrupt in ((1, False), (2, True), (3, False)):
            self.iteration(version, interrupt)
        return {
            "scheduler": isinstance(self.core.scheduler, AsyncScheduler),
            "queue": self.core.batch_queue_size,
            "wrong": self.wrong,
            "in flight at a reset": max(self.in_flight_at_reset),
            "in flight asleep": self.in_flight_asleep,
            "preempted": self.num_preempted,
            "cut at the quorum": self.num_cut,
            "sampled": self.runner.num_sampled,
        }


if __name__ == "__main__":
    case = ["", ""]
    as_on_gpu(lambda: case[0])
    found = {}
    for name in sys.argv[1:]:
        case = name.split("/")
        rehearsal = Rehearsal(case[1])
        try:
            found[name] = rehearsal.run()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        rehearsal.engine.close()
    print("FOUND " + json.dumps(found))
