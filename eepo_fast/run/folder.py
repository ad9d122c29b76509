"""The folder of a run: taken by one process at a time, written before training, held against what a resumed run has."""

from contextlib import ExitStack
from pathlib import Path

from eepo_fast import checkpoint
from eepo_fast.checkpoint.state import FROM_CONTENT, NAME, changed_inputs
from eepo_fast.config import Config, dump_config
from eepo_fast.disk import LOCK, InUse, locked
from eepo_fast.evaluation import periodic
from eepo_fast.run import log_files
from eepo_fast.run.display import Display
from eepo_fast.run.loop import ENDING
from eepo_fast.types import TrainerState, UserError

Place = tuple[Path | None, bool]
"""(checkpoint to go on from, whether the run is finished)."""


def take_folder(config: Config, resume: bool, display: Display, held: ExitStack) -> Place:
    """Locks the run's folder until `held` is closed, and returns what to go on from; UserError where the folder cannot
    be used. A refused run leaves none that was not there."""
    run_dir = config.run_dir
    for place in (run_dir, *run_dir.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"run folder {run_dir}: {place} is a file; choose another run.root")
    try:
        remedy = "wait for its end, or choose another run.name or run.root"
        held.enter_context(locked(run_dir / LOCK, f"run folder {run_dir}", remedy))
    except InUse:
        raise
    except UserError:  # of a finished run nothing is written any more
        if not (resume and run_dir.is_dir() and (found := _place(config, display))[1]):
            raise
        return found
    if not resume and any(place.name != LOCK for place in run_dir.iterdir()):
        raise UserError(f"run folder {run_dir} is not empty; add --resume to go on, or choose another run.name")
    return _place(config, display) if resume else (None, False)


def _place(config: Config, display: Display) -> Place:
    folder = _checkpoint_to_resume(config, display)
    return folder, folder is not None and _is_finished(checkpoint.read_state(folder), config)


def write_folder(config: Config, state: TrainerState) -> None:
    """Writes the run's folder as it is after `state.step` iterations."""
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        (run_dir / ENDING).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"run folder {run_dir}: cannot be written: {error.strerror}; choose another run.root") from None
    log_files.cut_back(run_dir, state.step)
    checkpoint.clean(run_dir)
    checkpoint.remove_newer(run_dir, state.step)
    periodic.remove_newer(run_dir, state.step)


def check_same_inputs(folder: Path, fingerprint: dict[str, str], config: Config) -> None:
    """Raises a UserError where data, model or tokenizer are not what the run began with, however they are spelt."""
    if changed := changed_inputs(folder, fingerprint):
        where = {"data": config.data.train, "model": config.model.path, "tokenizer": config.model.path}
        raise UserError(
            f"--resume: the {changed[0]} of {where[changed[0]]} is not what the run began with; put it back, or start "
            "another run.name",
            shared=True,
        )


def _checkpoint_to_resume(config: Config, display: Display) -> Path | None:
    """Returns the newest valid checkpoint, None where there is none yet; UserError where the config is another. Where
    data and model lie may differ: what they hold is compared once they are loaded."""
    folder, complaints = checkpoint.newest_valid(config.run_dir)
    for line in complaints:
        display.warn(line)
    if folder is None:
        return None
    state = checkpoint.read_state(folder)
    known = {NAME} | {key for key, name in FROM_CONTENT.items() if name in state.get("fingerprint", {})}
    if changed := [key for key in checkpoint.changed_keys(state["config"], config) if key not in known]:
        raise UserError(
            f"--resume: the config differs from the run's own in {', '.join(changed)}; set them back as in "
            f"{config.run_dir / 'config.yaml'}, or start another run.name"
        )
    return folder


def _is_finished(state: dict, config: Config) -> bool:
    """Returns, without loading the model, whether the run reached its planned end and the plan is the same."""
    changed = {*checkpoint.changed_keys(state["config"], config)} - {NAME}
    if changed:  # data or model lie elsewhere: they are compared first
        return False
    same_plan = all(state["config"]["train"][key] == getattr(config.train, key) for key in ("iterations", "epochs"))
    owed = config.evaluation.every and not periodic.is_done(config.run_dir, state["step"])  # due after the last, always
    return same_plan and state["step"] >= state["total"] and not owed
