"""Checkpoints: the policy as a Hugging Face folder, its optimizer, and the trainer's state, under a sha256 manifest.

    step_000012/model/…                config.json, model.safetensors, tokenizer: loads like any model folder
    step_000012/optimizer.safetensors  AdamW's moments by weight name
    step_000012/state.json             step, policy_version, entropy window, config, hyper-state of the optimizer
    step_000012/manifest.json          sha256 of every other file

Written into a temporary folder, synced to disk and renamed, so that a folder with the final name is whole. Only the
policy's weights are ever saved; the engine's, which may be forgetful, never.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from eepo_fast.config import Config
from eepo_fast.distributed import World
from eepo_fast.policy.module import Policy
from eepo_fast.trainer import TrainerState
from eepo_fast.types import UserError

# Sections and keys that may differ when a run is resumed: how long, how often, and by which means the same is computed.
SAFE_TO_CHANGE = {
    "checkpoint",
    "evaluation",
    "log",
    "run.root",
    "rollout.max_sequences",
    "rollout.gpu_memory_utilization",
    "rollout.sleep",
    "reward.step_seconds",
    "train.iterations",
    "train.epochs",
    "train.micro_batch_tokens",
    "train.packing",
    "train.engine",
    "train.zero_stage",
    "train.offload_optimizer",
    "train.offload_parameters",
    "train.liger",
    "rollout.tensor_parallel",
    "train.gradient_checkpointing",
}


def checkpoint_root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save_checkpoint(run_dir: Path, policy: Policy, tokenizer, state: TrainerState, config: Config, total: int) -> Path:
    """Write the checkpoint of `state.step`, drop all but the newest `checkpoint.keep`. `total`: iterations planned. All
    ranks call this, because sharded weights are put together; the first one writes."""
    root = checkpoint_root(run_dir)
    final = root / f"step_{state.step:06d}"
    masters = _on_host(policy.masters(), policy.world)
    moments = _on_host(policy.moments(), policy.world)
    if policy.world.is_main:
        _write(root, final, policy, masters, moments, tokenizer, state, config, total)
        for old in _folders(run_dir)[: -config.checkpoint.keep]:
            shutil.rmtree(old)
    policy.world.wait()
    return final


def _on_host(tensors: Iterator[tuple[str, Tensor]], world: World) -> dict[str, Tensor]:
    """On the first rank; the others only take part in putting each one together."""
    return {name: tensor.cpu().contiguous() for name, tensor in tensors if world.is_main}


def _write(
    root: Path, final: Path, policy: Policy, masters: dict[str, Tensor], moments: dict[str, Tensor], tokenizer,
    state: TrainerState, config: Config, total: int,
) -> None:  # fmt: skip
    temporary = root / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "model").mkdir(parents=True)
    policy.model.save_pretrained(temporary / "model", state_dict=masters)
    tokenizer.save_pretrained(temporary / "model")
    save_file(moments, temporary / "optimizer.safetensors")
    content = {
        **asdict(state),
        "total": total,
        "scheduler_step": policy.scheduler.last_epoch,
        "config": config.model_dump(),
    }
    (temporary / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    manifest = {str(p.relative_to(temporary)): _sha256(p) for p in _files(temporary)}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*_files(temporary), temporary / "model", temporary]:
        _fsync(path)
    temporary.rename(final)
    _fsync(root)


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    folders = [p for p in checkpoint_root(run_dir).glob("step_*") if p.name.removeprefix("step_").isdecimal()]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def remove_newer(run_dir: Path, step: int) -> None:
    """Remove checkpoints after `step`: damaged ones, whose iterations a resumed run does again."""
    for folder in _folders(run_dir):
        if _step(folder) > step:
            shutil.rmtree(folder)


def newest_valid(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose manifest holds, and one line for each newer one that is damaged. (None, []) where
    there is no checkpoint; UserError where all of them are damaged."""
    complaints = []
    for folder in reversed(_folders(run_dir)):
        complaint = verify(folder)
        if complaint is None:
            return folder, complaints
        complaints.append(f"checkpoint {folder} is damaged and not used: {complaint}")
    if complaints:
        raise UserError(
            f"{complaints[0]}; no older one is whole: restore one, or choose another run.name to start over"
        )
    return None, []


def read_state(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def changed_keys(saved: dict, config: Config) -> list[str]:
    """Keys whose values differ from the checkpoint's and would change what the run computes."""
    now = config.model_dump()
    return [
        f"{section}.{key}"
        for section, values in now.items()
        for key, value in values.items()
        # a key that an older version did not have was at its default
        if value != saved.get(section, {}).get(key, _default(section, key))
        and not {section, f"{section}.{key}"} & SAFE_TO_CHANGE
    ]


def _default(section: str, key: str) -> Any:
    return Config.model_fields[section].annotation.model_fields[key].get_default(call_default_factory=True)


def verify(folder: Path) -> str | None:
    """None where every file is there with the sha256 of the manifest; else what is wrong."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "manifest.json is missing or unreadable"
    found = {str(p.relative_to(folder)) for p in _files(folder)} - {"manifest.json"}
    if found != set(manifest):
        return f"files differ from the manifest: {', '.join(sorted(found ^ set(manifest)))}"
    for name, digest in manifest.items():
        if _sha256(folder / name) != digest:
            return f"{name} does not have the sha256 of the manifest"
    return None


def load_checkpoint(folder: Path, policy: Policy) -> TrainerState:
    """Load a verified checkpoint into the policy and return the trainer's state."""
    content = read_state(folder)
    weights = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        weights.update(load_file(path))
    for name, shape in policy.shapes.items():
        if name not in weights or weights[name].shape != shape:
            raise UserError(
                f"checkpoint {folder}: weight {name} is missing or has another shape; is model.path changed?",
                shared=True,
            )
    policy.load_state(weights, load_file(folder / "optimizer.safetensors"), content["scheduler_step"])
    return TrainerState(
        content["step"], content["policy_version"], content["entropy_window"], content.get("entropy", 0.0)
    )


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
