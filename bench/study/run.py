"""Runs the study: every method on the procedural task, tuned on seeds of its own, then run on the study's seeds.

    python bench/study/run.py [--out bench/results/study] [--workers 2] [--methods grpo eepo] [--phase tune final]

Runs whose numbers lie in OUT/runs are not done again: it goes on where it stopped. bench/study/report.py draws from it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from methods import FIRST_SEED, METHODS, SHARED, TUNING_SEEDS, run_config, study_base

KS = (1, 4, 16, 32)
NUM_SAMPLES = 32
NUM_SCORED = 8  # of these samples a problem, whose tokens' entropy is taken
# held-out problems: in distribution (as trained on), larger numbers, more numbers
SETS = {"in": "arithmetic:3:9:375", "larger": "arithmetic:3:15:350", "more": "arithmetic:4:9:250"}
LARGEST = 9  # in training; of "larger" those problems are taken that have a larger number
NUM_VALIDATION = 125  # of "in", for tuning; the rest is the study's test set
CURVES = (
    "reward/mean", "reward/stage1", "reward/stage2", "entropy/policy", "entropy/stage1", "entropy/stage2",
    "length/mean", "length/stage1", "length/stage2", "group/unique_fraction", "group/all_equal_fraction",
    "unlearn/active_fraction", "unlearn/kl", "unlearn/retention", "unlearn/grad_norm", "policy/grad_norm",
    "policy/clip_fraction_stage1", "policy/clip_fraction_stage2", "policy/ratio_mean_stage2", "aepo/temperature",
    "aepo/num_positive", "aepo/grad_norm", "tokens/generated", "tokens/aepo", "time/iteration_s",
)  # fmt: skip
WATCHED = [  # while training, in the final runs
    "evaluation.every=15", "evaluation.k=[1,8]", "evaluation.data.in=arithmetic:3:9:125",
    "evaluation.data.more=arithmetic:4:9:125",
]  # fmt: skip
SMALLEST_RATIO = 0.9
FORGET_STEP = "eepo.learning_rate"
OPEN = "unlearn/active_fraction"
EVERY = 5  # iterations averaged into one point of a curve
PHASES = ["base", "tune", "mass", "final", "targets", "targets_strong", "seconds"]
TARGETS = {"targets": (0.15, 0.25, 0.35, 0.45, 0.55), "targets_strong": (0.16, 0.2, 0.24, 0.28)}
STRONG = ["aepo.coef=3", "aepo.temperature_high=1.6"]  # a term that can hold entropy up where training takes it down


def choose(out: Path, name: str) -> list[str]:
    """Returns a method's overrides: its own key at its best value, and those of whom it follows at theirs."""
    own = [f"{METHODS[name].key}={best_value(out, name)}"] if METHODS[name].values and name != SHARED else []
    return [*inherited(out, name), *own]


def inherited(out: Path, name: str) -> list[str]:
    leaders = [SHARED, *([METHODS[name].follows] if METHODS[name].follows else [])]
    return [f"{METHODS[leader].key}={best_value(out, leader)}" for leader in leaders]


def best_value(out: Path, name: str) -> float:
    """Returns the best value of a method's own key, from the tuning seeds. A forget step's size: the largest that
    leaves stage 2's reward at SMALLEST_RATIO of stage 1's (two seeds' scores differ by more than sizes do), or the
    smallest where none does. Any other key: the best mean score."""
    method = METHODS[name]
    runs = {
        value: [json.loads(run_file(out, "tune", name, value, seed).read_text()) for seed in TUNING_SEEDS]
        for value in method.values
    }
    if method.key == FORGET_STEP:
        ratios = {v: statistics.fmean(map(stage_ratio, found)) for v, found in runs.items()}
        return max((v for v, ratio in ratios.items() if ratio >= SMALLEST_RATIO), default=min(method.values))
    return max(method.values, key=lambda v: statistics.fmean(run["score"] for run in runs[v]))


