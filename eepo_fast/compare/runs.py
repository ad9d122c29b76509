"""Carries a plan out: every run a process of its own, which goes on where it stopped; its numbers are kept in one file.

OUT/runs/METHOD-SEED/              the run's folder, without its checkpoints once it is finished
OUT/runs/METHOD-SEED.log           what it printed
OUT/results/METHOD-SEED.json       its numbers: with them a run is done, whatever becomes of its folder
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eepo_fast import disk
from eepo_fast.checkpoint import changed_keys
from eepo_fast.compare.numbers import Result, read_result
from eepo_fast.compare.plan import Plan, run_config
from eepo_fast.config import Config, under_new_names
from eepo_fast.config.files import read_yaml
from eepo_fast.evaluation.periodic import load_sets
from eepo_fast.run.loop import ENDING
from eepo_fast.types import UserError

Job = tuple[str, int]
"""(method, seed)."""


def jobs(plan: Plan) -> list[Job]:
    """Returns all runs, seed by seed, so that there are pairs as early as possible."""
    return [(name, seed) for seed in plan.seeds for name in plan.methods]


def result_file(out: Path, job: Job) -> Path:
    return out / "results" / f"{job[0]}-{job[1]}.json"


def is_done(plan: Plan, out: Path, job: Job) -> bool:
    """Returns whether a run's numbers are there; UserError where they are of other settings than the plan's, or what it
    would be evaluated on is not there."""
    path, config = result_file(out, job), run_config(plan, *job, out)[0]
    sets = load_sets(config)
    if not path.is_file():
        return False
    found = read_result(path)
    others = [f"evaluation set {s.name} (its problems)" for s in sets if found["sets"].get(s.name) != s.sha256]
    if keys := [*differing(found["config"], config), *others]:
        raise UserError(
            f"{path}: its run had another {', '.join(keys[:4])} than the plan has now; put it back, remove the file "
            f"and {config.run_dir} to run it again, or give another --out"
        )
    return True


def differing(saved: dict[str, Any], config: Config) -> list[str]:
    """Returns the keys that differ from a run's and that its numbers depend on, how long it is and how it is evaluated
    included."""
    now, saved = config.model_dump(), under_new_names(saved)
    evaluation = [("evaluation", key) for key in ("data", "k", "num_samples")]
    counted = [("train", "iterations"), ("train", "epochs"), *evaluation]
    more = [f"{section}.{key}" for section, key in counted if saved.get(section, {}).get(key) != now[section][key]]
    waited = {"quorum": 1.0, "carry": 0, **saved.get("rollout", {})}  # what an older version had not: its default
    waiting = [key for key in ("quorum", "carry", "in_flight") if waited.get(key) != now["rollout"].get(key)]
    ratio = ["grpo.ratio"] if saved.get("grpo", {}).get("ratio", "sampler") != config.grpo.ratio else []
    return list(dict.fromkeys([*changed_keys(saved, config), *more, *(f"rollout.{key}" for key in waiting), *ratio]))


def command(plan: Plan, out: Path, job: Job) -> list[str]:
    """Returns the command of a run; it starts it, or goes on with it."""
    return ["eepo-fast", "train", *run_config(plan, *job, out)[1], "--resume"]


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Holds OUT/.lock, and yields its descriptor; UserError where another process does: two would train there."""
    remedy = (
        "another comparison, or a run that it has begun, is at work there: wait for its end, or give another --out "
        "(--page shows what is there)"
    )
    with disk.locked(out / disk.LOCK, f"--out: {out}", remedy, keep=True) as descriptor:
        yield descriptor


