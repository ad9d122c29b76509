"""`eepo-fast compare PLAN.yaml --out DIR`."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eepo_fast.compare.page import write_comparison
from eepo_fast.compare.plan import read_plan, run_config, stamp
from eepo_fast.compare.runs import command, is_done, jobs, run_all
from eepo_fast.types import UserError


def compare(
    path: Path, out: Path, *, num_jobs: int, only_print: bool, only_page: bool, say: Callable[[str], Any]
) -> Path:
    """Declares the plan, does the runs that are missing, and writes the page; returns the page's path.

    only_print: says the commands of the missing runs, one a line, and does none: for a cluster. only_page: draws from
    what is there, and takes up what other machines have finished in OUT/runs.
    """
    plan = read_plan(path)
    for name in plan.methods:  # a wrong key is said before anything is written
        run_config(plan, name, plan.seeds[0], out)
    stamps = stamp(plan, out, runs_exist=any((out / "results").glob("*.json")))
    if only_print:
        for job in jobs(plan):
            if not is_done(plan, out, job):
                say(shlex.join(command(plan, out, job)))
    elif not only_page:
        try:
            run_all(plan, out, num_jobs, say)
        except UserError:
            write_comparison(plan, out, stamps)
            raise
    return write_comparison(plan, out, stamps)
