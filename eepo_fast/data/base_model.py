"""Makes the demo's base model: a tiny transformer taught the procedural task by supervision, built once and cached.

It learns from random right answers, so that it knows many ways to a solution and prefers none: what RL then narrows.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from eepo_fast.config import DataConfig
from eepo_fast.data.problems import BASE, arithmetic_problem, arithmetic_split

ALPHABET = "0123456789+-*()=,:"
SETTINGS: dict[str, Any] = {
    "version": 1,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "steps": 1600,
    "batch": 64,
    "learning_rate": 2e-3,
    "seed": 0,
}
IGNORED = -100  # label of tokens without loss, as transformers' models expect it


def base_folder(data: DataConfig) -> Path:
    """Returns where the base for this task lives: one folder for each set of task and training settings."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    content = json.dumps([SETTINGS, data.numbers, data.max_number])
    return cache / "eepo-fast" / f"{BASE}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def ensure_base(data: DataConfig, progress: Callable[[int, int, float], None] | None = None) -> Path:
    """Returns the base model's folder; it is trained now if it is not cached. `progress`: (step, steps, loss)."""
    folder = base_folder(data)
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        model, tokenizer = train_base(data, progress)
        disable_progress_bar()  # it would be there for one small file
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if (folder / "config.json").is_file():  # another process was faster
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train_base(
    data: DataConfig,
    progress: Callable[[int, int, float], None] | None = None,
    *,
    tasks: Sequence[tuple[int, int]] = (),
    **overrides,
):
    """Returns (model, tokenizer) after `steps` AdamW steps on random problems of the training split with random
    answers. tasks: (numbers, max_number) that problems are drawn from in equal parts; by default the one of `data`."""
    settings = {**SETTINGS, **overrides}
    steps, tasks = settings["steps"], tasks or [(data.numbers, data.max_number)]
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        shape = {k: v for k, v in settings.items() if k.startswith(("hidden", "inter", "num_"))}
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                tie_word_embeddings=True,
                max_position_embeddings=128,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                **shape,
            )
        )
    rng = random.Random(settings["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            warm, decay = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = settings["learning_rate"] * warm * decay
        input_ids, labels = _batch(rng, tasks, tokenizer, settings["batch"])
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress:
            progress(step + 1, steps, float(loss.detach()))
    return model.eval(), tokenizer


def _batch(rng: random.Random, tasks: Sequence[tuple[int, int]], tokenizer, size: int) -> tuple[Tensor, Tensor]:
    """Returns input_ids and labels [size, L] int64; the problem's own tokens carry no loss."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    while len(inputs) < size:
        numbers, max_number = rng.choice(tasks) if len(tasks) > 1 else tasks[0]
        problem, answer = arithmetic_problem(rng, numbers, max_number)
        if arithmetic_split(problem) != "train":
            continue
        prompt = tokenizer(problem)["input_ids"]
        completion = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        inputs.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([IGNORED] * len(prompt) + completion))
    input_ids = pad_sequence(inputs, batch_first=True, padding_value=tokenizer.pad_token_id)
    return input_ids, pad_sequence(labels, batch_first=True, padding_value=IGNORED)
