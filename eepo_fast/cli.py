"""Runs the command line. A user's mistake ends in one line on stderr and exit code 2."""

import argparse
import os
import re
import sys
from collections.abc import Collection
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eepo_fast.console import Stream, forgiving
from eepo_fast.disk import LOCK, disk_error, locked
from eepo_fast.run.signals import end_rank
from eepo_fast.types import EngineError, Interrupted, UserError

if TYPE_CHECKING:
    from eepo_fast.config import Config

EVAL_EXAMPLE = "example: eepo-fast eval --model runs/demo-eepo --data test=arithmetic --k 1,8 --out runs-eval"
TABLES_EXAMPLE = "example: eepo-fast tables results-grpo results-eepo --metric pass@8"
PREPARE_EXAMPLE = "example: eepo-fast data prepare math500=HuggingFaceH4/MATH-500 --split test"
TRAIN_EXAMPLE = "example: eepo-fast train configs/smollm2-gsm8k.yaml data.train=gsm8k.jsonl train.iterations=3"
GRADE_EXAMPLE = "example: eepo-fast grade --in answers.jsonl --out graded.jsonl"
REPORT_EXAMPLE = "example: eepo-fast report runs/demo-grpo runs/demo-eepo --out report"
PROFILE_EXAMPLE = "example: eepo-fast profile configs/demo.yaml --iterations 2 --out profile"
COMPARE_EXAMPLE = "example: eepo-fast compare bench/study/two_ways.yaml --out results --jobs 2"
DEMO_EXAMPLE = "example: eepo-fast demo --seed 1"


def _load_config(args: argparse.Namespace) -> "Config":
    from eepo_fast.config import is_file, load_config

    if not (files := [a for a in args.config if is_file(a)]):
        raise UserError(f"{args.command}: expected a YAML config file, found none; see configs/ for examples")
    main_rank = os.environ.get("RANK", "0") == "0"
    say = (lambda line: print(f"eepo-fast: {line}", file=sys.stderr)) if main_rank else None
    return load_config(files, [a for a in args.config if a not in files], say)


def _train(args: argparse.Namespace) -> int:
    together = os.environ.get("WORLD_SIZE", "1") != "1"
    if args.machine and not args.dry_run:
        raise UserError("--machine: expected --dry-run with it: it names a machine to estimate for")
    if args.dry_run:
        return _dry_run(args) if os.environ.get("RANK", "0") == "0" else 0
    if not together:
        config = _load_config(args)  # before torch is imported, which takes seconds
    from eepo_fast.distributed import start_world
    from eepo_fast.run.build import train

    with start_world() as world:
        if together:
            with world.agree():
                config = _load_config(args)
        folder = train(config, resume=args.resume, world=world)
        if world.is_main:
            print(f"run folder: {folder}")
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    from eepo_fast.config import dump_config
    from eepo_fast.run.estimate import check_engine_memory, estimate, find_machine
    from eepo_fast.run.plan import batch_plan, check_world

    config = _load_config(args)
    machine = find_machine(args.machine, int(os.environ.get("WORLD_SIZE", "1")))
    check_world(config, machine.ranks, machine.neighbours)
    check_engine_memory(config, machine.memory_gib, on_gpu=not machine.measured)
    plan, lines = batch_plan(config), estimate(config, machine)
    print(dump_config(config))
    for name, value in plan.items():
        print(f"{name + ':':<46}{value:>12,}" if isinstance(value, int) else f"{name + ':':<46}{value:>12}")
    print("\n".join(lines))
    return 0


