"""Wall time of an iteration, simulated: which part of it EEPO adds, and what streaming and a quorum take away again.

    python bench/simulate_rollout.py [--out FILE] [--figure FILE]

From the lengths of answers, the time of a decoding step (weights and keys and values read, one token a sequence
multiplied) and the rates of a GPU, which are assumptions (eepo_fast/run/estimate.py). The same simulation, with times
taken from one run on the machine at hand, is held against other runs by bench/check_simulation.py.

Left out: grading, the guard's scores of 16 answers, and the host's work beside STEP_OVERHEAD_S. Streamed unlearning,
beside sampling, is what this trainer does on one GPU; with DeepSpeed it comes after the stage, as in `plain`. Assumed:
lengths are those of bench/lengths, stretched so that the longest answer is max_new_tokens; the same in both stages;
prompts are dealt to engines in turn; unlearning beside decoding gets what decoding leaves of the GPU's multiplications,
and slows it by INTERFERENCE.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from common import parser_with_defaults, record

from eepo_fast.config import Config, load_config
from eepo_fast.rollout.engine import num_preemptible
from eepo_fast.run.estimate import Machine, Shape, find_machine, find_shape

ROOT = Path(__file__).parents[1]
STEP_OVERHEAD_S = 1.5e-3  # of a decoding step: the scheduler, launches
INTERFERENCE = 0.1  # decoding takes so much longer while unlearning goes on beside it
MODELS = ("qwen2.5-3b", "llama-3.2-3b-instruct", "qwen3-8b-base")
PAPER = [f"8x{name}" for name in ("A100-80GB", "H200", "B200")]
PROMPTS = 128  # the paper's
MANY = (64, 256, 1024)  # H200, with 16 prompts each
QUORUMS = (1.0, 0.9, 0.75, 0.5)


class Answer(NamedTuple):
    prompt: int
    """The number of its prompt."""
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class StepTime:
    """Holds what one decoding step takes, in seconds."""

    fixed_s: float
    sequence_s: float
    """Seconds a sequence: its token is multiplied with the weights."""
    cached_token_s: float
    """Seconds a token whose keys and values are read."""
    weights_s: float = 0.0
    """Seconds that reading the weights takes beside `fixed_s`."""
    overlapped: bool = False
    """Whether what is read and what is multiplied go on at once."""

    def __call__(self, sequences: float, cached: float) -> float:
        reading, multiplying = self.weights_s + self.cached_token_s * cached, self.sequence_s * sequences
        return self.fixed_s + (max(reading, multiplying) if self.overlapped else reading + multiplying)

    def busy(self, sequences: float, cached: float) -> float:
        """Returns the share of a step in which something is multiplied."""
        return self.sequence_s * sequences / self(sequences, cached)


@dataclass(frozen=True)
class Costs:
    step: StepTime
    prefill_token_s: float
    forward_token_s: float
    """Seconds of one token of the batch, all ranks at work."""
    train_token_s: float
    """Seconds of such a token forward and backward."""
    reference_token_s: float = 0.0
    """Seconds of such a token in the reference of the KL term."""
    update_s: float = 0.0
    """Seconds an update takes beside the tokens: gradients and weights on the wire, the optimizer."""
    unlearn_s: float = 0.0
    """The same of the unlearning pass."""
    sync_s: float = 0.0
    forget_s: float = 0.0
    first_step_s: float = 0.0
    """Seconds that a stage's beginning costs beside its prefill."""


@dataclass(frozen=True)
class Setup:
    prompts: int
    group_size: int
    updates: int
    engines: int
    max_sequences: int
    stream_tokens: int
    static: bool = False
    """Whether it is the embedded engine: a batch begins together, and rows are dropped when half of them have ended."""


@dataclass
class Stage:
    seconds: float = 0.0
    ends: list[tuple[float, Answer, float]] = field(default_factory=list)
    """(time, answer, how busy the GPU's multipliers were) of the answers that ended, in order."""
    left: list[tuple[Answer, int]] = field(default_factory=list)
    """(which, tokens so far) of those that were preempted."""
    steps: list[tuple[int, float, float]] = field(default_factory=list)
    """(how many alike, sequences, cached tokens)."""
    running: list[tuple[float, int]] = field(default_factory=list)
    """(time, how many answers were being written)."""


