"""Unbiased pass@k, intervals, and sampling that is kept and gone on with."""

import json
import math
import random

import numpy as np
import pytest

from eepo_fast.evaluation.pass_at_k import average, interval, pass_at_k, scores, summarise
from eepo_fast.evaluation.samples import Sampler, sample_set
from eepo_fast.rewards import ArithmeticGrader
from eepo_fast.rollout.engine import Sampling

SAMPLING = Sampling(1.0, 6, (1,))


@pytest.mark.parametrize("n", [1, 5, 16])
def test_against_binomials(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k))


def test_k_above_n_is_refused():
    with pytest.raises(ValueError, match=r"expected k in \[1, 4\], found 5"):
        pass_at_k(4, 2, 5)


class Odd(ArithmeticGrader):
    """Right where the sum of the characters is odd: both happen."""

    asked = 0

    def judge(self, problem, completion):
        Odd.asked += 1
        return float(sum(map(ord, completion)) % 2), "ok"


def test_a_set_is_sampled_graded_and_scored(make_engine, prompts, tokenizer):
    rows = sample_set(Sampler(make_engine(), tokenizer, SAMPLING, 0), Odd(), prompts, 8)
    assert [row["sample"] for row in rows if row["id"] == "p1"] == [None, *range(8)] and len(rows) == 36
    found = {name: sum(values) / len(values) for name, values in scores(rows, [1, 8]).items()}
    assert set(found) == {"greedy", "pass@1", "pass@8", "unique"}
    sampled = [row["reward"] for row in rows if row["sample"] is not None]
    assert found["pass@1"] == pytest.approx(sum(sampled) / len(sampled))
    assert 0 < found["pass@1"] < found["pass@8"] <= 1 and 1 / 8 <= found["unique"] <= 1
    assert rows == sample_set(Sampler(make_engine(max_sequences=5), tokenizer, SAMPLING, 0), Odd(), prompts, 8)
    other = sample_set(Sampler(make_engine(), tokenizer, SAMPLING, 1), Odd(), prompts, 8)
    assert [r for r in rows if r["sample"] is None] == [r for r in other if r["sample"] is None] and rows != other


def test_an_interrupted_evaluation_goes_on(make_engine, prompts, tokenizer, tmp_path):
    file = tmp_path / "set.jsonl"
    sampler = Sampler(make_engine(), tokenizer, SAMPLING, 0)
    rows = sample_set(sampler, Odd(), prompts, 2, file=file)
    lines = file.read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows and len(lines) == 12
    file.write_text("\n".join([*lines[:8], lines[8][:20]]))  # two prompts whole, the third cut off
    Odd.asked = 0
    again = sample_set(sampler, Odd(), prompts, 2, file=file)
    assert Odd.asked == 6, "two prompts were known"
    by_key = {(row["id"], row["sample"]): row for row in rows}
    assert {(row["id"], row["sample"]): row for row in again} == by_key
    assert [json.loads(line) for line in file.read_text().splitlines()] == again


def test_a_k_given_twice_counts_once():
    rows = [row("a", 0, 1.0), row("b", 0, 0.0)]
    assert scores(rows, [1, 1]) == {"pass@1": [1.0, 0.0]}


def test_any_text_survives_an_interruption(make_engine, prompts, tokenizer, tmp_path):
    """Line separators that are not the file's, and a file cut inside a character."""
    file = tmp_path / "set.jsonl"
    sampler = Sampler(make_engine(), tokenizer, SAMPLING, 0)
    rows = sample_set(sampler, Odd(), prompts, 1, file=file)
    for r, text in zip(rows, ["a\u20285\u2028b", "\x85", "\u2029", "é", "é", "é", "é", "日本"], strict=True):
        r["completion"] = text
    whole = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()
    file.write_bytes(whole[: whole.rindex("本".encode()) + 1])
    Odd.asked = 0
    again = sample_set(sampler, Odd(), prompts, 1, file=file)
    assert Odd.asked == 2 and [r for r in again if r["id"] != rows[-1]["id"]] == [
        r for r in rows if r["id"] != rows[-1]["id"]
    ]


def test_forgetful_weights_are_never_evaluated(make_engine, prompts, tokenizer):
    engine = make_engine()
    engine.weights_version = engine.weights_version._replace(forgotten=True)
    with pytest.raises(AssertionError, match="forgetful"):
        sample_set(Sampler(engine, tokenizer, SAMPLING, 0), Odd(), prompts, 1)


def test_intervals_are_those_of_resampled_problems():
    rng = random.Random(0)
    values = [float(rng.random() < 0.3) for _ in range(200)]
    low, high = interval([values])
    draws = np.random.default_rng(1).choice(values, size=(20_000, 200)).mean(1)
    assert (low, high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.006)
    other = [float(rng.random() < 0.6) for _ in range(50)]
    both = (np.random.default_rng(2).choice(other, size=(20_000, 50)).mean(1) + draws) / 2
    assert interval([values, other]) == pytest.approx(tuple(np.percentile(both, [2.5, 97.5])), abs=0.006)
    assert interval([[1.0] * 5]) == (1.0, 1.0)


def row(problem, sample, reward, status="ok"):
    return {"id": problem, "sample": sample, "reward": reward, "status": status, "completion": f"{problem}{sample}",
            "num_tokens": 4, "finished": reward == 1.0}  # fmt: skip


def test_a_summary_counts_the_missing_and_averages_unweighted():
    first = [row("a", None, 1.0), row("b", None, None, "timeout")]
    second = [row("c", None, 0.0), row("c", 0, 1.0), row("c", 1, 0.0)]
    part = summarise(first, [1])
    assert part["metrics"]["greedy"]["value"] == 0.5 and part["status"] == {"ok": 1, "timeout": 1}
    assert part["num_samples"] == 0 and part["truncated_fraction"] == 0.5 and part["length"] == 4
    assert summarise(second, [1, 2])["metrics"]["pass@2"]["value"] == 1.0
    assert set(average({"x": first, "y": second}, [1])) == {"greedy"}, "what one set lacks has no average"
    assert average({"x": first, "y": second}, [1])["greedy"]["value"] == 0.25
