"""A whole iteration: EEPO against GRPO, in turns, with the same prompts and the same lengths of answers.

    python bench/bench_iteration.py [--pairs 10] [--model FOLDER] [--engine hf|vllm] [--quorum 0.9] [--carry] [--out F]

Where trl is installed its GRPOTrainer has its turn too (bench/trl_peer.py), with the same tokens, timed and measured as
ours. Answers end where bench/lengths says, whatever the model says: all sample the same number of tokens. `allowed`
is 1.03 times what EEPO's additional FLOPs, counted by PyTorch over one iteration of each, make an iteration longer on a
machine that is always busy. Without --model: random weights, of the demo's shape on a CPU, of Qwen2.5-0.5B's on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import trl_peer
from common import allocations, parser_with_defaults, record
from models import SHAPES, make_model
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from eepo_fast.algorithm import iteration
from eepo_fast.algorithm.overlap import Ahead
from eepo_fast.algorithm.trainer import Trainer
from eepo_fast.config import Config, load_config
from eepo_fast.config.schema import ModelConfig
from eepo_fast.data.base_model import make_tokenizer
from eepo_fast.policy.loading import load_model
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rollout.engine import OnProgress, SampleRequest, continuation, make_requests
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.run.build import make_engine
from eepo_fast.types import Grade, Problem, Prompt

GPU = torch.cuda.is_available()
LENGTHS = Path(__file__).parent / "lengths"
GOAL = 1.03
KEPT = ("seconds", "idle", "tokens/per_second", "unlearn/hidden_s")


class Grader:
    """Rewards every second answer, so that no group is all alike and every iteration has a gradient."""

    beside_sampling = False

    def grade(self, problems, completions, *, seconds=None):
        return [Grade(float(i % 2), "ok", 0.0) for i in range(len(completions))]


@register_flop_formula(torch.ops.eepo_kernels.linear_logprobs)
def _(hidden, weight, *rest, **more):
    return 2 * hidden[0] * hidden[1] * weight[0]


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _(query, key, *rest, **more):
    batch, heads, length, size = query
    return 4 * batch * heads * length * key[2] * size


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward)
def _(grad, query, key, *rest, **more):
    batch, heads, length, size = query
    return 10 * batch * heads * length * key[2] * size


def addmm_flops(added, a, b, *rest, **more) -> int:
    """Counts the product with a dtype of its own, which the head has on a GPU and PyTorch's formula does not know."""
    return 2 * a[0] * a[1] * b[1]


def make_trainer(config: Config, model, tokenizer, prompts: list[Prompt], *, checkpointing: bool) -> Trainer:
    device = torch.device("cuda" if GPU else "cpu")
    longest = max(len(p.token_ids) for p in prompts)
    engine = make_engine(config.rollout, model.to(device), tokenizer, longest)
    policy = TorchPolicy(
        copy.deepcopy(model).to(device),
        compute_dtype=torch.bfloat16 if GPU else torch.float32,
        temperature=1.0,
        micro_batch_tokens=config.train.micro_batch_tokens,
        pad_id=tokenizer.pad_token_id or 0,
        packed=True,
        optimizer=config.optimizer,
        gradient_checkpointing=checkpointing,
    )
    return Trainer(
        config,
        policy=policy,
        reference=None,
        engine=engine,
        grader=Grader(),
        prompts=prompts,
        tokenizer=tokenizer,
        stop_token_ids=[],  # nothing ends an answer but its length
    )


def fix_lengths(lengths: list[int], prompts: list[Prompt], group_size: int) -> None:
    """Gives every sample of every prompt its length, the same in both methods."""
    place = {p.id: i for i, p in enumerate(prompts)}

    def limited(chosen, stage, indices, *seeds) -> list[SampleRequest]:
        requests = []
        for r in make_requests(chosen, stage, indices, *seeds):
            limits = [lengths[(place[r.prompt.id] * group_size + k) % len(lengths)] for k in r.sample_indices]
            requests.append(replace(r, limits=tuple(limits)))
        return requests

    def limited_rest(rollouts, *arguments) -> list[SampleRequest]:
        whole = [lengths[(place[r.prompt.id] * group_size + r.sample_index) % len(lengths)] for r in rollouts]
        requests = continuation(rollouts, *arguments)
        return [replace(request, limits=(most,)) for request, most in zip(requests, whole, strict=True)]

    iteration.make_requests = limited
    iteration.continuation = limited_rest


def make_prompts(lengths: list[int], count: int, num_words: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for i in range(count):
        ids = torch.randint(2, num_words, (lengths[i % len(lengths)],), generator=generator).tolist()
        prompts.append(Prompt(Problem(f"p{i}", "", "1"), "", ids))
    return prompts


def timed(trainer: Trainer, progress: OnProgress | None = None) -> dict[str, float]:
    cpu, started = cpu_seconds(), synchronised_time()
    _, row = trainer.iteration(progress)
    seconds = synchronised_time() - started
    row["seconds"], row["idle"] = seconds, idle(cpu, seconds)
    return row


def synchronised_time() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def idle(cpu: float, seconds: float) -> float:
    """Returns the share of the cores' time in which this process did nothing, since it had used `cpu` seconds."""
    return 1 - (cpu_seconds() - cpu) / (seconds * torch.get_num_threads())


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def flops(trainer: Trainer) -> float:
    streams, Ahead.stream = Ahead.stream, lambda *sizes: None  # the counter does not see other threads
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: addmm_flops}) as counter:
        trainer.iteration()
    Ahead.stream = streams
    return counter.get_total_flops()


def standing_bytes(model, optimizer, *more: torch.Tensor) -> int:
    """Counts what is alive all the time: weights, the optimizer's state, and `more`."""
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *states, *more))


class Rounds:
    """Runs iterations in turns: in a round each trainer has one. The first warms up, the last is for memory."""

    def __init__(self, trainers: dict[str, Trainer], pairs: int):
        self.trainers, self.pairs, self.round = trainers, pairs, 0
        self.rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*trainers, "trl")}
        self.peak_bytes: dict[str, int] = {}

    @property
    def is_for_memory(self) -> bool:
        return self.round == self.pairs + 1

    def ours(self) -> None:
        for name in list(self.trainers)[:: 1 if self.round % 2 else -1]:
            trainer = self.trainers[name]
            if not self.is_for_memory:
                self.rows[name].append(timed(trainer))
                continue
            with allocations() as found:
                trainer.iteration()
            weights = trainer.engine.weights.values() if isinstance(trainer.engine, HfEngine) else ()
            standing = standing_bytes(trainer.policy.model, trainer.policy.optimizer, *weights)
            self.peak_bytes[name] = found.peak_bytes + standing
        self.round += 1

    def begin_trl(self) -> None:
        if self.is_for_memory:
            self.found = allocations().__enter__()
        self.cpu, self.started = cpu_seconds(), synchronised_time()

    def end_trl(self, model, optimizer) -> None:
        seconds = synchronised_time() - self.started
        if self.is_for_memory:
            self.found.__exit__(None, None, None)
            self.peak_bytes["trl"] = self.found.peak_bytes + standing_bytes(model, optimizer)
        else:
            self.rows["trl"].append({"seconds": seconds, "idle": idle(self.cpu, seconds)})
        self.ours()


def summary(rounds: Rounds) -> dict:
    """Returns medians by trainer; the warm-up is left out."""
    found = {}
    for name, part in rounds.rows.items():
        if not part:
            continue
        keys = [k for k in part[0] if k.startswith("time/") or k in KEPT]
        medians = {k: statistics.median(r[k] for r in part[1:]) for k in keys}
        found[name] = {k: v for k, v in medians.items() if math.isfinite(v)}  # GRPO hides no unlearning
        if name in rounds.peak_bytes:
            found[name]["peak_mib"] = rounds.peak_bytes[name] / 2**20
    return found


def beyond_two_stages(grpo: dict[str, float], eepo: dict[str, float]) -> dict[str, float]:
    """Returns how much of EEPO is neither its two stages nor done by GRPO too, and how much unlearning was hidden."""
    both = sum(grpo.get(f"time/{name}_s", 0.0) for name in ("sync", "reward", "update"))
    stages = sum(eepo[f"time/rollout_stage{s}_s"] for s in (1, 2))
    unlearning = eepo["time/unlearn_s"] + eepo["unlearn/hidden_s"]
    return {
        "beyond_two_stages": eepo["seconds"] / (both + stages) - 1,
        "unlearning_hidden": eepo["unlearn/hidden_s"] / unlearning,
        "forget_share": eepo["time/forget_s"] / eepo["seconds"],
    }


def ratios(rounds: Rounds, name: str, other: str) -> list[float]:
    """Returns the seconds of one over those of another, round by round."""
    pairs = zip(rounds.rows[name][1:], rounds.rows[other][1:], strict=True)
    return [one["seconds"] / two["seconds"] for one, two in pairs]


def parse_args() -> argparse.Namespace:
    parser = parser_with_defaults(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    name = "qwen2.5-0.5b" if GPU else "demo"
    parser.add_argument("--model", default=name, help=f"one of {', '.join(SHAPES)}, random; or a folder or hub id")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    lengths = LENGTHS / ("gsm8k_smollm2.json" if GPU else "long_tail.json")
    parser.add_argument("--lengths", type=Path, default=lengths)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--quorum", type=float, default=1.0)
    parser.add_argument("--carry", action="store_true", help="with and without rollout.carry: carried_iterations.py")
    parser.add_argument("--in-flight", type=float, default=0.5, help="rollout.in_flight with --carry")
    parser.add_argument("--only", nargs="+", help="with --carry: some of grpo, grpo_carry, eepo, eepo_carry")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="in all trainers")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all trainers")
    return parser.parse_args()


