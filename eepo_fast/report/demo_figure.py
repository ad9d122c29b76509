"""Draws the demo's figure: entropy and reward over the iterations, and what the three models can do at the end."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from eepo_fast.report.panels import smooth

COLOURS = {"base": "#8c8c8c", "grpo": "#c44e52", "eepo": "#1f77b4", "stage2": "#7fb7e0"}
SMOOTHING = 9  # iterations of the running mean


def draw(results: dict[str, dict[str, float]], curves: dict[str, list[dict]], alpha: float, path: Path) -> None:
    figure, (entropy, reward, final) = plt.subplots(1, 3, figsize=(14, 4.2), constrained_layout=True)
    lines = [
        ("grpo", "entropy/stage1", "GRPO", "grpo", "-"),
        ("eepo", "entropy/stage1", "EEPO, stage 1", "eepo", "-"),
        ("eepo", "entropy/stage2", "EEPO, stage 2 (after forgetting)", "stage2", "--"),
    ]
    for method, key, label, colour, style in lines:
        rows = curves[method]
        steps = [row["step"] for row in rows]
        entropy.plot(steps, smooth([row[key] for row in rows], SMOOTHING), style, color=COLOURS[colour], label=label)
        rewards = smooth([row[key.replace("entropy", "reward")] for row in rows], SMOOTHING)
        reward.plot(steps, rewards, style, color=COLOURS[colour], label=label)
    entropy.axhline(alpha, color="black", linewidth=0.6, linestyle=":", label="α, the gate's threshold")
    entropy.set(title="Entropy of sampled tokens", xlabel="iteration", ylabel="nats a token", ylim=(0, None))
    entropy.legend(frameon=False, fontsize=8)
    reward.set(title="Reward of sampled completions", xlabel="iteration", ylabel="share right", ylim=(0, 1))
    reward.legend(frameon=False, fontsize=8)

    keys = [key for key in next(iter(results.values())) if key != "unique"]
    width = 0.8 / len(results)
    for i, (method, row) in enumerate(results.items()):
        x = np.arange(len(keys)) + (i - (len(results) - 1) / 2) * width
        label = method if method == "base" else method.upper()
        bars = final.bar(x, [100 * row[k] for k in keys], width, color=COLOURS[method], label=label)
        final.bar_label(bars, fmt="%.0f", fontsize=7, padding=1)
    final.set(title="Held-out problems", ylabel="percent solved", ylim=(0, 108))
    final.set_xticks(range(len(keys)), keys)
    final.legend(frameon=False, fontsize=8, loc="upper left")
    for axis in (entropy, reward, final):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
