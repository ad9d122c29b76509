"""Micro-batches: budgets, balance over ranks, and packed sequences that never see one another."""

import copy
import pickle
import random

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from eepo_fast.distributed import deal
from eepo_fast.policy import attention
from eepo_fast.policy.micro_batches import collate, input_length, plan_micro_batches
from eepo_fast.policy.module import PolicyModule, gather_columns
from eepo_fast.types import UserError


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[7], [1, 30, 2, 9, 9, 4, 17, 1], list(range(1, 60)), [200, 1, 1, 1], [0, 3, 0]])
def test_micro_batches_hold_all_in_budget_as_many_on_each_rank(make_rollouts, lengths, num_ranks, packed):
    rollouts, budget = make_rollouts(lengths), 64
    plan = plan_micro_batches(rollouts, budget, num_ranks, packed)
    assert len(plan) == num_ranks and len({len(rank) for rank in plan}) == 1
    members = [r for rank in plan for batch in rank for r in batch]
    assert len(members) == len(set(members)) and set(members) == {r for r in rollouts if r.num_tokens}
    for batch in (b for rank in plan for b in rank if len(b) > 1):
        sizes = [input_length(r) for r in batch]
        assert (sum(sizes) if packed else max(sizes) * len(sizes)) <= budget
    assert plan == plan_micro_batches(rollouts, budget, num_ranks, packed)


def test_ranks_get_nearly_equal_work(make_rollouts):
    lengths = [random.Random(0).randint(1, 100) for _ in range(400)]
    plan = plan_micro_batches(make_rollouts(lengths), 512, 4, True)
    loads = [sum(input_length(r) for batch in rank for r in batch) for rank in plan]
    assert max(loads) < 1.02 * min(loads)
    fill = sum(loads) / (512 * sum(map(len, plan)))
    assert fill > 0.85, "few micro-batches that are far from full"


def test_deal():
    hands = deal([5, 9, 1, 1, 4, 4], 2)
    assert sorted(i for hand in hands for i in hand) == list(range(6))
    assert [sum([5, 9, 1, 1, 4, 4][i] for i in hand) for hand in hands] in ([12, 12], [13, 11], [11, 13])
    assert deal([1, 1, 1, 1], 2) == [[0, 2], [1, 3]] and deal([3], 2) == [[0], []]


def logprobs(model, rollouts, packed):
    model = copy.deepcopy(model)
    if packed:
        attention.use_packed_attention(model)
    batch = collate(rollouts, 0, torch.device("cpu"), packed)
    stats = PolicyModule(model, temperature=0.7, autocast=None)(batch)
    return batch, stats.logprobs


def test_packed_is_padded(tiny_model, make_rollouts):
    rollouts = make_rollouts([5, 1, 17, 8])
    packed, padded = (logprobs(tiny_model, rollouts, p) for p in (True, False))
    assert packed[0].input_ids.shape == (1, sum(map(input_length, rollouts))) and padded[0].input_ids.shape[0] == 4
    assert torch.allclose(packed[1], padded[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("neighbour", [0, 1, 3])
def test_a_poisoned_neighbour_is_never_seen(tiny_model, make_rollouts, neighbour):
    """NaN in the embeddings of another sequence's own token reaches that sequence alone."""
    rollouts = make_rollouts([5, 4, 17, 8])
    clean = logprobs(tiny_model, rollouts, True)[1]
    poisoned = copy.deepcopy(tiny_model)
    hooks = []

    def poison(module, args, out):
        batch = collate(rollouts, 0, torch.device("cpu"), True)
        first, last = batch.boundaries[neighbour], batch.boundaries[neighbour + 1]
        out = out.clone()
        out[:, first:last] = torch.nan
        return out

    hooks.append(poisoned.model.embed_tokens.register_forward_hook(poison))
    found = logprobs(poisoned, rollouts, True)[1]
    for i, (a, b) in enumerate(zip(clean.split([5, 4, 17, 8]), found.split([5, 4, 17, 8]), strict=True)):
        assert torch.isnan(b).all() if i == neighbour else torch.equal(a, b)


def test_without_boundaries_it_would_be_seen(tiny_model, make_rollouts, monkeypatch):
    """Negative control: one causal attention over the whole row."""
    rollouts = make_rollouts([5, 4, 17, 8])
    clean = logprobs(tiny_model, rollouts, True)[1]
    real = attention.packed_attention

    def leaky(*args, lengths, **kwargs):
        return real(*args, lengths=[sum(lengths)], **kwargs)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leaky)
    assert (logprobs(tiny_model, rollouts, True)[1][5:] - clean[5:]).abs().max() > 1e-3


def test_a_sliding_window_holds_inside_each_sequence(make_rollouts):
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=6, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    rollouts = make_rollouts([5, 1, 17, 30])
    packed, padded = (logprobs(model, rollouts, p)[1] for p in (True, False))
    assert torch.allclose(packed, padded, rtol=1e-5, atol=1e-5)
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert not torch.allclose(packed, logprobs(model, rollouts, True)[1], atol=1e-4), "the window matters here"


def test_a_model_whose_attention_is_its_own_is_refused(tiny_model):
    tiny_model._supports_attention_backend = False
    with pytest.raises(UserError, match=r"train\.packing: expected a model whose attention can be exchanged"):
        attention.use_packed_attention(tiny_model)


def test_a_rank_without_rollouts_still_has_a_forward_pass(tiny_model):
    """Zero tokens, zero loss, zero gradients: what a rank with nothing to do adds."""
    for packed in (True, False):
        model = copy.deepcopy(tiny_model)
        if packed:
            attention.use_packed_attention(model)
        batch = collate([], 0, torch.device("cpu"), packed)
        module = PolicyModule(model, temperature=1.0, autocast=None)
        loss, stats = module(batch, lambda stats, rows: -stats.logprobs)
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert float(loss.detach()) == 0 and stats.logprobs.shape == (0,) and batch.split(stats.logprobs) == ()
        assert all(g is None or not g.any() for g in grads)


def test_ranks_exchange_numbers_and_not_what_they_are_cut_from(make_rollouts):
    rollouts, sizes = make_rollouts([8] * 64), []

    class Pair:
        size = 2

        def gather(self, value):
            sizes.append(len(pickle.dumps(value)))
            return [value, {}]

    whole = torch.arange(8.0 * 64)
    mine = {r: (part, part + 1) for r, part in zip(rollouts, whole.split(8), strict=True)}
    found = gather_columns(Pair(), rollouts, mine)
    assert found[rollouts[1]] == [list(range(8, 16)), list(range(9, 17))]
    assert sizes[0] < 64 * 1000 < len(pickle.dumps([part for part, _ in mine.values()])), "the control: it is seen"
