"""The forget step: its sign, its gradient against float64, and all that it must leave alone."""

import copy
import math
import time
from types import SimpleNamespace

import pytest
import torch

from eepo_fast.algorithm.ablations import find_ablation
from eepo_fast.algorithm.forget import GradientPass, compute_unlearning
from eepo_fast.algorithm.overlap import Background, StreamedUnlearning
from eepo_fast.rollout.engine import Sampling, make_requests
from eepo_fast.types import Segment, WeightsVersion


def plain_objective(model, rollouts, config, open_gates=None):
    """L(O₁) of Eq. 10 in float64, one response at a time: no fused head, no batching, no shared code."""
    total = torch.zeros((), dtype=torch.float64)
    for r in rollouts:
        if not r.num_tokens:
            continue
        ids = torch.tensor([r.prompt.token_ids + r.token_ids])
        logits = model(ids).logits[0, len(r.prompt.token_ids) - 1 : -1]
        log_p = torch.log_softmax(logits, -1)
        entropy = -(log_p.exp() * log_p).sum(-1).detach()
        p = log_p.exp()[range(r.num_tokens), r.token_ids]
        for t in range(r.num_tokens):
            window = entropy[max(0, t - config.window + 1) : t + 1]
            if config.gate != "token" or window.mean() < config.alpha:
                clipped = p[t].clamp(config.prob_floor, 1 - config.prob_ceiling_gap)
                value = torch.log(1 - clipped) if config.loss == "complementary" else -torch.log(p[t])
                total = total + value / r.num_tokens
    prompts = len({r.prompt.id for r in rollouts})
    return total / len(rollouts) * (prompts if config.reduction == "prompt_sum" else 1)


def sampled(engine, prompts, n=4, max_new_tokens=8):
    requests = make_requests(prompts, 1, range(n), run_seed=0, step=0)
    return engine.generate(requests, Sampling(1.0, max_new_tokens, (1,)))


@pytest.mark.parametrize("changes", [{}, {"loss": "nll"}, {"gate": "always"}, {"reduction": "prompt_sum"}])
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
def test_theta_prime_against_float64(make_policy, make_engine, prompts, test_config, changes, micro_batch_tokens):
    """θ' - θ, relative to its own norm, whatever the micro-batch."""
    config = test_config(eepo={"alpha": 1.0, "learning_rate": 3e-3, **changes}).eepo
    policy, engine = make_policy(micro_batch_tokens=micro_batch_tokens), make_engine()
    rollouts = sampled(engine, prompts)
    result = compute_unlearning(policy, rollouts, config, [])
    exact = copy.deepcopy(policy.model).double()
    objective = plain_objective(exact, rollouts, config)
    gradients = torch.autograd.grad(objective, list(exact.parameters()))
    expected = dict(zip(dict(exact.named_parameters()), gradients, strict=True))
    assert 0 < result.active_fraction <= 1 and (config.gate == "always") == (result.active_fraction == 1)
    assert result.loss == pytest.approx(objective.item(), rel=1e-5)
    before = {k: v.double().clone() for k, v in engine.weights.items()}
    engine.forget(result.gradient.tensors, eta=config.learning_rate, rounding="stochastic", seed=0, step=0)
    moved = torch.cat([(engine.weights[k].double() - before[k]).flatten() for k in before])
    truth = torch.cat([config.learning_rate * expected[k].flatten() for k in before])
    # storing θ' in fp32 rounds each weight once; the gradient itself is held to 1e-4
    rounding = math.sqrt(sum(float(((v * 2**-24) ** 2).sum()) for v in before.values()))
    assert (moved - truth).norm() <= 1e-4 * truth.norm() + rounding
    gradient = torch.cat([result.gradient.tensors[k].double().flatten() for k in before])
    assert (gradient * config.learning_rate - truth).norm() <= 1e-4 * truth.norm()


