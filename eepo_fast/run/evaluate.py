"""`eepo-fast eval` evaluates a model, checkpoint or run on sets of problems, or completions made elsewhere.

OUT/evaluation.json        what is evaluated: the same command goes on where it stopped, another one is refused
OUT/completions/NAME.jsonl every completion
OUT/results.{json,csv,md}
"""

import errno
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eepo_fast import checkpoint
from eepo_fast.config import Config, DataConfig, RewardConfig, make_config
from eepo_fast.config.checks import COLDEST_OF_VLLM
from eepo_fast.config.files import merge, read_override
from eepo_fast.config.schema import without_unread
from eepo_fast.data.prompts import CHATML, check_ids, stop_token_ids
from eepo_fast.data.rows import iter_jsonl
from eepo_fast.data.tasks import ARITHMETIC, BASES, TASKS
from eepo_fast.distributed import World, default_device
from eepo_fast.evaluation.periodic import make_eval_prompts, readable_sets
from eepo_fast.evaluation.samples import Row, Sampler, append_rows, sample_set
from eepo_fast.evaluation.sets import EvalSet, digest, load_set
from eepo_fast.evaluation.tables import make_results, to_markdown, write_results
from eepo_fast.rewards import make_answer_grader
from eepo_fast.rollout.engine import OnProgress, Sampling
from eepo_fast.run.display import Display
from eepo_fast.types import UserError, WeightsVersion

UNLIMITED = 1e9
OF_TRAINING = {"tensor_parallel", "sleep", "quorum", "carry", "in_flight"}  # keys of rollout that are not taken over
SECTIONS = ("model", "data", "rollout", "reward")  # what an override may set: all else belongs to training
OPTIONS = {"model.path": "--model", "data.train": "--data", "rollout.temperature": "--temperature"}  # options instead
MOST_SAMPLES = 100_000
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a write says without naming its file


@dataclass(frozen=True)
class EvalOptions:
    data: list[str]
    """Each is NAME=SPEC."""
    out: Path
    ks: list[int]
    num_samples: int | None
    temperature: float
    seed: int
    overrides: list[str]


def parse_data(specs: list[str]) -> dict[str, str]:
    result = {}
    for text in specs or [""]:
        name, _, spec = text.partition("=")
        if not re.fullmatch(r"[\w-]{1,100}", name) or not spec or name == "average":
            raise UserError(
                "--data: expected NAME=FILE.jsonl, such as math500=math500.jsonl, found "
                f"{repr(text) if text else 'none'}; a name has letters, digits, _ and -, and is not `average`"
            )
        if name in result:
            raise UserError(f"--data: {name} is given twice; names tell the sets apart")
        result[name] = spec
    return result


def number_of_samples(options: EvalOptions) -> int:
    """Returns the samples a problem beside the greedy completion; UserError where some k is larger."""
    if options.num_samples is not None and not 0 <= options.num_samples <= MOST_SAMPLES:
        raise UserError(f"--n: expected 0 to {MOST_SAMPLES} samples, found {options.num_samples}")
    if not 0 < options.temperature < math.inf:
        raise UserError(f"--temperature: expected a positive number, found {options.temperature}")
    largest = max(options.ks)
    n = options.num_samples if options.num_samples is not None else (largest if largest > 1 else 0)
    if largest > max(1, n):
        raise UserError(f"--k: expected at most the {n} samples of --n, found {largest}; raise --n, or lower --k")
    return n


