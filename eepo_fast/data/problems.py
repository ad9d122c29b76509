"""Loads problems (files, hub data sets, procedural tasks), makes prompts of them, and orders them for training."""

import json
import re
from collections.abc import Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from eepo_fast.config import DataConfig
from eepo_fast.data.tasks import TASKS, task_problems
from eepo_fast.types import Cursor, Problem, Prompt, UserError

DEFAULT_ROWS = 10_000  # of a procedural task, or as many as it has
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
CHATML = "<|im_start|>"
# A whole answer that is one number with thousands marks: the commas go, as graders of the data sets take them out.
THOUSANDS = re.compile(r"[-+]?\$?[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
# Some chat templates write today's date, and a run that is resumed on another day would read other prompts than it
# began with. So all days are this one, which Llama 3's template has where it is told none.
TODAY = datetime(2024, 7, 26)
# Names under which model families keep their end-of-turn token.
STOP_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def load_problems(config: DataConfig, seed: int) -> list[Problem]:
    """Returns the problems of `data.train`; UserError naming file, line or column where they cannot be used."""
    if config.train in TASKS:
        size, exact = config.num_rows or DEFAULT_ROWS, config.num_rows is not None
        return task_problems(config.train, size, config, seed, config.split, exact=exact, asked_by="data.num_rows")
    if config.split != "train":
        raise UserError(
            f"data.split: expected train with data.train={config.train}, found {config.split}: only procedural tasks "
            f"({', '.join(TASKS)}) have splits; give a file of that split"
        )
    path = Path(config.train)
    if path.is_file():
        return read_jsonl(path)
    looks_local = path.suffix in (".jsonl", ".json") or config.train.startswith((".", "/", "~"))
    if not path.is_dir() and (looks_local or config.train.count("/") > 1):
        raise UserError(
            f"data.train: no file {config.train}; give a JSON Lines file, a hub data set or one of {', '.join(TASKS)}"
        )
    return read_hub(config)


def read_jsonl(path: Path) -> list[Problem]:
    """Reads JSON Lines with id, problem, answer; further fields are allowed. Lines are counted from 1 in errors."""
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    for number, row in iter_jsonl(path):
        where = f"{path}, line {number}"
        for key in ("id", "problem", "answer"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                found = "nothing" if key not in row else repr(row[key])
                raise UserError(f"{where}: expected a non-empty string in `{key}`, found {found}")
            try:
                row[key].encode("utf-8")
            except UnicodeEncodeError:
                raise UserError(
                    f"{where}: `{key}` holds half of a surrogate pair, which is no text; repair it"
                ) from None
        if row["id"] in lines:
            raise UserError(
                f"{where}: id {row['id']!r} was already used in line {lines[row['id']]}; ids must be unique"
            )
        lines[row["id"]] = number
        problems.append(Problem(row["id"], row["problem"], row["answer"], str(row.get("source", ""))))
    if not problems:
        raise UserError(f"{path}: expected problems, found an empty file")
    return problems


def iter_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of lines that are not blank; UserError on all but JSON objects in UTF-8."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        for number, raw in enumerate(file, 1):
            # a first line that is no JSON says that the file is likely of another kind
            hint = "; expected JSON Lines; `eepo-fast data prepare` converts others" if number == 1 else ""
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not UTF-8 (byte {error.start} of the line); save the file as UTF-8{hint}"
                ) from None
            if not text:
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # ValueError also where a number has too many digits
                raise UserError(f"{path}, line {number}: not valid JSON: {error}{hint}") from None
            if not isinstance(row, dict):
                found = type(row).__name__
                raise UserError(f"{path}, line {number}: expected a JSON object, found a {found}{hint}")
            yield number, row


def read_hub(
    config: DataConfig,
    *,
    revision: str | None = None,
    subset: str | None = None,
    split: str = "train",
    asked_by: str = "data.train",
) -> list[Problem]:
    """Returns the problems of `data.train`, a hub data set or a folder. asked_by: what errors begin with."""
    from datasets import load_dataset

    try:
        rows = load_dataset(config.train, subset, data_files=config.files, revision=revision, split=split)
    except Exception as error:  # the hub's client raises many kinds; the user needs the name and the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "a folder, and" if Path(config.train).is_dir() else "no file or folder, and from the hub it"
        raise UserError(f"{asked_by}: {config.train} is {kind} could not be loaded: {reason}") from None
    problems, unanswered = [], 0
    for number, row in enumerate(rows):
        values = {name: _column(row, column, f"{config.train}, row {number}") for name, column in config.columns}
        if config.answer_marker:
            _, marker, answer = values["answer"].rpartition(config.answer_marker)
            answer = answer.strip() if marker else ""  # a text without the marker has no final answer
            values["answer"] = answer.replace(",", "") if THOUSANDS.fullmatch(answer) else answer
        if not values["answer"].strip() or not values["problem"].strip():
            unanswered += 1
            continue
        problems.append(Problem(f"{config.train}/{number:06d}", values["problem"], values["answer"], config.train))
    if unanswered:
        no_marker = f" (or no {config.answer_marker!r} before one)" if config.answer_marker else ""
        print(f"{config.train}: {unanswered} of {len(rows)} rows have no problem or no answer{no_marker}: left out")
    if not problems:
        raise UserError(f"{asked_by}: {config.train} has no row with a problem and an answer")
    return problems


def _column(row: dict[str, Any], column: str, where: str) -> str:
    """Returns a column as text: strings and numbers, and lists of them. where: data set and row."""
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            known = ", ".join(value) if isinstance(value, dict) else "none"
            raise UserError(f"data.columns: {where}: no column {column!r}; found at that place: {known}")
        value = value[part]
    parts = value if isinstance(value, list) else [] if value is None else [value]
    for part in parts:
        if not isinstance(part, str | int | float):
            found = type(part).__name__ if part is value else f"a list with a {type(part).__name__}"
            raise UserError(
                f"data.columns: {where}, column {column!r}: expected text, a number or a list of them, found {found}; "
                "name another column"
            )
    return ", ".join(map(str, parts))


# Prompts


def render(template: str, problem: str, tokenizer: Any) -> str:
    """Returns the prompt's text; the templates are those of the SimpleRL-Zoo recipe, which the paper follows."""
    if template == "chatml":
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{problem}\n{BOXED}<|im_end|>\n<|im_start|>assistant\n"
        )
    if template == "question_answer":
        return f"Question:\n{problem}\nAnswer:\nLet's think step by step.\n"
    if template == "chat":
        from jinja2 import TemplateError  # what transformers writes chat templates with

        messages = [{"role": "user", "content": f"{problem}\n{BOXED}"}]
        try:
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, strftime_now=TODAY.strftime,
                date_string=TODAY.strftime("%d %b %Y"),
            )  # fmt: skip
        except TemplateError as error:
            raise UserError(
                f"data.template: the tokenizer's chat template cannot render a problem alone: {error}; use another"
            ) from None
    return problem