def stage_ratio(run: dict) -> float:
    """Returns stage 2's reward over stage 1's, where anything was forgotten; 1 where nothing was."""
    first, second, gate = (run["curves"].get(k, []) for k in ("reward/stage1", "reward/stage2", OPEN))
    pairs = [(a, b) for a, b, share in zip(first, second, gate, strict=False) if share]
    return sum(b for _, b in pairs) / sum(a for a, _ in pairs) if pairs else 1.0


def run_file(out: Path, phase: str, name: str, value: float | None, seed: int) -> Path:
    middle = "" if value is None else f"-{value:g}"
    return out / "runs" / phase / f"{name}{middle}-{seed}.json"


def plan(out: Path, phase: str, names: list[str]) -> list[tuple[str, float | None, int]]:
    """Returns (method, value, seed) of the runs of a phase, those that decide most first."""
    if phase == "tune":
        return [(n, v, s) for n in names for s in TUNING_SEEDS for v in METHODS[n].values]
    if phase in TARGETS:
        return [("aepo", target, seed) for seed in (0, 1, 2) for target in TARGETS[phase] if "aepo" in names]
    most = max(METHODS[n].num_seeds for n in names)
    return [(n, None, FIRST_SEED + k) for k in range(most) for n in names if k < METHODS[n].num_seeds]


def overrides_of(out: Path, phase: str, name: str, value: float | None) -> list[str]:
    if phase == "final":
        return choose(out, name)
    if phase in TARGETS:
        strong = STRONG if phase == "targets_strong" else []
        return [*choose(out, name), *strong, f"aepo.target_entropy={value}"]
    return [*(inherited(out, name) if name != SHARED else []), f"{METHODS[name].key}={value}"]


def one_run(out: Path, phase: str, name: str, value: float | None, seed: int) -> None:
    """Trains and evaluates; writes the run's numbers."""
    from eepo_fast import checkpoint
    from eepo_fast.run.build import train
    from eepo_fast.run.display import Display

    started = time.perf_counter()
    overrides = overrides_of(out, phase, name, value)
    with tempfile.TemporaryDirectory() as root:
        config = run_config(name, [*overrides, *(WATCHED if phase == "final" else [])], seed, root)
        folder = train(config, display=Display.silent())
        trained = time.perf_counter()
        model = checkpoint.newest_valid(folder)[0] / "model"
        content = {"method": name, "overrides": overrides, "seed": seed, **evaluate(model, config, phase)}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    content["curves"] = curves(lines)
    content["watched"] = [
        {k: v for k, v in line.items() if k == "step" or k.startswith("eval/")}
        for line in lines
        if "eval/in/greedy" in line
    ]
    content["train_s"], content["evaluate_s"] = trained - started, time.perf_counter() - trained
    path = run_file(out, phase, name, value, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(rounded(content)) + "\n")
    temporary.replace(path)


def evaluate(model_folder: Path, config, phase: str) -> dict:
    """Scores on the sets; when tuning, on the validation problems alone."""
    import torch

    from eepo_fast.config import ModelConfig
    from eepo_fast.data.prompts import stop_token_ids
    from eepo_fast.evaluation.pass_at_k import summarise
    from eepo_fast.evaluation.periodic import make_eval_prompts
    from eepo_fast.evaluation.samples import Sampler, sample_set
    from eepo_fast.evaluation.sets import load_set
    from eepo_fast.policy.loading import load_model
    from eepo_fast.policy.plain import TorchPolicy
    from eepo_fast.rewards import make_grader
    from eepo_fast.rollout.engine import Sampling
    from eepo_fast.rollout.hf import HfEngine

    model, tokenizer = load_model(ModelConfig(path=str(model_folder)))
    engine = HfEngine(model, dtype=torch.float32, max_sequences=1024, pad_id=tokenizer.pad_token_id)
    stops = tuple(stop_token_ids(tokenizer, tokenizer.eos_token_id))
    sampler = Sampler(engine, tokenizer, Sampling(1.0, config.rollout.max_new_tokens, stops), seed=0)
    policy = TorchPolicy(model, compute_dtype=torch.float32, temperature=1.0, micro_batch_tokens=8192,
                         pad_id=tokenizer.pad_token_id, packed=True)  # fmt: skip
    found = {}
    for name, spec in SETS.items():
        prompts = make_eval_prompts(load_set(name, spec, config.data), config, tokenizer, None)
        if name == "larger":
            prompts = [p for p in prompts if max(map(int, p.text.split("=")[0].split(","))) > LARGEST]
        if name == "in":
            random.Random(0).shuffle(prompts)  # problems that many expressions give come first
            prompts = prompts[:NUM_VALIDATION] if phase == "tune" else prompts[NUM_VALIDATION:]
        elif phase == "tune":
            continue
        found[name] = summarise(sample_set(sampler, make_grader("arithmetic", config.reward), prompts, NUM_SAMPLES), KS)
        found[name]["entropy"] = mean_entropy(policy, sampler.sample(prompts, NUM_SCORED, greedy=False))
    metrics = found["in"]["metrics"]
    score = (metrics["pass@1"]["value"] + metrics["pass@16"]["value"]) / 2
    return {"score": score, "sets": found}


