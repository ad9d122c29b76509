"""Runs small enough to be broken many times: a two-layer model, sixteen problems, four to an epoch's iteration."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eepo_fast.checkpoint import newest_valid
from eepo_fast.config import dump_config, load_config
from eepo_fast.run.build import train
from eepo_fast.run.display import Display

HERE = Path(__file__).parent
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


@pytest.fixture(scope="module")
def server():
    """fork_server.py: asked with a JSON object, it answers with one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(HERE / "fork_server.py")], env=environment, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip

        def ask(**request):
            process.stdin.write(json.dumps(request) + "\n")
            return json.loads(process.stdout.readline())

        for line in process.stdout:  # what its imports print comes first
            if line.startswith('{"ready"'):
                break
        yield ask
        process.stdin.close()


@pytest.fixture
def start(server, tmp_path):
    """`eepo-fast train` in a process of its own, misbehaving as told; (its pid, the file of its stderr)."""

    def run(config, patch="nothing", **options):
        path, errors = tmp_path / "config.yaml", tmp_path / "stderr"
        path.write_text(dump_config(config))
        request = dict(train=[str(path), "--resume"], patch=patch, options=options, stderr=str(errors))
        return server(**request)["pid"], errors

    return run


@pytest.fixture
def complete(start, code_of):
    """Start, or go on, to the end, in a process like those that are killed: what else this one has imported, such as
    vLLM, may change the last bits. The run's folder."""

    def run(config):
        pid, errors = start(config)
        assert code_of(pid) == 0, errors.read_text()
        return config.run_dir

    return run


@pytest.fixture
def code_of(server):
    return lambda pid: server(wait=pid)["code"]


@pytest.fixture
def wait_for_rows():
    """Wait until a run has logged so many iterations."""

    def wait(run_dir, count):
        path, deadline = run_dir / "metrics.jsonl", time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return wait


@pytest.fixture
def long_run(make_run):
    """The config of a run that goes on until it is ended, and saves when it is."""
    return make_run("train.iterations=100000", "train.epochs=100000", "checkpoint.every=0")
