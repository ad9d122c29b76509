"""No step of an iteration holds the logits of all tokens: the largest single allocation is counted."""

import copy

import pytest
import torch
from eepo_kernels import linear_loss
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.algorithm.trainer import Trainer
from eepo_fast.rewards import ArithmeticGrader
from eepo_fast.types import Grade

V = 20_000


class LengthGrader(ArithmeticGrader):
    def grade(self, problems, completions, *, seconds=None):
        return [Grade(float(len(c) % 2), "ok", 0.0) for c in completions]


@pytest.fixture
def tiny_model():
    """A wide vocabulary over next to no model, so that logits are what is large."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_allocation_of_an_iteration(
    count_allocations, make_policy, make_engine, prompts, tokenizer, test_config, monkeypatch, dtype, loss
):
    monkeypatch.setattr(linear_loss, "default_chunk_bytes", lambda device: 2 << 20)
    config = test_config(
        rollout={"max_new_tokens": 30},
        grpo={"kl_coef": 1e-4, "entropy_coef": 1e-5, "loss": loss, "ratio": "policy"},
        eepo={"alpha": 99.0},
        train={"micro_batch_tokens": 4096, "prompts_per_update": 4},
    )
    policy = make_policy(micro_batch_tokens=4096, compute_dtype=dtype)
    reference = policy.with_model(copy.deepcopy(policy.model))
    engine = make_engine(max_sequences=8)
    trainer = Trainer(
        config, policy=policy, reference=reference, engine=engine, grader=LengthGrader(), prompts=prompts,
        tokenizer=tokenizer, stop_token_ids=[1],
    )  # fmt: skip
    rows = []
    found = count_allocations(lambda: rows.append(trainer.iteration()[1]))
    num_stage1 = rows[0]["tokens/generated"] // 2 * 0.9  # random tokens: a few completions end early
    assert rows[0]["unlearn/active_fraction"] == 1 and rows[0]["policy/grad_norm"] > 0
    smallest_logits = num_stage1 * V * 2  # of stage 1 alone, in 16 bits
    assert num_stage1 > 150 and found.largest_bytes < smallest_logits / 2


def test_the_counter_sees_full_logits(count_allocations, make_policy, make_rollouts):
    """Negative control: a policy that took its logits the plain way would be seen."""
    policy = make_policy(micro_batch_tokens=4096)
    (batch,) = policy.micro_batches(make_rollouts([30] * 8))
    found = count_allocations(lambda: policy.model(batch.input_ids).logits.log_softmax(-1))
    assert found.largest_bytes >= 240 * V * 4
