"""`eepo-fast report RUN…`: DIR/index.html, its scripts and its pictures."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import plotly

from eepo_fast.report.page import ASSETS, write_page
from eepo_fast.report.panels import panels_of
from eepo_fast.report.pictures import draw_all
from eepo_fast.report.rollouts import write_rollouts
from eepo_fast.report.runs import group_runs, read_run
from eepo_fast.types import UserError

PLOTLY = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
BESIDE = (ASSETS / "page.css", ASSETS / "page.js", ASSETS / "rollouts.js", PLOTLY)


def write_report(folders: Sequence[Path], out: Path | None) -> Path:
    """The page's path. UserError where a folder is no run's, or `out` holds something else."""
    if out is None:
        if len(folders) > 1:
            raise UserError("report: expected --out DIR with several runs, found none; it says where the page goes")
        out = folders[0] / "report"
    runs = [read_run(folder) for folder in folders]
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, found the file {out}; choose another")
    if (out / "config.yaml").exists():
        raise UserError(f"--out: {out} is a run's folder; choose another, such as {out / 'report'}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        groups = group_runs(runs)
        panels = panels_of(groups)
        pictures = draw_all(groups, panels, out)
        write_rollouts(runs, out / "rollouts")
        for path in BESIDE:
            shutil.copyfile(path, out / path.name)
        return write_page(runs, groups, panels, pictures, out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}; choose another") from None
