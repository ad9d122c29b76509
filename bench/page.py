"""Draws what the benches found: bench/results/README.md and its pictures, from bench/results/*/*.json.

python bench/page.py [--results bench/results]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
SIMULATED = "simulated"
LEFT_OUT = ("study", SIMULATED)
PHASES = {  # of bench_iteration, as they are stacked
    "sync": "sync", "rollout_stage1": "stage 1", "unlearn": "unlearn", "forget": "forget", "rollout_stage2": "stage 2",
    "kl_guard": "guard of the step", "reward": "grading", "old_logprobs": "old log-probs", "update": "policy update",
}  # fmt: skip
SIMULATED_WAYS = {
    "two_tails": "two waits alone", "plain": "one after another", "plain_quorum_0.75": "the same, quorum 0.75",
    "streamed": "streamed", "streamed_quorum_0.9": "streamed, quorum 0.9",
    "streamed_quorum_0.75": "streamed, quorum 0.75", "streamed_carry": "carry 1, quorum 0.9",
    "streamed_carry_quorum_0.75": "carry 1, quorum 0.75, in_flight 1", "grpo_carry": "GRPO with carry 1, quorum 0.9",
}  # fmt: skip
INTRODUCTION = """# What the benches found

Drawn by `python bench/page.py` from the JSON beside it; each file says which device, versions, commit and command.
Ratios are of one run, in which both sides had their turns. A machine that is not here has not been measured.
"""


def first(rows: list[dict], **wanted) -> dict:
    """Returns the row with these values, or nothing."""
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), {})


def head(rows: list[dict], peer: str, f: float, key: str) -> float | None:
    """Returns a peer's number over ours, at the largest vocabulary."""
    words = max((row["V"] for row in rows if "V" in row), default=0)
    ours, theirs = (first(rows, task="entropy", V=words, f=f, peer=p).get(key) for p in ("eepo", peer))
    return theirs / ours if ours and theirs else None


def inverse(value: float | None) -> float | None:
    return 1 / value if value else None


Reading = Callable[[dict], float | None]
FASTER: dict[str, tuple[str, Reading]] = {  # what | against: (bench, times as fast)
    **{
        f"head, gate open for {f:.0%} | {name}": (
            "bench_linear_loss",
            lambda d, peer=peer, f=f: head(d["rows"], peer, f, "s"),
        )
        for f in (1.0, 0.2)
        for peer, name in (("naive", "all logits"), ("torch.compile", "torch.compile"), ("trl", "TRL, chunked"))
    },
    "sync | vLLM's load_weights": (
        "bench_weight_update",
        lambda d: inverse(first(d["rows"], task="speed").get("sync_over_load_weights")),
    ),
    "forget and restore | back up, step, load": (
        "bench_weight_update",
        lambda d: inverse(first(d["rows"], task="speed").get("forget_and_restore_over_plain_way")),
    ),
    "sampling | transformers' generate": ("bench_rollout", lambda d: inverse(d["rows"][0].get("engine_over_generate"))),
    "packed passes | padded by length": ("bench_packing", lambda d: d["rows"][0].get("packed_over_padded_by_length")),
    "policy update | all logits, padded": ("bench_policy_step", lambda d: d["rows"][-1].get("plain_over_ours")),
    "grading | math-verify": ("bench_grading", lambda d: d["rows"][-1].get("ratio")),
    "GRPO, whole iteration | TRL": ("bench_iteration", lambda d: d.get("trl_over_grpo")),
    "EEPO, whole iteration | TRL's GRPO": ("bench_iteration", lambda d: d.get("trl_over_eepo")),
    "EEPO, whole iteration | GRPO": ("bench_iteration", lambda d: inverse(d.get("eepo_over_grpo"))),
}
SMALLER: dict[str, tuple[str, Reading]] = {
    **{
        f"head | {name}": (
            "bench_linear_loss",
            lambda d, peer=peer: head(d["rows"], peer, 1.0, "peak_beyond_grads_mib"),
        )
        for peer, name in (("naive", "all logits"), ("torch.compile", "torch.compile"), ("trl", "TRL, chunked"))
    },
    "policy update | all logits, padded": (
        "bench_policy_step",
        lambda d: d["rows"][-1].get("plain", {}).get("peak_mib", 0) / d["rows"][-1]["ours"]["peak_mib"] or None,
    ),
    "GRPO, whole iteration | TRL": ("bench_iteration", lambda d: inverse(d.get("grpo_memory_over_trl"))),
    "EEPO, whole iteration | TRL's GRPO": ("bench_iteration", lambda d: inverse(d.get("eepo_memory_over_trl"))),
}


def readings(table: dict[str, tuple[str, Reading]], files: dict[str, dict]) -> dict[str, float]:
    found = {label: read(files[bench]) for label, (bench, read) in table.items() if bench in files}
    return {label: value for label, value in found.items() if value is not None}


