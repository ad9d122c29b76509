"""Makes the base models of procedural tasks: tiny transformers, taught by supervision, built once and cached.

- arithmetic: random right answers, so that it knows many ways to a solution and prefers none: what RL then narrows.
- two_ways: both ways, with carries and without, but taking way A in PREFERS_A of all cases: what RL should get out of.
"""

import hashlib
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from eepo_fast.config import DataConfig
from eepo_fast.data.tasks import (
    ARITHMETIC,
    BASES,
    TWO_WAYS,
    arithmetic_problem,
    is_held_out,
    two_ways_answers,
    two_ways_numbers,
)

ALPHABETS = {ARITHMETIC: "0123456789+-*()=,:", TWO_WAYS: "0123456789+:AB"}
PREFERS_A = 0.97  # the entropy of which way it takes is 0.13 nats: the gate is open there
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
LESSONS_TOLD_APART = 64
IGNORED = -100  # label of tokens without loss, as transformers' models expect it


def base_folder(name: str, data: DataConfig) -> Path:
    """Returns where a base lives: one folder for what it is taught, as its first lessons show it, and how. name: of
    BASES."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    task = BASES[name]
    taught = _lessons(random.Random(SETTINGS["seed"]), _lesson_of(task, data), LESSONS_TOLD_APART)
    digest = hashlib.sha256(json.dumps([SETTINGS, ALPHABETS[task], taught]).encode()).hexdigest()[:12]
    return cache / "eepo-fast" / f"{name}-{digest}"


def ensure_base(name: str, data: DataConfig, progress: Callable[[int, int, float], None] | None = None) -> Path:
    """Returns a base model's folder; it is trained now if it is not cached. name: of BASES; progress: is told (step,
    steps, loss)."""
    folder = base_folder(name, data)
    if not (folder / "config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        model, tokenizer = train_base(data, progress, task=BASES[name])
        disable_progress_bar()  # it would be there for one small file
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if (folder / "config.json").is_file():  # another process was faster
            shutil.rmtree(temporary)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    return folder


def make_tokenizer(task: str = ARITHMETIC) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token a character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABETS[task]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def train_base(
    data: DataConfig,
    progress: Callable[[int, int, float], None] | None = None,
    *,
    task: str = ARITHMETIC,
    tasks: Sequence[tuple[int, int]] = (),
    **overrides,
):
    """Returns (model, tokenizer) after `steps` AdamW steps on random problems of the training split with random
    answers. tasks: (numbers, max_number) that arithmetic is drawn from in equal parts; by default the one of `data`."""
    settings = {**SETTINGS, **overrides}
    steps, lesson = settings["steps"], _lesson_of(task, data, tasks)
    tokenizer = make_tokenizer(task)
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
        input_ids, labels = _batch(rng, lesson, tokenizer, settings["batch"])
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if progress:
            progress(step + 1, steps, float(loss.detach()))
    return model.eval(), tokenizer


Lesson = Callable[[random.Random], tuple[str, str, int]]
"""Draws (problem, answer, how many of the answer's first tokens are read, but not learned)."""


def _lesson_of(task: str, data: DataConfig, tasks: Sequence[tuple[int, int]] = ()) -> Lesson:
    arithmetic = partial(_arithmetic_lesson, tasks or [(data.numbers, data.max_number)])
    return arithmetic if task == ARITHMETIC else _two_ways_lesson


def _arithmetic_lesson(tasks: Sequence[tuple[int, int]], rng: random.Random) -> tuple[str, str, int]:
    numbers, max_number = rng.choice(tasks) if len(tasks) > 1 else tasks[0]
    return *arithmetic_problem(rng, numbers, max_number), 0


def _two_ways_lesson(rng: random.Random) -> tuple[str, str, int]:
    """Three of four lessons teach a way, and the rest which way to take: so that B is known as well as A."""
    (a, b), how = two_ways_numbers(rng, rng.random() < 0.5), rng.random() < 0.75
    way = "A" if rng.random() < (0.5 if how else PREFERS_A) else "B"
    return f"{a}+{b}:", two_ways_answers(a, b)[way], int(how)


def _lessons(rng: random.Random, lesson: Lesson, count: int) -> list[tuple[str, str, int]]:
    """Draws lessons of the training split."""
    drawn: list[tuple[str, str, int]] = []
    while len(drawn) < count:
        if not is_held_out((one := lesson(rng))[0]):
            drawn.append(one)
    return drawn


def _batch(rng: random.Random, lesson: Lesson, tokenizer, size: int) -> tuple[Tensor, Tensor]:
    """Returns input_ids and labels [size, L] int64; the problem's own tokens carry no loss."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for problem, answer, skipped in _lessons(rng, lesson, size):
        prompt = tokenizer(problem)["input_ids"]
        completion = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        inputs.append(torch.tensor(prompt + completion))
        labels.append(torch.tensor([IGNORED] * (len(prompt) + skipped) + completion[skipped:]))
    return (
        pad_sequence(inputs, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )
