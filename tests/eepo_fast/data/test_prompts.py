"""Templates and conversations, what tokenizers add, and texts of tokens."""

import copy
import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eepo_fast.config import DataConfig
from eepo_fast.data.prompts import check_ids, make_prompts, render, stop_token_ids, token_texts
from eepo_fast.types import Problem, UserError


def test_templates():
    def rendered(template, **more):
        return render(Problem("a", "1+1?", "2"), DataConfig(train="x", template=template, **more), None)

    assert rendered("plain") == "1+1?"
    assert rendered("chatml") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n1+1?\nPlease reason step by "
        "step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered("question_answer") == "Question:\n1+1?\nAnswer:\nLet's think step by step.\n"


def test_long_prompts_are_left_out_and_counted(test_config, tokenizer):
    problems = [Problem("a", "1,1=2:", "1+1"), Problem("b", "1,1,1,1=4:", "1+1+1+1")]
    prompts, notes = make_prompts(problems, test_config(data={"max_prompt_tokens": 6}).data, tokenizer)
    assert [p.id for p in prompts] == ["a"] and notes == ["1 of 2 prompts are longer than 6 tokens: left out"]
    with pytest.raises(UserError, match="all 2 prompts are longer than 3 tokens"):
        make_prompts(problems, test_config(data={"max_prompt_tokens": 3}).data, tokenizer)


def test_a_template_that_the_tokenizer_lacks_is_named(test_config, tokenizer):
    with pytest.raises(UserError, match="chat template"):
        make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chat"}).data, tokenizer)


def test_a_template_that_cannot_render_is_named(test_config, tokenizer):
    broken = copy.deepcopy(tokenizer)
    for content, reason in (("{{ raise_exception('a system turn first') }}", "a system turn first"), ("{% if %}", "")):
        broken.chat_template = content
        with pytest.raises(UserError, match=f"data.template: .* cannot render .*{reason}.*; use another"):
            make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chat"}).data, broken)


def test_chat_templates_write_the_same_day_always(test_config, tokenizer):
    """Llama 3's asks for the day; a run that goes on tomorrow must read today's prompts."""
    dated = copy.deepcopy(tokenizer)
    for content, day in (("{{ strftime_now('%d%m%y') }}", "260724"), ("{{ date_string[:2] }}", "26")):
        dated.chat_template = content
        prompts, _ = make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chat"}).data, dated)
        assert prompts[0].text == day


def test_chatml_needs_its_tokens(test_config, tokenizer):
    with pytest.raises(UserError, match="`chatml` needs a tokenizer with "):
        make_prompts([Problem("a", "1", "1")], test_config(data={"template": "chatml"}).data, tokenizer)


def test_an_empty_prompt_is_named(test_config):
    class Empty:
        eos_token_id = bos_token_id = None
        get_vocab = dict

        def __call__(self, text, add_special_tokens):
            return {"input_ids": []}

    with pytest.raises(UserError, match="problem a gives an empty prompt"):
        make_prompts([Problem("a", "1", "1")], test_config().data, Empty())


def test_stop_tokens():
    vocabulary = {"<|im_end|>": 5, "</s>": 7, "x": 1}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=9)
    assert stop_token_ids(tokenizer, [3, 5]) == [3, 5, 7, 9]
    assert stop_token_ids(tokenizer, None) == [5, 7, 9]


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>{{ '(no thoughts)' if not thoughts }}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "1+1?"},
]


