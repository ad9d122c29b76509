"""The demo over several seeds, paired: mean and standard deviation of every number, and of EEPO minus GRPO.

    python bench/demo_seeds.py --seeds 0 1 2 3 4 --out bench/results/cpu/demo_seeds.json

About two minutes a seed on two CPU cores. Seeds already in the output file are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from eepo_fast.data.base_model import ensure_base
from eepo_fast.run.demo import demo_config, evaluate_folder, late_mean, read_metrics, run_method
from eepo_fast.run.display import Display

CURVES = (
    "entropy/stage1",
    "entropy/stage2",
    "reward/stage1",
    "reward/stage2",
    "group/unique_fraction",
    "unlearn/active_fraction",
    "unlearn/kl",
)


def one_seed(seed: int) -> dict[str, dict[str, float | None]]:
    result = {}
    with tempfile.TemporaryDirectory() as root:
        for method in ("grpo", "eepo"):
            run_dir, scores = run_method(method, seed, root, Display())
            rows = read_metrics(run_dir)
            late = {f"late {key}": late_mean(rows, key) for key in CURVES}
            result[method] = {**scores, **late, "train_s": sum(row["time/iteration_s"] for row in rows)}
    return result


def spread(values: list[float | None]) -> str:
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return "-"
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0.0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    content = json.loads(args.out.read_text()) if args.out.exists() else {"seeds": {}}
    if "base" not in content:
        config = demo_config("eepo", 0, "unused")
        content["base"] = evaluate_folder(ensure_base(config.model.path, config.data), config)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in map(str, args.seeds):
        if seed not in content["seeds"]:
            content["seeds"][seed] = one_seed(int(seed))
            args.out.write_text(json.dumps(content, indent=1))
    runs = [content["seeds"][str(seed)] for seed in args.seeds]
    print("base", {key: round(value, 3) for key, value in content["base"].items()})
    print("| | GRPO | EEPO | EEPO - GRPO |\n| --- | --- | --- | --- |")
    for key in runs[0]["eepo"]:
        grpo, eepo = ([run[method][key] for run in runs] for method in ("grpo", "eepo"))
        pairs = [b - a if a is not None else None for a, b in zip(grpo, eepo, strict=True)]
        print(f"| {key} | {spread(grpo)} | {spread(eepo)} | {spread(pairs)} |")


if __name__ == "__main__":
    main()