def draw_ratios(path: Path, files: dict[str, dict], device: str) -> bool:
    """Draws the ratios, and returns whether there is anything to draw."""
    tables = {"times as fast": readings(FASTER, files), "times less memory": readings(SMALLER, files)}
    tables = {title: values for title, values in tables.items() if values}
    if not tables:
        return False
    heights = [len(values) for values in tables.values()]
    figure, axes = plt.subplots(
        len(tables), 1, figsize=(8.5, 1.2 + 0.32 * sum(heights)), layout="constrained", squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (title, values) in zip(axes[:, 0], tables.items(), strict=True):
        for row, value in enumerate(values.values()):
            axis.barh(row, value - 1, left=1, color="#1f77b4" if value >= 1 else "#c44e52")
            axis.text(max(value, 1) * 1.03, row, f"{value:.2g}", va="center", fontsize=8)
        axis.set_yticks(range(len(values)), [label.replace(" | ", "  against  ") for label in values], fontsize=8)
        axis.invert_yaxis()
        axis.set_xscale("log")
        ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32) if t / 2 <= max(values.values())]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.axvline(1, color="0.4", lw=0.8)
        axis.set_xlabel(title)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{device}: ours against what a user would pick instead", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def draw_iteration(path: Path, record: dict) -> None:
    """Draws the seconds of an iteration by phase; TRL's, which has none of these names, as one."""
    row = record["rows"][0]
    names = [name for name in ("grpo", "eepo", "trl") if name in row]
    figure, axis = plt.subplots(figsize=(8.5, 1.4 + 0.5 * len(names)), layout="constrained")
    for place, name in enumerate(names):
        values, left = row[name], 0.0
        for number, (key, label) in enumerate(PHASES.items()):
            seconds = values.get(f"time/{key}_s", 0.0)
            axis.barh(place, seconds, left=left, color=f"C{number}", label=label if name == "eepo" else None)
            left += seconds
        axis.barh(place, values["seconds"] - left, left=left, color="0.75", label="other" if name == "eepo" else None)
        axis.text(values["seconds"] * 1.01, place, f"{values['seconds']:.2f} s", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), [{"trl": "TRL's GRPO"}.get(n, n.upper()) for n in names])
    axis.invert_yaxis()
    axis.set_xlabel(f"seconds of an iteration, {row['tokens']:.0f} tokens sampled")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=7, ncols=5, loc="outside lower center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_simulated(path: Path, record: dict) -> None:
    ways = [key for key in SIMULATED_WAYS if key in record["rows"][0]]
    groups = {}
    for row in record["rows"]:
        groups.setdefault(row["lengths"], []).append(row)
    figure, axes = plt.subplots(len(groups), 1, figsize=(10, 3.3 * len(groups)), layout="constrained", squeeze=False)
    for axis, (lengths, rows) in zip(axes[:, 0], groups.items(), strict=True):
        for number, way in enumerate(ways):
            places = [i + (number - len(ways) / 2) * 0.09 for i in range(len(rows))]
            axis.bar(
                places, [row[way] - 1 for row in rows], 0.08, bottom=1, color=f"C{number}", label=SIMULATED_WAYS[way]
            )
        axis.set_xticks(
            range(len(rows)),
            [f"{row['model'].removesuffix('-instruct')}\n{row['machine']}" for row in rows],
            fontsize=6,
        )
        axis.set_ylabel("EEPO / synchronous GRPO, wall time")
        axis.set_title(f"lengths of answers: {lengths}", fontsize=9, loc="left")
        axis.axhline(1, color="0.4", lw=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="outside lower center")
    figure.suptitle("Simulated, not measured: a whole iteration", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def table(folder: Path, files: dict[str, dict]) -> list[str]:
    lines = ["| file | torch | commit | command |", "| --- | --- | --- | --- |"]
    for name, record in files.items():
        command = record.get("command", "")
        lines.append(
            f"| `{folder.name}/{name}.json` | {record.get('torch', '')} | {record.get('commit', '')} | `{command}` |"
        )
    return lines


def section(folder: Path) -> list[str]:
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    benches = {name: record for name, record in files.items() if "rows" in record and "device" in record}
    if not benches:
        return []
    some = next(iter(benches.values()))
    lines = [f"\n## {folder.name}\n"]
    if folder.name == SIMULATED:
        draw_simulated(folder / "iteration.png", benches["simulate_rollout"])
        lines.append(f"![Simulated iterations]({folder.name}/iteration.png)\n")
    else:
        cores = "" if folder.name != "cpu" else f", {max(r['threads'] for r in benches.values())} cores"
        lines.append(f"{some['device']}{cores}.\n")
        if draw_ratios(folder / "ratios.png", benches, folder.name):
            lines.append(f"![Ratios]({folder.name}/ratios.png)\n")
        if "bench_iteration" in benches:
            draw_iteration(folder / "iteration.png", benches["bench_iteration"])
            lines.append("Where the time of an iteration goes (`bench/bench_iteration.py`):\n")
            lines.append(f"![An iteration by phase]({folder.name}/iteration.png)\n")
    return [*lines, *table(folder, benches)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    folders = sorted(p for p in args.results.iterdir() if p.is_dir() and p.name not in LEFT_OUT)
    lines = [INTRODUCTION.strip()]
    for folder in [*folders, args.results / SIMULATED]:
        if folder.is_dir():
            lines += section(folder)
    (args.results / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