def _eval(args: argparse.Namespace) -> int:
    from eepo_fast.config import Config
    from eepo_fast.distributed import start_world
    from eepo_fast.run.display import Display
    from eepo_fast.run.evaluate import EvalOptions, evaluate_completions, evaluate_model

    if (args.model is None) == (args.completions is None):
        raise UserError("eval: expected one of --model and --completions; see eepo-fast eval --help")
    # --data takes all that follows it: what begins with a section of the config is an override
    overrides = [text for text in args.data if _is_override(text, Config.model_fields)]
    data, overrides = [text for text in args.data if text not in overrides], overrides + args.overrides
    temperature, seed = 1.0 if args.temperature is None else args.temperature, args.seed or 0
    options = EvalOptions(data, Path(args.out).expanduser(), _ks(args.k), args.n, temperature, seed, overrides)
    if args.completions is not None:
        if overrides:
            raise UserError(f"eval: --completions takes no overrides, found {overrides[0]!r}; --mode sets grading")
        of_sampling = {"--num-samples": args.n, "--temperature": args.temperature, "--seed": args.seed}
        if found := next((name for name, value in of_sampling.items() if value is not None), None):
            raise UserError(f"eval: --completions are sampled already: expected no {found}; remove it")
        with _taken(options.out):
            evaluate_completions(Path(args.completions), options, args.mode or "strict", Display())
        return 0
    if args.mode is not None:
        options.overrides.append(f"reward.mode={args.mode}")
    with start_world() as world, ExitStack() as held:
        with world.agree():
            if world.is_main:
                held.enter_context(_taken(options.out))
        evaluate_model(args.model, options, world, Display() if world.is_main else Display.silent())
    return 0


def _taken(out: Path, name: str = LOCK) -> AbstractContextManager[int]:
    """Returns a lock on what --out names, for as long as it is written."""
    return locked(out / name, f"--out: {out}", "wait for its end, or choose another")


def _is_override(text: str, sections: Collection[str]) -> bool:
    return re.match(r"\w+\.[\w.]+=", text) is not None and text.partition(".")[0] in sections


def _tables(args: argparse.Namespace) -> int:
    from eepo_fast.evaluation.tables import join

    print(join([Path(out).expanduser() for out in args.outs], args.metric, args.format))
    return 0


def _ks(text: str) -> list[int]:
    from eepo_fast.run.evaluate import MOST_SAMPLES

    parts = text.split(",")
    digits = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
    if not digits or not all(0 < int(part) <= MOST_SAMPLES for part in parts):
        raise UserError(f"--k: expected whole numbers up to {MOST_SAMPLES} such as 1,8,32, found {text[:100]!r}")
    return sorted({int(part) for part in parts})


def _prepare(args: argparse.Namespace) -> int:
    from eepo_fast.config import load_config
    from eepo_fast.evaluation.prepare import prepare

    name, _, source = args.source.partition("=")
    if not re.fullmatch(r"[\w-]{1,100}", name) or not source:
        raise UserError(
            f"data prepare: expected NAME=SOURCE, such as math500=HuggingFaceH4/MATH-500, found {args.source!r}"
        )
    for text in args.overrides:
        if not re.match(r"data\.(columns[.=]|files=|answer_marker=|max_bad=)", text):
            raise UserError(
                "data prepare: expected keys of data.columns, data.files, data.answer_marker or data.max_bad, found "
                f"{text!r}; see eepo-fast data prepare --help"
            )
    config = load_config([], ["model.path=unused", f"data.train={source}", *args.overrides]).data
    folder = Path(args.out).expanduser()
    with _taken(folder, f".{name}.lock"):  # other names may be prepared beside it
        manifest = prepare(
            name, source, config, folder=folder, revision=args.revision, subset=args.subset, split=args.split
        )
    print(f"{folder / name}.jsonl: {manifest.rows} rows of {source}, revision {manifest.revision}")
    print(f"licence, as its card states it: {manifest.licence}")
    print(f"sha256: {manifest.sha256}")
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    from rich.console import Console

    from eepo_fast.checkpoint.command import export_checkpoint, list_checkpoints, verify_checkpoints

    console, path = Console(highlight=False, soft_wrap=True), Path(args.path).expanduser()
    if args.what == "list":
        list_checkpoints(path, console)
    elif args.what == "export":
        export_checkpoint(path, Path(args.out).expanduser(), args.dtype, console)
    elif not verify_checkpoints(path, console):
        return 1
    return 0


def _grade(args: argparse.Namespace) -> int:
    from eepo_fast.rewards.grade_file import grade_file

    counts = grade_file(Path(args.input), Path(args.output), args.mode)
    print(f"mode {args.mode}: " + ", ".join(f"{name} {value}" for name, value in counts.items()))
    return 0