def test_after_the_step_the_sampled_tokens_are_less_likely(make_policy, make_engine, prompts, test_config):
    """The sign. Mean over gated tokens, for the complementary loss."""
    config = test_config(eepo={"alpha": 1.0, "learning_rate": 0.1}).eepo
    policy, engine = make_policy(), make_engine()
    rollouts = sampled(engine, prompts)
    result = compute_unlearning(policy, rollouts, config, [])
    engine.forget(result.gradient.tensors, eta=config.learning_rate, rounding="stochastic", seed=0, step=0)
    after = score_with(engine.model, policy, rollouts)
    change = [
        a - b
        for r, now in zip(rollouts, after, strict=True)
        for a, b, g in zip(now, r.prox_logprobs, r.gate, strict=True)
        if g
    ]
    assert len(change) > 5 and sum(change) / len(change) < -1e-4


def score_with(model, policy, rollouts):
    other = policy.with_model(model)
    return other.score(rollouts).logprobs


def test_a_closed_gate_writes_nothing(make_policy, make_engine, prompts, test_config):
    config = test_config(eepo={"alpha": 1e-9}).eepo
    policy, engine = make_policy(), make_engine()
    result = compute_unlearning(policy, sampled(engine, prompts), config, [])
    assert not result.apply and result.active_fraction == 0 and result.finite
    for name, weight in policy.named_weights().items():
        assert torch.equal(engine.weights[name], weight)


def test_policy_is_bitwise_untouched(make_policy, make_engine, prompts, test_config):
    policy, engine = make_policy(), make_engine()
    for p in policy.model.parameters():
        p.grad = torch.randn_like(p)
    policy.step()  # an optimizer with moments
    for p in policy.model.parameters():
        p.grad = torch.randn_like(p)
    state = lambda: [  # noqa: E731
        *(p.detach().clone() for p in policy.model.parameters()),
        *(p.grad.clone() for p in policy.model.parameters()),
        *(v.clone() for s in policy.optimizer.state.values() for v in s.values()),
    ]
    before = state()
    engine.sync([policy.named_weights()], WeightsVersion(1, False))
    for changes in ({"alpha": 1.0}, {"alpha": 1.0, "num_steps": 3}, {"gate": "iteration", "alpha": 9.0}):
        config = test_config(eepo=changes).eepo
        engine.sync([policy.named_weights()], WeightsVersion(1, False))
        ablation = find_ablation(config, (0, 0))
        result = compute_unlearning(policy, sampled(engine, prompts), config, [], ablation=ablation)
        assert result.apply
        engine.forget(result.gradient.tensors, eta=1.0, rounding="stochastic", seed=0, step=0)
        sampled(engine, prompts)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert not all(torch.equal(engine.weights[n], w) for n, w in policy.named_weights().items())
    engine.sync([policy.named_weights()], WeightsVersion(1, False))
    assert all(torch.equal(engine.weights[n], w) for n, w in policy.named_weights().items())


def test_mean_is_over_responses_first(make_policy, make_rollouts, test_config):
    """Long responses weigh no more than short ones; an empty one is counted and adds nothing."""
    config = test_config(eepo={"gate": "always"}).eepo
    policy = make_policy()
    rollouts = make_rollouts([1, 9, 0])
    whole = compute_unlearning(policy, rollouts, config, []).loss
    single = [compute_unlearning(policy, [r], config, []).loss for r in rollouts]
    assert single[2] == 0
    assert whole == pytest.approx(sum(single) / 3, rel=1e-5)


def test_only_empty_responses(make_policy, make_rollouts, test_config):
    result = compute_unlearning(make_policy(), make_rollouts([0, 0]), test_config().eepo, [])
    assert not result.apply and result.grad_norm == 0 and result.finite


