"""Runs' folders made up for the tests of the report: every key of the metrics, rollouts with and without details."""

import json
import math
import random

from eepo_fast.config import dump_config, load_config

HOSTILE = "</script><script>window.owned=1</script><img src=x onerror=window.owned=2> \u2028 <!--data--> ${1}"


def make_run(
    folder, *, seed=0, steps=6, eepo=True, details=True, groups=4, size=4, metric_keys=(), words=8, evaluated=()
):
    """A run's folder: `steps` iterations of `groups` groups of `size`; evaluated: the iterations with an evaluation."""
    rng = random.Random(f"{folder.name}/{seed}")
    folder.mkdir(parents=True)
    overrides = [
        "model.path=m", "data.train=arithmetic", f"run.name={folder.name}", f"run.root={folder.parent}",
        f"run.seed={seed}", f"eepo.enabled={str(eepo).lower()}", f"log.token_details={str(details).lower()}",
        f"train.iterations={steps}",
    ]  # fmt: skip
    (folder / "config.yaml").write_text(dump_config(load_config([], overrides)), encoding="utf-8")
    lines = []
    for step in range(1, steps + 1):
        row = {key: 0.1 + rng.random() for key in metric_keys}
        row |= {"step": step, "time/iteration_s": 2.0, "time/update_s": 1.0, "time/rollout_stage1_s": 0.6}
        row |= {"reward/stage1": 0.5 + 0.01 * step + 0.001 * seed, "entropy/stage1": math.exp(-0.1 * step)}
        if eepo:
            row |= {"reward/stage2": 0.4 + 0.01 * step, "entropy/stage2": 0.1 + math.exp(-0.1 * step)}
        else:
            row |= {key: None for key in row if "stage2" in key or key.startswith("unlearn/")}
        if step in evaluated:
            row |= {"eval/test/greedy": 0.5, "eval/test/pass@1": 0.4, "eval/test/pass@8": 0.8}
            write_evaluation(folder, step)
        lines.append(json.dumps(row))
        write_rollouts(folder, step, rng, eepo, details, groups, size, words)
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "ended.json").write_text(json.dumps({"reason": "finished", "step": steps, "total": steps, "message": ""}))
    return folder


def write_evaluation(folder, step):
    def cell(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    part = {"metrics": {m: cell(v) for m, v in (("greedy", 0.5), ("pass@1", 0.4), ("pass@8", 0.8))}, "num_problems": 7}
    path = folder / "evaluations" / f"step_{step:06d}" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": "m", "sets": {"test": part}, "average": part["metrics"]}))


def write_rollouts(folder, step, rng, eepo, details, groups, size, words):
    (folder / "rollouts").mkdir(exist_ok=True)
    with (folder / "rollouts" / f"step_{step:06d}.jsonl").open("w", encoding="utf-8") as file:
        for g in range(groups):
            for k in range(size):
                stage = 2 if eepo and k >= size // 2 else 1
                tokens = [HOSTILE if g == 0 and i == 0 else f" word{rng.randrange(9)}" for i in range(words)]
                row = {
                    "prompt_id": f"p{g}", "prompt": f"Question {g}? {HOSTILE if g == 0 else ''}",
                    "problem": f"Question {g}?",
                    "answer": str(g), "stage": stage, "sample_index": k, "weights_version": [step, stage == 2],
                    "completion": "".join(tokens), "reward": None if g == 1 and k == 0 else float(rng.random() < 0.5),
                    "status": "timeout" if g == 1 and k == 0 else "ok", "advantage": rng.random() - 0.5,
                    "num_tokens": words, "finished": k != 1,
                }  # fmt: skip
                if details:
                    numbers = {
                        name: [-rng.random() for _ in tokens] for name in ("rollout_logprobs", "policy_logprobs")
                    }
                    row |= {
                        "tokens": tokens,
                        "token_ids": [1] * words,
                        **numbers,
                        "entropy": [rng.random() for _ in tokens],
                    }
                    if stage == 1 and eepo:
                        row["gate"] = [float(i % 2) for i in range(words)]
                        row["forget_change"] = [-0.5 if i % 2 else 0.02 for i in range(words)]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
