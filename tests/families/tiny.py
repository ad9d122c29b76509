"""Makes tiny models of the families that transformers has for causal language models, with random weights.

Most configs shrink by the names that their fields share; the others have what they need in OWN.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 8, "bos_token_id": 257, "eos_token_id": 256,
    "pad_token_id": 258, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "d_model": 32, "n_layers": 2,
    "n_heads": 4, "d_ff": 64, "ffn_dim": 64, "num_layers": 2, "num_heads": 4, "word_embed_proj_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "sliding_window": 8, "ffn_hidden_size": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_n_heads": 4,
    "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_groups": 1, "ssm_state_size": 8, "n_groups": 1, "state_size": 8,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "rotary_dim": 4, "n_inner": 64, "dropout_rate": 0.0,
    "moe_layer_start_index": 0, "lru_width": 32, "conv_L_cache": 3,
}  # fmt: skip

WIDE = {  # the sizes that vLLM's kernels ask for on a CPU
    "hidden_size": 128, "head_dim": 32, "n_embd": 128, "d_model": 128, "word_embed_proj_dim": 128,
    "intermediate_size": 256, "moe_intermediate_size": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "kv_lora_rank": 64, "q_lora_rank": 64,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "num_heads": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "hybrid_layer_ids": [1], "mamba_ngroups": 1},
}


def small_config(family: str, wide: bool = False) -> Any:
    """Returns the family's config with every size that it has in SMALL. wide: and in WIDE."""
    known, sizes = CONFIG_MAPPING[family]().to_dict(), SMALL | (WIDE if wide else {})
    values = {key: value for key, value in sizes.items() if key in known} | OWN.get(family, {})
    if "kv_lora_rank" in known:  # multi-head latent attention: a head's size is the sum of two others
        values.pop("head_dim", None)
        values.pop("qk_head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in ("layer_types", "layers_block_type"):  # one of each kind
        if known.get(name) and name not in values:
            kinds = list(dict.fromkeys(known[name]))
            values[name] = kinds if len(kinds) > 1 else kinds * 2
            values["num_hidden_layers"] = len(values[name])
    return CONFIG_MAPPING[family](**values)


def tiny_model(family: str, size: float = 1.0, config: Any = None) -> PreTrainedModel:
    """Returns a model in fp32 in eval mode, with weights drawn from a seed: matrices as wide as `size` makes them."""
    config = config or small_config(family)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * size / weight.shape[-1] ** 0.5)
            elif "norm" not in name.lower() and not name.endswith(("A_log", "dt_bias", ".D")):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()
