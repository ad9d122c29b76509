"""Takes a run from its config to its folder: puts the parts together, trains, logs, saves, resumes."""

import copy
import hashlib
import os
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from eepo_kernels import checksums
from transformers import PreTrainedModel

from eepo_fast.algorithm.methods import check_methods
from eepo_fast.algorithm.trainer import Trainer
from eepo_fast.checkpoint import CheckpointWriter, load_checkpoint, read_state
from eepo_fast.config import Config, dump_config
from eepo_fast.data.base_model import ensure_base
from eepo_fast.data.problems import Found, find_problems
from eepo_fast.data.prompts import check_ids, make_prompts, stop_token_ids
from eepo_fast.data.tasks import BASES
from eepo_fast.distributed import World, default_device
from eepo_fast.evaluation.periodic import PeriodicEvaluation, load_sets, readable_sets
from eepo_fast.policy.loading import embedding_rows, eos_of, find_model, load_model, positions
from eepo_fast.policy.module import Policy
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.policy.schedule import plan_schedule
from eepo_fast.policy.trial import Trial, check_engine, check_padded, check_policy, make_trial, why_not_packed
from eepo_fast.policy.zero import ZeroPolicy, import_deepspeed
from eepo_fast.rewards import Grader, make_grader, why_unreadable
from eepo_fast.rollout.engine import RolloutEngine
from eepo_fast.rollout.families import persistent_buffers, rope_limit
from eepo_fast.rollout.make import make_engine
from eepo_fast.rollout.start_vllm import import_vllm
from eepo_fast.run.display import Display
from eepo_fast.run.estimate import check_engine_memory, device_memory_gib
from eepo_fast.run.folder import check_same_inputs, take_folder, write_folder
from eepo_fast.run.loop import Loop, Meeting, ending_of, one_line_errors, write_ending
from eepo_fast.run.plan import about_iterations, about_schedule, check_world, num_iterations, num_updates
from eepo_fast.run.signals import Stopped, leaving_at_once, listening, say_leaving
from eepo_fast.run.trackers import Trackers
from eepo_fast.run.trackers import chosen as chosen_trackers
from eepo_fast.run.watchdog import Watchdog, watching
from eepo_fast.types import Interrupted, Problem, Prompt, TrainerState, UserError, WeightsVersion


@dataclass
class Parts:
    """Holds everything a run is made of, loaded and checked."""

    config: Config
    """What the run was asked for, but for what its model cannot do."""
    policy: Policy
    reference: Policy | None
    engine: RolloutEngine
    tokenizer: object
    prompts: list[Prompt]
    stop_token_ids: list[int]
    evaluation: PeriodicEvaluation
    fingerprint: dict[str, str]
    """Digests of data, model and tokenizer, which a resumed run must have again."""

    def trainer(
        self, config: Config, grader: Grader, state: TrainerState | None = None, total: int | None = None
    ) -> Trainer:
        """Returns a trainer with these parts, which goes on from `state` if that is given. total: iterations of the
        whole run, where it has an end."""
        return Trainer(
            config,
            policy=self.policy,
            reference=self.reference,
            engine=self.engine,
            grader=grader,
            prompts=self.prompts,
            tokenizer=self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            state=state or TrainerState(),
            total=total,
        )


