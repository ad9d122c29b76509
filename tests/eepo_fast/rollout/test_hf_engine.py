"""The embedded engine: the distribution it samples, the log-probs it reports, and independence of batching."""

import copy

import numpy as np
import pytest
import torch

from eepo_fast.rollout.engine import Sampling, make_requests, sample_seed
from eepo_fast.rollout.hf import sample
from eepo_fast.types import EngineError, WeightsVersion

SAMPLING = Sampling(0.8, 8, (1,))


def plain_logprobs(model, rollout, temperature):
    ids = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1)[range(rollout.num_tokens), rollout.token_ids].tolist()


def test_reported_logprobs_are_those_of_a_plain_forward(make_engine, prompts):
    """Prompts of different lengths, so that padding, positions and the cache are all in play."""
    engine = make_engine()
    assert len({len(p.token_ids) for p in prompts}) > 1
    rollouts = engine.generate(make_requests(prompts, 1, range(5), 0, 0), SAMPLING)
    assert len(rollouts) == 20
    for r in rollouts:
        assert r.rollout_logprobs == pytest.approx(plain_logprobs(engine.model, r, 0.8), abs=2e-5)
        assert r.finished == (r.token_ids[-1] == 1) and (r.finished or r.num_tokens == 8)
        assert 1 not in r.token_ids[:-1]
    assert {r.finished for r in rollouts} == {True, False}


def test_samples_do_not_depend_on_batching(make_engine, prompts):
    requests = make_requests(prompts, 1, range(6), 0, 0)
    whole = make_engine().generate(requests, SAMPLING)
    small = make_engine(max_sequences=3).generate(requests, SAMPLING)
    backwards = make_engine().generate(requests[::-1], SAMPLING)
    alone = [r for request in requests for r in make_engine().generate([request], SAMPLING)]
    expected = [r.token_ids for r in whole]
    assert [r.token_ids for r in small] == expected == [r.token_ids for r in alone]
    by_prompt = {(r.prompt.id, r.sample_index): r.token_ids for r in backwards}
    assert [by_prompt[r.prompt.id, r.sample_index] for r in whole] == expected


def test_seeds_differ_in_every_part():
    base = (0, 1, "p", 1, 0)
    seeds = {sample_seed(*base)}
    for i, other in enumerate([9, 9, "q", 2, 9]):
        seeds.add(sample_seed(*base[:i], other, *base[i + 1 :]))
    assert len(seeds) == 6 and all(0 <= s < 1 << 64 for s in seeds)


def test_stages_draw_different_samples(make_engine, prompts):
    engine = make_engine()
    one = engine.generate(make_requests(prompts, 1, range(4), 0, 0), SAMPLING)
    two = engine.generate(make_requests(prompts, 2, range(4), 0, 0), SAMPLING)
    assert [r.token_ids for r in one] != [r.token_ids for r in two]


