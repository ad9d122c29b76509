"""Trains as a user would in place of this trainer: by TRL's GRPOTrainer, on the same model, prompts and answers.

TRL's settings: no KL term, two updates an iteration, micro-batches of as many sequences as fit the same number of
padded tokens, fp32 on a CPU and bf16 autocast on a GPU, transformers' generate. Gradient checkpointing, which TRL turns
on by default, is off unless asked for: it saves memory and costs time.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence

import torch
from datasets import Dataset
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, TrainerCallback

from eepo_fast.types import Prompt

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's version, once for each of its modules
        from trl import GRPOConfig, GRPOTrainer
        from trl import __version__ as TRL
except ImportError:
    TRL = None


class FixedLengths(LogitsProcessor):
    """Ends a row where its length says, and nowhere else."""

    def __init__(self, lengths: torch.Tensor, eos_ids: list[int]):
        self.lengths, self.eos_ids, self.generated = lengths, eos_ids, 0

    def __call__(self, input_ids, scores):
        self.generated += 1
        last = self.lengths == self.generated
        ended = torch.full_like(scores, -torch.inf)
        ended[:, self.eos_ids[0]] = 0.0
        scores = scores.clone()
        scores[:, self.eos_ids] = -torch.inf
        return torch.where(last[:, None], ended, scores)


class Iterations(TrainerCallback):
    """Says when a whole iteration (sampling and updates) begins, and when it is done."""

    def __init__(self, updates: int, begin: Callable[[], None], end: Callable[..., None]):
        self.updates, self.begin, self.end = updates, begin, end

    def on_step_begin(self, args, state, control, **more):
        if state.global_step % self.updates == 0:
            self.begin()

    def on_step_end(self, args, state, control, model, optimizer, **more):
        if state.global_step % self.updates == 0:
            self.end(model, optimizer)


def run_iterations(
    count: int,
    begin: Callable[[], None],
    end: Callable[..., None],
    *,
    model: PreTrainedModel,
    tokenizer,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    group_size: int,
    updates: int,
    micro_batch_tokens: int,
    checkpointing: bool = False,
) -> None:
    """Trains a copy of the model for `count` iterations; `begin` is called before each and `end` after it, with the
    model and the optimizer.

    lengths: of every answer, prompt by prompt."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(
            count, folder, copy.deepcopy(model), tokenizer, prompts, lengths, group_size, updates, micro_batch_tokens,
            checkpointing,
        )  # fmt: skip
        trainer.add_callback(Iterations(updates, begin, end))
        trainer.train()


def _make_trainer(
    count, folder, model, tokenizer, prompts, lengths, group_size, updates, micro_batch_tokens, checkpointing
):
    rows = len(prompts) * group_size
    longest = max(len(p.token_ids) for p in prompts) + max(lengths)
    per_update = rows // updates
    fitting = max(1, micro_batch_tokens // longest)
    micro = max(n for n in range(1, min(fitting, per_update) + 1) if per_update % n == 0)
    gpu = torch.cuda.is_available()
    settings = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_update // micro,
        steps_per_generation=rows // micro,
        num_generations=group_size,
        max_completion_length=max(lengths),
        max_steps=count * updates,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        bf16=gpu,
        use_cpu=not gpu,
        gradient_checkpointing=checkpointing,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=gpu,
    )
    ids = {p.id: list(p.token_ids) for p in prompts}

    def reward(completion_ids, **more) -> list[float]:
        assert list(map(len, completion_ids)) == list(lengths), "not the same work"
        return [float(i % 2) for i in range(len(completion_ids))]

    trainer = GRPOTrainer(
        model,
        reward,
        settings,
        Dataset.from_dict({"prompt": list(ids)}),
        processing_class=tokenizer,
    )
    trainer._tokenize_prompts = lambda names: ([ids[name] for name in names], None, {})
    generate, eos_ids = model.generate, trainer.eos_token_ids
    all_lengths = torch.tensor(lengths, device=trainer.accelerator.device)
    model.generate = lambda **arguments: generate(
        **arguments, logits_processor=LogitsProcessorList([FixedLengths(all_lengths, eos_ids)])
    )
    return trainer
