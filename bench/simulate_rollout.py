"""Wall time of an iteration, simulated: which part of it EEPO adds, and what streaming and a quorum take away again.

    python bench/simulate_rollout.py [--out FILE] [--figure FILE]

From the lengths of answers, the time of a decoding step (weights and keys and values read, one token a sequence
multiplied) and the rates of a GPU, which are assumptions (eepo_fast/run/estimate.py). The same simulation, with times
taken from one run on the machine at hand, is held against other runs by bench/check_simulation.py.

Every figure is the mean of ITERATIONS iterations; those with rollout.carry come after WARM_UP others of the same run.
Streamed unlearning, beside sampling, is what this trainer does on a GPU up to ZeRO-2; else it comes after the stage, as
in `plain`. Lengths are those of bench/lengths, stretched so that the longest answer is max_new_tokens. simulation.py
says what else is assumed and left out.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from carried_simulation import CarriedRun, Draw, carried_iterations
from common import parser_with_defaults, record
from simulation import Answer, Costs, Setup, StepTime, iteration

from eepo_fast.config import Config, load_config
from eepo_fast.run.estimate import Machine, Shape, find_machine, find_shape

ROOT = Path(__file__).parents[1]
STEP_OVERHEAD_S = 1.5e-3  # of a decoding step: the scheduler, launches
MODELS = ("qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base")
PAPER = [f"8x{name}" for name in ("A100-80GB", "H200", "B200")]
PROMPTS = 128  # the paper's
MANY = (64, 256, 1024)  # H200, with 16 prompts each
QUORUMS = (1.0, 0.9, 0.75, 0.5)
ITERATIONS, WARM_UP = 6, 4
OF_MANY = 2  # iterations of those, in which nothing of a single answer is left
CARRIES = {"carry": (0.9, 0.5), "carry_quorum_0.75": (0.75, 1.0)}  # rollout.quorum and in_flight with rollout.carry 1


def gpu_costs(config: Config, shape: Shape, machine: Machine, mean_length: float) -> Costs:
    """Counts costs from bytes and multiplications, as eepo_fast/run/estimate.py does."""
    n, tp = machine.ranks, config.rollout.tensor_parallel
    multiplied = 2 * shape.multiplied_weights
    forward = (multiplied + shape.attention_flops(mean_length)) / machine.flops
    wire = shape.weights / machine.link_bytes_per_s if n > 1 else 0.0
    return Costs(
        step=StepTime(
            fixed_s=STEP_OVERHEAD_S,
            sequence_s=multiplied / tp / machine.flops,
            cached_token_s=shape.kv_bytes() / tp / machine.bytes_per_s,
            weights_s=2 * shape.weights / tp / machine.bytes_per_s,
            overlapped=True,
        ),
        prefill_token_s=multiplied / tp / machine.flops,
        forward_token_s=forward / n,
        reference_token_s=forward / n if config.grpo.kl_coef else 0.0,
        train_token_s=forward * (4 if config.train.gradient_checkpointing else 3) / n,
        update_s=6 * wire + 20 * shape.weights / n / machine.bytes_per_s,
        unlearn_s=4 * wire,
        sync_s=6 * shape.weights / machine.bytes_per_s,
        forget_s=2 * wire + 8 * shape.weights / n / machine.bytes_per_s,
    )


def drawing(pairs: Sequence[Sequence[int]], longest: int, group_size: int) -> Draw:
    """Returns what draws the answers of a group from measured ones, each as many times as long as lets the longest be
    `longest`."""
    factor = longest / max(n for _, n in pairs)

    def draw(number: int) -> list[tuple[int, int]]:
        generator = random.Random(number)
        asked = generator.choice(pairs)[0]
        return [(asked, max(1, round(generator.choice(pairs)[1] * factor))) for _ in range(group_size)]

    return draw


class Case(NamedTuple):
    draw: Draw
    costs: Costs
    setup: Setup
    iterations: int = ITERATIONS

    def answers(self, number: int = 0) -> list[Answer]:
        """Returns those of an iteration that waits for all."""
        size = self.setup.prompts
        return [Answer(i, *drawn) for i in range(size) for drawn in self.draw(number * size + i)]


def make_case(model: str, machine_name: str, pairs: Sequence[Sequence[int]], prompts: int | None = None) -> Case:
    """Makes one of the paper's models with its settings, on a machine with assumed rates."""
    config = load_config([str(ROOT / f"configs/{model}.yaml")], [])
    shape, machine = find_shape(config), find_machine(machine_name, 1)
    prompts = prompts or config.train.prompts_per_iteration
    draw = drawing(pairs, config.rollout.max_new_tokens, config.rollout.group_size)
    mean = statistics.mean(tokens for number in range(prompts) for _, tokens in draw(number))
    setup = Setup(
        prompts=prompts,
        group_size=config.rollout.group_size,
        updates=config.train.prompts_per_iteration // config.train.prompts_per_update,
        engines=machine.ranks // config.rollout.tensor_parallel,
        max_sequences=config.rollout.max_sequences,
        stream_tokens=config.train.micro_batch_tokens * machine.ranks,
    )
    return Case(draw, gpu_costs(config, shape, machine, mean), setup)