def test_sampling_follows_the_distribution():
    """Frequencies of 100,000 draws within 5σ; impossible tokens never drawn, not even at the ends of [0, 1)."""
    logits = torch.tensor([[2.0, -torch.inf, 0.0, 1.0, -torch.inf]])
    probs = torch.softmax(logits[0] / 0.7, 0).numpy()
    draws = 100_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(draws))
    token, logprob = sample(logits.expand(draws, -1), 0.7, uniform)
    counts = np.bincount(token.numpy(), minlength=5)
    sigma = np.sqrt(draws * probs * (1 - probs))
    assert np.all(np.abs(counts - draws * probs) <= 5 * sigma)
    assert torch.allclose(logprob.exp(), torch.from_numpy(probs)[token])
    ends, _ = sample(logits.expand(2, -1), 0.7, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [0, 3]


def test_greedy_takes_the_most_likely(make_engine, prompts):
    engine = make_engine()
    for r in engine.generate(make_requests(prompts, 0, range(1), 0, 0), Sampling(0.0, 6, (1,))):
        ids = list(r.prompt.token_ids)
        for token in r.token_ids:
            assert engine.model(torch.tensor([ids])).logits[0, -1].argmax() == token
            ids.append(token)


def test_own_weights_in_own_dtype_and_versions(make_engine, tiny_model, make_policy):
    engine, policy = make_engine(dtype=torch.bfloat16), make_policy()
    weights = policy.named_weights()
    assert all(w.dtype == torch.bfloat16 for w in engine.weights.values())
    assert engine.model.model.rotary_emb.inv_freq.dtype == torch.float32
    engine.sync([weights], WeightsVersion(3, False))
    assert engine.weights_version == WeightsVersion(3, False)
    pointers = [w.data_ptr() for w in engine.weights.values()]
    gradient = {k: torch.randn_like(w) for k, w in weights.items()}
    before = {k: w.clone() for k, w in weights.items()}
    engine.forget(gradient, eta=1e-3, rounding="stochastic", seed=0, step=0)
    assert engine.weights_version == WeightsVersion(3, True)
    assert all(torch.equal(weights[k], before[k]) for k in weights), "the policy's own weights moved"
    engine.sync([weights], WeightsVersion(4, False))
    assert engine.weights_version == WeightsVersion(4, False)
    assert all(torch.equal(engine.weights[k], w.bfloat16()) for k, w in weights.items())
    assert pointers == [w.data_ptr() for w in engine.weights.values()]


def test_stage_two_is_sampled_by_the_forgetful_weights(make_engine, prompts, make_policy):
    engine, policy = make_engine(), make_policy()
    gradient = {k: torch.randn_like(w) for k, w in policy.named_weights().items()}
    engine.forget(gradient, eta=0.05, rounding="nearest", seed=0, step=0)
    forgetful = copy.deepcopy(engine.model)
    for r in engine.generate(make_requests(prompts, 2, range(2), 0, 0), SAMPLING):
        assert r.weights_version == WeightsVersion(0, True)
        assert r.rollout_logprobs == pytest.approx(plain_logprobs(forgetful, r, 0.8), abs=2e-5)
        assert r.rollout_logprobs != pytest.approx(plain_logprobs(policy.model, r, 0.8), abs=1e-3)


def test_an_engine_whose_update_was_interrupted_does_not_sample(make_engine, make_policy, prompts):
    engine, weights = make_engine(), make_policy().named_weights()
    requests = make_requests(prompts[:1], 1, range(1), 0, 0)

    def breaks_off():
        yield dict(list(weights.items())[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.sync(breaks_off(), WeightsVersion(1, False))
    with pytest.raises(EngineError, match=r"last update .* did not finish"):
        engine.generate(requests, SAMPLING)
    with pytest.raises(AssertionError, match="a sync without"):
        engine.sync([dict(list(weights.items())[:2])], WeightsVersion(1, False))
    engine.sync([weights], WeightsVersion(1, False))
    assert engine.generate(requests, SAMPLING)[0].weights_version == (1, False)


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_scores_are_those_of_a_plain_forward(make_engine, prompts, monkeypatch, temperature):
    """Of completions of many lengths, in batches that pad."""
    monkeypatch.setattr("eepo_fast.rollout.hf.SCORE_TOKENS", 60)
    engine = make_engine()
    rollouts = engine.generate(make_requests(prompts, 1, range(5), 0, 0), SAMPLING)
    assert len({r.num_tokens for r in rollouts}) > 1
    assert len(list(engine._score_batches(rollouts))) > 3
    for r, scored in zip(rollouts, engine.score(rollouts, temperature), strict=True):
        assert scored == pytest.approx(plain_logprobs(engine.model, r, temperature), abs=2e-5)
    same = scored == pytest.approx(r.rollout_logprobs, abs=1e-3)
    assert same == (temperature == 0.8), "what it was sampled at"
    with torch.no_grad():
        next(engine.model.parameters()).view(-1)[0] += 1
    with pytest.raises(EngineError):
        engine.score(rollouts, 1.0)


def test_completions_are_handed_over_as_they_end(make_engine, prompts):
    """Each once, the very objects that are returned, the short ones before the long ones."""
    engine, seen = make_engine(), []
    rollouts = engine.generate(make_requests(prompts, 1, range(5), 0, 0), SAMPLING, None, seen.append)
    assert sorted(map(id, seen)) == sorted(map(id, rollouts))
    lengths = [r.num_tokens for r in seen]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
