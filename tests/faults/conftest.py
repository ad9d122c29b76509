"""Runs small enough to be broken many times: a two-layer model, sixteen problems, four to an epoch's iteration."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eepo_fast.checkpoint import newest_valid
from eepo_fast.config import load_config
from eepo_fast.run.build import train
from eepo_fast.run.display import Display

ROOT = Path(__file__).parents[2]
TINY = (
    "data.train=arithmetic", "data.numbers=3", "data.num_rows=16", "data.max_prompt_tokens=32", "rollout.group_size=4",
    "rollout.max_new_tokens=8", "rollout.dtype=float32", "grpo.kl_coef=0.01", "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=5", "eepo.alpha=9", "eepo.learning_rate=0.01", "train.prompts_per_iteration=4",
    "train.prompts_per_update=2", "train.micro_batch_tokens=128", "train.epochs=9", "train.iterations=6",
    "checkpoint.every=1", "checkpoint.keep=99", "log.rollouts=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from more, and lose much where other processes run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model_folder(tiny_model, tokenizer, tmp_path):
    folder = tmp_path / "base"
    tiny_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_run(model_folder, tmp_path):
    """The config of a tiny run."""

    def make(*overrides, root="runs"):
        settings = (*TINY, f"model.path={model_folder}", f"run.root={tmp_path / root}", "run.name=tiny")
        return load_config([], [*settings, *overrides])

    return make


@pytest.fixture
def go():
    """Train in this process; the run's folder."""
    return lambda config, resume=False: train(config, resume=resume, display=Display.silent())


def rows(run_dir):
    """What the run computed, iteration by iteration: no times."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    timed = ("time/", "tokens/per_second")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def fingerprint(folder):
    """Of the weights and the optimizer in a checkpoint, bit for bit."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("**/*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def outcome():
    """(metrics of every iteration, bits of the last checkpoint)."""
    return lambda run_dir: (rows(run_dir), fingerprint(newest_valid(run_dir)[0]))