def run_all(plan: Plan, out: Path, todo: Sequence[Job], num_jobs: int, say: Callable[[str], Any], lock: int) -> None:
    """Does runs, `num_jobs` at a time; UserError where some failed, after all others. lock: see `locked`."""
    say(f"{len(todo)} of {len(jobs(plan))} runs to do, {num_jobs} at a time")
    failed: list[Job] = []

    processes: list[subprocess.Popen] = []

    def do(job: Job) -> None:
        started = time.perf_counter()
        error = _run(plan, out, job, num_jobs, processes, lock)
        if error is None:
            say(f"{job[0]}, seed {job[1]}: {time.perf_counter() - started:.0f} s")
        else:
            failed.append(job)
            say(f"{job[0]}, seed {job[1]}: failed: {error}")

    pool = ThreadPoolExecutor(num_jobs)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        list(pool.map(do, todo))
    except (SystemExit, KeyboardInterrupt):
        for process in processes:
            process.terminate()
        raise
    finally:  # what has not begun does not begin; what runs saves, and leaves
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)
    if failed:
        names = ", ".join(f"{name}-{seed}" for name, seed in failed)
        raise UserError(f"{len(failed)} runs failed: {names}; their logs are in {out / 'runs'}; a second call goes on")


def _run(plan: Plan, out: Path, job: Job, num_jobs: int, processes: list[subprocess.Popen], lock: int) -> str | None:
    """Does a run and keeps its numbers; returns what went wrong. processes: gets the run's."""
    config = run_config(plan, *job, out)[0]
    log = config.run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    if num_jobs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_jobs)))
    with log.open("a", encoding="utf-8") as file:
        arguments = [sys.executable, "-m", "eepo_fast.cli", *command(plan, out, job)[1:]]
        # the lock is the run's, too: should we be killed, nobody begins it a second time while it lives
        process = subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT, pass_fds=[lock])
        processes.append(process)
        code = process.wait()
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit code {code}: {lines[-1] if lines else 'nothing was printed'}"
    take_up(plan, out, job)
    return None


def take_up(plan: Plan, out: Path, job: Job) -> None:
    """Keeps the numbers of a run in one file, if it is finished; UserError where it had other settings than the plan
    has now."""
    config, path = run_config(plan, *job, out)[0], result_file(out, job)
    ending = config.run_dir / ENDING
    if not ending.is_file() or json.loads(ending.read_text(encoding="utf-8"))["reason"] != "finished":
        return
    saved = read_yaml(config.run_dir / "config.yaml")
    if keys := differing(saved, config):
        raise UserError(
            f"{config.run_dir}: its run had another {', '.join(keys[:4])} than the plan has now; put it back, remove "
            "the folder to run it again, or give another --out"
        )
    content = read_run(config, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    temporary.replace(path)
    if not plan.keep_checkpoints:
        shutil.rmtree(config.run_dir / "checkpoints", ignore_errors=True)


def read_run(config: Config, plan: Plan) -> Result:
    """Returns the numbers of a finished run: every metric of every iteration, and what the plan asks of its samples."""
    lines = (config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{key: _rounded(value) for key, value in json.loads(line).items()} for line in lines]
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        raise UserError(
            f"{config.run_dir / 'metrics.jsonl'}: expected every iteration once and in order, found others; two "
            "processes have trained in this folder: remove it, and run it again"
        )
    for measure in plan.all_measures().values():
        for row in rows if measure.set else ():
            samples = config.run_dir / "evaluations" / f"step_{row['step']:06d}" / f"{measure.set}.jsonl"
            if samples.is_file():
                row[measure.key] = _share(samples, measure.begins_with)
    sets = {s.name: s.sha256 for s in load_sets(config)}
    portable = config.model_copy(update={"run": config.run.model_copy(update={"root": ""})})  # as on any machine
    return {"config": portable.model_dump(mode="json"), "sets": sets, "rows": rows}


def _share(samples: Path, beginning: str) -> float | None:
    """Returns the share of a set's samples, greedy ones apart, that begin with a text."""
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    found = [row["completion"].lstrip().startswith(beginning) for row in rows if row["sample"] is not None]
    return sum(found) / len(found) if found else None


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