def resolve_model(path: str, overrides: list[str]) -> tuple[Config, dict[str, Any]]:
    """Returns (config to load and sample with, what was found) for a run's folder, a checkpoint's, or any model.path. A
    run's data and rollout settings are its own; elsewhere the defaults hold, with the prompt of the model's family."""
    folder, values = Path(path).expanduser(), {}
    found = {"model": str(folder.resolve()) if folder.exists() else path}  # a folder has one name, however it is spelt
    if (folder / "checkpoints").is_dir():
        newest, complaints = checkpoint.newest_valid(folder)
        if newest is None:
            raise UserError(f"--model: {path} holds no checkpoint yet; give a run with one, or a model folder")
        for line in complaints:
            Display().warn(line)
        folder = newest
    if (folder / "manifest.json").is_file() and (folder / "model").is_dir():
        if complaint := checkpoint.verify(folder):
            raise UserError(f"--model: checkpoint {folder} is damaged: {complaint}")
        state = checkpoint.read_state(folder)
        values = without_unread({s: v for s, v in state["config"].items() if s in SECTIONS})
        values["model"] = {"path": str(folder / "model"), "dtype": state["config"]["model"]["dtype"]}
        values["rollout"] = {k: v for k, v in values["rollout"].items() if k not in OF_TRAINING}
        found |= {"run": state["config"]["run"]["name"], "step": state["step"]}
    else:
        values = {"model": {"path": path}, "data": {"train": "unused"}}
        for key in ("data.numbers", "data.max_number") if BASES.get(path) == ARITHMETIC else ():
            if not any(text.startswith(f"{key}=") for text in overrides):
                raise UserError(
                    f"--model: {path} is taught one task, and {key} is not given; add the demo's data.numbers=3 "
                    "data.max_number=9, or another one's"
                )
    given = {"eepo": {"enabled": False}}
    for text in overrides:
        if text.partition(".")[0] not in SECTIONS:
            raise UserError(f"override {text!r}: eval takes keys of {', '.join(SECTIONS)}; the others are of training")
        if option := OPTIONS.get(text.partition("=")[0]):
            raise UserError(f"override {text!r}: eval does not take this key; use {option}")
        given = merge(given, read_override(text))
    return make_config(values, given), found


def family_template(model, tokenizer) -> str:
    """Returns the prompt of the model's family, as the recipe has them: ChatML for Qwen (not for what was distilled
    into one with another tokenizer), the tokenizer's own chat template where it has one, else question and answer."""
    if "qwen" in model.config.model_type and CHATML in tokenizer.get_vocab():
        return "chatml"
    return "chat" if getattr(tokenizer, "chat_template", None) else "question_answer"


def evaluate_model(path: str, options: EvalOptions, world: World, display: Display) -> dict[str, Any] | None:
    """Evaluates a model and writes the tables; returns the results on the first rank."""
    num_samples = number_of_samples(options)
    specs = parse_data(options.data)
    with world.agree():
        config, found = resolve_model(path, options.overrides)
        sets = [load_set(name, spec, config.data) for name, spec in specs.items()]
    sets = readable_sets(sets, config.reward, config.data.max_bad, world, display.say)
    with world.agree():
        # a template that no run and no override gives is the model family's, or the procedural task's
        guessed = config.data.train == "unused" and not any(o.startswith("data.template=") for o in options.overrides)
        model, tokenizer, config, device = load_for_sampling(config, options, display)
        if guessed:
            config = with_template(config, family_template(model, tokenizer))
        if config.rollout.engine == "vllm" and options.temperature < COLDEST_OF_VLLM and num_samples:
            raise UserError(
                f"--temperature: expected at least {COLDEST_OF_VLLM} with rollout.engine=vllm, which samples at that "
                f"where less is asked for, found {options.temperature}; greedy completions are made without it"
            )
    from eepo_fast.policy.loading import embedding_rows, eos_of, positions
    from eepo_fast.policy.trial import check_engine, make_trial, own_logprobs
    from eepo_fast.rollout.make import make_engine

    stops = tuple(stop_token_ids(tokenizer, eos_of(model)))
    with world.agree():
        configs = [with_template(config, "plain") if guessed and s.task in TASKS else config for s in sets]
        prompts = {
            s.name: make_eval_prompts(s, c, tokenizer, positions(model)) for s, c in zip(sets, configs, strict=True)
        }
        settings = {
            **found, "samples": num_samples, "temperature": options.temperature, "seed": options.seed,
            "template": ", ".join(dict.fromkeys(c.data.template for c in configs)),
            "max_new_tokens": config.rollout.max_new_tokens,
            "engine": config.rollout.engine, "dtype": config.rollout.dtype, "grading": config.reward.mode,
            "weights": fingerprint(model), "data": {s.name: s.sha256 for s in sets},
            "stop_token_ids": list(stops), "prompts": {name: digest(part) for name, part in prompts.items()},
        }  # fmt: skip
        if world.is_main:
            _claim(options.out, settings)
        everything = [p for part in prompts.values() for p in part]
        for line in check_ids(everything, tokenizer, embedding_rows(model), f"--model: {path}"):
            display.warn(line)
        trial = make_trial(model, everything, 1.0)
    longest = max(len(p.token_ids) for p in everything)
    engine = make_engine(config.rollout, model.to(device), tokenizer, longest)
    rows: dict[str, list[Row]] = {}
    with world.closing(engine):
        engine.sync([{name: p.detach() for name, p in model.named_parameters()}], WeightsVersion(0, False))
        _, slower = check_engine(
            engine, lambda rollouts: own_logprobs(model, rollouts, 1.0), trial, world,
            kind=type(model).__name__, exact=config.rollout.dtype == "float32" and device.type == "cpu",
            most=longest + config.rollout.max_new_tokens,
        )  # fmt: skip
        if slower:
            display.warn(slower)
        sampling = Sampling(options.temperature, config.rollout.max_new_tokens, stops)
        sampler = Sampler(engine, tokenizer, sampling, options.seed, world)
        for eval_set in sets:
            with (
                closing(make_answer_grader(eval_set.task, config.reward)) as grader,
                showing(display, eval_set) as (problems, completions),
                writing(options.out),
            ):
                rows[eval_set.name] = sample_set(
                    replace(sampler, progress=completions), grader, prompts[eval_set.name], num_samples,
                    file=options.out / "completions" / f"{eval_set.name}.jsonl", progress=problems,
                )  # fmt: skip
    return _finish(found.get("run", path), options, settings, rows, display) if world.is_main else None


@contextmanager
def showing(display: Display, eval_set: EvalSet) -> Iterator[tuple[OnProgress, OnProgress]]:
    """Yields two functions of (done, total): one for a set's problems, one for completions sampled on this rank."""
    with display.task(eval_set.name) as update:
        done = [0, len(eval_set.problems)]

        def problems(now: int, total: int) -> None:
            done[:] = now, total
            update(now, total, f"{now} of {total} problems")

        yield problems, lambda now, asked: update(done[0], done[1], f"sampling, {now} of {asked} completions finished")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns a full disk, or a folder in a file's place, into one line once the evaluation has begun. What else the
    system refuses, to an engine or a grader, is no mistake in --out."""
    try:
        yield
    except OSError as error:
        ours = error.errno in FULL if error.filename is None else Path(str(error.filename)).is_relative_to(out)
        if not ours:
            raise
        raise UserError(
            f"--out: {error.filename or out} cannot be written: {error.strerror}; mend that and give the same command "
            "again, or choose another folder"
        ) from None


def with_template(config: Config, template: str) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"template": template})})


def load_for_sampling(config: Config, options: EvalOptions, display: Display):
    """Returns (model, tokenizer, config with a dtype for this device, device)."""
    from eepo_fast.data.base_model import ensure_base
    from eepo_fast.policy.loading import load_model

    model_config = config.model
    if model_config.path in BASES:
        model_config = model_config.model_copy(update={"path": str(ensure_base(model_config.path, config.data))})
    display.say(f"loading {model_config.path}")
    model, tokenizer = load_model(model_config)
    if default_device().type == "cpu" and not any(o.startswith("rollout.dtype=") for o in options.overrides):
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"dtype": "float32"})})
    return model, tokenizer, config, default_device()


def fingerprint(model) -> str:
    """Returns a digest of a sample of every weight: another model under the same path is another evaluation."""
    from eepo_fast.rollout.families import persistent_buffers

    digest = hashlib.sha256()
    for name, weight in (*model.named_parameters(), *persistent_buffers(model).items()):
        values = weight.detach().flatten()
        digest.update(name.encode() + values[:: max(1, len(values) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate_completions(file: Path, options: EvalOptions, mode: Literal["strict", "paper"], display: Display) -> dict:
    """Grades completions made elsewhere: lines of `id` and `response`, each id as often as it was sampled. They are
    reported as samples, also where they were decoded greedily; those of an evaluation of ours as what they were."""
    data = DataConfig(train="unused")
    sets = [load_set(name, spec, data) for name, spec in parse_data(options.data).items()]
    responses = read_responses(file)
    owners = Counter(p.id for s in sets for p in s.problems)
    sets = readable_sets(sets, RewardConfig(mode=mode), data.max_bad, World(), display.say)
    if (twice := next((i for i, count in owners.items() if count > 1), None)) is not None:
        raise UserError(f"--data: id {twice!r} is in more than one set; with --completions ids must tell them apart")
    if (unknown := next((i for i in responses if i not in owners), None)) is not None:
        raise UserError(f"{file}: id {unknown!r} is in none of the sets of --data")
    settings = {
        "completions": str(file.resolve()), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        "grading": mode, "data": {s.name: s.sha256 for s in sets},
    }  # fmt: skip
    for eval_set in sets:
        _check_responses(eval_set, responses, file, options.ks)
    _claim(options.out, settings)
    rows = {}
    # a call grades all of a set: an answer's own limit holds, and no budget of a training step
    reward = RewardConfig(mode=mode, step_seconds=UNLIMITED)
    for eval_set in sets:
        pairs = [(p, k, r) for p in eval_set.problems for k, r in responses[p.id]]
        with closing(make_answer_grader(eval_set.task, reward)) as grader:
            grades = grader.grade([p for p, _, _ in pairs], [r for _, _, r in pairs])
        rows[eval_set.name] = [
            {"id": p.id, "sample": k, "completion": r, "num_tokens": None, "finished": None, "status": g.status,
             "reward": g.reward if g.status not in ("timeout", "error") else None}
            for (p, k, r), g in zip(pairs, grades, strict=True)
        ]  # fmt: skip
        file_of_set = options.out / "completions" / f"{eval_set.name}.jsonl"
        with writing(options.out):
            file_of_set.unlink(missing_ok=True)
            append_rows(file_of_set, rows[eval_set.name])
    return _finish(str(file), options, settings, rows, display)


Responses = dict[str, list[tuple[int | None, str]]]
"""(number of the sample, or None for the greedy one; text), by id."""


def read_responses(file: Path) -> Responses:
    """Reads lines with `response`, or, as an evaluation writes them, with `completion` and `sample`."""
    responses: Responses = {}
    for number, row in iter_jsonl(file):
        ours = "completion" in row and "response" not in row
        text = "completion" if ours else "response"
        for key in ("id", text):
            if isinstance(row.get(key), int | float) and not isinstance(row[key], bool):
                row[key] = str(row[key])
            if not isinstance(row.get(key), str):
                raise UserError(f"{file}, line {number}: expected a string in `{key}`, found {row.get(key)!r}")
            if any("\ud800" <= character <= "\udfff" for character in row[key]):
                raise UserError(f"{file}, line {number}: `{key}` holds half of a surrogate pair, which is no text")
        known = responses.setdefault(row["id"], [])
        greedy = ours and row.get("sample", 0) is None
        known.append((None if greedy else sum(k is not None for k, _ in known), row[text]))
    if not responses:
        raise UserError(f"{file}: expected lines of id and response, found an empty file")
    return responses


def _check_responses(eval_set: EvalSet, responses: Responses, file: Path, ks: list[int]) -> None:
    """Raises a UserError where problems have different numbers of responses, or too few for k."""
    first = [k for k, _ in responses.get(eval_set.problems[0].id, [])]
    for problem in eval_set.problems:
        found = [k for k, _ in responses.get(problem.id, [])]
        if not found or len(found) != len(first) or found.count(None) != first.count(None):
            raise UserError(
                f"{file}: expected {max(1, len(first))} responses to every problem of {eval_set.name}, "
                f"{first.count(None)} of them greedy, found {len(found)} and {found.count(None)} to {problem.id!r}"
            )
        if found.count(None) > 1:
            raise UserError(f"{file}: expected one greedy completion of {problem.id!r}, found {found.count(None)}")
    count = len(first) - first.count(None)
    if max(ks) > max(count, first.count(None)):
        raise UserError(f"--k: expected at most the {count} responses a problem of {file}, found {max(ks)}")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder this evaluation's; UserError where it is another's."""
    if (out / "config.yaml").is_file() and (out / "checkpoints").is_dir():
        raise UserError(f"--out: {out} is the folder of a run; choose another folder, such as {out}-eval")
    path = out / "evaluation.json"
    try:
        (out / "completions").mkdir(parents=True, exist_ok=True)
        if path.is_file():
            before = _read_settings(path)
            if settings.keys() - before.keys():
                raise UserError(
                    f"--out: {out} holds an evaluation of an earlier version or another kind; choose another folder"
                )
            changed = [key for key in settings | before if before.get(key) != settings.get(key)]
            if changed:  # the first says most: of another template, its name before the digests of its prompts
                raise UserError(
                    f"--out: {out} holds another evaluation: {changed[0]} is {settings.get(changed[0])!r} here and "
                    f"{before.get(changed[0])!r} there; choose another folder"
                )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}; choose another folder") from None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"--out: {path} is not the settings of an evaluation; choose another folder")
    return found


def _finish(
    name: str, options: EvalOptions, settings: dict[str, Any], rows: dict[str, list[Row]], display: Display
) -> dict:
    """Writes and shows the tables. name: how they call what was evaluated."""
    results = make_results(name, settings, rows, options.ks)
    with writing(options.out):
        write_results(options.out, results)
    display.say(to_markdown(results))
    display.say(f"tables: {options.out}/results.json, results.csv, results.md")
    return results
