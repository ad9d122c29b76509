"""The learning rates of whole runs: against a formula, against transformers' own, and under DeepSpeed on two ranks."""

import math

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_linear_schedule_with_warmup

from eepo_fast.policy.schedule import plan_schedule, rate_of, set_schedule

RATE, UPDATES = 1e-3, 12


def expected_rates(schedule, warmup, floor, updates=UPDATES):
    """The rates of a run's updates, one by one."""
    rates = []
    for update in range(updates):
        if update < warmup:
            rates.append(RATE * (update + 1) / (warmup + 1))
            continue
        done = (update - warmup) / (updates - warmup)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": math.cos(math.pi * done / 2) ** 2}[schedule]
        rates.append(floor + (RATE - floor) * left)
    return rates


@pytest.fixture
def plan(make_policy, test_config):
    """A policy with the schedule of a run of so many updates, and the part of its config."""

    def make(schedule, warmup=0, floor=0.0, updates=UPDATES):
        chosen = (
            {"schedule": schedule} if schedule == "constant" else {"schedule": schedule, "min_learning_rate": floor}
        )
        optimizer = test_config(optimizer={"learning_rate": RATE, "warmup_steps": warmup, **chosen}).optimizer
        policy = make_policy(optimizer=optimizer)
        if updates is not None:
            plan_schedule(policy.scheduler, optimizer, updates)
        return policy, optimizer

    return make


def rates_of(policy, updates=UPDATES):
    rates = []
    for _ in range(updates):
        rates.append(rate_of(policy.scheduler))
        assert policy.step()[1]
    return rates


@pytest.mark.parametrize("floor", [0.0, 2e-4, RATE])
@pytest.mark.parametrize("warmup", [0, 1, 5, 11])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_over_a_whole_run(plan, schedule, warmup, floor):
    policy, _ = plan(schedule, warmup, floor)
    rates, expected = rates_of(policy), expected_rates(schedule, warmup, floor)
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[warmup] == pytest.approx(RATE) and min(rates) > 0
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert rate_of(policy.scheduler) == pytest.approx(floor, abs=1e-18), "what the last update leads to"
    assert rates_of(policy, 5) == pytest.approx([floor] * 5, abs=1e-18), "nor does it fall, or rise, below or beyond"


@pytest.mark.parametrize("updates", [None, 1, UPDATES])
def test_a_constant_rate_is_bitwise_what_it_was(plan, updates):
    for warmup in (0, 3, 20):
        policy, _ = plan("constant", warmup, updates=updates)
        assert rates_of(policy) == [RATE * min(1.0, (step + 1) / (warmup + 1)) for step in range(UPDATES)]


def test_the_library_has_the_same_rates(plan):
    """Without a warm-up, which begins at 0 there: an update for nothing."""

    def theirs(make, **options):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
        scheduler, rates = make(optimizer, 0, UPDATES, **options), []
        for _ in range(UPDATES):
            rates += scheduler.get_last_lr()
            optimizer.step()
            scheduler.step()
        return rates

    cosine = theirs(get_cosine_with_min_lr_schedule_with_warmup, min_lr=1e-4)
    assert rates_of(plan("cosine", floor=1e-4)[0]) == pytest.approx(cosine, rel=1e-12)
    assert rates_of(plan("linear")[0]) == pytest.approx(theirs(get_linear_schedule_with_warmup), rel=1e-12)


def test_a_wrong_number_of_updates_is_seen(plan):
    """Negative control: of the first test, and of a resumed run."""
    for updates in (UPDATES - 1, UPDATES + 1, None):
        rates = rates_of(plan("linear", 5, updates=updates)[0])
        assert rates != pytest.approx(expected_rates("linear", 5, 0.0), rel=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("done", [0, 3, 9, UPDATES])
def test_a_resumed_schedule_has_the_same_bits(plan, schedule, done):
    whole = rates_of(plan(schedule, 5, 1e-5)[0])
    policy, optimizer = plan(schedule, 5, 1e-5, updates=None)
    set_schedule(policy.scheduler, done)
    plan_schedule(policy.scheduler, optimizer, UPDATES)
    assert rates_of(policy, UPDATES - done) == whole[done:]
    plan_schedule(policy.scheduler, optimizer, 2 * UPDATES)
    assert rates_of(policy) == pytest.approx(expected_rates(schedule, 5, 1e-5, 2 * UPDATES)[UPDATES:], rel=1e-12)


def test_a_run_that_ends_in_its_warm_up_only_rises(plan):
    rates = rates_of(plan("cosine", 20)[0], 30)
    assert rates[:20] == pytest.approx(expected_rates("constant", 20, 0.0, 20), rel=1e-12)
    assert max(rates) <= RATE and min(rates) >= 0


def test_an_update_that_is_dropped_does_not_count(plan):
    policy, _ = plan("linear")
    before = rate_of(policy.scheduler)
    next(policy.model.parameters()).grad = torch.full_like(next(policy.model.parameters()), math.nan)
    assert not policy.step()[1] and rate_of(policy.scheduler) == before


@pytest.mark.slow
def test_two_ranks_go_by_the_same_rates(launch):
    """ZeRO 0 to 3 on two ranks: the rates that updates had, and how far they moved the weights."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed; pip install 'eepo-fast[dev]'")
    for report in launch("policy/schedule_worker.py"):
        assert len(report) == 4
        for name, found in report.items():
            assert found["rates"] == pytest.approx(found["formula"], rel=1e-12), name
            assert found["resumed"] == found["rates"][2:] and found["same bits"], name
            assert found["distance"] < 1e-4 < 0.1 < found["control"], (name, found)
