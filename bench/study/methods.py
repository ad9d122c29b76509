"""Says what the study compares: a method's overlay, what it sweeps, and how a run of it is configured.

The base is configs/demo.yaml with the paper's two updates an iteration (with one, every ratio is 1 and nothing is ever
clipped): enough for GRPO's entropy to fall by more than a third, which is what the methods are there
against. At half the learning rate it hardly falls, and no step that leaves stage 2's reward alone makes a difference
that two seeds could show. The model has been taught more of the task than it is then trained on: larger numbers, and
more of them, are out of the training distribution and not unknown.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eepo_fast.config import Config, DataConfig, load_config

ROOT = Path(__file__).parents[2]
BASE = ("train.prompts_per_update=16", "log.token_details=false", "log.rollouts=false")
TARGET_ENTROPY = 0.3  # between what GRPO ends with and what the base has
ETAS = (3e-3, 5e-3, 7e-3, 1e-2)
SHARED = "grpo"  # what it chooses for its own key, all methods take
FIRST_SEED = 16  # of the final runs; 0 to 15 were seen while the rule for η was still being changed


@dataclass(frozen=True)
class Method:
    key: str
    """The setting that is swept, on the tuning seeds."""
    values: tuple[float, ...]
    """The values that are tried, four for every method that is swept."""
    num_seeds: int = 5
    fixed: tuple[str, ...] = ()
    follows: str = ""
    """The method whose chosen value of `key` this one takes, in place of a sweep or of a fixed η."""


AEPO = (f"aepo.target_entropy={TARGET_ENTROPY}",)
METHODS = {
    "grpo": Method("grpo.kl_coef", (0.0, 1e-4, 1e-3, 1e-2), 16),
    "eepo": Method("eepo.learning_rate", ETAS, 16),
    "eepo_random": Method("eepo.learning_rate", (), 16, follows="eepo"),
    "high_temperature": Method("rollout.temperature", (1.1, 1.2, 1.35, 1.5)),
    "entropy_bonus": Method("grpo.entropy_coef", (3e-4, 1e-3, 3e-3, 1e-2)),
    "clip_higher": Method("grpo.clip_high", (0.24, 0.28, 0.35, 0.5)),
    "more_rollouts": Method("rollout.group_size", (10, 12, 16, 24)),
    "aepo": Method("aepo.coef", (0.03, 0.1, 0.3, 1.0), fixed=AEPO),
    "eepo_aepo": Method("aepo.coef", (0.03, 0.1, 0.3, 1.0), fixed=AEPO, follows="eepo"),
    "eepo_nll": Method("eepo.learning_rate", (3e-2, 1e-1, 3e-1, 1.0)),  # its gradient is twenty to thirty times shorter
    "eepo_always": Method("eepo.learning_rate", ETAS),
    "eepo_multistep": Method("eepo.learning_rate", (3e-4, 1e-3, 2e-3, 3e-3)),
    "eepo_iteration_gate": Method("eepo.learning_rate", ETAS),
}
TUNING_SEEDS = (100, 101)


TAUGHT = ((3, 9), (3, 9), (3, 15), (4, 9))  # (numbers, largest); a half is what RL then trains on
STEPS = 2500


def study_base() -> Path:
    """Returns the folder of the model that every run starts from, taught now if it is not cached."""
    from eepo_fast.data.base_model import SETTINGS, train_base

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(json.dumps([SETTINGS, TAUGHT, STEPS]).encode()).hexdigest()[:12]
    folder = cache / "eepo-fast" / f"study-base-{digest}"
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        model, tokenizer = train_base(DataConfig(train="arithmetic"), tasks=TAUGHT, steps=STEPS)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    return folder


def run_config(name: str, overrides: list[str], seed: int, root: str) -> Config:
    files = [str(ROOT / "configs/demo.yaml"), str(ROOT / f"configs/methods/{name}.yaml")]
    fixed = [*BASE, *METHODS[name].fixed, f"model.path={study_base()}"]
    fixed += [f"run.root={root}", f"run.name={name}", f"run.seed={seed}"]
    return load_config(files, [*fixed, *overrides])
