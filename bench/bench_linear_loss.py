"""Loss with gradients through the LM head, side by side with what a user would pick instead.

Time, peak memory, error against float64, and the share of the machine's own ceilings. Peers that are not installed, or
do not run on this device, are skipped by name.

G is the fastest single matmul of [N, D] by [D, V] measured in the same run; a loss with gradients whose coefficients
are non-zero on a share f of the tokens has a floor of (1 + 2f) G.
"""

import gc
import math
import statistics
import time

import torch
from common import interleaved, keep, parser_with_defaults, peak_bytes, record
from eepo_kernels import fused_linear_loss, linear_logprobs
from eepo_kernels.linear_chunks import Head, Options, default_chunk_bytes
from head_peers import ENTROPY_COEF, SURROGATE, TASKS, NotHere
from torch.profiler import ProfilerActivity, profile

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
GPU_SHAPES = [  # N, D, V
    (32_768, 2048, 151_936),  # Qwen2.5-3B
    (32_768, 3072, 128_256),  # Llama-3.2-3B
    (32_768, 4096, 151_936),  # Qwen3-8B
    (4096, 2048, 151_936),  # a small micro-batch
]
CPU_SHAPES = [(1024, 512, 49_152), (1024, 512, 151_936)]  # SmolLM2's vocabulary, Qwen's
SHARES = (1.0, 0.5, 0.2)


def make_inputs(n: int, d: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(n, d, generator=g, device=DEVICE).to(DTYPE).requires_grad_()
    weight = (torch.randn(v, d, generator=g, device=DEVICE) / d**0.5).to(DTYPE).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), generator=g, device=DEVICE)


def weights_of(n: int, f: float) -> torch.Tensor:
    """Returns 1/N for a share f of the tokens, spread over all of them; 0 for the others."""
    kept = (torch.arange(n, device=DEVICE) * 7919) % 100 < 100 * f
    return torch.where(kept, 1 / n, 0.0)


def gemm_seconds(n: int, d: int, v: int, repeats: int) -> float:
    """Returns G: the fastest of plain matmuls of this shape, its output, in the inputs' dtype, in memory at hand."""
    a, b = torch.randn(n, d, device=DEVICE, dtype=DTYPE), torch.randn(v, d, device=DEVICE, dtype=DTYPE)
    out = torch.empty(n, v, device=DEVICE, dtype=DTYPE)
    times = []
    for _ in range(max(3, repeats)):
        start = time.perf_counter()
        torch.mm(a, b.T, out=out)
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def copy_bytes_per_s() -> float:
    """Returns the bytes that a large copy reads and writes a second."""
    source = torch.empty((4 << 30 if CUDA else 1 << 28) // 4, device=DEVICE)
    source.normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"]


def gradients(loss, inputs, weights) -> list[torch.Tensor]:
    hidden, weight, targets = inputs
    value = loss(hidden, weight, targets, weights)
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def truth_of(task: str, inputs, weights) -> list[torch.Tensor]:
    """Computes the truth in float64, on the numbers that the inputs' dtype holds, through the chunked PyTorch path
    (which has a gradcheck and is compared with autograd through all the logits in the tests)."""
    hidden, weight, targets = inputs
    exact = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), targets)
    coef = ENTROPY_COEF if task == "entropy" else 0.0

    def loss(hidden, weight, targets, weights):
        def loss_fn(stats, rows):
            return weights[rows] * (-stats.logprobs - coef * stats.entropy)

        return fused_linear_loss(hidden, weight, targets, loss_fn, backend="torch")[0]

    return gradients(loss, exact, weights.double())


def errors(found, truth) -> dict[str, float]:
    names = ("loss_error", "dX_error", "dW_error")
    return {n: float((f.double() - t).norm() / t.norm()) for n, f, t in zip(names, found, truth, strict=True)}


def available(task: str, inputs, weights) -> tuple[dict, dict[str, str]]:
    """Returns the peers that run on these inputs, and why the others do not."""
    running, skipped = {}, {}
    for name, build in TASKS[task].items():
        try:
            loss = build()
            gradients(loss, inputs, weights)
            running[name] = loss
        except NotHere as reason:
            skipped[name] = str(reason)
        except torch.cuda.OutOfMemoryError:
            skipped[name] = "out of memory"
        except Exception as error:  # a peer may fail in any way; the bench goes on without it and says so
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    return running, skipped


