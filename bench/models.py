"""Makes models with random weights in the shape of known ones: a bench needs their sizes, not what they say."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.data.base_model import SETTINGS, make_tokenizer

GPU = torch.cuda.is_available()
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, words, tied
    "demo": (
        SETTINGS["hidden_size"], SETTINGS["intermediate_size"], SETTINGS["num_hidden_layers"],
        SETTINGS["num_attention_heads"], SETTINGS["num_key_value_heads"], len(make_tokenizer()), False,
    ),
    "smollm2-135m, 4 layers": (576, 1536, 4, 9, 3, 49_152, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49_152, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 151_936, True),
}  # fmt: skip


def make_model(name: str, device: str = "cuda" if GPU else "cpu") -> LlamaForCausalLM:
    hidden, intermediate, layers, heads, kv, words, tied = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=words, tie_word_embeddings=tied, max_position_embeddings=4096,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).eval()
