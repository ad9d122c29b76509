"""Models of many families through the trial before training: what they need is found, what is wrong is named.

Tiny models with random weights; the table of all of them is docs/models.md.
"""

import copy
import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from eepo_fast.checkpoint.command import export_checkpoint
from eepo_fast.distributed import World
from eepo_fast.policy import attention, module
from eepo_fast.policy.trial import (
    check_engine,
    check_padded,
    check_policy,
    gap,
    make_trial,
    own_logprobs,
    why_not_packed,
)
from eepo_fast.rollout import families
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import UserError, WeightsVersion

HERE = Path(__file__).parent


def load(name):
    spec = importlib.util.spec_from_file_location(f"families_{name}", HERE / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


tiny, check, table = load("tiny"), load("check"), load("table")

SOME = {  # what each stands for, and what is expected of it beside `yes`
    "llama": {},
    "gemma2": {
        "head": "yes, capped",
        "packing": "padded: its forward pass fails: AssertionError: attention with a cap",
    },
    "granite": {},
    "cohere": {"head": "yes, scaled"},
    "opt": {},  # dropout by a function, a learned position
    "glm4_moe": {},  # a router's bias is a buffer
    "gpt_oss": {"packing": "padded: its forward pass fails: AssertionError: attention with a cap or sinks"},
    "nemotron": {"packing": "padded: its forward pass fails: TypeError: packed_attention() missing"},
    "qwen3_next": {"packing": "padded: expected a model whose", "engine": "slower: prompts of one length at a time"},
    "lfm2": {"packing": "padded: its log-probs are", "engine": "slower: prompts of one length at a time"},
    "mamba": {"packing": "padded: expected a model whose", "engine": "slower: "},
    "cpmant": {"refused": "model.path: CpmAntForCausalLM: expected its hidden states and head"},
}


@pytest.mark.parametrize("family", SOME)
def test_a_family_is_run_rightly_or_refused(family):
    found = check.check_family(tiny.tiny_model(family))
    if "refused" in SOME[family]:
        assert found["refused"].startswith(SOME[family]["refused"])
        return
    for column in check.COLUMNS:
        assert found[column].startswith(SOME[family].get(column, "yes")), (column, found)


@pytest.mark.slow
def test_the_table_says_what_is_found():
    """Each line that is found anew is on the page, and nearly all are found: a slow machine may run out of time."""
    command = [sys.executable, str(HERE / "table.py"), "--without-vllm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    page = [f"{line.rpartition(' | ')[0]} |  |" for line in table.PAGE.read_text(encoding="utf-8").splitlines()]
    assert not set(found) - set(page)
    assert len(found) >= 100, done.stderr


def trial_of(model):
    return make_trial(model, check.PROMPTS, 1.0)


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_a_cap_is_seen_however_small_the_logits(size, monkeypatch):
    """The negative control: without the config's field the same model is refused, logits of a thousandth, too."""
    model = tiny.tiny_model("gemma2", size)
    trial_of(model)
    monkeypatch.setattr(families, "CAPS", ())
    with pytest.raises(UserError, match="does something to its logits after the head that is not known"):
        trial_of(model)


@pytest.mark.parametrize(
    "family, name", [("opt", "dropout"), ("xglm", "activation_dropout"), ("starcoder2", "residual_dropout")]
)
def test_checkpointing_leaves_no_dropout_on(family, name, monkeypatch):
    """Whatever the family calls it. The control: in training mode throughout, the trial says that something is off."""
    config = tiny.small_config(family)
    setattr(config, name, 0.3)
    monkeypatch.setattr(tiny, "small_config", lambda _: config)
    model = tiny.tiny_model(family)
    trial = trial_of(model)
    packed = why_not_packed(model, trial) is None
    check_policy(check.make_policy(model, packed, checkpointing=True), trial, exact=True)
    policy = check.make_policy(model, False, checkpointing=True)
    for part in policy.model.modules():
        part.training = True
        if isinstance(getattr(part, name, None), float):
            setattr(part, name, 0.3)
    with pytest.raises(UserError, match=r"log-probs to be those of the model's own .*; set train.gradient_check"):
        check_policy(policy, trial, exact=True)


def test_checkpointing_is_done_with_modules_in_evaluation():
    """A layer is computed twice, in evaluation mode."""
    policy = check.make_policy(tiny.tiny_model("llama"), True, checkpointing=True)
    seen = []
    for part in policy.model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda part, *_: seen.append(part.training))
    check.gradient_of(policy, trial_of(tiny.tiny_model("llama")))
    linear = sum(isinstance(part, nn.Linear) for part in policy.model.modules())
    # the head is not called; what ends a layer is needed no second time
    assert not any(seen) and len(seen) == 2 * (linear - 1) - len(policy.model.model.layers)


def test_packing_that_mixes_sequences_is_found():
    """The control of the trial: attention that sees the sequence before."""
    model = tiny.tiny_model("llama")
    assert why_not_packed(model, trial_of(model)) is None

    def leaking(module, query, key, value, mask, *, boundaries, lengths, **more):
        return attention.packed_attention(
            module, query, key, value, mask, boundaries=boundaries, lengths=[query.shape[2]], **more
        )

    attention.AttentionInterface.register(attention.NAME, leaking)
    try:
        assert "apart from those of each sequence alone" in why_not_packed(model, trial_of(model))
    finally:
        attention.AttentionInterface.register(attention.NAME, attention.packed_attention)


def test_a_window_in_a_mask_alone_is_not_packed(monkeypatch):
    """A window longer than the trial's sequences is seen by what the layers say, not by what they compute."""
    config = tiny.small_config("mistral")
    config.sliding_window = 256
    monkeypatch.setattr(tiny, "small_config", lambda _: config)
    model = tiny.tiny_model("mistral")
    assert why_not_packed(model, trial_of(model)) is None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
        if hasattr(layer.self_attn, "config"):
            layer.self_attn.config = copy.deepcopy(config)
            layer.self_attn.config.sliding_window = None
    assert why_not_packed(model, trial_of(model)) == "its layers do not say how far back they look"


def test_what_depends_on_the_batch_is_refused_where_padded():
    """As dynamic rope is: a model, or a policy alone, that computes a sequence otherwise beside longer ones."""
    model = tiny.tiny_model("llama")
    trial = trial_of(model)
    check_padded(model, trial)
    policy = check.make_policy(model, False)
    check_policy(policy, trial, exact=True)
    for part in (model, policy.model):
        part.model.register_forward_hook(lambda module, inputs, output: add_rows(output))
    with pytest.raises(UserError, match=r"a sequence otherwise beside longer ones, .* set train.micro_batch_tokens=1"):
        check_padded(model, trial)
    with pytest.raises(UserError, match=r"log-probs of sequences together to be those of each alone"):
        check_policy(policy, trial, exact=True)


def add_rows(output):
    output.last_hidden_state = output.last_hidden_state * (1 + 0.1 * (len(output.last_hidden_state) - 1))
    return output


def test_an_engine_that_is_wrong_is_named_or_slower():
    model = tiny.tiny_model("llama")
    trial, policy = trial_of(model), check.make_policy(model, True)
    engine = HfEngine(model, dtype=torch.float32, max_sequences=16, pad_id=0)
    engine.sync(policy.weights(), WeightsVersion(0, False))

    def tried():
        score = lambda rollouts: policy.score(rollouts).logprobs  # noqa: E731
        return check_engine(engine, score, trial, World(), kind="Llama", exact=True, most=64)

    assert tried()[1] == ""
    forward = engine.model.forward

    def without_padding(input_ids, attention_mask=None, **more):
        return forward(input_ids, attention_mask=torch.ones_like(attention_mask), **more)

    engine.model.forward = without_padding
    assert tried()[1].endswith("prompts of one length at a time") and not engine.memory.padded
    engine.after_head, engine.model.forward = None, lambda *_, **__: 1 / 0
    with pytest.raises(UserError, match=r"rollout.engine: Llama cannot be run: .*; use rollout.engine=vllm"):
        tried()


def test_long_rope_has_a_limit():
    model = tiny.tiny_model("phi3")
    assert families.rope_limit(model) is None
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert families.rope_limit(model) == 64


def test_buffers_are_saved_exported_and_missed(tokenizer, make_trainer, save_checkpoint, tmp_path):
    """An export is the model to the bit; one without a buffer is refused, where transformers would make zeros of it."""
    model = tiny.tiny_model("glm4_moe")
    buffers = families.persistent_buffers(model)
    assert buffers and not families.persistent_buffers(tiny.tiny_model("llama")), "rotary frequencies are made anew"
    for buffer in buffers.values():
        buffer.uniform_()
    trainer = make_trainer()
    trainer.policy = check.make_policy(model, True)
    folder = save_checkpoint(tmp_path / "run", trainer)
    export_checkpoint(folder, tmp_path / "out", "float32", Console(quiet=True))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    trial = trial_of(model)
    assert own_logprobs(found, trial.rollouts, 1.0) == own_logprobs(model, trial.rollouts, 1.0)
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name not in buffers}, path, {"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["model/model.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=rf"lacks {len(buffers)} tensors of the model, such as {next(iter(buffers))}"):
        export_checkpoint(folder, tmp_path / "other", "float32", Console(quiet=True))


