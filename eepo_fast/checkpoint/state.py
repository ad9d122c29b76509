"""Holds what a checkpoint has beside files: the state that makes a resumed run compute what it would have computed."""

import base64
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from eepo_fast.checkpoint.folder import read_state
from eepo_fast.checkpoint.groups import FILE as GROUPS
from eepo_fast.checkpoint.groups import load_groups
from eepo_fast.config import Config, under_new_names
from eepo_fast.policy.module import Policy
from eepo_fast.types import Cursor, Prompt, TrainerState, UserError

# Sections and keys that may differ when a run is resumed: how long, how often, and by which means the same is computed.
SAFE_TO_CHANGE = {
    "checkpoint", "evaluation", "log",
    "run.root", "run.timeout_s",
    "rollout.max_sequences", "rollout.gpu_memory_utilization", "rollout.sleep", "rollout.tensor_parallel",
    "rollout.carry",  # what is in flight is finished first
    "reward.step_seconds",
    "train.iterations", "train.epochs", "train.micro_batch_tokens", "train.packing", "train.engine", "train.zero_stage",
    "train.offload_optimizer", "train.offload_parameters", "train.liger", "train.gradient_checkpointing",
}  # fmt: skip

FROM_CONTENT = {"data.train": "data", "model.path": "model"}  # keys that say where it lies, and what digest it has
NAME = "run.name"  # a run whose folder was renamed is the same one; a comparison tells runs apart by it


def changed_keys(saved: dict, config: Config) -> list[str]:
    """Returns the keys whose values differ from the checkpoint's and would change what the run computes."""
    now, saved, safe = config.model_dump(), under_new_names(saved), SAFE_TO_CHANGE
    if bool(config.rollout.carry) != bool(saved.get("rollout", {}).get("carry")):  # what goes with it
        safe = safe | {"rollout.quorum", "rollout.in_flight"}
        if "policy" not in (config.grpo.ratio, saved.get("grpo", {}).get("ratio")):
            safe = safe | {"grpo.ratio", "grpo.ratio_cap"}
    return [
        f"{section}.{key}"
        for section, values in now.items()
        for key, value in values.items()
        # a key that an older version did not have was at its default
        if value != saved.get(section, {}).get(key, _default(config, section, key))
        and not {section, f"{section}.{key}"} & safe
    ]


def _default(config: Config, section: str, key: str) -> Any:
    return type(getattr(config, section)).model_fields[key].get_default(call_default_factory=True)


def make_state(
    state: TrainerState, policy: Policy, config: Config, fingerprint: Mapping[str, str], total: int,
    evaluation: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Returns what state.json holds: all of the state but its groups, which are a file of their own. fingerprint: of
    data, model and tokenizer; total: iterations planned; evaluation: metrics of this step, where there are any."""
    return {
        **asdict(replace(state, groups=[])),
        "total": total,
        "scheduler_step": policy.scheduler.last_epoch,
        "world_size": policy.world.size,
        "fingerprint": dict(fingerprint),
        "evaluation": {k: v for k, v in evaluation.items() if k.startswith("eval/")},
        "config": config.model_dump(),
    }


def changed_inputs(folder: Path, fingerprint: Mapping[str, str]) -> list[str]:
    """Returns which of data, model and tokenizer are not what the run began with."""
    saved = read_state(folder).get("fingerprint", {})
    return [name for name, value in fingerprint.items() if saved.get(name, value) != value]


def random_state() -> dict[str, Any]:
    """Returns the states of this process's generators, as JSON can hold them. Sampling does not use them (its seeds
    come from step and prompt): a reward, a model or an engine of the user's may."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = cast(tuple, np.random.get_state())  # numpy's stubs know the dictionary of legacy=False alone
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _pack(torch.get_rng_state()),
        "cuda": [_pack(state) for state in devices],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_unpack(state["torch"]))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_unpack(s) for s in state["cuda"]])


def _pack(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _unpack(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.uint8).copy())


class Tensors(Mapping[str, Tensor]):
    """Holds the tensors of several safetensors files by name; each is read when it is asked for."""

    def __init__(self, paths: Sequence[Path]):
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._places = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._places[name].get_slice(name).get_shape())


def load_checkpoint(folder: Path, policy: Policy, prompts: Sequence[Prompt] = ()) -> TrainerState:
    """Loads a verified checkpoint into the policy and the random generators, and returns the trainer's state. prompts:
    of the run, among which those of the groups in flight are."""
    content = read_state(folder)
    weights = Tensors(sorted((folder / "model").glob("*.safetensors")))
    for name, shape in policy.shapes.items():
        if name not in weights or weights.shape(name) != shape:
            raise UserError(
                f"checkpoint {folder}: weight {name} is missing or has another shape; is model.path changed?",
                shared=True,
            )
    policy.load_state(weights, Tensors(sorted(folder.glob("optimizer*.safetensors"))), content["scheduler_step"])
    states = json.loads((folder / "rng.json").read_text(encoding="utf-8"))
    if policy.world.rank < len(states):  # a rank that the run did not have before keeps its own
        set_random_state(states[policy.world.rank])
    # what an older version did not have is at its default
    state = TrainerState(**{field.name: content[field.name] for field in fields(TrainerState) if field.name in content})
    if state.cursor is not None:
        epoch, position, postponed = state.cursor
        state.cursor = Cursor(epoch, position, tuple(postponed))
    state.groups = load_groups(folder / GROUPS, prompts)
    return state
