"""Writes docs/models.md: what every family that can be made tiny was found to do. Run it as a script to write it anew.

With --print it writes nothing, and with --without-vllm it prints all but the last column, which takes most of half an
hour. Each family has a process of its own, which a crash or a model that cannot be made small ends.
"""

import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
SECONDS = 120
FAMILIES = """
afmoe apertus arcee axk1 axk2 bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe cpmant ctrl cwm deepseek_v2
deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1
falcon_mamba flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa
gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jamba jetmoe
laguna lfm2 lfm2_moe llama llama4_text mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral
ministral3 mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe
openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlnet xlstm youtu zamba2
""".split()  # noqa: SIM905
HEAD = """# Which models

Any causal language model that transformers has is tried before training, on 64 tokens: it is run rightly, or refused in
one line. Of {count} families a tiny model with random weights was tried on a CPU (`python tests/families/table.py`):
whether the fused head does all that the family does to its logits, whether sequences can be packed (if not, they are
padded by themselves, which is slower), whether gradient checkpointing leaves log-probs and gradients as they were, and
how the embedded engine samples. `prompts of one length at a time`: the model keeps a state in which padding would
count. The last column is vLLM's: whether weights are updated where its kernels read them, or a copy of them that it
then loads anew, behind which its log-probs were the model's own; `–` where vLLM would not start with a model so small,
or not on a CPU, which says nothing of a real one. What was found holds for the versions in `constraints.txt`; the trial
before each run says it of yours.

| family | fused head | packing | checkpointing | embedded engine | vLLM |
| --- | --- | --- | --- | --- | --- |
"""


def in_another_process(find: Callable[[], Any], if_lost: Any) -> Any:
    """Returns what `find` does, which may crash or hang; `if_lost` then."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(SECONDS)
        try:
            os.write(writing, json.dumps(find()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return json.loads(content) if content else if_lost


def find(family: str) -> dict[str, str]:
    """Returns what `check_family` says."""
    import check
    import tiny

    try:
        return check.check_family(tiny.tiny_model(family))
    except Exception as error:
        return {"broken": f"{type(error).__name__}: {error}".splitlines()[0]}


def find_vllm(family: str) -> str:
    """Returns what `check_vllm` says of a model that is as wide as vLLM asks for."""
    import check
    import tiny

    try:
        return check.check_vllm(tiny.tiny_model(family, config=tiny.small_config(family, wide=True)))
    except Exception as error:
        return f"not tried: {type(error).__name__}: {error}".splitlines()[0]


def row(family: str, found: dict[str, str]) -> str:
    cells = [found.get(name, "") for name in ("head", "packing", "checkpointing", "engine", "vllm")]
    if "refused" in found:
        cells = [f"refused: {found['refused'].partition(': ')[2]}", *[""] * 4]
    cells = [c.partition(": ")[2] if c.startswith(("train.", "rollout.", "model.")) else c for c in cells]
    cells = [re.sub(r"\b[\d.]+(e-?\d+)? nats", "some nats", cell) for cell in cells]  # the same on every machine
    return f"| {family} | " + " | ".join(cell.replace("|", "/").partition("; ")[0] for cell in cells) + " |"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with_vllm = "--without-vllm" not in sys.argv
    if with_vllm:
        from eepo_fast.rollout.start_vllm import import_vllm

        import_vllm()  # once for all
    rows = []
    for family in FAMILIES:
        found = in_another_process(partial(find, family), {"broken": f"no answer within {SECONDS} s"})
        if "broken" in found:
            print(f"{family}: {found['broken']}", file=sys.stderr)
            continue
        if with_vllm and "refused" not in found:
            said = in_another_process(partial(find_vllm, family), "not tried: no answer")
            print(f"{family}: vLLM: {said}", file=sys.stderr, flush=True)
            found["vllm"] = "–" if said.startswith("not tried") else said
        rows.append(row(family, found))
        print(rows[-1], flush=True)
    if with_vllm and "--print" not in sys.argv:
        PAGE.write_text(HEAD.format(count=len(rows)) + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