def make_prompts(problems: list[Problem], config: DataConfig, tokenizer: Any) -> tuple[list[Prompt], int]:
    """Returns the prompts, and how many problems were left out for their length."""
    if config.template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "data.template: `chat` needs a tokenizer with a chat template, and this one has none; use another"
        )
    if config.template == "chatml" and CHATML not in tokenizer.get_vocab():
        raise UserError(
            f"data.template: `chatml` needs a tokenizer with {CHATML}, and this one reads it as plain text; use another"
        )
    # A chat template writes its special tokens itself; elsewhere the tokenizer adds its own (Llama's begin of text).
    add_special_tokens = config.template != "chat"
    prompts = []
    for problem in problems:
        text = render(config.template, problem.problem, tokenizer)
        if not (token_ids := tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]):
            raise UserError(f"data.train: problem {problem.id} gives an empty prompt with template {config.template}")
        if len(token_ids) <= config.max_prompt_tokens:
            prompts.append(Prompt(problem, text, token_ids))
    if not prompts:
        raise UserError(
            f"data.max_prompt_tokens: all {len(problems)} prompts are longer than {config.max_prompt_tokens} tokens; "
            "raise it"
        )
    return prompts, len(problems) - len(prompts)


def stop_token_ids(tokenizer: Any, model_eos: int | list[int] | None) -> list[int]:
    """Returns the ids that end a completion: the tokenizer's, the model's, and end-of-turn tokens that are known."""
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[name] for name in STOP_TOKENS if name in vocabulary}
    ids.update(model_eos if isinstance(model_eos, list) else [] if model_eos is None else [model_eos])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def completion_text(tokenizer: Any, token_ids: list[int], stop_token_ids: Collection[int]) -> str:
    """Returns what a completion says, without its stop token and other special tokens."""
    ids = token_ids[:-1] if token_ids and token_ids[-1] in stop_token_ids else token_ids
    return tokenizer.decode(ids, skip_special_tokens=True)


def token_texts(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """Returns the text that each token adds, special tokens too; a character cut over several is the last one's."""
    texts = []
    start = read = 0  # a token is decoded behind the one before: a tokenizer treats the beginning of a text otherwise
    for end in range(1, len(token_ids) + 1):
        before, now = (tokenizer.decode(token_ids[start:stop]) for stop in (read, end))
        if now.endswith("\ufffd") and end < len(token_ids):  # inside a character
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts


def cursor_after(iterations: int, num_prompts: int, prompts_per_iteration: int) -> Cursor:
    """Returns where a run is that has trained on whole batches of every epoch alone."""
    epoch, batch = divmod(iterations, num_prompts // prompts_per_iteration)
    return Cursor(epoch, batch * prompts_per_iteration)


def next_prompts(
    cursor: Cursor, count: int, num_prompts: int, seed: int, *, whole_batches: bool
) -> tuple[list[int], Cursor]:
    """Returns the next prompts, no one twice, and where they end; an epoch is a permutation. whole_batches: an epoch's
    last prompts are dropped where they are fewer than `count`; else a batch goes on into the next epoch."""
    assert count <= num_prompts
    (epoch, position, waiting), order = cursor, _permutation(cursor.epoch, num_prompts, seed)
    if whole_batches and num_prompts - position + len(waiting) < count:
        epoch, position, waiting, order = epoch + 1, 0, (), _permutation(epoch + 1, num_prompts, seed)
    taken, postponed = list(waiting[:count]), list(waiting[count:])
    while len(taken) < count:
        if position == num_prompts:
            epoch, position, order = epoch + 1, 0, _permutation(epoch + 1, num_prompts, seed)
        index = order[position]
        position += 1
        (postponed if index in taken else taken).append(index)
    return taken, Cursor(epoch, position, tuple(postponed))


def _permutation(epoch: int, num_prompts: int, seed: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(num_prompts).tolist()
