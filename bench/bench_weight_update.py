"""sync and forget, in place and over all weights, against a plain copy of the same bytes."""

import torch
from common import interleaved, parse_args, record
from eepo_kernels import forget, sync

SHAPES = [(8192, 576), *[(1536, 576), (576, 576)] * 12]  # 20 million weights, shaped like a small model's


def main() -> None:
    args = parse_args(__doc__)
    g = torch.Generator().manual_seed(0)
    master = [torch.randn(shape, generator=g) * 0.02 for shape in SHAPES]
    gradient = [torch.randn(shape, generator=g) * 1e-3 for shape in SHAPES]
    dst = [m.bfloat16() for m in master]
    settings = dict(eta=3e-3, keys=list(range(len(dst))), offsets=[0] * len(dst))
    variants = {
        "copy_s": lambda: [d.copy_(m) for d, m in zip(dst, master, strict=True)],
        "sync_s": lambda: sync(dst, master),
        "forget_nearest_s": lambda: forget(dst, gradient, rounding="nearest", **settings),
        "forget_stochastic_s": lambda: forget(dst, gradient, rounding="stochastic", **settings),
    }
    seconds = interleaved(variants, args.repeats)
    ratios = {
        f"{name.removesuffix('_s')}_over_copy": t / seconds["copy_s"] for name, t in seconds.items() if name != "copy_s"
    }
    row = {"weights": sum(d.numel() for d in dst), **seconds, **ratios}
    record([row], args.out)


if __name__ == "__main__":
    main()
