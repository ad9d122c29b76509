"""Manages the folders of a run's checkpoints: their names, their manifests, which are whole, and which are kept."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eepo_fast.types import UserError

MANIFEST = "manifest.json"


def checkpoint_root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def folder_of(run_dir: Path, step: int) -> Path:
    return checkpoint_root(run_dir) / f"step_{step:06d}"


def temporary_of(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def folders(run_dir: Path) -> list[Path]:
    """Returns the checkpoint folders, oldest first."""
    found = [p for p in checkpoint_root(run_dir).glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    return sorted((p for p in found if p.is_dir() and not p.is_symlink()), key=step_of)


def clean(run_dir: Path) -> None:
    """Removes what a killed run had not finished writing."""
    for folder in checkpoint_root(run_dir).glob(".step_*.tmp"):
        shutil.rmtree(folder, ignore_errors=True)


def check_room(run_dir: Path, needed: int) -> None:
    """Raises a UserError where the disk has no room for one checkpoint of so many bytes. What a killed run has not
    finished is removed before it is written."""
    left = sum(path.stat().st_size for folder in checkpoint_root(run_dir).glob(".step_*.tmp") for path in files(folder))
    place = next(place for place in (run_dir, *run_dir.absolute().parents) if place.is_dir())
    if (free := shutil.disk_usage(place).free + left) < needed:
        raise UserError(
            f"run folder {run_dir}: expected room for a checkpoint, {needed / 1e9:.3g} GB of weights and two moments "
            f"in fp32, found {free / 1e9:.3g} GB free on its disk; make room, or choose another run.root"
        )


def remove_newer(run_dir: Path, step: int) -> None:
    """Removes checkpoints after `step`: damaged ones, whose iterations a resumed run does again."""
    for folder in folders(run_dir):
        if step_of(folder) > step:
            shutil.rmtree(folder)


def prune(run_dir: Path, keep: int, best: str) -> None:
    """Removes all but the newest `keep`, and the best: the one whose iteration has the most of the metric `best`, if
    that is given; the first among equals."""
    found = folders(run_dir)
    kept = set(found[-keep:])
    scores = _scores(run_dir, best) if best else {}
    if known := [folder for folder in found if step_of(folder) in scores]:
        kept.add(max(known, key=lambda folder: scores[step_of(folder)]))
    for folder in found:
        if folder not in kept:
            shutil.rmtree(folder)


def _scores(run_dir: Path, metric: str) -> dict[int, float]:
    """Returns the scores by iteration, read from metrics.jsonl, which has what an evaluation found later, too."""
    scores = {}
    for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get(metric) is not None:  # NaN is written as null
            scores[row["step"]] = row[metric]
    return scores


def newest_valid(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint whose manifest holds, and one line for each newer one that is damaged; (None, [])
    where there is no checkpoint. UserError where all of them are damaged."""
    complaints: list[str] = []
    for folder in reversed(folders(run_dir)):
        if (complaint := verify(folder)) is None:
            return folder, complaints
        complaints.append(f"checkpoint {folder} is damaged and not used: {complaint}")
    if complaints:
        raise UserError(
            f"{complaints[0]}; no older one is whole: restore one, or choose another run.name to start over"
        )
    return None, []


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def verify(folder: Path) -> str | None:
    """Returns None where every file is there with the sha256 of the manifest, else what is wrong. Links are refused:
    what they lead to is not the checkpoint's own."""
    try:
        return _verify(folder)
    except OSError as error:  # a bad disk, or another process at work in the folder
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"


def _verify(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict):
        return f"{MANIFEST} is missing or unreadable"
    for path in [folder, *folder.rglob("*")]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            return f"{path.name} is a link or a special file"
    if (found := {str(p.relative_to(folder)) for p in files(folder)} - {MANIFEST}) != set(manifest):
        return f"files differ from the manifest: {', '.join(sorted(found ^ set(manifest)))}"
    for name, digest in manifest.items():
        if sha256(folder / name) != digest:
            return f"{name} does not have the sha256 of the manifest"
    try:
        step = int(read_state(folder)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return "state.json is missing or unreadable"
    if folder.name.startswith("step_") and folder.name != f"step_{step:06d}":
        return f"it is of iteration {step}"
    return None


def commit(final: Path, digests: Mapping[str, str]) -> None:
    """Makes the temporary folder the checkpoint. digests: sha256 of all its files, which are on disk already. OSError
    where they are not in it."""
    temporary = temporary_of(final)
    if absent := sorted(set(digests) - {str(p.relative_to(temporary)) for p in files(temporary)}):
        raise OSError(f"{absent[0]} is not in it; run.root must be one folder for all ranks")
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps(dict(sorted(digests.items())), indent=1), encoding="utf-8")
    for path in (manifest, temporary / "model", temporary):
        fsync(path)
    aside = final.with_name(f".{final.name}.old.tmp")
    if final.exists():  # a damaged one, of which a resumed run has done the iterations again
        final.rename(aside)
    temporary.rename(final)
    fsync(final.parent)
    fsync(final.parent.parent)
    shutil.rmtree(aside, ignore_errors=True)


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
