"""The whole path on a GPU, `pytest -m gpu`: both engines through every update, quorum, streaming, Liger with packed
attention, ZeRO-2, resuming, and an iteration through the command line. The same on a CPU, as far as there is such a
thing there, among the slow tests: so that what is wrong with a test is not found out on a GPU."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from eepo_fast.algorithm.forget import compute_unlearning
from eepo_fast.algorithm.overlap import Background, StreamedUnlearning
from eepo_fast.data.base_model import make_tokenizer
from eepo_fast.policy import attention
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rollout.engine import SampleRequest, Sampling, continuation, sample_seed
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.rollout.vllm import VllmEngine
from eepo_fast.types import Problem, Prompt, WeightsVersion

ROOT = Path(__file__).parents[2]
SAMPLING = Sampling(1.0, 32, tuple(range(7, 512, 12)))  # an end now and then
MEAN_GAP = 0.05  # nats: bf16 weights and activations in both, added up in another order


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request):
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("there is no CUDA device" if request.param == "cuda" else "there is a CUDA device, which is used")
    return torch.device(request.param)


def make_model(**changes):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**sizes | changes)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6)  # some distributions are peaked
    return model


def make_policy(model, device, optimizer=None, **changes):
    options = dict(compute_dtype=torch.bfloat16, temperature=1.0, micro_batch_tokens=512, pad_id=0, packed=True)
    return TorchPolicy(copy.deepcopy(model).to(device), optimizer=optimizer, **options | changes)


@pytest.fixture(scope="module", params=["hf", "vllm"])
def engine(request, device):
    if request.param == "hf":
        yield HfEngine(make_model(), dtype=torch.bfloat16, max_sequences=16, pad_id=0, device=device)
        return
    if not importlib.util.find_spec("vllm"):
        pytest.skip("vllm is not installed")
    options = dict(dtype=torch.bfloat16, max_sequences=16, max_model_len=256, gpu_memory_utilization=0.2)
    with closing(VllmEngine(make_model(), enable_sleep=device.type == "cuda", **options)) as made:
        yield made


def requests_for(count, samples=2):
    prompts = [
        Prompt(Problem(f"p{i}", "", "1"), "", [3 + (5 * i + j) % 500 for j in range(4 + i)]) for i in range(count)
    ]
    seeds = [tuple(sample_seed(0, 0, p.problem.id, 1, k) for k in range(samples)) for p in prompts]
    return [SampleRequest(p, 1, tuple(range(samples)), s) for p, s in zip(prompts, seeds, strict=True)]


def mean_gap(policy, rollouts):
    scored = policy.score(rollouts).logprobs
    pairs = [p for r, found in zip(rollouts, scored, strict=True) for p in zip(found, r.rollout_logprobs, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def sync(engine, policy, version):
    engine.sync(policy.weights(), WeightsVersion(version, False))


def random_gradient(policy):
    generator = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(p.shape, generator=generator) * 1e-2).to(p.device)
        for name, p in policy.model.named_parameters()
    }


def moved(policy, gradient, eta):
    model = copy.deepcopy(policy.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(gradient[name], alpha=eta)
    return policy.with_model(model)


# -- engines


def test_sync_forget_generate_sleep_wake(engine, device):
    """Log-probs are the policy's after every update; those of the other weights are not."""
    policy, requests = make_policy(make_model(), device), requests_for(6)
    sync(engine, policy, 1)
    first = engine.generate(requests, SAMPLING)
    assert {tuple(r.weights_version) for r in first} == {(1, False)} and mean_gap(policy, first) < MEAN_GAP
    gradient = random_gradient(policy)
    forgetful = moved(policy, gradient, 2.0)
    assert mean_gap(forgetful, first) > 4 * MEAN_GAP, "the control"
    stats = engine.forget(gradient, eta=2.0, rounding="stochastic", seed=0, step=0)
    second = engine.generate(requests, SAMPLING)
    assert abs(stats.retention - 1) < 0.05 and {tuple(r.weights_version) for r in second} == {(1, True)}
    assert mean_gap(forgetful, second) < MEAN_GAP and mean_gap(policy, second) > 4 * MEAN_GAP
    for wakes_for in ("an update", "sampling"):
        engine.sleep()
        if wakes_for == "an update":
            sync(engine, policy, 2)
        third = engine.generate(requests, SAMPLING)
        assert {tuple(r.weights_version) for r in third} == {(2, False)} and mean_gap(policy, third) < MEAN_GAP