def test_padding_never_enters(make_policy, make_rollouts, test_config):
    """Other rows' length changes the padding of this one, and nothing else."""
    config = test_config(eepo={"gate": "always"}).eepo
    rollouts = make_rollouts([2, 12])
    alone = compute_unlearning(make_policy(micro_batch_tokens=1), rollouts, config, [])
    found = {r: r.prox_logprobs for r in rollouts}
    together = compute_unlearning(make_policy(micro_batch_tokens=10_000), rollouts, config, [])
    for r in rollouts:
        assert found[r] == pytest.approx(r.prox_logprobs, abs=1e-5)
    for name, gradient in alone.gradient.tensors.items():
        assert torch.allclose(gradient, together.gradient.tensors[name], rtol=1e-4, atol=1e-6)


def test_iteration_gate_averages_over_iterations(make_policy, make_rollouts, test_config):
    rollouts, policy = make_rollouts([4, 4]), make_policy()
    entropy = compute_unlearning(policy, rollouts, test_config(eepo={"gate": "always"}).eepo, []).mean_entropy
    for earlier, is_open in [([], True), ([9.0], False), ([9.0, 0.0, 0.0], True)]:
        config = test_config(eepo={"gate": "iteration", "alpha": entropy * 1.01, "window": 3}).eepo
        result = compute_unlearning(policy, rollouts, config, earlier)
        assert result.apply == is_open and result.active_fraction == float(is_open)
        assert result.entropy_window == pytest.approx([*earlier, entropy][-3:])
        assert all(set(r.gate) == {float(is_open)} for r in rollouts)


def test_several_steps_follow_the_gradient_at_theta_prime(make_policy, make_rollouts, test_config):
    eta = 0.05
    config = test_config(eepo={"gate": "always", "num_steps": 3, "learning_rate": eta}).eepo
    policy, rollouts = make_policy(), make_rollouts([5, 3])
    found = compute_unlearning(policy, rollouts, config, [], ablation=find_ablation(config, (0, 0)))
    scored = policy.score(rollouts).logprobs
    assert [r.prox_logprobs for r in rollouts] == [pytest.approx(s, abs=1e-5) for s in scored], "of θ, not of θ'"
    found = found.gradient.tensors
    model = copy.deepcopy(policy.model).double()
    for _ in range(3):
        grads = torch.autograd.grad(plain_objective(model, rollouts, config), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p.add_(g, alpha=eta)
    start = {n: p.detach().double() for n, p in policy.model.named_parameters()}
    truth = torch.cat([(p.detach() - start[n]).flatten() for n, p in model.named_parameters()])
    moved = torch.cat([found[n].double().flatten() * eta for n in start])
    assert (moved - truth).norm() <= 1e-3 * truth.norm()
    once = compute_unlearning(policy, rollouts, test_config(eepo={"gate": "always"}).eepo, []).gradient.tensors
    assert (torch.cat([once[n].double().flatten() * 3 * eta for n in start]) - truth).norm() > 1e-2 * truth.norm()


def test_a_non_finite_gradient_is_not_applied(make_policy, make_rollouts, test_config):
    policy = make_policy()
    with torch.no_grad():
        next(policy.model.model.layers[0].parameters())[0, 0] = torch.nan
    result = compute_unlearning(policy, make_rollouts([4]), test_config(eepo={"gate": "always"}).eepo, [])
    assert not result.apply and not result.finite


def test_bf16_compute_keeps_fp32_gradients(make_policy, make_rollouts, test_config):
    config, rollouts = test_config(eepo={"gate": "always"}).eepo, make_rollouts([6, 9])
    exact = compute_unlearning(make_policy(), rollouts, config, []).gradient.tensors
    half = compute_unlearning(make_policy(compute_dtype=torch.bfloat16), rollouts, config, []).gradient.tensors
    flat = [torch.cat([g[k].flatten() for k in exact]) for g in (exact, half)]
    assert flat[1].dtype == torch.float32 and not torch.equal(*flat)
    assert (flat[1] - flat[0]).norm() < 5e-2 * flat[0].norm()


def test_gradient_checkpointing_recomputes_and_changes_nothing(make_policy, make_rollouts, test_config):
    config, rollouts = test_config(eepo={"gate": "always"}).eepo, make_rollouts([6, 9])
    expected = compute_unlearning(make_policy(micro_batch_tokens=999), rollouts, config, []).gradient.tensors
    policy = make_policy(micro_batch_tokens=999, gradient_checkpointing=True)
    calls = []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found = compute_unlearning(policy, rollouts, config, []).gradient.tensors
    assert len(calls) == 2, "once forward, once again in the backward pass"
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-7)