def sample_continuous(answers: Sequence[Answer], costs: Costs, setup: Setup, quorum: float = 1.0) -> Stage:
    """Samples as an engine does whose rows are taken by the next answer as soon as they are free."""
    stage, waiting = Stage(), list(answers)[::-1]
    preemptible, steps_done, cached, seen = num_preemptible(len(answers), quorum), 0, 0.0, set()
    ends: list[tuple[int, int, Answer]] = []  # (step, number, which)
    stage.seconds = costs.first_step_s
    while waiting or ends:
        while waiting and len(ends) < setup.max_sequences:
            answer = waiting.pop()
            if answer.prompt not in seen:  # one prefill for all its samples
                seen.add(answer.prompt)
                stage.seconds += answer.prompt_tokens * costs.prefill_token_s
            heapq.heappush(ends, (steps_done + answer.tokens, len(waiting), answer))
            cached += answer.prompt_tokens
        stage.running.append((stage.seconds, len(ends)))
        step, _, answer = heapq.heappop(ends)
        count, rows = step - steps_done, len(ends) + 1
        at = cached + rows * count / 2
        stage.seconds += count * costs.step(rows, at)
        stage.steps.append((count, rows, at))
        cached += rows * count - answer.prompt_tokens - answer.tokens
        steps_done = step
        stage.ends.append((stage.seconds, answer, costs.step.busy(rows, at)))
        tied = ends and ends[0][0] == steps_done  # ends in the same step
        if not waiting and len(ends) <= preemptible and not tied:
            stage.left = [(a, a.tokens - (end - steps_done)) for end, _, a in ends]
            break
    stage.running.append((stage.seconds, 0))
    return stage


def sample_static(answers: Sequence[Answer], costs: Costs, setup: Setup, quorum: float = 1.0) -> Stage:
    stage = Stage()
    ordered = sorted(answers, key=lambda a: a.prompt_tokens)
    for start in range(0, len(ordered), setup.max_sequences):
        batch = ordered[start : start + setup.max_sequences]
        widest = max(a.prompt_tokens for a in batch)
        stage.seconds += costs.first_step_s + len({a.prompt for a in batch}) * widest * costs.prefill_token_s
        rows, preemptible, done = len(batch), num_preemptible(len(batch), quorum), 0
        by_length = sorted(batch, key=lambda a: a.tokens)
        for i, answer in enumerate(by_length):
            stage.running.append((stage.seconds, len(batch) - i))
            count, at = answer.tokens - done, rows * (widest + (done + answer.tokens) / 2)
            stage.seconds += count * costs.step(rows, at)
            stage.steps.append((count, rows, at))
            done, running = answer.tokens, len(batch) - i - 1
            stage.ends.append((stage.seconds, answer, costs.step.busy(rows, at)))
            if running and by_length[i + 1].tokens == done:  # ends in the same step
                continue
            if running <= preemptible:
                stage.left += [(a, done) for a in by_length[i + 1 :]]
                break
            if running <= rows // 2:
                rows = running
    stage.running.append((stage.seconds, 0))
    return stage


def one_stage(answers: Sequence[Answer], costs: Costs, setup: Setup, quorum: float = 1.0) -> list[Stage]:
    """Samples one stage on every engine."""
    shares: list[list[Answer]] = [[] for _ in range(setup.engines)]
    for answer in answers:
        shares[answer.prompt % setup.engines].append(answer)
    sample = sample_static if setup.static else sample_continuous
    return [sample(share, costs, setup, quorum) for share in shares if share]


def streamed_unlearning(stages: Sequence[Stage], costs: Costs, setup: Setup) -> tuple[float, float]:
    """Returns (seconds left of the pass when the last answer has ended, by how much sampling took longer)."""
    ends = sorted((end for stage in stages for end in stage.ends), key=lambda end: end[0])
    over = max(stage.seconds for stage in stages)
    free = beside = late = tokens = 0.0
    for when, answer, busy in ends:
        tokens += answer.prompt_tokens + answer.tokens
        if tokens >= setup.stream_tokens and when < over:
            seconds, speed = tokens * costs.train_token_s, max(1e-3, 1 - busy)
            begin = max(free, when)
            free = begin + seconds / speed
            there = max(0.0, min(free, over) - begin)  # beside sampling
            beside, late = beside + there, late + seconds - there * speed  # the rest at full speed
            tokens = 0.0
    return late + tokens * costs.train_token_s, beside * INTERFERENCE


class Iteration(NamedTuple):
    phases: dict[str, float]
    """Seconds by phase."""
    stages: list[list[Stage]]
    """Each stage's engines."""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