def _report(args: argparse.Namespace) -> int:
    from eepo_fast.report.command import write_report

    out = Path(args.out).expanduser() if args.out else None
    print(f"report: {write_report([Path(run).expanduser() for run in args.runs], out)}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from eepo_fast.compare.command import compare

    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, found {args.jobs}")
    say = partial(print, flush=True)
    plan, out = Path(args.plan).expanduser(), Path(args.out).expanduser()
    page = compare(plan, out, num_jobs=args.jobs, only_print=args.print, only_page=args.page, say=say)
    if not args.print:
        print(f"page: {page}")
    return 0


def _profile(args: argparse.Namespace) -> int:
    config = _load_config(args)
    from eepo_fast.distributed import start_world
    from eepo_fast.run.display import Display
    from eepo_fast.run.profiling import Capture, profile

    if args.iterations < 1 or args.skip < 0:
        raise UserError(f"--iterations: expected at least 1, and --skip 0, found {args.iterations} and {args.skip}")
    command = [sys.executable, "-m", "eepo_fast.cli", *(args.argv or sys.argv[1:])]
    capture = Capture(args.iterations, args.skip, Path(args.out).expanduser(), args.nsys, command)
    with start_world() as world:
        profile(config, capture, world, Display() if world.is_main else Display.silent())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from eepo_fast.run.demo import run_demo

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
    evaluate = commands.add_parser("eval", help="evaluate a model, a run or completions", epilog=EVAL_EXAMPLE)
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of data, rollout, reward and model")
    evaluate.add_argument("--model", help="a run's folder, a checkpoint's, or anything that model.path may be")
    evaluate.add_argument("--completions", help="in place of --model: JSON Lines of id and response")
    sets = "a file or folder of rows, a prepared hub name, or a procedural task"
    evaluate.add_argument("--data", nargs="+", action="extend", required=True, metavar="NAME=FILE", help=sets)
    evaluate.add_argument("--k", default="1", help="pass@k, such as 1,8; 1 alone: greedy only")
    evaluate.add_argument(
        "--num-samples", "--n", dest="n", type=int, help="a problem; default the largest k; torchrun takes no --n"
    )
    evaluate.add_argument("--temperature", type=float, help="of the samples; default 1")
    evaluate.add_argument("--seed", type=int, help="of the samples; default 0")
    evaluate.add_argument("--mode", choices=("strict", "paper"), help="paper: graded as the recipe did")
    evaluate.add_argument("--out", required=True, help="folder of completions and tables; a second call goes on")
    evaluate.set_defaults(run=_eval)
    tables = commands.add_parser("tables", help="several evaluations of the same sets", epilog=TABLES_EXAMPLE)
    tables.add_argument("outs", nargs="+", metavar="OUT", help="what --out of an evaluation was: a row of the table")
    tables.add_argument("--metric", default="greedy", help="greedy (the default), pass@8, ...")
    tables.add_argument(
        "--format", choices=["markdown", "csv", "json"], default="markdown", help="markdown: in percent"
    )
    tables.set_defaults(run=_tables)
    data = commands.add_parser("data", help="prepare data", epilog=PREPARE_EXAMPLE)
    kinds = data.add_subparsers(dest="what", required=True)
    prepare = kinds.add_parser("prepare", help="fetch and pin a data set", epilog=PREPARE_EXAMPLE)
    prepare.add_argument("source", metavar="NAME=SOURCE", help="a hub data set, a file or a folder")
    prepare.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="data.columns, files, answer_marker, max_bad"
    )
    prepare.add_argument("--out", default="data", help="folder; `eepo-fast eval` looks into data/")
    prepare.add_argument("--revision", help="commit; default the pinned one, else the newest")
    prepare.add_argument("--subset", help="configuration of the data set")
    prepare.add_argument("--split", default="test")
    prepare.set_defaults(run=_prepare)
    _add_checkpoint(commands)
    report = commands.add_parser("report", help="draw finished or running runs into a page", epilog=REPORT_EXAMPLE)
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; runs that differ in seed alone are one")
    report.add_argument("--out", help="folder of index.html; default with one run: RUN/report")
    report.set_defaults(run=_report)
    _add_compare(commands)
    profile = commands.add_parser(
        "profile", help="trace a few iterations: where time and memory go", epilog=PROFILE_EXAMPLE
    )
    profile.add_argument("config", nargs="+", metavar="CONFIG.yaml | key.sub=value", help="as for train")
    profile.add_argument("--iterations", type=int, default=2, help="how many are traced")
    profile.add_argument("--skip", type=int, default=1, help="how many before them, to warm up")
    profile.add_argument("--out", default="profile", help="folder of the traces, one a rank")
    profile.add_argument("--nsys", action="store_true", help="under Nsight Systems: mark the window, trace nothing")
    profile.set_defaults(run=_profile)
    demo = commands.add_parser("demo", help="GRPO against EEPO on a tiny model, in minutes", epilog=DEMO_EXAMPLE)
    demo.add_argument("--seed", type=int, default=0, help="seed of prompts and sampling; the base model is the same")
    demo.add_argument("--root", default="runs", help="where its runs, demo-grpo and demo-eepo, are written")
    demo.set_defaults(run=_demo)
    return parser