def stream(policy, rollouts, config, *, threaded=False, untaken=()):
    prompts = len({r.prompt.id for r in rollouts})
    streamed = StreamedUnlearning(policy, config, len(rollouts), prompts, Background("unlearn", threaded=threaded))
    for r in reversed(rollouts):  # not in the order of the batch
        if r not in untaken:
            streamed.take(r)
    return streamed


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("changes", [{}, {"reduction": "prompt_sum"}, {"gate": "iteration"}])
def test_unlearning_that_streams_is_the_same(make_policy, make_engine, prompts, test_config, changes, threaded):
    """While others are sampled, in the order in which they end, some only at the end: the same sum in another order."""
    config = test_config(eepo={"alpha": 1.0, **changes}).eepo
    policy = make_policy(micro_batch_tokens=40)
    rollouts = sampled(make_engine(), prompts)
    rollouts[1].segments = [Segment([], [], rollouts[1].weights_version)]
    after = compute_unlearning(policy, rollouts, config, [])
    columns = [(r.prox_logprobs, r.entropy, r.gate) for r in rollouts]
    for r in rollouts:
        r.prox_logprobs = r.entropy = r.gate = None
    streamed = stream(policy, rollouts, config, threaded=threaded, untaken={rollouts[0], rollouts[5]})
    streamed.background.wait()
    assert len(streamed.whole.done) >= len(rollouts) / 2, "most of it is done before the stage ends"
    assert streamed.seconds_until(math.inf) > 0 and streamed.seconds_until(0.0) == 0
    found = compute_unlearning(policy, rollouts, config, [], begun=streamed.hand_over())
    assert found.loss == pytest.approx(after.loss, rel=1e-5) and found.active_fraction == after.active_fraction
    assert found.mean_entropy == pytest.approx(after.mean_entropy, rel=1e-5)
    assert [r.prox_logprobs is None for r in rollouts] == [i == 1 for i in range(len(rollouts))]
    for r, (logprobs, entropy, gate) in zip(rollouts, columns, strict=True):
        if r.num_tokens:
            assert r.prox_logprobs == pytest.approx(logprobs, abs=1e-5) and r.gate == gate
            assert r.entropy == pytest.approx(entropy, abs=1e-5)
    pairs = [(found.gradient.tensors[k].double(), after.gradient.tensors[k].double()) for k in after.gradient.tensors]
    distance = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    assert distance < 1e-5 * after.grad_norm
    assert all(p.grad is None for p in policy.model.parameters())


def test_a_stream_out_of_memory_is_made_after_the_stage(make_policy, make_engine, prompts, test_config):
    config = test_config(eepo={"alpha": 1.0}).eepo
    policy = make_policy(micro_batch_tokens=40)
    rollouts = sampled(make_engine(), prompts)
    expected = compute_unlearning(policy, rollouts, config, [])
    loss, calls = policy.loss, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(*arguments)

    policy.loss = failing
    streamed = stream(policy, rollouts, config)
    assert len(calls) == 2 and streamed.whole is None and streamed.gave_up, "and it does not try again"
    found = compute_unlearning(policy, rollouts, config, [], begun=streamed.hand_over())
    assert found.loss == expected.loss and found.grad_norm == expected.grad_norm


