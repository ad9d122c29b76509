"""Sampling with log-probs and per-sample seeds: the embedded engine against transformers' generate."""

import torch
from common import interleaved, parse_args, record
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.rollout.engine import Sampling, make_requests
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import Problem, Prompt

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 16, 4, 32, 32, 8192


def main() -> None:
    args = parse_args(__doc__)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, VOCABULARY, (PROMPTS, PROMPT_TOKENS))
    prompts = [Prompt(Problem(str(i), "?", "?"), "?", row.tolist()) for i, row in enumerate(ids)]
    engine = HfEngine(model, dtype=torch.float32, max_sequences=PROMPTS * SAMPLES, pad_id=0)
    sampling = Sampling(1.0, NEW_TOKENS, (VOCABULARY,))  # no stop token: the same work on both sides

    def ours() -> None:
        engine.generate(make_requests(prompts, 1, range(SAMPLES), 0, 0), sampling)

    @torch.no_grad()
    def transformers_generate() -> None:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            max_new_tokens=NEW_TOKENS,
            num_return_sequences=SAMPLES,
            top_k=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        model.compute_transition_scores(out.sequences, out.logits, normalize_logits=True)

    seconds = interleaved({"engine_s": ours, "generate_s": transformers_generate}, args.repeats)
    ratio = seconds["engine_s"] / seconds["generate_s"]
    record([{"tokens": PROMPTS * SAMPLES * NEW_TOKENS, **seconds, "engine_over_generate": ratio}], args.out)


if __name__ == "__main__":
    main()
