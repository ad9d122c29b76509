"""Measures what a checkpoint costs training, against what a user would write instead: a model of SmolLM2-135M's shape.

    python bench/bench_checkpoint.py --out bench/results/cpu/bench_checkpoint.json

`blocking` is how long training stands still; `whole`, the time until the checkpoint can be relied on, with nothing else
running; `plain`, save_pretrained and torch.save of the optimizer's state, neither checked nor synced to disk; `plain,
synced`, the same and fsync; `verify`, what reading every file again against its sha256 takes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from common import interleaved, parser_with_defaults, record
from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.checkpoint import CheckpointWriter, verify
from eepo_fast.checkpoint.folder import checkpoint_root, files, fsync
from eepo_fast.config import make_config
from eepo_fast.data.base_model import make_tokenizer
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.types import TrainerState


def main() -> None:
    args = parser_with_defaults(__doc__.splitlines()[0]).parse_args()
    root = Path(tempfile.mkdtemp())
    config = make_config(
        {"model": {"path": "unused"}, "data": {"train": "arithmetic"}, "run": {"root": str(root), "name": "run"},
         "checkpoint": {"keep": 1}}
    )  # fmt: skip
    shape = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **shape)
    ).eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = TorchPolicy(
        model.to(device), compute_dtype=torch.float32, temperature=1.0, micro_batch_tokens=1024, pad_id=0,
        optimizer=config.optimizer,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    policy.step()
    writer, state = CheckpointWriter(config, policy, make_tokenizer(), {}, 9), TrainerState()

    def start() -> None:
        state.step += 1
        writer.start(state)

    def plain(synced: bool) -> None:
        folder = root / "plain"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        torch.save(policy.optimizer.state_dict(), folder / "optimizer.pt")
        if synced:
            for path in files(folder):
                fsync(path)

    def whole() -> None:
        start()
        assert writer.finish() is None

    seconds = interleaved(
        {"blocking": start, "finish": lambda: writer.finish(), "whole": whole, "plain": lambda: plain(False),
         "plain, synced": lambda: plain(True),
         "verify": lambda: verify(next(checkpoint_root(config.run_dir).iterdir()))},
        args.repeats,
    )  # fmt: skip
    seconds.pop("finish")
    size = sum(os.path.getsize(path) for path in files(checkpoint_root(config.run_dir))) / 1e9
    results = {f"{name}_s": value for name, value in seconds.items()}
    results |= {f"{name}_over_plain": value / seconds["plain"] for name, value in seconds.items() if name != "plain"}
    record([{"gigabytes": size, **results}], args.out)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