def iteration(
    answers: Sequence[Answer], costs: Costs, setup: Setup, *, eepo: bool, streamed: bool = False, quorum: float = 1.0
) -> Iteration:
    """Simulates an iteration. answers: of the whole batch, a prompt's own side by side."""
    tokens = sum(a.prompt_tokens + a.tokens for a in answers)
    found = {"sync": costs.sync_s}
    if not eepo:
        both = [one_stage(answers, costs, setup)]
        found["stage 1"] = max(s.seconds for s in both[0])
        # the first mini-batch is scored by its own update
        found["old log-probs"] = tokens * (1 - 1 / setup.updates) * costs.forward_token_s
    else:
        half = setup.group_size // 2
        first = [a for i, a in enumerate(answers) if i % setup.group_size < half]
        second = [a for i, a in enumerate(answers) if i % setup.group_size >= half]
        stages = one_stage(first, costs, setup, quorum)
        left = [one for stage in stages for one in stage.left]
        unfinished = {id(a) for a, _ in left}
        heard = sum(a.prompt_tokens + a.tokens for a in first if id(a) not in unfinished)
        rest, slower = streamed_unlearning(stages, costs, setup) if streamed else (heard * costs.train_token_s, 0.0)
        found["stage 1"] = max(s.seconds for s in stages) + slower
        found["unlearn"] = rest + costs.unlearn_s
        found["forget"] = costs.forget_s
        # stragglers: what they have said is read again as a prompt of their own
        more = [Answer(a.prompt, a.prompt_tokens + n, a.tokens - n) for a, n in left]
        shifted = [m._replace(prompt=m.prompt + (i + 1) * setup.prompts) for i, m in enumerate(more)]
        both = [stages, one_stage([*shifted, *second], costs, setup)]
        found["stage 2"] = max(s.seconds for s in both[1])
        late = sum(m.prompt_tokens + m.tokens for m in more) * (1 - 1 / setup.updates)
        found["old log-probs"] = late * costs.forward_token_s
    found["reference"] = tokens * costs.reference_token_s
    found["update"] = tokens * costs.train_token_s + setup.updates * costs.update_s
    return Iteration(found, both)


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


def drawn_answers(pairs: Sequence[Sequence[int]], longest: int, prompts: int, group_size: int) -> list[Answer]:
    """Draws answers of a batch from measured ones, each as many times as long as lets the longest be `longest`."""
    generator, factor = random.Random(0), longest / max(n for _, n in pairs)
    found = []
    for prompt in range(prompts):
        asked = generator.choice(pairs)[0]
        lengths = [generator.choice(pairs)[1] for _ in range(group_size)]
        found += [Answer(prompt, asked, max(1, round(n * factor))) for n in lengths]
    return found


class Case(NamedTuple):
    answers: list[Answer]
    costs: Costs
    setup: Setup


def make_case(model: str, machine_name: str, pairs: Sequence[Sequence[int]], prompts: int | None = None) -> Case:
    """Makes one of the paper's models with its settings, on a machine with assumed rates."""
    config = load_config([str(ROOT / f"configs/{model}.yaml")], [])
    shape, machine = find_shape(config), find_machine(machine_name, 1)
    prompts = prompts or config.train.prompts_per_iteration
    answers = drawn_answers(pairs, config.rollout.max_new_tokens, prompts, config.rollout.group_size)
    setup = Setup(
        prompts=prompts,
        group_size=config.rollout.group_size,
        updates=config.train.prompts_per_iteration // config.train.prompts_per_update,
        engines=machine.ranks // config.rollout.tensor_parallel,
        max_sequences=config.rollout.max_sequences,
        stream_tokens=config.train.micro_batch_tokens * machine.ranks,
    )
    return Case(answers, gpu_costs(config, shape, machine, sum(a.tokens for a in answers) / len(answers)), setup)


def compare(case: Case) -> dict:
    """Returns seconds of GRPO, and of EEPO in multiples of them."""
    grpo, plain = iteration(*case, eepo=False), iteration(*case, eepo=True)
    free = case._replace(costs=replace(case.costs, train_token_s=0.0, unlearn_s=0.0, forget_s=0.0))
    tails = iteration(*free, eepo=True).phases
    bound = sum(tails[name] for name in ("stage 1", "stage 2"))
    bound += sum(grpo.phases[name] for name in ("sync", "reference", "update"))
    row = {"grpo_s": grpo.seconds, "two_tails": bound / grpo.seconds}
    for quorum in QUORUMS:
        for streamed in (False, True):
            name = ("streamed" if streamed else "plain") + (f"_quorum_{quorum:g}" if quorum < 1 else "")
            row[name] = iteration(*case, eepo=True, streamed=streamed, quorum=quorum).seconds / grpo.seconds
    return row | {"grpo": grpo.phases, "eepo": plain.phases}


def draw(path: Path, case: Case, title: str) -> None:
    """Draws how many answers are being written on one engine, over the seconds of an iteration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ways = {
        "GRPO": iteration(*case, eepo=False),
        "EEPO, one thing after another": iteration(*case, eepo=True),
        "EEPO, unlearning streamed": iteration(*case, eepo=True, streamed=True),
        "EEPO, streamed, quorum 0.75": iteration(*case, eepo=True, streamed=True, quorum=0.75),
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
            found = compare(make_case("qwen3-8b-base", f"{n}xH200", chosen, 16 * n))
            rows.append(
                {"lengths": lengths, "model": "qwen3-8b-base", "machine": f"{n}xH200", "prompts": 16 * n} | found
            )
    if args.figure:
        draw(args.figure, make_case("qwen3-8b-base", "8xH200", ended), "Qwen3-8B-Base on 8 H200")
    record(rows, args.out, simulated=True, cut_off=1 - len(ended) / len(pairs))


if __name__ == "__main__":
    main()