def test_a_conversation_is_rendered_whole_by_chat_alone(test_config, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    problem = Problem("a", "1+1?", "2", messages=TALK)

    def text(**data):
        prompts, notes = make_prompts([problem], test_config(data={**data, "max_prompt_tokens": 999}).data, tokenizer)
        return prompts[0].text, notes

    said = "<user>hi<assistant>hello<user>1+1?<assistant>"
    assert text(template="chat") == (said + "(no thoughts)", [])
    assert text(template="chat", chat_template_kwargs={"thoughts": True}) == (said, [])
    assert text(template="chat", system_prompt="Be brief.")[0] == f"<system>Be brief.{said}(no thoughts)"
    plain, (note,) = text(template="plain")
    assert plain == "1+1?" and "1 of 1 prompts are conversations" in note and "data.template=chat reads all" in note
    problem = Problem("a", "1+1?", "2", messages=[{"role": "system", "content": "own"}, TALK[0]])
    assert text(template="chat", system_prompt="Be brief.")[0] == "<system>own<user>hi<assistant>(no thoughts)"


def test_a_system_prompt_in_chatml():
    data = DataConfig(train="x", template="chatml", system_prompt="Be brief.")
    assert render(Problem("a", "1", "1"), data, None).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


class Adding:
    """A tokenizer that writes ids 1 (begin) and 2 (end) around a text, a digit being its own value plus ten."""

    eos_token_id, bos_token_id = 2, 1

    def get_vocab(self):
        return {"<s>": 1, "</s>": 2}

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1, 1, *(10 + int(c) for c in text), 2, 2]}


def test_what_a_tokenizer_adds_to_a_prompt_is_mended(test_config):
    """Behind its own end of text a model has nothing to say; a text begins once."""
    (prompt,), notes = make_prompts([Problem("a", "34", "1")], test_config().data, Adding())
    assert prompt.token_ids == [1, 13, 14]
    assert [note.partition(" prompts ")[2].split()[0] for note in notes] == ["ended", "began"]


def test_a_token_beyond_the_embedding_is_named(test_config):
    prompts, _ = make_prompts([Problem("a", "1", "1"), Problem("b", "9", "1")], test_config().data, Adding())
    tokenizer = SimpleNamespace(get_vocab=lambda: {"a": 19})
    assert check_ids(prompts, tokenizer, 20, "model.path: m") == check_ids(prompts, tokenizer, 1044, "m") == []
    (line,) = check_ids(prompts, tokenizer, 1045, "model.path: m")
    assert line == "model.path: m: the tokenizer has 20 tokens, the model's embedding 1045 rows: is it the model's own?"
    with pytest.raises(UserError, match=r"m: tokenizer and model do not fit: problem b holds token 19, .* has 19 rows"):
        check_ids(prompts, tokenizer, 19, "model.path: m")


def test_texts_of_tokens_are_the_completion(tokenizer):
    ids = tokenizer("12+3*(4)")["input_ids"]
    assert token_texts(tokenizer, ids) == list("12+3*(4)") and token_texts(tokenizer, []) == []


def test_a_character_over_several_tokens_is_the_last_ones():
    """A byte-level tokenizer, for which an umlaut is two tokens and an emoji four."""
    byte_level = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    whole = SimpleNamespace(decode=byte_level.decode)
    ids = byte_level.encode("aü 🙂!").ids
    assert token_texts(whole, ids) == ["a", "", "ü", " ", "", "", "", "🙂", "!"]
    assert token_texts(whole, ids[:-2]) == ["a", "", "ü", " ", "", "", "\ufffd"], "cut off inside a character"


def test_texts_of_a_byte_fallback_vocabulary_are_the_completion():
    """Llama's and Gemma's kind: bytes in the vocabulary, a leading space that decoding takes away; any sequence."""
    bytes_of = [f"<0x{i:02X}>" for i in range(256)]
    vocab = {token: i for i, token in enumerate(["<unk>", *bytes_of, "▁", "a", "▁the", "ü", "🙂"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    whole = SimpleNamespace(decode=tokenizer.decode)
    assert token_texts(whole, [vocab[t] for t in ("▁the", "<0xC3>", "<0xBC>", "▁the")]) == ["the", "", "ü", " the"]
    rng = random.Random(0)
    for _ in range(200):
        texts = token_texts(whole, [rng.randrange(len(vocab)) for _ in range(12)])
        assert len(texts) == 12
    valid = [vocab[t] for t in ("a", "▁the", "ü", "🙂", "<0x0A>", "▁")]
    for _ in range(200):
        ids = [rng.choice(valid) for _ in range(12)]
        assert "".join(token_texts(whole, ids)) == tokenizer.decode(ids)
