"""The policy's update against the GEMM rate: packed micro-batches, fused head, clipping, AdamW.

    python bench/bench_policy_step.py [--tokens 4096] [--model qwen2.5-0.5b ...] [--out FILE]

`share`: 6 x weights x tokens, at the GEMM rate measured here with the model's own sizes, over the time of the update
(the head's weights times the tokens that it is asked about; attention's own products are not counted). Against it what
most trainers do: sequences padded in order of length, all logits at once. Random weights, measured lengths
(bench/lengths), bf16 over fp32 masters on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable

import torch
from bench_packing import LENGTHS
from common import interleaved, parser_with_defaults, peak_bytes, record
from models import SHAPES, make_model

from eepo_fast.algorithm.losses import PolicyTokens, policy_loss, token_weights
from eepo_fast.config.schema import GrpoConfig, OptimizerConfig
from eepo_fast.policy.micro_batches import collate, input_length, plan_micro_batches
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.types import Problem, Prompt, Rollout, Segment, WeightsVersion

GPU = torch.cuda.is_available()
VARIANTS = ("ours", "ours, of sequences", "ours, checkpointing", "plain")
MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b") if GPU else ("smollm2-135m, 4 layers",)


def make_rollouts(words: int, num_tokens: int) -> list[Rollout]:
    """Makes as many as have `num_tokens` together."""
    generator, found = torch.Generator().manual_seed(0), []

    def ids(n: int) -> list[int]:
        return torch.randint(2, words, (n,), generator=generator).tolist()

    lengths = json.loads(LENGTHS.read_text())["lengths"]
    while sum(map(input_length, found)) < num_tokens:
        p, n = lengths[len(found) % len(lengths)]
        prompt = Prompt(Problem(str(len(found)), "", ""), "", ids(p))
        rollout = Rollout(prompt, 1, len(found), [Segment(ids(n), [-1.0] * n, WeightsVersion(0, False))], True)
        rollout.reward, rollout.advantage = 1.0, (-1.0) ** len(found)
        found.append(rollout)
    return found


def gemm_flops(name: str, tokens: int) -> float:
    """Returns the FLOP/s of a layer's largest product, forward: the rate that an update could have."""
    hidden, intermediate, *_ = SHAPES[name]
    dtype, device = (torch.bfloat16, "cuda") if GPU else (torch.float32, "cpu")
    a = torch.randn(tokens, hidden, dtype=dtype, device=device)
    b = torch.randn(intermediate, hidden, dtype=dtype, device=device)
    repeats = 50 if GPU else 3
    best = float("inf")
    for _ in range(5):
        if GPU:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b.T
        if GPU:
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / repeats)
    return 2 * tokens * hidden * intermediate / best


def our_update(policy: TorchPolicy, rollouts: list[Rollout], loss: str) -> None:
    weight = 1 / sum(r.num_tokens for r in rollouts)
    for micro in policy.micro_batches(rollouts):
        tokens = PolicyTokens.of(
            micro, token_weights(micro, rollouts, weight), WeightsVersion(0, False), with_reference=False
        )
        policy.backward(micro, policy_loss(GrpoConfig(kl_coef=0.0, loss=loss), tokens))
    policy.step()


def plain_update(model, optimizer, rollouts: list[Rollout], micro_batch_tokens: int) -> None:
    """Updates by transformers' logits, padded, and a log-softmax of all of them; the same loss at a ratio of 1."""
    device, total = next(model.parameters()).device, sum(r.num_tokens for r in rollouts)
    for members in plan_micro_batches(rollouts, micro_batch_tokens, 1, False)[0]:
        micro = collate(members, 0, device, False)
        with torch.autocast(device.type, torch.bfloat16, enabled=GPU):
            logits = model(micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits
        chosen = logits.flatten(0, 1)[micro.positions].float()
        logprobs = torch.log_softmax(chosen, -1).gather(1, micro.targets[:, None]).squeeze(1)
        advantages = micro.per_token([r.advantage for r in micro.rollouts])
        (-(logprobs - logprobs.detach()).exp() * advantages / total).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_update(key: str, name: str, rollouts: list[Rollout], micro_batch_tokens: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model = make_model(name)
    if key == "plain":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        return lambda: plain_update(model, optimizer, rollouts, micro_batch_tokens)
    policy = TorchPolicy(
        model,
        compute_dtype=torch.bfloat16 if GPU else torch.float32,
        temperature=1.0,
        micro_batch_tokens=micro_batch_tokens,
        pad_id=0,
        packed=True,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        gradient_checkpointing="checkpointing" in key,
    )
    return lambda: our_update(policy, rollouts, "gspo" if "sequences" in key else "ppo")


def measure(name: str, args) -> dict:
    hidden, _, _, _, _, words, tied = SHAPES[name]
    rollouts = make_rollouts(words, args.tokens * args.micro_batches)
    tokens, asked = sum(map(input_length, rollouts)), sum(r.num_tokens for r in rollouts)
    weights = sum(p.numel() for p in make_model(name, device="meta").parameters())
    head = words * hidden
    layers = weights - head * (1 if tied else 2)  # an embedding is looked up
    flops, rate = 6 * (layers * tokens + head * asked), gemm_flops(name, args.tokens)
    row = {"model": name, "tokens": tokens, "completion_tokens": asked, "micro_batch_tokens": args.tokens}
    row |= {"gemm_tflops": rate / 1e12, "flops": flops}
    seconds: dict[str, list[float]] = {key: [] for key in VARIANTS}
    for turn in range(args.repeats):  # one at a time: two of the largest do not fit
        for key in VARIANTS:
            gc.collect()
            try:
                update = make_update(key, name, rollouts, args.tokens)
                update()  # warms up
                seconds[key].append(interleaved({key: update}, 1)[key])
                if turn == 0:
                    row[key] = {"peak_mib": peak_bytes(update) / 2**20}
            except torch.OutOfMemoryError:
                row[key] = {"skipped": "out of memory"}
            update = None
    for key, found in seconds.items():
        if found:
            middle = statistics.median(found)
            row[key] |= {"seconds": middle, "tokens_per_s": tokens / middle, "share": flops / rate / middle}
    if seconds["plain"] and seconds["ours"]:
        row["plain_over_ours"] = row["plain"]["seconds"] / row["ours"]["seconds"]
    return row


def main() -> None:
    parser = parser_with_defaults(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8 if GPU else 1)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=MODELS)
    args = parser.parse_args()
    rows = [measure(name, args) for name in args.model]
    record(rows, args.out, share={row["model"]: row["ours"].get("share") for row in rows})


if __name__ == "__main__":
    main()