def test_room_is_asked_for_all_that_is_summed(make_policy, make_engine, prompts, test_config):
    """∇L at the first micro-batch; and where the policy sums on its own, its part beside this rank's, always."""
    policy, rollouts = make_policy(micro_batch_tokens=40), sampled(make_engine(), prompts)
    weights = sum(4 * p.numel() for p in policy.model.parameters())
    of_two = SimpleNamespace(stream_tokens=40, alone=lambda: policy, world=SimpleNamespace(size=2))
    for whole, part in ((policy, 0), (of_two, weights / 2)):
        background, asked = Background("unlearn", threaded=False), []
        background.has_room = lambda count, asked=asked: asked.append(count) or True
        streamed = StreamedUnlearning(whole, test_config(eepo={"alpha": 1.0}).eepo, len(rollouts), 4, background)
        for r in rollouts:
            streamed.take(r)
        passes = policy.pass_bytes(gradient=True)
        assert asked[0] == passes + weights + part and set(asked[1:]) == {passes + part} and len(asked) > 2


def test_an_iteration_streams(make_trainer):
    """The policy's passes begin before the stage ends; with ranks that would have to agree, after it."""
    trainer = make_trainer(eepo={"alpha": 3.0}, train={"micro_batch_tokens": 30})
    seen, sampling = [], [False]
    generate, loss = trainer.engine.generate, trainer.policy.loss

    def generating(*arguments):
        sampling[0] = True
        try:
            return generate(*arguments)
        finally:
            sampling[0] = False

    def watched(*arguments):
        seen.append(sampling[0])
        return loss(*arguments)

    trainer.engine.generate, trainer.policy.loss = generating, watched
    _, row = trainer.iteration()
    assert seen.index(False) > 1, "several micro-batches during the stage, the rest behind it"
    assert row["time/unlearn_s"] > 0 and row["time/rollout_stage1_s"] > 0
    type(trainer.policy).stream_tokens, whole = property(lambda policy: None), type(trainer.policy).stream_tokens
    try:
        seen.clear()
        trainer.iteration()
    finally:
        type(trainer.policy).stream_tokens = whole
    assert seen[0] is False


def test_a_stream_whose_iteration_is_abandoned_ends(make_trainer, iterations, monkeypatch):
    """Nothing goes on behind a run that saves and leaves, nor is what waits begun."""
    threaded = lambda name, **options: Background(name, threaded=True)  # noqa: E731
    monkeypatch.setattr("eepo_fast.algorithm.overlap.Background", threaded)
    trainer = make_trainer(eepo={"alpha": 3.0}, train={"micro_batch_tokens": 30})
    loss = trainer.policy.loss
    monkeypatch.setattr(trainer.policy, "loss", lambda *arguments: time.sleep(0.2) or loss(*arguments))

    def leave():
        raise InterruptedError

    trainer.at_safe_point = leave
    with pytest.raises(InterruptedError):
        trainer.iteration()
    background = iterations[0].ahead.unlearning
    assert any(f.cancelled() for f in background.pending) and all(f.done() for f in background.pending)
    assert not any(thread.is_alive() for thread in background.pool._threads)


def test_an_engine_that_returns_copies_is_noticed(make_policy, make_engine, prompts, test_config):
    """Else each of its completions would count twice."""
    config = test_config(eepo={"alpha": 1.0}).eepo
    policy = make_policy(micro_batch_tokens=40)
    rollouts = sampled(make_engine(), prompts)
    streamed = stream(policy, rollouts, config)
    with pytest.raises(AssertionError, match="objects that it has handed over"):
        compute_unlearning(policy, [copy.copy(r) for r in rollouts], config, [], begun=streamed.hand_over())


def test_a_stream_that_gives_up_is_counted(make_trainer, monkeypatch):
    trainer = make_trainer(eepo={"alpha": 3.0}, train={"micro_batch_tokens": 30})
    add, calls = GradientPass.add, []

    def failing(self, rollouts):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return add(self, rollouts)

    monkeypatch.setattr(GradientPass, "add", failing)
    _, row = trainer.iteration()
    assert row["policy/out_of_memory"] == 1 and row["unlearn/active_fraction"] > 0
