"""`eepo-fast compare PLAN.yaml --out DIR`."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eepo_fast.compare.page import write_comparison
from eepo_fast.compare.plan import read_plan, run_config, stamp
from eepo_fast.compare.runs import command, is_done, jobs, run_all, take_up
from eepo_fast.evaluation.periodic import load_sets
from eepo_fast.report.command import write_report


def compare(
    path: Path, out: Path, *, num_jobs: int, only_print: bool, only_page: bool, say: Callable[[str], Any]
) -> Path:
    """Declares the plan, does the runs that are missing, and writes the page; returns the page's path.

    only_print: says the commands of the missing runs, one a line, and does none: for a cluster. only_page: draws from
    what is there, and takes up what other machines have finished in OUT/runs.
    """
    plan = read_plan(path)
    for name in plan.methods:  # a mistake is said before anything is written
        load_sets(run_config(plan, name, plan.seeds[0], out)[0])
    stamps = stamp(plan, out, runs_exist=any((out / "results").glob("*.json")))
    todo = [job for job in jobs(plan) if not is_done(plan, out, job)]
    try:
        if only_print:
            for job in todo:
                say(shlex.join(command(plan, out, job)))
        elif only_page:
            for job in todo:
                take_up(plan, out, job)
        else:
            run_all(plan, out, todo, num_jobs, say)
    finally:
        folders = [out / "runs" / f"{name}-{seed}" for name, seed in jobs(plan)]
        found = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
        if found and todo and not only_print:
            write_report(found, out / "report")
        page = write_comparison(plan, out, stamps)
    return page
