"""A run from its config to its folder: put the parts together, train, log, save, resume."""

from __future__ import annotations

import copy
import hashlib
import os
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from eepo_fast import checkpoint, metrics
from eepo_fast.config import Config, RolloutConfig, dump_config
from eepo_fast.data import ARITHMETIC, BASE, load_problems, make_prompts, stop_token_ids
from eepo_fast.display import Display
from eepo_fast.distributed import World, default_device
from eepo_fast.estimate import check_engine_memory, device_memory_gib
from eepo_fast.evaluation import periodic
from eepo_fast.evaluation.periodic import PeriodicEvaluation, check_sets, load_sets
from eepo_fast.models import load_model
from eepo_fast.plan import check_world, num_iterations
from eepo_fast.policy.module import Policy
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.policy.zero import ZeroPolicy, import_deepspeed
from eepo_fast.rewards import Grader, check_golds, make_grader
from eepo_fast.rollout.engine import Request, RolloutEngine, Sampling
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.rollout.vllm import VllmEngine, import_vllm
from eepo_fast.trainer import Trainer, TrainerState
from eepo_fast.types import Problem, Prompt, UserError, WeightsVersion
from eepo_fast.warmup import ensure_base

LARGEST_GAP = 0.5  # nats: far above what 16-bit arithmetic does, far below what a wrong weight does


@dataclass
class Parts:
    """Everything a run is made of, loaded and checked."""

    policy: Policy
    reference: Policy | None
    engine: RolloutEngine
    tokenizer: object
    prompts: list[Prompt]
    stop_token_ids: list[int]
    evaluation: PeriodicEvaluation


def load_parts(config: Config, grader: Grader, world: World, display: Display) -> Parts:
    """Load data and models; UserError, on all ranks, before anything is written."""
    with world.agree():
        if config.rollout.engine == "vllm":
            import_vllm()
            if config.rollout.sleep and not torch.cuda.is_available():
                raise UserError("rollout.sleep: expected false on a CPU, found true: vLLM sleeps on a GPU only")
        if config.train.engine == "deepspeed":
            import_deepspeed()
        problems = load_problems(config.data, config.run.seed)
        sets = load_sets(config)
        if world.is_main:
            check_golds(grader, problems, config.data.train)
            check_sets(sets, config.reward)
    _check_same_everywhere(config, [p for part in (problems, *(s.problems for s in sets)) for p in part], world)
    if config.model.path == BASE:
        if config.data.train != ARITHMETIC:
            raise UserError(f"model.path: {BASE} knows nothing but data.train={ARITHMETIC}, found {config.data.train}")
        with display.task("teaching the base model the task") as update:
            path = ensure_base(config.data, lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}"))
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})
    display.say(f"loading {config.model.path}")
    with world.agree():
        model, tokenizer = load_model(config.model)
        prompts, too_long = make_prompts(problems, config.data, tokenizer)
        num_iterations(config, len(prompts))
        _check_length(model, prompts, config)
        stops = stop_token_ids(tokenizer, eos_of(model))
        evaluation = PeriodicEvaluation(config, sets, tokenizer, stops, positions(model))
    _check_same_model(model, prompts, world)
    if too_long:
        display.say(
            f"{too_long} of {len(problems)} prompts are longer than {config.data.max_prompt_tokens} tokens: left out"
        )
    # The engine first: a sharded model shows no weights. vLLM's start on all ranks together, and wait for one another:
    # where one fails, its process ends, and the launcher ends the others.
    with world.agree() if config.rollout.engine == "hf" else nullcontext():
        longest = max(len(p.token_ids) for p in (*prompts, *evaluation.prompts))
        engine = make_engine(config.rollout, model, tokenizer, longest)
    policy, reference = make_policies(config, model, tokenizer, world)
    parts = Parts(policy, reference, engine, tokenizer, prompts, stops, evaluation)
    _check_engine(parts, config.rollout.temperature)
    return parts


