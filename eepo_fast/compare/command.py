"""`eepo-fast compare PLAN.yaml --out DIR`."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eepo_fast.compare.page import write_comparison
from eepo_fast.compare.plan import read_plan
from eepo_fast.compare.runs import command, is_done, jobs, locked, run_all, take_up
from eepo_fast.compare.stamps import check, read_stamps, stamp
from eepo_fast.report.command import write_report
from eepo_fast.types import UserError


def compare(
    path: Path, out: Path, *, num_jobs: int, only_print: bool, only_page: bool, say: Callable[[str], Any]
) -> Path:
    """Declares the plan, does the runs that are missing, and writes the page; returns the page's path.

    only_print: says the commands of the missing runs, one a line, and does none: for a cluster. only_page: draws from
    what is there, and takes up what other machines have finished in OUT/runs.
    """
    plan, out = read_plan(path), out.resolve()
    todo = [job for job in jobs(plan) if not is_done(plan, out, job)]  # checks the runs' configs and sets, too
    stamps, runs_exist = read_stamps(out), any(out.glob("results/*.json")) or any(out.glob("runs/*/metrics.jsonl"))
    check(plan, stamps, runs_exist=runs_exist)
    try:
        out.mkdir(parents=True, exist_ok=True)
        stamps = stamp(plan, path, out, stamps, runs_exist=runs_exist)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}; choose another") from None
    if only_print:
        for job in todo:
            say(shlex.join(command(plan, out, job)))
        return write_comparison(plan, out, stamps)
    try:
        if only_page:
            for job in jobs(plan):  # those that are done, too: a measure may be new
                take_up(plan, out, job)
        else:
            with locked(out) as lock:
                run_all(plan, out, todo, num_jobs, say, lock)
    finally:
        folders = [out / "runs" / f"{name}-{seed}" for name, seed in jobs(plan)]
        found = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
        if found and todo:
            write_report(found, out / "report")
        page = write_comparison(plan, out, stamps)
    return page