def after_what_was_said(r):
    """Returns a completion's last segment, with all before it as its prompt."""
    prompt = replace(r.prompt, token_ids=r.prompt.token_ids + r.token_ids[: r.num_before])
    return replace(r, prompt=prompt, segments=r.segments[-1:])


def test_a_quorum_and_what_goes_on_under_forgetful_weights(engine, device):
    policy = make_policy(make_model(), device)
    requests = [replace(r, limits=(6, SAMPLING.max_new_tokens)) for r in requests_for(8)]
    sync(engine, policy, 1)
    rollouts = engine.generate(requests, SAMPLING, None, None, 0.5)
    cut = [r for r in rollouts if r.preempted]
    assert 0 < len(cut) <= 8 and mean_gap(policy, [r for r in rollouts if r.num_tokens]) < MEAN_GAP
    gradient = random_gradient(policy)
    engine.forget(gradient, eta=2.0, rounding="stochastic", seed=0, step=0)
    rest = [after_what_was_said(r) for r in engine.generate(continuation(cut, 2, 0, 0), SAMPLING)]
    assert mean_gap(moved(policy, gradient, 2.0), rest) < MEAN_GAP < mean_gap(policy, rest)
    sync(engine, policy, 2)


def test_an_interruption_leaves_an_engine_that_goes_on(engine, device):
    policy, requests, seen = make_policy(make_model(), device), requests_for(6), []
    sync(engine, policy, 1)

    def progress(done, total):
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests, SAMPLING, progress)
    rollouts = engine.generate(requests, SAMPLING)
    assert len(rollouts) == 12 and mean_gap(policy, rollouts) < MEAN_GAP


def test_unlearning_streams_beside_sampling(engine, device, test_config):
    config = test_config(eepo={"alpha": 9.0}).eepo
    policy, requests = make_policy(make_model(), device, micro_batch_tokens=96), requests_for(8)
    sync(engine, policy, 1)
    background = Background("unlearn", threaded=True)
    streamed = StreamedUnlearning(policy, config, 16, 8, background)
    rollouts = engine.generate(requests, SAMPLING, None, streamed.take)
    assert streamed.spans or streamed.background.pending, "something was done before the last one ended"
    found = compute_unlearning(policy, rollouts, config, [], begun=streamed.hand_over())
    background.close()
    assert not streamed.gave_up
    expected = compute_unlearning(policy, rollouts, config, [])
    assert distance(found.gradient.tensors, expected.gradient.tensors) < 1e-2
    stats = policy.forget(engine, found.gradient, config, seed=0, step=0)
    assert stats.num_weights == sum(shape.numel() for shape in policy.shapes.values())
    sync(engine, policy, 2)