def _check_same_everywhere(config: Config, problems: list[Problem], world: World) -> None:
    """Config and data are the same on every rank."""
    content = (dump_config(config), *((p.id, p.problem, p.answer) for p in problems))
    mine = hashlib.sha256(repr(content).encode()).hexdigest(), hashlib.sha256(content[0].encode()).hexdigest()
    everyone = world.gather(mine)
    for rank, (whole, config_hash) in enumerate(everyone):
        if whole != everyone[0][0]:
            what = "config" if config_hash != everyone[0][1] else f"data of {config.data.train}"
            raise UserError(
                f"rank {rank} has another {what} than rank 0; start all ranks with the same files and arguments",
                shared=True,
            )


def _check_same_model(model: PreTrainedModel, prompts: list[Prompt], world: World) -> None:
    """Weights, by a sample of each, and prompts, as tokens, are the same on every rank."""
    digest = hashlib.sha256(repr([p.token_ids for p in prompts]).encode())
    for name, weight in model.named_parameters():
        values = weight.detach().flatten()
        digest.update(name.encode() + values[:: max(1, len(values) // 64)].float().numpy().tobytes())
    everyone = world.gather(digest.hexdigest())
    for rank, found in enumerate(everyone):
        if found != everyone[0]:
            raise UserError(
                f"rank {rank} has another model or tokenizer than rank 0; give all ranks the same files", shared=True
            )


def make_policies(config: Config, model: PreTrainedModel, tokenizer, world: World) -> tuple[Policy, Policy | None]:
    """(policy, reference). The reference is whole on every rank; beside a sharded policy in the dtype computed with."""
    train, dtype, device = config.train, getattr(torch, config.model.dtype), default_device()
    shared = dict(compute_dtype=dtype, temperature=config.rollout.temperature, pad_id=tokenizer.pad_token_id)
    plain = dict(micro_batch_tokens=train.micro_batch_tokens, packed=train.packing, liger=train.liger)
    sharded = train.engine == "deepspeed"
    reference = None
    if config.grpo.kl_coef:
        frozen = copy.deepcopy(model).requires_grad_(False)
        if sharded:
            for parameter in frozen.parameters():  # not .to(dtype): buffers such as rotary frequencies stay in fp32
                parameter.data = parameter.data.to(dtype)
        with world.agree():
            reference = TorchPolicy(frozen.to(device), world=world, **shared, **plain)
    if sharded:
        engine_dtype = getattr(torch, config.rollout.dtype)
        policy = ZeroPolicy(
            model, world=world, train=train, engine_dtype=engine_dtype, optimizer=config.optimizer, **shared
        )
        return policy, reference
    options = dict(optimizer=config.optimizer, gradient_checkpointing=train.gradient_checkpointing)
    return TorchPolicy(model.to(device), **shared, **plain, **options), reference


def make_engine(rollout: RolloutConfig, model: PreTrainedModel, tokenizer, longest: int) -> RolloutEngine:
    """longest: tokens of the longest prompt."""
    settings = dict(dtype=getattr(torch, rollout.dtype), max_sequences=rollout.max_sequences)
    if rollout.engine == "hf":
        return HfEngine(model, pad_id=tokenizer.pad_token_id, device=default_device(), **settings)
    return VllmEngine(
        model,
        max_model_len=longest + rollout.max_new_tokens,
        tensor_parallel=rollout.tensor_parallel,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enable_sleep=rollout.sleep,
        **settings,
    )


def _check_engine(parts: Parts, temperature: float) -> None:
    """Every engine and the policy must give the same text the same probability: once, on a few tokens, before
    training."""
    parts.engine.sync(parts.policy.weights(), WeightsVersion(0, False))
    prompt = min(parts.prompts, key=lambda p: len(p.token_ids))
    mine = parts.engine.generate([Request(prompt, 1, (0,), (0,))], Sampling(temperature, 16, ()))
    rollouts = [r for share in parts.policy.world.gather(mine) for r in share]
    scored = parts.policy.score(rollouts)[0]
    for rank, rollout in enumerate(rollouts):
        pairs = zip(scored[id(rollout)], rollout.rollout_logprobs, strict=True)
        gap = sum(abs(a - b) for a, b in pairs) / rollout.num_tokens
        if not gap < LARGEST_GAP:
            raise UserError(
                f"rollout.engine: expected the engine's log-probs to be the policy's, found them {gap:.2f} nats apart "
                f"on average, on rank {rank}: this engine does not run {type(parts.policy.model).__name__} rightly; "
                "use another one",
                shared=True,
            )


def eos_of(model: PreTrainedModel) -> int | list[int] | None:
    return model.config.eos_token_id if model.generation_config is None else model.generation_config.eos_token_id


def positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model can read; None where its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def _check_length(model, prompts: list[Prompt], config: Config) -> None:
    limit = positions(model)
    longest = max(len(p.token_ids) for p in prompts)
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens: the longest prompt has {longest} tokens; with {config.rollout.max_new_tokens} "
            f"more it passes the {limit} positions of {config.model.path}; lower it, or data.max_prompt_tokens"
        )


def train(config: Config, *, resume: bool = False, display: Display | None = None, world: World | None = None) -> Path:
    """Train as `config` says and return the run's folder. All processes of `world` call this."""
    world = world or World()
    display = display or (Display() if world.is_main else Display.silent())
    with world.agree():
        check_world(config, world.size, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
        check_engine_memory(config, device_memory_gib(world.size), on_gpu=torch.cuda.is_available())
        folder = _prepare_folder(config, resume, display) if world.is_main else None
    folder, finished = world.gather(folder)[0]
    if finished:
        display.say(f"run {config.run_dir} is finished")
        return config.run_dir
    # the grader's worker processes must not outlive a refused command
    with closing(make_grader(config.data.train, config.reward)) as grader:
        with world.agree():
            grader.start()
        _run(config, grader, folder, resume, display, world)
    return config.run_dir


def _prepare_folder(config: Config, resume: bool, display: Display) -> tuple[Path | None, bool]:
    """(checkpoint to go on from, is the run finished); UserError where the run's folder cannot be used."""
    run_dir = config.run_dir
    for folder in (run_dir, *run_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run folder {run_dir}: {folder} is a file; choose another run.root")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not resume:
        raise UserError(f"run folder {run_dir} is not empty; add --resume to go on, or choose another run.name")
    folder = _checkpoint_to_resume(config, display) if resume else None
    return folder, folder is not None and _is_finished(checkpoint.read_state(folder), config)


def _run(config: Config, grader: Grader, folder: Path | None, resume: bool, display: Display, world: World) -> None:
    """Load everything, then write the run's folder, then train, from checkpoint `folder` where there is one."""
    run_dir = config.run_dir
    parts = load_parts(config, grader, world, display)
    total = num_iterations(config, len(parts.prompts))
    state = checkpoint.load_checkpoint(folder, parts.policy) if folder else TrainerState()
    if state.step >= total:
        display.say(f"run {run_dir} is finished")
        return
    with world.agree():
        if world.is_main:
            _write_folder(config, state)
    if resume:
        display.say(f"going on after iteration {state.step} of {total}" if folder else "no checkpoint yet: starting")

    trainer = Trainer(
        config,
        policy=parts.policy,
        reference=parts.reference,
        engine=parts.engine,
        grader=grader,
        prompts=parts.prompts,
        tokenizer=parts.tokenizer,
        stop_token_ids=parts.stop_token_ids,
        state=state,
    )
    with closing(parts.engine):
        _loop(trainer, parts.evaluation, run_dir, total, display)


def _write_folder(config: Config, state: TrainerState) -> None:
    """The run's folder as it is after `state.step` iterations."""
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"run folder {run_dir}: cannot be written: {error.strerror}; choose another run.root") from None
    metrics.cut_back(run_dir, state.step)
    checkpoint.remove_newer(run_dir, state.step)
    periodic.remove_newer(run_dir, state.step)


def _loop(trainer: Trainer, evaluation: PeriodicEvaluation, run_dir: Path, total: int, display: Display) -> None:
    config = trainer.config
    with display.training(config.run.name, trainer.state.step, total) as show:
        while trainer.state.step < total:
            batch, row = trainer.iteration(show.completions)
            step = trainer.state.step
            if evaluation.due(step, total):
                row |= evaluation.run(trainer.policy, trainer.engine, trainer.state.policy_version, step)
            if trainer.world.is_main:
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
