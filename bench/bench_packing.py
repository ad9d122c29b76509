"""Forward and backward over completions of very different lengths: packed, padded in order of length, and padded as
they come, a fixed number at a time, which is what most trainers do. Tokens a second count real tokens alone.

The model is SmolLM2-135M-Instruct's shape with fewer layers on a CPU, all of it on a GPU; the lengths are measured
ones.
"""

import copy
import json
from pathlib import Path

import torch
from common import interleaved, parser_with_defaults, record
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.policy.micro_batches import collate, input_length, plan_micro_batches
from eepo_fast.policy.module import PolicyModule, prepare_model
from eepo_fast.types import Problem, Prompt, Rollout, Segment, WeightsVersion

LENGTHS = Path(__file__).parent / "lengths" / "gsm8k_smollm2.json"
GPU = torch.cuda.is_available()
VOCABULARY = 49152


def make_rollouts(limit: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()

    lengths = json.loads(LENGTHS.read_text())["lengths"][:limit]
    version = WeightsVersion(0, False)
    return [
        Rollout(Prompt(Problem(str(i), "", ""), "", ids(p)), 1, i, [Segment(ids(n), [0.0] * n, version)], True)
        for i, (p, n) in enumerate(lengths)
    ]


def main() -> None:
    parser = parser_with_defaults(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384 if GPU else 4096, help="of a micro-batch")
    parser.add_argument("--completions", type=int, default=10_000 if GPU else 32)
    args = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30 if GPU else 4,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).eval()
    modules = {}
    for packed in (True, False):
        prepared = copy.deepcopy(model)
        prepare_model(prepared, packed=packed)
        modules[packed] = PolicyModule(prepared, temperature=1.0, autocast=None)
    rollouts = make_rollouts(args.completions)
    tokens = sum(map(input_length, rollouts))
    at_a_time = max(1, args.tokens // max(map(input_length, rollouts)))
    plans = {
        "packed": plan_micro_batches(rollouts, args.tokens, 1, True)[0],
        "padded_by_length": plan_micro_batches(rollouts, args.tokens, 1, False)[0],
        "padded_as_they_come": [rollouts[i : i + at_a_time] for i in range(0, len(rollouts), at_a_time)],
    }

    def run(name: str) -> None:
        packed = name == "packed"
        module = modules[packed]
        for members in plans[name]:
            loss, _ = module(collate(members, 0, device, packed), lambda stats, rows: -stats.logprobs)
            loss.backward()
        module.zero_grad(set_to_none=True)

    seconds = interleaved({name: lambda name=name: run(name) for name in plans}, args.repeats)
    row = {"completions": len(rollouts), "tokens": tokens, "micro_batch_tokens": args.tokens}
    for name, plan in plans.items():
        width = [sum(map(input_length, m)) if name == "packed" else len(m) * max(map(input_length, m)) for m in plan]
        row[f"{name}_micro_batches"], row[f"{name}_real_tokens"] = len(plan), tokens / sum(width)
        row[f"{name}_tokens_per_s"] = tokens / seconds[name]
    for name in ("padded_by_length", "padded_as_they_come"):
        row[f"packed_over_{name}"] = seconds[name] / seconds["packed"]
    record([row], args.out)


if __name__ == "__main__":
    main()
