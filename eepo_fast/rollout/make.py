"""The rollout engine that a config asks for."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from eepo_fast.config import RolloutConfig
from eepo_fast.distributed import default_device
from eepo_fast.rollout.engine import RolloutEngine
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.rollout.vllm import VllmEngine


def make_engine(rollout: RolloutConfig, model: PreTrainedModel, tokenizer, longest: int) -> RolloutEngine:
    """longest: tokens of the longest prompt."""
    settings = dict(dtype=getattr(torch, rollout.dtype), max_sequences=rollout.max_sequences)
    if rollout.engine == "hf":
        return HfEngine(model, pad_id=tokenizer.pad_token_id, device=default_device(), **settings)
    return VllmEngine(
        model,
        max_model_len=longest + rollout.max_new_tokens,
        tensor_parallel=rollout.tensor_parallel,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enable_sleep=rollout.sleep,
        deterministic=rollout.deterministic,
        **settings,
    )