@contextmanager
def loaded_parts(config: Config, grader: Grader, world: World, display: Display) -> Iterator[Parts]:
    """Loads data and models; UserError, on all ranks, before anything is written. The engine is closed afterwards."""
    with world.agree():
        if config.rollout.engine == "vllm":
            import_vllm(deterministic=config.rollout.deterministic)
            if config.rollout.sleep and not torch.cuda.is_available():
                raise UserError("rollout.sleep: expected false on a CPU, found true: vLLM sleeps on a GPU only")
        if config.train.engine == "deepspeed":
            import_deepspeed()
        found = find_problems(config.data, config.run.seed, for_function=bool(config.reward.function))
        sets = load_sets(config)
    _check_same_everywhere(config, found.problems, [p for s in sets for p in s.problems], world)
    found = _readable(found, grader, config, world, display)
    sets = readable_sets(sets, config.reward, config.data.max_bad, world, display.say)
    problems, data = found.problems, _digest([_content_of(p) for p in found.problems])
    asked = config
    if config.model.path in BASES:
        base, task = config.model.path, BASES[config.model.path]
        if config.data.train != task:
            raise UserError(f"model.path: {base} knows nothing but data.train={task}, found {config.data.train}")
        with display.task("teaching the base model the task") as update:
            path = ensure_base(base, config.data, lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}"))
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})
    display.say(f"loading {config.model.path}")
    with world.agree():
        model, tokenizer = load_model(config.model)
        prompts, notes = make_prompts(problems, config.data, tokenizer)
        notes += check_ids(prompts, tokenizer, embedding_rows(model), f"model.path: {config.model.path}")
        num_iterations(config, len(prompts))
        _check_length(model, prompts, config)
        stops = stop_token_ids(tokenizer, eos_of(model))
        evaluation = PeriodicEvaluation(config, sets, tokenizer, stops, positions(model))
        trial = make_trial(model, prompts, config.rollout.temperature)  # before any copy of the model is prepared
        config = _packed_or_padded(config, model, trial, display)
    fingerprint = {"data": data, **_check_same_model(model, tokenizer, prompts, world)}
    for note in notes:
        display.say(note)
    # The engine comes first: a sharded model shows no weights. vLLM's engines start together and wait for one another:
    # where one fails, its process ends, and the launcher ends the others.
    with world.agree() if config.rollout.engine == "hf" else nullcontext():
        longest = max(len(p.token_ids) for p in (*prompts, *evaluation.prompts))
        engine = make_engine(config.rollout, model, tokenizer, longest)
    with world.closing(engine):
        policy, reference = make_policies(config, model, tokenizer, world)
        engine.sync(policy.weights(), WeightsVersion(0, False))
        _try_parts(config, policy, engine, trial, longest, display)
        found = asked.model_copy(update={"train": config.train})
        yield Parts(found, policy, reference, engine, tokenizer, prompts, stops, evaluation, fingerprint)


def _packed_or_padded(config: Config, model: PreTrainedModel, trial: Trial, display: Display) -> Config:
    """Returns the config without packing where the model cannot be packed, and says why; UserError where it cannot be
    padded, either."""
    if config.train.packing:
        if (why := why_not_packed(model, trial)) is None:
            return config
        display.warn(f"train.packing: {type(model).__name__} is padded instead of packed, which is slower: {why}")
    if config.train.micro_batch_tokens > 1:  # else each sequence has a pass of its own
        check_padded(model, trial)
    return config.model_copy(update={"train": config.train.model_copy(update={"packing": False})})


def _try_parts(
    config: Config, policy: Policy, engine: RolloutEngine, trial: Trial, longest: int, display: Display
) -> None:
    """Checks, on all ranks, that policy and engine compute what the model does, and says how far they are apart."""
    exact = config.model.dtype == "float32" and not torch.cuda.is_available()  # a GPU may round fp32 products, too
    found = check_policy(policy, trial, exact=exact)
    apart, slower = check_engine(
        engine, lambda rollouts: policy.score(rollouts).logprobs, trial, policy.world,
        kind=type(policy.model).__name__, exact=exact and config.rollout.dtype == "float32",
        most=longest + config.rollout.max_new_tokens,
    )  # fmt: skip
    if slower:
        display.warn(slower)
    display.say(f"trial: {found}, the engine {apart:.1g} from the policy")


def _readable(found: Found, grader: Grader, config: Config, world: World, display: Display) -> Found:
    """Returns what can be graded, on every rank; says what is left out, or raises a UserError where it is too much."""
    with world.agree():
        unreadable = grader.unreadable([p.answer for p in found.problems]) if world.is_main else []
    found = found.without(world.gather(unreadable)[0], why_unreadable)
    with world.agree():
        for line in found.checked(config.data.train, config.data.max_bad):
            display.say(line)
    return found


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _content_of(problem: Problem) -> tuple:
    """Returns all that a run may read of a problem; what only some have is no part of the others' digest."""
    more = (problem.messages, problem.columns) if problem.messages or problem.columns else ()
    return problem.id, problem.problem, problem.answer, *more


def _check_same_everywhere(config: Config, problems: list[Problem], others: list[Problem], world: World) -> None:
    """Checks that all ranks have the same config and data. others: of evaluation."""
    data, other_data = (_digest([_content_of(p) for p in part]) for part in (problems, others))
    everyone = world.gather((_digest(dump_config(config)), data, other_data))
    for rank, found in enumerate(everyone):
        if found != everyone[0]:
            what = "config" if found[0] != everyone[0][0] else f"data of {config.data.train}"
            raise UserError(
                f"rank {rank} has another {what} than rank 0; start all ranks with the same files and arguments",
                shared=True,
            )