@pytest.mark.parametrize("family, one_by_one", [("llama", True), ("qwen3_moe", True), ("hrm_text", False)])
def test_weights_as_checkpoints_have_them(family, one_by_one):
    """Experts alone; projections that a checkpoint has in one together."""
    model = tiny.tiny_model(family)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    found = families.as_saved(model, weights)
    assert families.is_saved_one_by_one(model, {name: w.shape for name, w in weights.items()}) == one_by_one
    parts = [part for name, weight in weights.items() for part in families.as_saved(model, {name: weight}).items()]
    alone = len(parts) == len(found) and all(torch.equal(found[name], part) for name, part in parts)
    assert alone == one_by_one
    assert sum(part.numel() for part in found.values()) == sum(w.numel() for w in weights.values())


def test_a_family_without_checkpointing_is_named():
    with pytest.raises(UserError, match=r"train.gradient_checkpointing: .*; set train.gradient_checkpointing=false"):
        module._checkpoint_gradients(tiny.tiny_model("jetmoe"))


def test_dropout_in_the_config_is_off_and_kept(monkeypatch):
    """Falcon's layers read it there while they run; what is saved has it still."""
    config = tiny.small_config("falcon")
    config.hidden_dropout = 0.3
    monkeypatch.setattr(tiny, "small_config", lambda _: config)
    model = tiny.tiny_model("falcon")
    policy = check.make_policy(model, False, checkpointing=True)
    check_policy(policy, trial_of(model), exact=True)
    assert policy.model.config.hidden_dropout == 0.3
    for part in policy.model.modules():
        if hasattr(part, "config"):
            part.config = policy.model.config
    with pytest.raises(UserError, match="log-probs to be those of the model's own"):
        check_policy(policy, trial_of(model), exact=True)


def test_capped_attention_is_never_pytorchs(monkeypatch):
    """Which passes the cap over: the same model, further away than any rounding."""
    config = tiny.small_config("gemma2")
    config.attn_logit_softcapping = 0.1
    monkeypatch.setattr(tiny, "small_config", lambda _: config)
    model = tiny.tiny_model("gemma2")
    trial = trial_of(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert gap(own_logprobs(model, trial.rollouts, 1.0), trial.logprobs) > 0.05
    assert HfEngine(model, dtype=torch.float32, max_sequences=4, pad_id=0).model.config._attn_implementation == "eager"


def test_a_model_of_few_positions_is_tried_shorter(monkeypatch):
    config = tiny.small_config("gpt2")
    config.n_positions = 20
    monkeypatch.setattr(tiny, "small_config", lambda _: config)
    assert [len(r.prompt.token_ids) + r.num_tokens for r in trial_of(tiny.tiny_model("gpt2")).rollouts] == [9, 20, 16]