def measure(task: str, shape, f: float, repeats: int, g_s: float) -> list[dict]:
    n, d, v = shape
    inputs, weights = make_inputs(n, d, v), weights_of(n, f)
    running, skipped = available(task, inputs, weights)
    seconds = interleaved({name: lambda fn=fn: gradients(fn, inputs, weights) for name, fn in running.items()}, repeats)
    # float64 truth on fewer tokens, as many as take seconds: several chunks on a GPU
    few = min(n, max(8, (1 << 32) // (v * d) * (1000 if CUDA else 1) // 8 * 8))
    small = (inputs[0].detach()[:few].requires_grad_(), *(t[:few] if t.dim() == 1 else t for t in inputs[1:]))
    truth = truth_of(task, small, weights_of(few, f))
    rows = []
    outputs = inputs[0].nbytes + inputs[1].nbytes
    for name, fn in running.items():
        row = {"task": task, "N": n, "D": d, "V": v, "f": f, "peer": name, "s": seconds[name]}
        row["over_eepo"] = seconds[name] / seconds["eepo"]
        row["over_floor"] = seconds[name] / ((1 + 2 * f) * g_s)
        row["peak_beyond_grads_mib"] = (peak_bytes(lambda fn=fn: gradients(fn, inputs, weights)) - outputs) / 2**20
        row |= errors(gradients(fn, small, weights_of(few, f)), truth)
        if name in SURROGATE:
            del row["loss_error"]
        rows.append(row)
    rows += [
        {"task": task, "N": n, "D": d, "V": v, "f": f, "peer": name, "skipped": why} for name, why in skipped.items()
    ]
    return rows


def scoring(shape, repeats: int, g_s: float) -> dict:
    """Measures log-probs and entropy without gradients, against all the logits at once."""
    n, d, v = shape
    hidden, weight, targets = make_inputs(*shape)

    @torch.no_grad()
    def plain():
        logp = torch.log_softmax((hidden @ weight.T).float(), -1)
        return logp.gather(1, targets[:, None]), -(logp.exp() * logp).sum(-1)

    @torch.no_grad()
    def eepo():
        return linear_logprobs(hidden, weight, targets)

    seconds = interleaved({"eepo": eepo, "naive": plain}, repeats)
    peaks = {name: peak_bytes(run) / 2**20 for name, run in (("eepo", eepo), ("naive", plain))}
    return {
        "task": "scoring", "N": n, "D": d, "V": v, "peer": "eepo", "s": seconds["eepo"],
        "naive_over_eepo": seconds["naive"] / seconds["eepo"], "over_floor": seconds["eepo"] / g_s,
        "peak_mib": peaks["eepo"], "naive_peak_mib": peaks["naive"],
    }  # fmt: skip


def where_time_goes(shape, f: float, g_s: float, copy_rate: float) -> dict:
    """Puts one call of the fused loss under the profiler, its device time by kind of kernel; beside it what the bytes
    cost at the rate of a copy: logits written and read in fp32, read again and written as gradients for a share f,
    which two GEMMs read; and dW read and written at each flush of the packed rows but the first, which only writes."""
    inputs, weights = make_inputs(*shape), weights_of(shape[0], f)
    loss = TASKS["entropy"]["eepo"]()
    gradients(loss, inputs, weights)
    activities = [ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]
    with profile(activities=activities) as prof:
        gradients(loss, inputs, weights)
        if CUDA:
            torch.cuda.synchronize()
    kinds = {"gemm": 0.0, "row_stats": 0.0, "row_grad": 0.0, "other": 0.0}
    for event in prof.key_averages():
        spent = (event.self_device_time_total if CUDA else event.self_cpu_time_total) / 1e6
        kinds[_kind(event.key.lower())] += spent
    n, d, v = shape
    logits = n * v
    row_bytes = 8 * logits + f * logits * (4 + 3 * DTYPE.itemsize)
    options = Options(1.0, 0.0, default_chunk_bytes(inputs[0].device), "triton" if CUDA else "torch", DTYPE)
    packed = Head(inputs[0], inputs[1], None, options, with_grad=True).pack_rows
    dw_bytes = 4 * v * d * (2 * math.ceil(f * n / packed) - 1)
    total = sum(kinds.values())
    return (
        {
            "task": "where time goes",
            "N": n,
            "D": shape[1],
            "V": v,
            "f": f,
            "total_s": total,
            "floor_s": (1 + 2 * f) * g_s,
        }
        | {f"{kind}_share": spent / total for kind, spent in kinds.items()}
        | {"row_traffic_floor_s": row_bytes / copy_rate, "dW_traffic_floor_s": dw_bytes / copy_rate}
    )


def _kind(name: str) -> str:
    if any(word in name for word in ("gemm", "cutlass", "nvjet", "aten::mm", "aten::addmm", "xmma")):
        return "gemm"
    return name.removesuffix("_kernel").removesuffix("_fwd") if name.startswith("row_") else "other"


def main() -> None:
    parser = parser_with_defaults(__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help="this one alone")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of tokens with a gradient")
    parser.add_argument("--peers", nargs="+", help="these beside eepo, such as naive liger; by default all that run")
    args = parser.parse_args()
    if args.peers:
        for task, peers in TASKS.items():
            TASKS[task] = {name: build for name, build in peers.items() if name in ("eepo", *args.peers)}
    shapes = GPU_SHAPES if CUDA else CPU_SHAPES
    rows = []
    copy_rate = statistics.median([copy_bytes_per_s() for _ in range(3)])
    for shape in [tuple(args.shape)] if args.shape else shapes:
        g_s = gemm_seconds(*shape, args.repeats)
        flops = 2 * shape[0] * shape[1] * shape[2]
        rows.append(
            {
                "task": "ceilings",
                "N": shape[0],
                "D": shape[1],
                "V": shape[2],
                "G_s": g_s,
                "G_tflops": flops / g_s / 1e12,
            }
            | {"copy_gb_per_s": copy_rate / 1e9}
        )
        for f in args.shares:
            rows += measure("entropy", shape, f, args.repeats, g_s)
            keep(rows, args.out)
        rows += measure("nll", shape, 1.0, args.repeats, g_s)
        keep(rows, args.out)
        rows.append(scoring(shape, args.repeats, g_s))
        rows += [where_time_goes(shape, f, g_s, copy_rate) for f in (1.0, 0.2)]
    record(rows, args.out)


if __name__ == "__main__":
    main()