def mean(case: Case, **ways) -> tuple[float, dict[str, float]]:
    """Returns the seconds of iterations that wait for all of theirs, and those of their phases."""
    found = [iteration(case.answers(n), case.costs, case.setup, **ways) for n in range(case.iterations)]
    phases = {name: statistics.mean(one.phases[name] for one in found) for name in found[0].phases}
    return sum(phases.values()), phases


def carried(case: Case, quorum: float, in_flight: float, **way) -> dict[str, float]:
    """Returns seconds with rollout.carry, and what is in flight."""
    run = CarriedRun(case.draw, case.costs, case.setup, quorum=quorum, in_flight=in_flight, **way)
    found = list(carried_iterations(run, WARM_UP, case.iterations))
    names = ("seconds", "staleness", "carried", "held")
    return {name: statistics.mean(getattr(one, name) for one in found) for name in names}


def compare(case: Case) -> dict:
    """Returns seconds of GRPO, and others in multiples of them."""
    (grpo_s, grpo), (_, plain) = mean(case, eepo=False), mean(case, eepo=True)
    free = case._replace(costs=replace(case.costs, train_token_s=0.0, unlearn_s=0.0, forget_s=0.0))
    tails = mean(free, eepo=True)[1]
    bound = sum(tails[name] for name in ("stage 1", "stage 2"))
    bound += sum(grpo[name] for name in ("sync", "reference", "update"))
    row = {"grpo_s": grpo_s, "two_tails": bound / grpo_s}
    for quorum in QUORUMS:
        for streamed in (False, True):
            name = ("streamed" if streamed else "plain") + (f"_quorum_{quorum:g}" if quorum < 1 else "")
            row[name] = mean(case, eepo=True, streamed=streamed, quorum=quorum)[0] / grpo_s
    ways = {"plain": {"eepo": True}, "streamed": {"eepo": True, "streamed": True}, "grpo": {"eepo": False}}
    for carry, settings in CARRIES.items():
        for name, way in ways.items():
            found = carried(case, *settings, **way)
            row[f"{name}_{carry}"] = found.pop("seconds") / grpo_s
            row[f"{name}_{carry}_in_flight"] = found
    return row | {"grpo": grpo, "eepo": plain}


def draw(path: Path, case: Case, title: str) -> None:
    """Draws how many answers are being written on one engine, over the seconds of an iteration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = {
        "GRPO": iteration(case.answers(), case.costs, case.setup, eepo=False),
        "EEPO, one thing after another": iteration(case.answers(), case.costs, case.setup, eepo=True),
        "EEPO, unlearning streamed": iteration(case.answers(), case.costs, case.setup, eepo=True, streamed=True),
        "EEPO, streamed, quorum 0.75": iteration(
            case.answers(), case.costs, case.setup, eepo=True, streamed=True, quorum=0.75
        ),
    }
    figure, axes = plt.subplots(len(ways), 1, figsize=(8, 6.4), sharex=True, layout="constrained")
    for axis, (name, found) in zip(axes, ways.items(), strict=True):
        begun = found.phases["sync"]
        for number, stages in enumerate(found.stages, 1):
            steps = stages[0].running
            axis.fill_between(
                [begun + t for t, _ in steps], [n for _, n in steps], step="post", color=f"C{number - 1}", alpha=0.7,
                label=f"stage {number}" if len(found.stages) > 1 else "all",
            )  # fmt: skip
            begun += found.phases[f"stage {number}"]
            last = number == len(found.stages)
            names = ("old log-probs", "reference", "update") if last else ("unlearn", "forget")
            seconds = sum(found.phases.get(n, 0.0) for n in names)
            axis.axvspan(begun, begun + seconds, color="0.8" if last else "C3", alpha=0.6, lw=0)
            phase = "policy" if last else "unlearn"
            place = (begun + seconds / 2, axis.get_ylim()[1] / 2)
            axis.text(*place, phase, ha="center", va="center", rotation=90, fontsize=8)
            begun += seconds
        axis.set_title(f"{name}: {found.seconds:.0f} s", loc="left", fontsize=10)
        axis.set_ylabel("answers")
    axes[-1].set_xlabel("seconds")
    figure.suptitle(f"{title} (simulated, one engine)", fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = parser_with_defaults(__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=Path, default=ROOT / "bench/lengths/gsm8k_smollm2.json")
    parser.add_argument("--figure", type=Path, help="draw an iteration as a PNG")
    args = parser.parse_args()
    pairs = json.loads(args.lengths.read_text())["lengths"]
    longest = max(n for _, n in pairs)
    ended = [pair for pair in pairs if pair[1] < longest]
    rows = []
    for lengths, chosen in (("as measured", pairs), ("those that ended", ended)):
        for model in MODELS:
            for machine in PAPER:
                found = compare(make_case(model, machine, chosen))
                rows.append({"lengths": lengths, "model": model, "machine": machine, "prompts": PROMPTS} | found)
        for n in MANY:
            found = compare(make_case("qwen3-8b-base", f"{n}xH200", chosen, 16 * n)._replace(iterations=OF_MANY))
            rows.append(
                {"lengths": lengths, "model": "qwen3-8b-base", "machine": f"{n}xH200", "prompts": 16 * n} | found
            )
    if args.figure:
        draw(args.figure, make_case("qwen3-8b-base", "8xH200", ended), "Qwen3-8B-Base on 8 H200")
    record(rows, args.out, simulated=True, cut_off=1 - len(ended) / len(pairs))


if __name__ == "__main__":
    main()
