"""`eepo-fast report RUN…` writes DIR/index.html, its scripts and its pictures."""

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
MARK = '<meta name="generator" content="eepo-fast report">'
BESIDE = (ASSETS / "page.css", ASSETS / "page.js", ASSETS / "rollouts.js", PLOTLY)


def write_report(folders: Sequence[Path], out: Path | None) -> Path:
    """Writes the report, returns its page's path; UserError if a folder is no run's, or `out` holds something else."""
    folders = list({folder.resolve(): folder for folder in folders}.values())  # no folder is read twice
    if out is None and len(folders) > 1:
        raise UserError("report: expected --out DIR with several runs, found none; it says where the page goes")
    try:
        runs = [read_run(folder) for folder in folders]
    except OSError as error:
        raise UserError(f"report: {error.filename} cannot be read: {error.strerror or error}") from None
    if out is not None:
        _check_place(out)
    out = out or folders[0] / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "index.html").exists():  # marks the folder as ours, should we be interrupted
            (out / "index.html").write_text(MARK, encoding="utf-8")
        groups = group_runs(runs)
        panels = panels_of(groups)
        pictures = draw_all(groups, panels, out)
        write_rollouts(runs, out / "rollouts")
        for path in BESIDE:
            shutil.copyfile(path, out / path.name)
        return write_page(runs, groups, panels, pictures, out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}; choose another") from None


def _check_place(out: Path) -> None:
    """Refuses all but a new folder, an empty one or an earlier report, so that nothing else is written over."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: expected a folder, found the file {out}; choose another")
    page = out / "index.html"
    is_report = page.is_file() and MARK in page.read_text(encoding="utf-8", errors="replace")[:2000]
    if out.is_dir() and any(out.iterdir()) and not is_report:
        raise UserError(
            f"--out: expected a new folder or an earlier report, found {out} with other files; choose another"
        )