def _add_compare(commands) -> None:
    text = "methods over seeds, by a plan: paired differences"
    compare = commands.add_parser("compare", help=text, epilog=COMPARE_EXAMPLE)
    compare.add_argument("plan", metavar="PLAN.yaml", help="methods, seeds, evaluation sets, claims and their margins")
    compare.add_argument("--out", required=True, help="folder of runs, results and page; a second call goes on")
    compare.add_argument("--jobs", type=int, default=1, help="runs side by side, which share this machine's cores")
    compare.add_argument("--print", action="store_true", help="print the missing runs' commands, for other machines")
    compare.add_argument("--page", action="store_true", help="run nothing: take up finished runs, and write the page")
    compare.set_defaults(run=_compare)


def _add_checkpoint(commands) -> None:
    example = "example: eepo-fast checkpoint list runs/demo-eepo"
    parser = commands.add_parser("checkpoint", help="look at a run's checkpoints, or export one", epilog=example)
    kinds = parser.add_subparsers(dest="what", required=True)
    for name, text in (
        ("list", "what there is"),
        ("verify", "check every file against the manifest; exit code 1 where one is damaged"),
        ("export", "write a plain Hugging Face folder, which transformers and vLLM load"),
    ):
        example = f"example: eepo-fast checkpoint {name} runs/demo-eepo" + (" --out model" if name == "export" else "")
        kind = kinds.add_parser(name, help=text, epilog=example)
        kind.add_argument("path", help="a run's folder, or a checkpoint's")
        kind.set_defaults(run=_checkpoint)
    kind.add_argument("--out", required=True, help="the folder to write")
    kind.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: what the run computed in")


def _left(name: str, command: str) -> int:
    """Says that a run which was told to leave has saved, and returns its exit code."""
    from eepo_fast.run.signals import exit_code

    if os.environ.get("RANK", "0") == "0":
        more = "go on with --resume" if command == "train" else "give the same command again"
        print(f"eepo-fast: left on {name}, everything saved; {more}", file=sys.stderr)
    return exit_code(name)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code; a rank that a launcher has started ends its process with it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        end_rank(partial(_main, argv))
    return _main(argv)


def _main(argv: list[str] | None) -> int:
    parser = make_parser()
    with forgiving() as out:
        args, rest = parser.parse_known_args(argv)
        args.argv = argv
        positional = {"train": "config", "profile": "config", "eval": "overrides", "data": "overrides"}
        if args.command in positional and not any(a.startswith("-") for a in rest):
            getattr(args, positional[args.command]).extend(rest)  # argparse ends a positional list at the first option
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        code = _run(args)
        return code if out is None else _printed(args, out, code)


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run(args)
    except UserError as error:
        if not error.shared or os.environ.get("RANK", "0") == "0":
            print(f"eepo-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except EngineError as error:
        print(f"eepo-fast: rollout engine: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except Interrupted as found:
        return _left(str(found), args.command)
    except KeyboardInterrupt:
        print("eepo-fast: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        print(f"eepo-fast: {args.command}: the disk refuses: {' '.join(reason.split())}; mend that", file=sys.stderr)
        return 2


def _printed(args: argparse.Namespace, out: Stream, code: int) -> int:
    """Returns the exit code of a command that has ended with `code`. What it has printed matters where that is its
    result: where it could not be written, that is an error; where nobody reads on, not a success."""
    out.flush()
    is_result = args.command in ("tables", "checkpoint") or getattr(args, "dry_run", False)
    if not is_result or out.lost is None:
        return code
    if not out.is_gone:
        print(f"eepo-fast: {args.command}: stdout cannot be written: {out.lost}; mend that", file=sys.stderr)
        return code or 2
    return code or 1


if __name__ == "__main__":
    sys.exit(main())
