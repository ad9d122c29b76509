"""Run by test_liger.py: policy and reference are made as on a GPU, Liger included, out of a model on the host; each
fault in a process of its own, because Liger changes transformers for the whole of it. Prints what was found, as JSON.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)  # a kernel that is given tensors of the host must fail, as it does on a GPU

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from eepo_fast.config import make_config
from eepo_fast.distributed import World
from eepo_fast.policy import module, plain, zero
from eepo_fast.rollout import families
from eepo_fast.run import build
from eepo_fast.types import UserError

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
PROBE = torch.arange(2, 14)[None]


class Tokenizer:
    pad_token_id = 0


class OnGpu:
    """What a function is to take for a tensor on a GPU."""

    is_cuda = True


def whether_asked(ligers):
    """Liger's rotary positions: theirs for a tensor, the word that they were asked for `OnGpu`."""
    return lambda first, *rest: "Liger's" if isinstance(first, OnGpu) else ligers(first, *rest)


def prepare_as_on_gpu(*arguments, **options):
    seen, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        module.prepare_model(*arguments, **options)
    finally:
        torch.cuda.is_available = seen


def put_back(fault):
    """The negative controls."""
    if fault == "liger everywhere":  # as Liger leaves it
        module._by_device = lambda on_gpu, on_host: on_gpu
    if fault == "check beside the patch":  # and each model checked when it is its turn
        module._by_device = lambda on_gpu, on_host: on_gpu
        unchecked = module.prepare_model

        def checked(model, **options):
            families.check_head(model)
            unchecked(model, **options)

        module.prepare_model = checked


def config_for(engine):
    return make_config(
        {
            "model": {"path": "unused", "dtype": "float32"},
            "data": {"train": "arithmetic"},
            "grpo": {"kl_coef": 1e-4},
            "rollout": {"dtype": "float32"},
            "train": {"engine": engine, "liger": True},
        }
    )


def rehearse(family, engine):
    from liger_kernel.transformers import monkey_patch, rope

    config_class, model_class = FAMILIES[family]
    torch.manual_seed(0)
    model, other = (model_class(config_class(**SIZES)).eval() for _ in range(2))
    with torch.no_grad():
        before = other(PROBE).logits
    monkey_patch.liger_rotary_pos_emb = whether_asked(rope.liger_rotary_pos_emb)
    policy, reference = build.make_policies(config_for(engine), model, Tokenizer(), World())
    try:
        families.check_head(other)  # a third model of the process, still on the host
        with torch.no_grad():
            after = other(PROBE).logits
    except Exception as error:
        return {"the other model": str(error)}
    fresh = model_class(config_class(**SIZES))  # and one that is made later
    rotary = vars(sys.modules[model_class.__module__])["apply_rotary_pos_emb"]
    return {
        "layers": sorted({type_name(m) for p in (policy, reference) for m in p.model.base_model.modules()}),
        "fresh layers": sorted({type_name(m) for m in fresh.base_model.modules()}),
        "rotary on a GPU": rotary(OnGpu(), None, None, None),
        "same on the host": torch.equal(before, after),
    }


def type_name(layer):
    return layer._get_name()


def refuse():
    """A family whose logits are not the head's output."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.1)).eval()
    families.CAPS = ()  # as if the cap were not known
    try:
        families.check_head(model)
    except UserError as error:
        return str(error)


def rehearse_all(fault, cases):
    put_back(fault)
    found = {}
    for case in cases:
        try:
            found[case] = refuse() if case == "gemma2" else rehearse(*case.split("/"))
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def in_a_fork(fault, cases):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(rehearse_all(fault, cases)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, fault
    return json.loads(text)


if __name__ == "__main__":
    import deepspeed  # noqa: F401  (once, before it forks)
    import liger_kernel.transformers  # noqa: F401

    plain.prepare_model = zero.prepare_model = prepare_as_on_gpu
    print("FOUND " + json.dumps({fault: in_a_fork(fault, cases) for fault, cases in json.loads(sys.argv[1]).items()}))