def make_config(
    *,
    eepo: bool,
    quorum: float,
    engine: str,
    prompts: int,
    group_size: int,
    longest: int,
    micro_batch_tokens: int = 4096,
    carry: int = 0,
    in_flight: float = 0.5,
) -> Config:
    forgets = ["eepo.alpha=9.0", "eepo.learning_rate=1e-4"]
    waits = [f"rollout.carry={carry}", f"rollout.in_flight={in_flight}"] if carry else []
    dtype = "bfloat16" if GPU or engine == "vllm" else "float32"
    return load_config([], [
        "model.path=unused", "data.train=unused", *(forgets if eepo else ["eepo.enabled=false"]),
        f"rollout.quorum={quorum if eepo or carry else 1}", *waits,
        f"rollout.engine={engine}", f"rollout.group_size={group_size}",
        f"rollout.max_new_tokens={longest}", f"rollout.dtype={dtype}",
        f"train.prompts_per_iteration={prompts}", f"train.prompts_per_update={max(1, prompts // 2)}",
        f"train.micro_batch_tokens={micro_batch_tokens}", "grpo.kl_coef=0.0", "optimizer.learning_rate=1e-6",
    ])  # fmt: skip


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    pairs = json.loads(args.lengths.read_text())["lengths"]
    answers = [n for _, n in pairs]
    if args.model in SHAPES:
        model, tokenizer = make_model(args.model), make_tokenizer()
    else:
        model, tokenizer = load_model(ModelConfig(path=args.model))
    if args.carry:
        sys.modules["bench_iteration"] = sys.modules[__name__]  # it imports this module, which is not loaded twice
        import carried_iterations

        carried_iterations.run(args, model, tokenizer, pairs)
        return
    prompts = make_prompts([p for p, _ in pairs], args.prompts, model.config.vocab_size)
    fix_lengths(answers, prompts, args.group_size)
    trainers = {}
    for name in ("grpo", "eepo"):
        config = make_config(
            eepo=name == "eepo", quorum=args.quorum, engine=args.engine, prompts=args.prompts,
            group_size=args.group_size, longest=max(answers), micro_batch_tokens=args.micro_batch_tokens,
        )  # fmt: skip
        trainers[name] = make_trainer(config, model, tokenizer, prompts, checkpointing=args.checkpointing)
    counted = {name: flops(trainer) for name, trainer in trainers.items()}
    rounds = Rounds(trainers, args.pairs)
    peer = {"trl": trl_peer.TRL} if trl_peer.TRL and args.engine == "hf" else {}
    if peer:
        trl_peer.run_iterations(
            args.pairs + 2, rounds.begin_trl, rounds.end_trl, model=model, tokenizer=tokenizer, prompts=prompts,
            lengths=[answers[i % len(answers)] for i in range(args.prompts * args.group_size)],
            group_size=args.group_size, updates=2, micro_batch_tokens=args.micro_batch_tokens,
            checkpointing=args.checkpointing,
        )  # fmt: skip
    else:
        print(
            "trl: not installed, skipped"
            if args.engine == "hf"
            else "trl: has its turn beside the embedded engine only"
        )
        for _ in range(args.pairs + 2):
            rounds.ours()
    tokens = {row["tokens/generated"] for name in trainers for row in rounds.rows[name]}
    assert len(tokens) == 1, "not the same work"
    pair_ratios = ratios(rounds, "eepo", "grpo")
    extra = counted["eepo"] / counted["grpo"]
    found = {"eepo_over_grpo": statistics.median(pair_ratios), "allowed": GOAL * extra, "flops_ratio": extra}
    found |= {
        "lowest": min(pair_ratios),
        "highest": max(pair_ratios),
        "pairs": len(pair_ratios),
        "tokens": tokens.pop(),
    }
    medians = summary(rounds)
    found |= beyond_two_stages(medians["grpo"], medians["eepo"])
    top = {key: found[key] for key in ("eepo_over_grpo", "allowed")}
    for name in trainers if peer else ():
        top[f"trl_over_{name}"] = statistics.median(ratios(rounds, "trl", name))
        top[f"{name}_memory_over_trl"] = rounds.peak_bytes[name] / rounds.peak_bytes["trl"]
    record([found | top | medians], args.out, **peer, **top)


if __name__ == "__main__":
    main()