def _check_same_model(model: PreTrainedModel, tokenizer, prompts: list[Prompt], world: World) -> dict[str, str]:
    """Checks that weights and prompts, as tokens, are the same on every rank, and returns their digests."""
    weights = {name: p.detach() for name, p in model.named_parameters()} | persistent_buffers(model)
    mine = {
        "model": _digest((list(weights), checksums(list(weights.values())).tolist())),
        "tokenizer": _digest((sorted(tokenizer.get_vocab().items()), [p.token_ids for p in prompts])),
    }
    everyone = world.gather(mine)
    for rank, found in enumerate(everyone):
        if found != everyone[0]:
            raise UserError(
                f"rank {rank} has another model or tokenizer than rank 0; give all ranks the same files", shared=True
            )
    return mine


def make_policies(config: Config, model: PreTrainedModel, tokenizer, world: World) -> tuple[Policy, Policy | None]:
    """Returns (policy, reference). The reference is whole on every rank, beside a sharded policy in model.dtype."""
    train, dtype, device = config.train, getattr(torch, config.model.dtype), default_device()
    temperature, pad_id = config.rollout.temperature, tokenizer.pad_token_id
    plain = partial(
        TorchPolicy, compute_dtype=dtype, temperature=temperature, pad_id=pad_id, packed=train.packing,
        micro_batch_tokens=train.micro_batch_tokens, liger=train.liger,
    )  # fmt: skip
    sharded = train.engine == "deepspeed"
    reference = None
    if config.grpo.kl_coef:
        frozen = frozen_copy(model, device, dtype if sharded else None)
        with world.agree():
            reference = plain(frozen, world=world)
    if sharded:
        policy = ZeroPolicy(
            model, world=world, train=train, compute_dtype=dtype, engine_dtype=getattr(torch, config.rollout.dtype),
            temperature=temperature, pad_id=pad_id, optimizer=config.optimizer,
        )  # fmt: skip
        return policy, reference
    model = model.to(device)  # type: ignore[bad-argument-type]  # transformers' decorator hides what `to` takes
    return plain(model, optimizer=config.optimizer, gradient_checkpointing=train.gradient_checkpointing), reference


def frozen_copy(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """Copies a model to the device and the dtype weight by weight: the host, where every rank of it does so at once,
    never holds a second model. Buffers such as rotary frequencies keep their dtype."""
    there = {p: p.detach().to(device, dtype, copy=True) for p in model.parameters()}
    # a copy that is being made knows what is copied already by its id()
    known = {id(p): torch.nn.Parameter(weight, requires_grad=False) for p, weight in there.items()}
    return copy.deepcopy(model, known).to(device)  # type: ignore[bad-argument-type]  # its decorator hides it


def _check_length(model, prompts: list[Prompt], config: Config) -> None:
    limit = positions(model)
    longest = max(len(p.token_ids) for p in prompts)
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens: the longest prompt has {longest} tokens; with {config.rollout.max_new_tokens} "
            f"more it passes the {limit} positions of {config.model.path}; lower it, or data.max_prompt_tokens"
        )
    limit = rope_limit(model)
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens: the longest prompt has {longest} tokens; with {config.rollout.max_new_tokens} "
            f"more it passes the {limit} tokens from which on LongRoPE changes all positions of a text that is begun; "
            "lower it, or data.max_prompt_tokens"
        )


