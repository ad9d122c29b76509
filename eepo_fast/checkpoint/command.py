"""`eepo-fast checkpoint list|verify|export` shows and checks a run's checkpoints, or exports one."""

import math
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from eepo_fast.checkpoint.beside import GENERATION_CONFIG, copy_beside
from eepo_fast.checkpoint.folder import MANIFEST, checkpoint_root, files, folders, newest_valid, read_state, verify
from eepo_fast.disk import make_folder, remove_if_empty, writing
from eepo_fast.policy.loading import refuse_own_code
from eepo_fast.types import UserError


def find_checkpoints(path: Path) -> list[Path]:
    """Returns a run's checkpoints, oldest first, or the one that `path` is; UserError where there is none."""
    if checkpoint_root(path).is_dir():
        if not (found := folders(path)):
            raise UserError(f"checkpoint: {path} holds no checkpoint yet")
        return found
    if (path / MANIFEST).is_file() or (path / "state.json").is_file():
        return [path]
    raise UserError(f"checkpoint: expected a run's folder or a checkpoint's, found {path}; see runs/NAME/checkpoints")


def list_checkpoints(path: Path, console: Console) -> None:
    table = Table("checkpoint", "written", "size", "ranks", "evaluation", "state", box=None, pad_edge=False)
    for folder in find_checkpoints(path):
        complaint = verify(folder)
        state = read_state(folder) if complaint is None else {}
        scores = ", ".join(f"{k.removeprefix('eval/')} {v:.3g}" for k, v in state.get("evaluation", {}).items())
        size = sum(file.stat().st_size for file in files(folder)) / 1e6
        written = datetime.fromtimestamp(folder.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")
        ranks = str(state.get("world_size", ""))
        table.add_row(folder.name, written, f"{size:.1f} MB", ranks, scores, complaint or "whole")
    console.print(table, markup=False)


def verify_checkpoints(path: Path, console: Console) -> bool:
    """Prints one line each, and returns whether all of them are whole."""
    complaints = {folder: verify(folder) for folder in find_checkpoints(path)}
    for folder, complaint in complaints.items():
        console.print(f"{folder}: {complaint or 'whole'}", markup=False)
    return not any(complaints.values())


def export_checkpoint(path: Path, out: Path, dtype: str | None, console: Console) -> None:
    """Writes a checkpoint, or a run's newest one, as a plain Hugging Face folder. dtype: the weights'; by default the
    one that the run computed in."""
    folder = find_checkpoints(path)[-1]
    if checkpoint_root(path).is_dir():
        newest, complaints = newest_valid(path)
        for line in complaints:
            console.print(line, style="yellow", markup=False)
        assert newest is not None  # there is one: find_checkpoints would have said so
        folder = newest
    elif complaint := verify(folder):
        raise UserError(f"checkpoint {folder} is damaged: {complaint}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: expected an empty or new folder, found {out}; choose another")
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = dtype or read_state(folder)["config"]["model"]["dtype"]
    refuse_own_code(folder / "model", f"checkpoint {folder}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True,
        trust_remote_code=False,
    )  # fmt: skip
    model, info = loaded
    if absent := sorted(info["missing_keys"]):
        raise UserError(f"checkpoint {folder}: lacks {len(absent)} tensors of the model, such as {absent[0]}")
    model.generation_config = GenerationConfig()  # the checkpoint's own is copied, however it is
    with writing(f"--out: {out}", "make room, or choose another"):
        made = make_folder(out.parent)
        temporary = None
        try:
            temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
            model.save_pretrained(temporary)
            (temporary / GENERATION_CONFIG).unlink(missing_ok=True)
            copy_beside(folder / "model", temporary)
            temporary.chmod(0o755)  # mkdtemp's is for its owner alone
            if out.exists():
                out.rmdir()
            temporary.rename(out)
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            remove_if_empty(made)
    megabytes = sum(math.prod(p.shape) * p.element_size() for p in model.parameters()) / 1e6
    console.print(f"{out}: {folder.name} of {path}, {dtype}, {megabytes:.1f} MB", markup=False)
