"""The simulation against the machine at hand: calibrated on GRPO in one setting, held against other settings.

    python bench/check_simulation.py [--repeats 3] [--out FILE]

From the calibrating runs: the time of a decoding step over the rows and cached tokens of that step (non-negative least
squares), forward (a prefill is one) and backward a token, what else a stage begins with, sync and forget. Each other
setting is run in turns with the calibrated one, whose drift since the calibration is divided out: a noisy machine slows
both. The embedded engine, a random model of the demo's shape.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from bench_iteration import LENGTHS, fix_lengths, make_config, make_prompts, make_trainer, timed
from common import parser_with_defaults, record
from models import make_model
from simulation import Answer, Costs, Setup, StepTime, iteration, sample_static

from eepo_fast.data.base_model import make_tokenizer

GOAL = 0.15
MAX_SEQUENCES = 1024


@dataclass(frozen=True)
class Setting:
    name: str
    eepo: bool = False
    prompts: int = 32
    group_size: int = 8
    quorum: float = 1.0
    lengths: str = "long tail"


CALIBRATED = Setting("GRPO")
OTHERS = (
    Setting("EEPO", eepo=True),
    Setting("EEPO, quorum 0.9", eepo=True, quorum=0.9),
    Setting("EEPO, quorum 0.5", eepo=True, quorum=0.5),
    Setting("GRPO, 16 prompts x 16", prompts=16, group_size=16),
    Setting("EEPO, 64 prompts x 4", eepo=True, prompts=64, group_size=4),
    Setting("GRPO, 8 prompts x 8", prompts=8),
    Setting("EEPO, 64 prompts x 8", eepo=True, prompts=64),
    Setting("GRPO, all of one length", lengths="even"),
    Setting("EEPO, half as long", eepo=True, lengths="halved"),
)


class Case:
    """Holds a setting as it is run and as it is simulated."""

    def __init__(self, setting: Setting, pairs: list[list[int]]):
        changed = {"long tail": lambda n: n, "even": lambda n: 41, "halved": lambda n: -(-n // 2)}[setting.lengths]
        self.setting = setting
        self.answers_tokens = [changed(n) for _, n in pairs]
        model, tokenizer = make_model("demo"), make_tokenizer()
        self.prompts = make_prompts([p for p, _ in pairs], setting.prompts, model.config.vocab_size)
        config = make_config(
            eepo=setting.eepo, quorum=setting.quorum, engine="hf", prompts=setting.prompts,
            group_size=setting.group_size, longest=max(self.answers_tokens),
        )  # fmt: skip
        self.trainer = make_trainer(config, model, tokenizer, self.prompts, checkpointing=False)
        self.setup = Setup(setting.prompts, setting.group_size, 2, 1, MAX_SEQUENCES, 4096, static=True)
        self.ticks: list[float] = []

    def answers(self) -> list[Answer]:
        size, known = self.setting.group_size, self.answers_tokens
        return [
            Answer(i, len(p.token_ids), known[(i * size + k) % len(known)])
            for i, p in enumerate(self.prompts)
            for k in range(size)
        ]

    def run(self) -> dict[str, float]:
        fix_lengths(self.answers_tokens, self.prompts, self.setting.group_size)
        self.ticks = [time.perf_counter()]
        return timed(self.trainer, lambda done, total: self.ticks.append(time.perf_counter()))

    def simulated(self, costs: Costs) -> float:
        # unlearning is streamed between the engine's steps: beside them on a CPU, and nothing is hidden
        return iteration(self.answers(), costs, self.setup, eepo=self.setting.eepo, quorum=self.setting.quorum).seconds


def non_negative_fit(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fits by least squares; a feature that would have a negative weight is left out."""
    kept = list(range(features.shape[1]))
    while True:
        weights, *_ = np.linalg.lstsq(features[:, kept], values, rcond=None)
        if (weights >= 0).all():
            found = np.zeros(features.shape[1])
            found[kept] = weights
            return found
        del kept[int(weights.argmin())]


def calibrate(case: Case, forget_s: float, repeats: int) -> tuple[Costs, float]:
    """Returns (costs, seconds of the runs they are from)."""
    rows, ticks = [], []
    for _ in range(repeats):
        rows.append(case.run())
        ticks.append(np.diff(case.ticks))
    middle = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
    steps = np.median([t[: len(ticks[0])] for t in ticks], axis=0)
    anything = Costs(StepTime(1.0, 0.0, 0.0), 0.0, 0.0, 0.0)
    stage = sample_static(case.answers(), anything, case.setup)
    features = np.array(
        [[1.0, held, at + held * (k - count / 2)] for count, held, at in stage.steps for k in range(count)]
    )
    # a tick comes after a token is drawn: between two of them lies one step; the first has the prefill in it
    durations = steps[1 : len(features)]
    found = non_negative_fit(features[: len(durations)], durations)
    prompt_tokens = len(case.prompts) * max(len(p.token_ids) for p in case.prompts)
    tokens = sum(a.prompt_tokens + a.tokens for a in case.answers())
    forward_token_s = middle["time/old_logprobs_s"] / (tokens / 2)
    first = middle["time/rollout_stage1_s"] - float(durations.sum()) - prompt_tokens * forward_token_s
    return Costs(
        step=StepTime(*map(float, found)),
        prefill_token_s=forward_token_s,  # it is a forward pass
        first_step_s=max(0.0, first),
        forward_token_s=forward_token_s,
        train_token_s=middle["time/update_s"] / tokens,
        sync_s=middle["time/sync_s"],
        forget_s=forget_s,
    ), middle["seconds"]


def main() -> None:
    args = parser_with_defaults(__doc__.splitlines()[0]).parse_args()
    assert not torch.cuda.is_available(), "the embedded engine's step on a CPU is what is simulated here"
    pairs = json.loads((LENGTHS / "long_tail.json").read_text())["lengths"]
    calibrated = Case(CALIBRATED, pairs)
    warm = Case(OTHERS[0], pairs)
    for case in (calibrated, warm):
        case.run()
    costs, reference_s = calibrate(calibrated, warm.run()["time/forget_s"], args.repeats)
    rows = []
    for setting in OTHERS:
        case = Case(setting, pairs)
        case.run()
        seconds, drifts = [], []
        for _ in range(args.repeats):
            drifts.append(calibrated.run()["seconds"] / reference_s)
            seconds.append(case.run()["seconds"])
        measured = statistics.median(s / d for s, d in zip(seconds, drifts, strict=True))
        simulated = case.simulated(costs)
        row = {"setting": setting.name, "measured_s": measured, "simulated_s": simulated}
        rows.append(row | {"error": simulated / measured - 1})
    worst = max(abs(row["error"]) for row in rows)
    step = {name: getattr(costs.step, name) for name in ("fixed_s", "sequence_s", "cached_token_s")}
    kept = {k: v for k, v in vars(costs).items() if isinstance(v, float)}
    record(rows, args.out, worst=worst, goal=GOAL, calibrated_s=reference_s, costs=step | kept)


if __name__ == "__main__":
    main()
