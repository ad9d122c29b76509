"""Makes prompts of problems, as tokens, and texts of tokens."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from eepo_fast.config import DataConfig
from eepo_fast.types import Problem, Prompt, UserError

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
CHATML = "<|im_start|>"
# Some chat templates write today's date, and a run that is resumed on another day would read other prompts than it
# began with. So all days are this one, which Llama 3's template has where it is told none.
TODAY = datetime(2024, 7, 26)
# Names under which model families keep their end-of-turn token.
STOP_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")


def render(problem: Problem, config: DataConfig, tokenizer: Any) -> str:
    """Returns the prompt's text; the templates are those of the SimpleRL-Zoo recipe, which the paper follows. Of a
    conversation, `chat` renders every message as it is, the others take what the user said last."""
    text = problem.problem
    if config.template == "chatml":
        return (
            f"<|im_start|>system\n{config.system_prompt or 'You are a helpful assistant.'}<|im_end|>\n"
            f"<|im_start|>user\n{text}\n{BOXED}<|im_end|>\n<|im_start|>assistant\n"
        )
    if config.template == "question_answer":
        return f"Question:\n{text}\nAnswer:\nLet's think step by step.\n"
    if config.template == "chat":
        messages = problem.messages or [{"role": "user", "content": f"{text}\n{BOXED}"}]
        if config.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        values = {"strftime_now": TODAY.strftime, "date_string": TODAY.strftime("%d %b %Y")}
        values |= config.chat_template_kwargs
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **values)
        except Exception as error:  # a template is a program of its own
            raise UserError(
                f"data.template: the tokenizer's chat template cannot render problem {problem.id}: {error}; use "
                "another, or other data.chat_template_kwargs"
            ) from None
    return text


def make_prompts(problems: list[Problem], config: DataConfig, tokenizer: Any) -> tuple[list[Prompt], list[str]]:
    """Returns the prompts, and lines that say what was left out or mended."""
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
    stops = set(stop_token_ids(tokenizer, None))
    prompts, ended, twice = [], 0, 0
    for problem in problems:
        text = render(problem, config, tokenizer)
        found = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        token_ids = _without_end(found, stops)
        ended += len(token_ids) < len(found)
        if len(token_ids) > 1 and token_ids[0] == token_ids[1] == tokenizer.bos_token_id:
            token_ids, twice = token_ids[1:], twice + 1
        if not token_ids:
            raise UserError(f"data.train: problem {problem.id} gives an empty prompt with template {config.template}")
        if len(token_ids) <= config.max_prompt_tokens:
            prompts.append(Prompt(problem, text, token_ids))
    if not prompts:
        raise UserError(
            f"data.max_prompt_tokens: all {len(problems)} prompts are longer than {config.max_prompt_tokens} tokens; "
            "raise it"
        )
    of, longest = f"of {len(problems)} prompts", config.max_prompt_tokens
    cut = sum(len(p.messages) > 1 for p in problems) if config.template != "chat" else 0
    notes = (
        (len(problems) - len(prompts), f"are longer than {longest} tokens: left out"),
        (ended, "ended with a token that ends a text, such as the tokenizer adds: taken off"),
        (twice, "began with the begin of text twice: once taken off"),
        (cut, f"are conversations of several messages, of which data.template={config.template} reads the user's last "
         "alone; data.template=chat reads all"),
    )  # fmt: skip
    return prompts, [f"{count} {of} {note}" for count, note in notes if count]


def _without_end(token_ids: list[int], stops: Collection[int]) -> list[int]:
    """Returns what stands before the stop tokens at the end: a model does not go on behind them."""
    end = len(token_ids)
    while end and token_ids[end - 1] in stops:
        end -= 1
    return token_ids[:end]


def check_ids(prompts: Sequence[Prompt], tokenizer: Any, rows: int, where: str) -> list[str]:
    """Raises a UserError for a token that the model's embedding, of so many rows, does not have. Returns lines to say
    where the tokenizer may be another model's."""
    for prompt in prompts:
        if (largest := max(prompt.token_ids)) >= rows:
            raise UserError(
                f"{where}: tokenizer and model do not fit: problem {prompt.id} holds token {largest}, and the model's "
                f"embedding has {rows} rows; use the tokenizer the model was trained with, or leave the problem out"
            )
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if rows - size > max(1024, rows // 10):  # they are padded to round numbers, by a few percent at the most
        return [f"{where}: the tokenizer has {size} tokens, the model's embedding {rows} rows: is it the model's own?"]
    return []


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