def mean_entropy(policy, rollouts: list) -> float:
    """Returns nats a token, at temperature 1 whatever training sampled at."""
    return statistics.fmean(value for values in policy.score(rollouts).entropy for value in values)


def curves(lines: list[dict]) -> dict[str, list[float | None]]:
    result = {}
    for key in CURVES:
        points = []
        for start in range(0, len(lines), EVERY):
            known = [line[key] for line in lines[start : start + EVERY] if line.get(key) is not None]
            points.append(statistics.fmean(known) if known else None)
        if any(point is not None for point in points):
            result[key] = points
    return result


def rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value


def is_done(out: Path, phase: str, name: str, value: float | None, seed: int) -> bool:
    """Returns whether a run's numbers are there, and of the settings that it would have today."""
    path = run_file(out, phase, name, value, seed)
    return path.exists() and json.loads(path.read_text())["overrides"] == overrides_of(out, phase, name, value)


def run_phase(out: Path, phase: str, names: list[str], workers: int) -> None:
    jobs = [job for job in plan(out, phase, names) if not is_done(out, phase, *job)]
    print(f"{phase}: {len(jobs)} runs to do", flush=True)

    def launch(job: tuple[str, float | None, int]) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
        started = time.perf_counter()
        command = [sys.executable, __file__, "--out", str(out), "--job", phase, *map(str, job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{phase} {job}: {done.stderr[-2000:]}")
        print(f"{phase} {job}: {time.perf_counter() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(launch, jobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results/study"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--phase", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--job", nargs=4, metavar=("PHASE", "METHOD", "VALUE", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    study_base()
    if args.job:
        phase, name, value, seed = args.job
        one_run(args.out, phase, name, None if value == "None" else json.loads(value), int(seed))
        return
    for phase in args.phase:
        if phase == "base":
            if not (args.out / "base.json").exists():
                with tempfile.TemporaryDirectory() as root:
                    found = evaluate(study_base(), run_config(SHARED, [], 0, root), "final")
                (args.out / "base.json").write_text(json.dumps(rounded(found)) + "\n")
            continue
        if phase == "mass":
            from forget_mass import is_done as measured
            from forget_mass import write

            file, overrides = args.out / "forget_mass.json", {n: choose(args.out, n) for n in (SHARED, "eepo")}
            if not measured(file, overrides):
                write(file, overrides)
            continue
        if phase == "seconds":
            from seconds import measure

            measure(args.out / "seconds.json", {name: choose(args.out, name) for name in [SHARED, *args.methods]})
            continue
        if phase == "tune":  # leaders first: their followers' sweeps start from what they chose
            for leader in (SHARED, *dict.fromkeys(m.follows for m in METHODS.values() if m.follows)):
                run_phase(args.out, phase, [leader], args.workers)
        run_phase(args.out, phase, args.methods, args.workers)


if __name__ == "__main__":
    main()
