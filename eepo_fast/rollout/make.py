"""Makes the rollout engine that a config asks for."""

import torch
from transformers import PreTrainedModel

from eepo_fast.config import RolloutConfig
from eepo_fast.distributed import default_device
from eepo_fast.rollout.engine import RolloutEngine
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.rollout.vllm import VllmEngine


def make_engine(rollout: RolloutConfig, model: PreTrainedModel, tokenizer, longest: int) -> RolloutEngine:
    """Returns the config's engine; `longest` has the longest prompt's tokens."""
    dtype, most = getattr(torch, rollout.dtype), rollout.max_sequences
    if rollout.engine == "hf":
        device, pad_id = default_device(), tokenizer.pad_token_id
        return HfEngine(model, dtype=dtype, max_sequences=most, pad_id=pad_id, device=device)
    return VllmEngine(
        model,
        dtype=dtype,
        max_sequences=most,
        max_model_len=longest + rollout.max_new_tokens,
        tensor_parallel=rollout.tensor_parallel,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enable_sleep=rollout.sleep,
        deterministic=rollout.deterministic,
    )
