"""The estimates of `--dry-run` against this machine: calibrated on the first setting, checked on the others.

Seconds: forward and backward of a packed micro-batch, at the FLOP rate that the first setting reached. Bytes: what the
forward pass keeps for the backward pass, the head's gradient included.
"""

import torch
from common import interleaved, parse_args, record
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.policy import footprint
from eepo_fast.policy.footprint import AUTOCAST, Shape
from eepo_fast.policy.micro_batches import collate
from eepo_fast.policy.module import PolicyModule, prepare_model
from eepo_fast.types import Problem, Prompt, Rollout, Segment, WeightsVersion

# hidden size, layers, intermediate size, heads, key-value heads, vocabulary, sequences, tokens of each
SETTINGS = [
    (576, 4, 1536, 9, 3, 16384, 4, 256),
    (576, 4, 1536, 9, 3, 16384, 4, 512),
    (768, 6, 2048, 12, 4, 8192, 4, 256),
    (384, 8, 1024, 6, 2, 32768, 6, 256),
    (1024, 3, 2816, 16, 4, 16384, 3, 384),
]
DTYPES = {"float32": (torch.float32, None, 4), "bfloat16": (torch.bfloat16, None, 2),
          "autocast": (torch.float32, torch.bfloat16, AUTOCAST)}  # fmt: skip


def build(setting: tuple, dtype: torch.dtype, autocast: torch.dtype | None):
    hidden, layers, inner, heads, kv, vocabulary, sequences, length = setting
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).eval()
    prepare_model(model, packed=True)
    prompt, rest = [5] * (length // 4), length - length // 4 + 1
    segment = Segment([6] * rest, [], WeightsVersion(0, False))
    rollouts = [Rollout(Prompt(Problem("", "", ""), "", prompt), 1, i, [segment], True) for i in range(sequences)]
    module = PolicyModule(model, temperature=1.0, autocast=autocast)
    shape = Shape(hidden, layers, vocabulary, inner, heads, kv, hidden // heads, True)
    return module, collate(rollouts, 0, torch.device("cpu"), True), shape


def kept_bytes(module, batch) -> int:
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, _ = module(batch, lambda stats, rows: -stats.logprobs)
    assert loss.requires_grad  # and its graph holds what is counted until here
    return sum(kept.values())


def flops(shape: Shape, setting: tuple) -> float:
    sequences, length = setting[-2:]
    head = 3 / 4  # of the tokens alone
    layers = shape.num_hidden_layers * shape.layer_weights
    per_token = 2 * (layers + head * shape.vocab_size * shape.hidden_size) + shape.attention_flops(length)
    return 3 * sequences * length * per_token


def main() -> None:
    args = parse_args(__doc__)
    built = {setting: build(setting, torch.float32, None) for setting in SETTINGS}

    def step(setting):
        module, batch, _ = built[setting]
        module(batch, lambda stats, rows: -stats.logprobs)[0].backward()
        module.zero_grad(set_to_none=True)

    seconds = interleaved({setting: lambda s=setting: step(s) for setting in SETTINGS}, args.repeats)
    rates = {setting: flops(built[setting][2], setting) / seconds[setting] for setting in SETTINGS}
    rows = []
    for setting in SETTINGS:
        row = {"setting": setting, "gflop_per_s": rates[setting] / 1e9,
               "seconds_over_estimate": rates[SETTINGS[0]] / rates[setting]}  # fmt: skip
        for name, (dtype, autocast, itemsize) in DTYPES.items():
            module, batch, shape = build(setting, dtype, autocast)
            estimated = footprint.kept_bytes(shape, batch.input_ids.numel(), itemsize, checkpointing=False)
            estimated += 4 * shape.vocab_size * shape.hidden_size  # the head's gradient is made in the forward pass
            row[f"{name}_bytes_over_estimate"] = kept_bytes(module, batch) / estimated
        rows.append(row)
    record(rows, args.out)


if __name__ == "__main__":
    main()