def distance(found, expected):
    flat = [torch.cat([t[name].flatten().float() for name in expected]) for t in (found, expected)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


# -- the policy


@pytest.mark.parametrize("checkpointing", [False, True])
def test_liger_with_packed_attention_is_the_plain_model(device, test_config, monkeypatch, checkpointing):
    """Below fp32, packed, with Liger where there is a GPU, against fp32, padded, without; and its kernels were used."""
    model, optimizer = make_model(), test_config().optimizer
    used, varlen = [], attention._varlen

    def noted():
        used.append(True)
        return varlen()

    monkeypatch.setattr(attention, "_varlen", noted)
    liger = device.type == "cuda"
    if liger:
        pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    sampler = HfEngine(model, dtype=torch.bfloat16, max_sequences=16, pad_id=0, device=device)
    rollouts = sampler.generate(requests_for(6), SAMPLING)
    # the plain one first: afterwards its rotary positions, too, would be Liger's
    plain = make_policy(model, device, optimizer, compute_dtype=torch.float32, packed=False)
    expected = gradient_of(plain, rollouts), plain.score(rollouts).logprobs
    assert not used
    fast = make_policy(model, device, optimizer, liger=liger, gradient_checkpointing=checkpointing)
    found = gradient_of(fast, rollouts), fast.score(rollouts).logprobs
    assert distance(found[0], expected[0]) < 0.05
    gaps = [abs(a - b) for pair in zip(found[1], expected[1], strict=True) for a, b in zip(*pair, strict=True)]
    assert sum(gaps) / len(gaps) < MEAN_GAP
    assert bool(used) == liger
    layers = {m._get_name() for m in fast.model.modules()}
    assert ("LigerRMSNorm" in layers) == liger and not {m._get_name() for m in plain.model.modules()} & {"LigerRMSNorm"}


def gradient_of(policy, rollouts):
    for batch in policy.micro_batches(rollouts):
        policy.backward(batch, lambda stats, rows: -stats.logprobs / 100)
    return {name: p.grad for name, p in policy.model.named_parameters()}


# -- the command line


REWARD = """
def parity(problem, completion):
    return float(len(completion) % 2)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small random model on disk, and a reward that tells its answers apart: nothing has to be taught first."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), make_tokenizer()
    sizes = make_model(vocab_size=len(tokenizer)).config.to_dict()
    sizes = {key: sizes[key] for key in LlamaConfig().to_dict() if key in sizes and key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rewards_here.py").write_text(REWARD)
    return folder


def run(base, folder, *overrides):
    command = [
        sys.executable,
        "-m",
        "eepo_fast.cli",
        "train",
        str(ROOT / "configs" / "demo.yaml"),
        f"run.root={folder}",
        f"model.path={base}",
        "reward.function=rewards_here:parity",
    ]
    sizes = ["train.prompts_per_iteration=8", "train.prompts_per_update=4", "rollout.group_size=4", "eepo.alpha=3.0"]
    shape = ["rollout.max_new_tokens=12", "train.micro_batch_tokens=256"]
    shape += ["rollout.gpu_memory_utilization=0.2"] if "rollout.engine=vllm" in overrides else []
    names = [o.lstrip("-").partition("=")[0] for o in overrides]
    given = [o for o in (*sizes, *shape, "train.iterations=1") if o.partition("=")[0] not in names]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(base), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([*command, *given, *overrides], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in (folder / "demo" / "metrics.jsonl").read_text().splitlines()]


ENGINES = {
    "torch and hf": ["grpo.kl_coef=1e-4"],
    "torch and vllm": ["rollout.engine=vllm", "rollout.dtype=bfloat16", "model.dtype=bfloat16", "rollout.quorum=0.8"],
    "ZeRO-2 on one rank and vllm": [
        "train.engine=deepspeed", "train.zero_stage=2", "model.dtype=bfloat16", "rollout.dtype=bfloat16",
        "rollout.engine=vllm", "grpo.kl_coef=1e-4",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ENGINES))
def test_an_iteration_through_the_command_line(device, base, tmp_path, kind):
    overrides = ENGINES[kind]
    for package, word in (("vllm", "rollout.engine=vllm"), ("deepspeed", "train.engine=deepspeed")):
        if word in overrides and not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    if device.type == "cuda" and "rollout.engine=vllm" in overrides:
        overrides = [*overrides, "rollout.sleep=true"]
    (row,) = run(base, tmp_path, *overrides)
    assert row["step"] == 1 and row["unlearn/active_fraction"] > 0 and row["unlearn/skipped"] == 0
    assert abs(row["unlearn/retention"] - 1) < 0.1 and row["policy/grad_norm"] > 0
    assert 0 <= row["rollout/logprob_gap"] < MEAN_GAP and row["policy/updates_skipped"] == 0
    assert row["policy/kl"] is None or row["policy/kl"] < 0.1


def test_resuming_goes_on_where_it_was(device, base, tmp_path):
    whole = run(base, tmp_path / "whole", "train.iterations=2", "checkpoint.every=1")
    run(base, tmp_path / "parts", "train.iterations=1", "checkpoint.every=1")
    resumed = run(base, tmp_path / "parts", "train.iterations=2", "checkpoint.every=1", "--resume")
    assert [row["step"] for row in resumed] == [1, 2] == [row["step"] for row in whole]
    assert [row["policy_version"] for row in resumed] == [row["policy_version"] for row in whole]
    if device.type == "cpu":
        for key in ("reward/mean", "policy/loss", "policy/grad_norm", "unlearn/grad_norm"):
            assert [row[key] for row in resumed] == [row[key] for row in whole], key