def train(config: Config, *, resume: bool = False, display: Display | None = None, world: World | None = None) -> Path:
    """Trains as `config` says and returns the run's folder. All processes of `world` call this. Raises Interrupted,
    with the signal's name, where SIGTERM or SIGUSR1 asked it to leave: all it had done is saved."""
    world = world or World()
    display = display or (Display() if world.is_main else Display.silent())
    with ExitStack() as held:
        if world.size == 1:
            held.enter_context(leaving_at_once())
        with world.agree():
            check_world(config, world.size, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
            check_engine_memory(config, device_memory_gib(world.size), on_gpu=torch.cuda.is_available())
            chosen_trackers(config)
            if config.model.path not in BASES:
                find_model(config.model.path)  # before anything that takes its time
            prepared = take_folder(config, resume, display, held) if world.is_main else None
        folder, finished = world.gather(prepared)[0]
        if finished:
            display.say(f"run {config.run_dir} is finished")
            return config.run_dir
        with world.agree():
            grader = make_grader(config.data.train, config.reward)
            check_methods(config)
        with closing(grader):  # its worker processes must not outlive a refused command
            with world.agree():
                grader.start()
            note = partial(write_ending, config.run_dir, "hung")
            with watching(world.rank, world.size, world.store, config.run.timeout_s, note) as watchdog:
                world = replace(world, on_micro_batch=watchdog.advance)
                _run(config, grader, folder, resume, display, world, watchdog)
    return config.run_dir


def _run(
    config: Config, grader: Grader, folder: Path | None, resume: bool, display: Display, world: World,
    watchdog: Watchdog,
) -> None:  # fmt: skip
    """Loads everything, then writes the run's folder, then trains, from checkpoint `folder` where there is one."""
    run_dir = config.run_dir
    watchdog.enter("loading")
    with loaded_parts(config, grader, world, display) as parts:
        config = parts.config
        if folder is not None:
            check_same_inputs(folder, parts.fingerprint, config)
        state = load_checkpoint(folder, parts.policy, parts.prompts) if folder else TrainerState()
        planned = read_state(folder)["total"] if folder else None
        total = num_iterations(config, len(parts.prompts), state)
        plan_schedule(parts.policy.scheduler, config.optimizer, num_updates(config, total))
        owed = world.gather(parts.evaluation.is_owed(state.step, total))[0]
        if state.step >= total and not owed:
            display.say(f"run {run_dir} is finished")
            return
        writer = CheckpointWriter(config, parts.policy, parts.tokenizer, parts.fingerprint, total)
        writer.saved_step = state.step
        with world.agree():
            writer.check()
        with world.agree():
            if world.is_main:
                with one_line_errors(run_dir):
                    write_folder(config, state)
        with world.agree():
            if not (run_dir / "config.yaml").is_file():
                raise UserError(
                    f"run.root: expected one folder that all ranks share, found that rank {world.rank} does not see "
                    f"what rank 0 has written to {run_dir}; give a path on a shared file system"
                )
        for line in (
            *about_iterations(config, len(parts.prompts), total), *about_carrying(config, state, total),
            *about_schedule(config, total, planned),
        ):  # fmt: skip
            display.say(line)
        if resume:
            display.say(
                f"going on after iteration {state.step} of {total}" if folder else "no checkpoint yet: starting"
            )
        with closing(writer), recorded(run_dir, state, total, watchdog):
            _go_through(config, grader, parts, state, total, display, writer, watchdog)


@contextmanager
def recorded(run_dir: Path, state: TrainerState, total: int, watchdog: Watchdog) -> Iterator[None]:
    """Notes what ends a run, whatever that is; a UserError where something that it has called ends the process."""
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        watchdog.let_it_end()
        write_ending(run_dir, *ending_of(error), step=state.step, total=total)
        if isinstance(error, SystemExit | GeneratorExit) and not isinstance(error, Stopped):
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"the run was ended after iteration {state.step} by {type(error).__name__}({error}) in "
                f"{where.filename}, line {where.lineno}; mend what does so, and go on with --resume"
            ) from error
        raise


def _go_through(
    config: Config, grader: Grader, parts: Parts, state: TrainerState, total: int, display: Display,
    writer: CheckpointWriter, watchdog: Watchdog,
) -> None:  # fmt: skip
    """Trains to the end; Interrupted, with the signal's name, where one asked it to leave."""
    world = parts.policy.world
    watched = display.training(config.run.name, state.step, total)
    logged = Trackers(chosen_trackers(config) if world.is_main else {}, state.step, display.warn)
    with listening() as request, logged as trackers, watched as show:
        if world.is_main:
            request.on_asked = say_leaving
            at_once = "left at once on a second {}, without saving"
            request.before_leaving_at_once = lambda name: write_ending(
                config.run_dir, "error", at_once.format(name), step=state.step, total=total
            )
        trainer, meeting = parts.trainer(config, grader, state, total), Meeting(world, writer, request, display)
        loop = Loop(trainer, parts.evaluation, writer, meeting, watchdog, trackers, total)

        def on_phase(phase: str) -> None:
            watchdog.enter(f"{phase} of iteration {state.step + 1}")
            loop.entered(phase)
            show.phase(phase)

        trainer.on_phase, trainer.at_safe_point, trainer.on_graded = on_phase, meeting, loop.graded
        loop.run(show)


def about_carrying(config: Config, state: TrainerState, total: int) -> Iterator[str]:
    """Yields what a user should know of `rollout.carry` before a run begins or goes on."""
    held = f"the {len(state.groups)} groups in flight are finished, and trained on,"
    if state.groups and not config.rollout.carry:
        yield f"rollout.carry=0: {held} before others"
    if state.groups and total > (config.train.iterations or total):
        yield f"train.iterations={config.train.iterations}: {held} in iterations up to {total}"
    if config.rollout.carry and config.grpo.ratio == "sampler":
        yield (
            "grpo.ratio=sampler: what other iterations have sampled is clipped around the weights that sampled it; "
            "with rollout.carry the default is decoupled: remove the key for it"
        )
