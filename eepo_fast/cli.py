"""The command line. A user's mistake ends in one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eepo_fast.types import UserError

if TYPE_CHECKING:
    from eepo_fast.config import Config

TRAIN_EXAMPLE = "example: eepo-fast train configs/smollm2-gsm8k.yaml data.train=gsm8k.jsonl train.iterations=3"
GRADE_EXAMPLE = "example: eepo-fast grade --in answers.jsonl --out graded.jsonl"
DEMO_EXAMPLE = "example: eepo-fast demo --seed 1"


def _load_config(args: argparse.Namespace) -> Config:
    from eepo_fast.config import load_config

    files = [a for a in args.config if "=" not in a]
    if not files:
        raise UserError("train: expected a YAML config file, found none; see configs/ for examples")
    return load_config(files, [a for a in args.config if "=" in a])


def _train(args: argparse.Namespace) -> int:
    together = os.environ.get("WORLD_SIZE", "1") != "1"
    if args.dry_run:
        return _dry_run(args) if os.environ.get("RANK", "0") == "0" else 0
    if not together:
        config = _load_config(args)  # before torch is imported, which takes seconds
    from eepo_fast.distributed import start_world
    from eepo_fast.run import train

    world = start_world()
    if together:
        with world.agree():
            config = _load_config(args)
    folder = train(config, resume=args.resume, world=world)
    if world.is_main:
        print(f"run folder: {folder}")
    world.close()
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    from eepo_fast.config import dump_config
    from eepo_fast.estimate import estimate, find_machine
    from eepo_fast.plan import batch_plan

    config = _load_config(args)
    machine = find_machine(args.machine, int(os.environ.get("WORLD_SIZE", "1")))
    plan, lines = batch_plan(config), estimate(config, machine)
    print(dump_config(config))
    print(
        "\n".join(
            f"{name + ':':<46}{value:>12,}" if isinstance(value, int) else f"{name + ':':<46}{value:>12}"
            for name, value in plan.items()
        )
    )
    print("\n".join(lines))
    return 0


def _grade(args: argparse.Namespace) -> int:
    from eepo_fast.rewards.grade_file import grade_file

    counts = grade_file(Path(args.input), Path(args.output), args.mode)
    print(f"mode {args.mode}: " + ", ".join(f"{name} {value}" for name, value in counts.items()))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from eepo_fast.demo import run_demo

    run_demo(seed=args.seed, root=args.root)
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eepo-fast", description="Train language models to reason better with EEPO.", epilog=TRAIN_EXAMPLE
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a model", epilog=TRAIN_EXAMPLE)
    train.add_argument(
        "config", nargs="+", metavar="CONFIG.yaml | key.sub=value", help="files, later ones win; then keys"
    )
    train.add_argument("--dry-run", action="store_true", help="print the resolved config and the batch plan, and stop")
    train.add_argument("--machine", help="with --dry-run: estimate for this one, such as 8xA100-80GB; else for this")
    train.add_argument("--resume", action="store_true", help="go on from the newest valid checkpoint of the run")
    train.set_defaults(run=_train)
    grade = commands.add_parser("grade", help="grade answers against gold answers", epilog=GRADE_EXAMPLE)
    grade.add_argument("--in", dest="input", required=True, help="JSON Lines: id, gold, and answer or response")
    grade.add_argument("--out", dest="output", required=True, help="JSON Lines: the same with reward, status, seconds")
    grade.add_argument("--mode", choices=("strict", "paper"), default="strict", help="paper: as the recipe graded")
    grade.set_defaults(run=_grade)
    demo = commands.add_parser("demo", help="GRPO against EEPO on a tiny model, in minutes", epilog=DEMO_EXAMPLE)
    demo.add_argument("--seed", type=int, default=0, help="seed of prompts and sampling; the base model is the same")
    demo.add_argument("--root", default="runs", help="where its runs, demo-grpo and demo-eepo, are written")
    demo.set_defaults(run=_demo)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "train" and not any(a.startswith("-") for a in rest):
        args.config += rest  # argparse ends a positional list at the first option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return args.run(args)
    except UserError as error:
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"eepo-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eepo-fast: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
