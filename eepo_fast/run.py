"""A run from its config to its folder: put the parts together, train, log, save, resume."""

from __future__ import annotations

import copy
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from eepo_fast import checkpoint, metrics
from eepo_fast.config import Config, dump_config
from eepo_fast.data import ARITHMETIC, BASE, load_problems, make_prompts, stop_token_ids
from eepo_fast.display import Display
from eepo_fast.models import load_model
from eepo_fast.plan import num_iterations
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rewards import Grader, make_grader
from eepo_fast.rollout.engine import RolloutEngine
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.rollout.vllm import VllmEngine, import_vllm
from eepo_fast.trainer import Trainer, TrainerState
from eepo_fast.types import Prompt, UserError
from eepo_fast.warmup import ensure_base

POLICIES = {"torch": TorchPolicy}


@dataclass
class Parts:
    """Everything a run is made of, loaded and checked."""

    policy: TorchPolicy
    reference: TorchPolicy | None
    tokenizer: object
    prompts: list[Prompt]
    stop_token_ids: list[int]


def load_parts(config: Config, display: Display) -> Parts:
    """Load data and models; UserError before anything is written."""
    if config.rollout.engine == "vllm":
        import_vllm()
        if config.rollout.sleep and not torch.cuda.is_available():
            raise UserError("rollout.sleep: expected false on a CPU, found true: vLLM sleeps on a GPU only")
    problems = load_problems(config.data, config.run.seed)
    if config.model.path == BASE:
        if config.data.train != ARITHMETIC:
            raise UserError(f"model.path: {BASE} knows nothing but data.train={ARITHMETIC}, found {config.data.train}")
        with display.task("teaching the base model the task") as update:
            path = ensure_base(config.data, lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}"))
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})
    display.say(f"loading {config.model.path}")
    model, tokenizer = load_model(config.model)
    prompts, too_long = make_prompts(problems, config.data, tokenizer)
    if too_long:
        display.say(
            f"{too_long} of {len(problems)} prompts are longer than {config.data.max_prompt_tokens} tokens: left out"
        )
    num_iterations(config, len(prompts))
    _check_length(model, prompts, config)
    eos = model.config.eos_token_id if model.generation_config is None else model.generation_config.eos_token_id
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = dict(
        compute_dtype=getattr(torch, config.model.dtype),
        temperature=config.rollout.temperature,
        micro_batch_tokens=config.train.micro_batch_tokens,
        pad_id=tokenizer.pad_token_id,
    )
    reference = None
    if config.grpo.kl_coef:
        reference = TorchPolicy(copy.deepcopy(model).requires_grad_(False), **settings)
    policy = POLICIES[config.train.engine](
        model, optimizer=config.optimizer, gradient_checkpointing=config.train.gradient_checkpointing, **settings
    )
    return Parts(policy, reference, tokenizer, prompts, stop_token_ids(tokenizer, eos))


def make_engine(config: Config, parts: Parts) -> RolloutEngine:
    rollout, model = config.rollout, parts.policy.model
    settings = dict(dtype=getattr(torch, rollout.dtype), max_sequences=rollout.max_sequences)
    if rollout.engine == "hf":
        return HfEngine(model, pad_id=parts.tokenizer.pad_token_id, **settings)
    longest = max(len(p.token_ids) for p in parts.prompts)
    return VllmEngine(
        model,
        max_model_len=longest + rollout.max_new_tokens,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enable_sleep=rollout.sleep,
        **settings,
    )


def _check_length(model, prompts: list[Prompt], config: Config) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(p.token_ids) for p in prompts)
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens: the longest prompt has {longest} tokens; with {config.rollout.max_new_tokens} "
            f"more it passes the {limit} positions of {config.model.path}; lower it, or data.max_prompt_tokens"
        )


def train(config: Config, *, resume: bool = False, display: Display | None = None) -> Path:
    """Train as `config` says and return the run's folder."""
    display = display or Display()
    run_dir = config.run_dir
    for folder in (run_dir, *run_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run folder {run_dir}: {folder} is a file; choose another run.root")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not resume:
        raise UserError(f"run folder {run_dir} is not empty; add --resume to go on, or choose another run.name")
    folder = _checkpoint_to_resume(config, display) if resume else None
    if folder is not None and _is_finished(checkpoint.read_state(folder), config):
        display.say(f"run {run_dir} is finished")
        return run_dir

    with closing(make_grader(config.data.train)) as grader:  # its worker processes must not outlive a refused command
        grader.start()
        _run(config, grader, folder, resume, display)
    return run_dir


def _run(config: Config, grader: Grader, folder: Path | None, resume: bool, display: Display) -> None:
    """Load everything, then write the run's folder, then train, from checkpoint `folder` where there is one."""
    run_dir = config.run_dir
    parts = load_parts(config, display)
    total = num_iterations(config, len(parts.prompts))
    state = checkpoint.load_checkpoint(folder, parts.policy) if folder else TrainerState()
    if state.step >= total:
        display.say(f"run {run_dir} is finished")
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run folder {run_dir}: cannot be written: {error.strerror}; choose another run.root") from None
    metrics.cut_back(run_dir, state.step)
    checkpoint.remove_newer(run_dir, state.step)
    if resume:
        display.say(f"going on after iteration {state.step} of {total}" if folder else "no checkpoint yet: starting")

    engine = make_engine(config, parts)
    trainer = Trainer(
        config,
        policy=parts.policy,
        reference=parts.reference,
        engine=engine,
        grader=grader,
        prompts=parts.prompts,
        tokenizer=parts.tokenizer,
        stop_token_ids=parts.stop_token_ids,
        state=state,
    )
    with closing(engine):
        _loop(trainer, config, run_dir, total, display)


def _loop(trainer: Trainer, config: Config, run_dir: Path, total: int, display: Display) -> None:
    with display.training(config.run.name, trainer.state.step, total) as show:
        while trainer.state.step < total:
            batch, row = trainer.iteration(show.completions)
            step = trainer.state.step
            if config.log.rollouts:
                metrics.write_rollouts(run_dir, step, batch, config.log.token_details, trainer.tokenizer)
            metrics.append_metrics(run_dir, row)
            show.iteration(row)
            every = config.checkpoint.every
            if step == total or (every and step % every == 0):
                checkpoint.save_checkpoint(run_dir, trainer.policy, trainer.tokenizer, trainer.state, config, total)


def _checkpoint_to_resume(config: Config, display: Display) -> Path | None:
    """The newest valid checkpoint, None where there is none yet; UserError where the config is not the run's own."""
    folder, complaints = checkpoint.newest_valid(config.run_dir)
    for line in complaints:
        display.warn(line)
    if folder is not None:
        changed = checkpoint.changed_keys(checkpoint.read_state(folder)["config"], config)
        if changed:
            raise UserError(
                f"--resume: the config differs from the run's own in {', '.join(changed)}; set them back as in "
                f"{config.run_dir / 'config.yaml'}, or start another run.name"
            )
    return folder


def _is_finished(state: dict, config: Config) -> bool:
    """Did the run reach its planned end, and is the plan the same? Answered without loading the model."""
    same_plan = all(state["config"]["train"][key] == getattr(config.train, key) for key in ("iterations", "epochs"))
    return same_plan and state["step"] >= state["total"]
