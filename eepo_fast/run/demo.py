"""`eepo-fast demo` trains with GRPO and EEPO from the same tiny base, on the same prompts, samples and updates.

It prints what comes out, also where EEPO does not win.
"""

import json
import shutil
import statistics
import time
from pathlib import Path

import torch
from rich.table import Table

from eepo_fast import checkpoint
from eepo_fast.config import Config, ModelConfig, load_config
from eepo_fast.data.base_model import ensure_base
from eepo_fast.data.prompts import make_prompts, stop_token_ids
from eepo_fast.disk import LOCK, locked
from eepo_fast.evaluation.pass_at_k import scores
from eepo_fast.evaluation.samples import Sampler, sample_set
from eepo_fast.evaluation.sets import HELD_OUT, load_set
from eepo_fast.policy.loading import load_model
from eepo_fast.rewards import make_answer_grader
from eepo_fast.rollout.engine import Sampling
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.run.build import train
from eepo_fast.run.display import Display
from eepo_fast.types import UserError

NUM_SAMPLES = 32
KS = (1, 4, 16, 32)


def demo_config(method: str, seed: int, root: str) -> Config:
    overrides = [f"run.name=demo-{method}", f"run.seed={seed}", f"eepo.enabled={str(method == 'eepo').lower()}"]
    config = load_config([str(find_config("demo.yaml"))], overrides)
    return config.model_copy(update={"run": config.run.model_copy(update={"root": root})})


def find_config(name: str) -> Path:
    """Returns the path of a file of configs/, beside the source tree or installed with the package."""
    for folder in (Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"demo: configs/{name} is not installed; run it from a clone of the project")


def evaluate_folder(folder: Path, config: Config) -> dict[str, float]:
    """Returns greedy accuracy and pass@k of a model folder on the held-out problems, with the same seeds every time."""
    model, tokenizer = load_model(ModelConfig(path=str(folder)))
    data = config.data
    prompts, _ = make_prompts(load_set("held out", data.train, data).problems, data, tokenizer)
    engine = HfEngine(model, dtype=torch.float32, max_sequences=1024, pad_id=tokenizer.pad_token_id)
    stops = tuple(stop_token_ids(tokenizer, tokenizer.eos_token_id))
    sampler = Sampler(engine, tokenizer, Sampling(1.0, config.rollout.max_new_tokens, stops), seed=0)
    rows = sample_set(sampler, make_answer_grader(data.train, config.reward), prompts, NUM_SAMPLES)
    return {name: statistics.fmean(values) for name, values in scores(rows, KS).items()}


def run_method(method: str, seed: int, root: str, display: Display) -> tuple[Path, dict[str, float]]:
    """Trains one method and evaluates its last checkpoint. An earlier run of the demo in the same place is replaced."""
    config = demo_config(method, seed, root)
    if (config.run_dir / "config.yaml").is_file():
        what = f"run folder {config.run_dir}"
        with locked(config.run_dir / LOCK, what, "wait for that demo's end, or choose another --root"):
            display.say(f"replacing {config.run_dir}, left by an earlier demo")
            shutil.rmtree(config.run_dir)
    run_dir = train(config, display=display)
    folder, _ = checkpoint.newest_valid(run_dir)
    assert folder is not None  # a run that ends has saved
    return run_dir, evaluate_folder(folder / "model", config)


def run_demo(seed: int, root: str, display: Display | None = None) -> dict[str, dict[str, float]]:
    display = display or Display()
    started = time.perf_counter()
    config = demo_config("eepo", seed, root)
    with display.task("teaching the base model the task") as update:
        base = ensure_base(
            config.model.path, config.data, lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}")
        )
    results = {"base": evaluate_folder(base, config)}
    run_dirs = {}
    for method in ("grpo", "eepo"):
        run_dirs[method], results[method] = run_method(method, seed, root, display)
    curves = {method: read_metrics(run_dir) for method, run_dir in run_dirs.items()}
    display.console.print(make_table(results, curves))
    report = run_dirs["eepo"] / "report"
    from eepo_fast.report.command import write_report  # matplotlib takes its time
    from eepo_fast.report.demo_figure import draw

    page = write_report(list(run_dirs.values()), report)
    (report / "demo.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(results, curves, config.eepo.alpha, report / "demo.png")
    display.say(f"figure: {report / 'demo.png'}")
    display.say(f"report: {page}")
    display.say(f"{time.perf_counter() - started:.0f} s in all; runs in {root}/")
    return results


def read_metrics(run_dir: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def late_mean(curve: list[dict[str, float | None]], key: str) -> float | None:
    """Returns the mean over the last fifth of the iterations; None where the metric does not exist."""
    values = [value for row in curve[-max(1, len(curve) // 5) :] if (value := row[key]) is not None]
    return sum(values) / len(values) if values else None


def make_table(results: dict[str, dict[str, float]], curves: dict[str, list]) -> Table:
    title = f"{HELD_OUT} held-out problems, {NUM_SAMPLES} samples each, percent"
    caption = "stage 1, stage 2: entropy of what they sampled, in nats, over the last fifth of training"
    table = Table(title=title, caption=caption, box=None, pad_edge=False, padding=(0, 1))
    for name in ("", "greedy", *(f"pass@{k}" for k in KS), "unique", "stage 1", "stage 2"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for method, row in results.items():
        cells = [f"{100 * row[key]:.1f}" for key in ("greedy", *(f"pass@{k}" for k in KS), "unique")]
        for key in ("entropy/stage1", "entropy/stage2"):
            value = late_mean(curves[method], key) if method in curves else None
            cells.append("" if value is None else f"{value:.3f}")
        table.add_row(method.upper() if method != "base" else method, *cells)
    return table
