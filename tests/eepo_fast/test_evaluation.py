"""Unbiased pass@k and the evaluation around it."""

import math

import pytest

from eepo_fast.evaluation.pass_at_k import evaluate, pass_at_k
from eepo_fast.rewards import ArithmeticGrader


@pytest.mark.parametrize("n", [1, 5, 16])
def test_against_binomials(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_k_above_n_is_refused():
    with pytest.raises(ValueError, match=r"expected k in \[1, 4\], found 5"):
        pass_at_k(4, 2, 5)


def test_evaluation_counts_what_it_sampled(make_engine, prompts, tokenizer):
    class Short(ArithmeticGrader):
        def _one(self, problem, completion):
            return super()._one(problem, completion).__class__(float(sum(map(ord, completion)) % 2), "ok", 0.0)

    settings = dict(num_samples=8, ks=(1, 8), max_new_tokens=6, seed=0)
    result = evaluate(make_engine(), prompts, Short(), tokenizer, [1], **settings)
    assert set(result) == {"greedy", "pass@1", "pass@8", "unique"}
    assert 0 < result["pass@1"] < result["pass@8"] <= 1 and 1 / 8 <= result["unique"] <= 1
    assert result == evaluate(make_engine(max_sequences=5), prompts, Short(), tokenizer, [1], **settings)


def test_forgetful_weights_are_never_evaluated(make_engine, prompts, tokenizer):
    engine = make_engine()
    engine.weights_version = engine.weights_version._replace(forgotten=True)
    with pytest.raises(AssertionError, match="forgetful"):
        evaluate(engine, prompts, None, tokenizer, [1], num_samples=1, ks=(1,), max_new_tokens=2, seed=0)
