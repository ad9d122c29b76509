"""bench/simulation.py and carried_simulation.py by hand: seconds of stages whose steps are easily added up."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
from carried_simulation import CarriedRun
from simulation import (
    INTERFERENCE,
    Answer,
    Costs,
    Setup,
    Stage,
    StepTime,
    Waits,
    iteration,
    sample_continuous,
    sample_static,
    streamed_unlearning,
)

SECOND = Costs(StepTime(1.0, 0.0, 0.0), 0.0, 0.0, 0.0)  # a step is a second, all else is free
SETUP = Setup(prompts=2, group_size=4, updates=1, engines=1, max_sequences=100, stream_tokens=1)
BOTH = pytest.mark.parametrize("sample", [sample_continuous, sample_static])


def answers(*lengths, prompt_tokens=0):
    return [Answer(i // 4, prompt_tokens, n) for i, n in enumerate(lengths)]


@BOTH
def test_a_stage_lasts_as_long_as_its_longest(sample):
    stage = sample(answers(3, 7, 5, 7), SECOND, SETUP)
    assert stage.seconds == 7 and [end for end, *_ in stage.ends] == [3, 5, 7, 7] and not stage.left


@BOTH
def test_a_quorum_leaves_the_longest(sample):
    stage = sample(answers(3, 7, 5, 9), SECOND, SETUP, 0.5)
    assert stage.seconds == 5 and sorted((a.tokens, n) for a, n in stage.left) == [(7, 5), (9, 5)]


@BOTH
def test_what_ends_in_the_same_step_is_no_straggler(sample):
    stage = sample(answers(*[5] * 10), SECOND, SETUP, 0.5)
    assert stage.seconds == 5 and len(stage.ends) == 10 and not stage.left


def test_rows_are_dropped_at_a_half():
    """Ten rows, six of which end together: four are held from there on."""
    stage = sample_static(answers(*[2] * 6, *[5] * 4), SECOND, SETUP)
    assert [(count, rows) for count, rows, _ in stage.steps if count] == [(2, 10), (3, 4)]


def test_free_rows_are_taken_by_the_next():
    stage = sample_continuous(answers(4, 2, 3), SECOND, replace(SETUP, max_sequences=2))
    assert stage.seconds == 5 and [end for end, *_ in stage.ends] == [2, 4, 5]


def test_what_a_step_costs():
    """Two answers of two tokens after prompts of ten: the cache grows by a token each."""
    costs = replace(SECOND, step=StepTime(0.0, 1.0, 0.1), prefill_token_s=0.5)
    stage = sample_continuous([Answer(0, 10, 2), Answer(0, 10, 2)], costs, SETUP)
    assert stage.seconds == pytest.approx(5 + 2 * (2 + 0.1 * 22))  # one prefill of ten tokens for both
    limited = StepTime(1.0, 2.0, 0.1, weights_s=3.0, overlapped=True)
    assert limited(1, 10) == 1 + max(3 + 1, 2) and limited(5, 10) == 1 + max(3 + 1, 10)


def test_streamed_unlearning_is_slow_beside_sampling_fast_behind():
    costs = replace(SECOND, train_token_s=1.0)
    stage = Stage(10.0, [(9.0, Answer(0, 0, 5), 0.9), (10.0, Answer(0, 0, 2), 0.0)])
    left, slower = streamed_unlearning([stage], costs, SETUP)
    assert left == pytest.approx(5 - 0.1 + 2) and slower == pytest.approx(1 * INTERFERENCE)


def test_an_iteration_adds_up():
    costs = replace(SECOND, train_token_s=0.1, forward_token_s=0.01, reference_token_s=0.02, forget_s=3.0, sync_s=2.0)
    batch = answers(3, 7, 5, 6, 4, 4, 4, 8)
    tokens = 41
    grpo = iteration(batch, costs, SETUP, eepo=False)
    assert grpo.seconds == pytest.approx(2 + 8 + tokens * 0.12)
    eepo = iteration(batch, costs, SETUP, eepo=True)
    # stage 1: 3, 7, 4, 4; stage 2: 5, 6, 4, 8
    assert eepo.seconds == pytest.approx(2 + 7 + 18 * 0.1 + 3 + 8 + tokens * 0.12)
    streamed = iteration(batch, costs, SETUP, eepo=True, streamed=True)
    assert streamed.seconds < eepo.seconds
    two = iteration(batch, costs, replace(SETUP, updates=2), eepo=True, quorum=0.5)
    assert two.phases["stage 1"] == 4 and two.phases["unlearn"] == pytest.approx(11 * 0.1)
    assert two.phases["stage 2"] == 8 and two.phases["old log-probs"] == pytest.approx(0.5 * 7 * 0.01)


@BOTH
def test_a_stage_that_waits_for_none_of_its_own_takes_one_step(sample):
    stage = sample(answers(5, 1, 9), SECOND, SETUP, 0.5, Waits(counts=()))
    assert stage.seconds == 1 and [a.tokens for _, a, _ in stage.ends] == [1]
    assert sorted((a.tokens, n) for a, n in stage.left) == [(5, 1), (9, 1)]


@BOTH
def test_what_must_end_is_waited_for(sample):
    batch = answers(3, 7, 5, 9)
    stage = sample(batch, SECOND, SETUP, 0.5, Waits(must={id(batch[1])}))
    assert stage.seconds == 7 and [a.tokens for a, _ in stage.left] == [9]
    stage = sample(batch, SECOND, SETUP, 0.5, Waits(counts={id(batch[2]), id(batch[3])}))
    assert stage.seconds == 5 and sorted(a.tokens for a, _ in stage.left) == [7, 9]


@pytest.mark.parametrize("static", [False, True])
def test_iterations_with_carry_by_hand(static):
    """Groups of an answer of one token and one of three, trained on one at a time, one begun ahead, quorum 0.5: first
    two groups, of which one has to be whole; then the new one's short answer, or the rest that is waited for."""
    setup = replace(SETUP, prompts=1, group_size=2, static=static)
    run = CarriedRun(lambda number: [(0, 1), (0, 3)], SECOND, setup, eepo=False, quorum=0.5, in_flight=1.0)
    found = [run.iteration() for _ in range(6)]
    assert [one.seconds for one in found] == [3, 1, 2, 1, 2, 1]
    assert [one.held for one in found] == [1] * 6 and all(one.tokens == 4 for one in found)
    assert found[1].staleness == 1 and found[2].staleness == pytest.approx((1 + 1) / 4)
