"""Loss with gradients through the LM head: fused and chunked against all logits at once."""

import torch
from common import interleaved, parse_args, record
from eepo_kernels import fused_linear_loss
from torch.nn.functional import cross_entropy

SHAPES = [(1024, 512, 49_152), (512, 512, 151_936)]  # N, D, V: SmolLM2's vocabulary, Qwen2.5's


def main() -> None:
    args = parse_args(__doc__)
    rows = []
    for n, d, v in SHAPES:
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, d, generator=g).requires_grad_()
        weight = (torch.randn(v, d, generator=g) / d**0.5).requires_grad_()
        targets = torch.randint(0, v, (n,), generator=g)
        share = {f: torch.arange(n) < f * n for f in (1.0, 0.2)}

        def fused(f, hidden=hidden, weight=weight, targets=targets, share=share):
            def loss_fn(stats, rows):
                return torch.where(share[f][rows], -stats.logprobs, 0.0)

            fused_linear_loss(hidden, weight, targets, loss_fn)[0].backward()

        def naive(hidden=hidden, weight=weight, targets=targets):
            cross_entropy(hidden @ weight.T, targets, reduction="sum").backward()

        variants = {"naive_s": naive, "fused_s": lambda f=fused: f(1.0), "fused_fifth_s": lambda f=fused: f(0.2)}
        seconds = interleaved(variants, args.repeats)
        ratio = seconds["fused_s"] / seconds["naive_s"]
        fifth = seconds["fused_fifth_s"] / seconds["naive_s"]
        rows.append({"N": n, "D": d, "V": v, **seconds, "fused_over_naive": ratio, "fifth_over_naive": fifth})
    record(rows, args.out)


if __name__ == "__main__":
    main()
