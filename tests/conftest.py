"""Shared fixtures, and the rule that CI skips nothing."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

# Tests run in several processes side by side, and their matrices are small: a thread each, for what they start, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton: its kernels run in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import LlamaConfig, LlamaForCausalLM

from eepo_fast.algorithm.iteration import Iteration
from eepo_fast.algorithm.trainer import Trainer
from eepo_fast.checkpoint import CheckpointWriter
from eepo_fast.config import RunConfig, make_config
from eepo_fast.data.base_model import make_tokenizer
from eepo_fast.distributed import close_groups
from eepo_fast.policy.plain import TorchPolicy
from eepo_fast.rewards import ArithmeticGrader
from eepo_fast.rollout.hf import HfEngine
from eepo_fast.types import Grade, Problem, Prompt, Rollout, Segment, WeightsVersion

# These are slow, too: patterns of tests' ids. Cases whose like is among the quick tests, and what keeps ranks,
# compilers, browsers or Triton's interpreter busy.
SLOW = (
    r"test_memory_stays_in_the_budget\[(10-0.3|10-1.0|4-0.3|4-1.0)-triton",
    r"test_activation_checkpointing\[\w+-\w+-triton",
    r"test_real_vocabularies\[(262144|128256)-cpu-triton",
    r"test_error_does_not_grow_with_the_number_of_chunks\[cpu-triton",
    r"test_error_is_bounded_by_plain_torch\[(bias)?-(flat|peaked)-shape[1-9]-cpu-triton",
    r"test_large_offset_does_not_cost_accuracy\[-10000.0-cpu-triton",
    r"test_gemm_count_is_one_plus_two_f\[(20000-0.0|20000-0.2|1073741824-0.5|1073741824-1.0)-triton",
    r"test_mistakes_are_one_line_and_end_every_rank\[overrides\d",
    r"test_two_ranks_hold_what_one_would",
    r"test_a_spill_or_an_error_fails\[(spill|triton error|csrc error)",
    r"test_hardware_rounding\.py::\w+\[(up|down)\]",
    r"test_cuda_source\.py::test_a_fault_in_the_source_is_seen\[(two|a row|the last|a zero|a block)",
    r"test_the_largest_allocation_of_an_iteration",
    r"rehearsal/test_fake_cuda_(estimate|zero)\.py",
    r"test_two_ranks_compute_what_one_process_does",
    r"test_a_run_outlives_its_tracker",
    r"test_data_is_prepared_pinned_and_found_again",
    r"test_grading\.py::test_(right_and_wrong|workers_are_recycled)",
    r"test_processes\.py::test_(slow_sampling|a_hang_that_keeps)",
    r"test_scoring_stays_in_the_budget\[triton",
    r"test_parity_after_sync_forget_and_restore\[llama",
    r"test_every_documented_command_runs\[(eepo-fast profile|python bench/)",
    r"test_a_crash_while_the_engine_is_forgetful_loses_nothing",
    r"test_a_profile_from_the_command_line",
    r"test_report\.py::test_(the_browser|colours_change|tokens_can_be|a_missing_script|alpha_is|a_report_is_written|the_page_does)",
)
SLOW_S = 900  # the budget of a test that is slow, needs a GPU or starts ranks; pyproject.toml has the others' budget
CHAOS_S = 3600

# The contract: what every row of metrics.jsonl has.
METRIC_KEYS = [
    "step",
    "policy_version",
    "reward/mean",
    "reward/stage1",
    "reward/stage2",
    "entropy/policy",
    "entropy/stage1",
    "entropy/stage2",
    "length/mean",
    "length/truncated_fraction",
    "group/unique_fraction",
    "group/all_equal_fraction",
    "group/filtered",
    "advantage/positive",
    "advantage/negative",
    "advantage/zero_fraction",
    "reward/overlong",
    "policy/high_covariance",
    "unlearn/active_fraction",
    "unlearn/loss",
    "unlearn/grad_norm",
    "unlearn/strength",
    "unlearn/kl",
    "unlearn/retention",
    "unlearn/noise_ratio",
    "unlearn/skipped",
    "unlearn/applied",
    "unlearn/learning_rate",
    "unlearn/kl_low_variance",
    "policy/loss",
    "policy/grad_norm",
    "policy/learning_rate",
    "policy/kl",
    "policy/clip_fraction_stage1",
    "policy/clip_fraction_stage2",
    "policy/ratio_mean_stage1",
    "policy/ratio_mean_stage2",
    *(
        f"policy/clip_{k}_stage{s}_{sign}"
        for k in ("fraction", "weight")
        for s in (1, 2)
        for sign in ("positive", "negative")
    ),
    "policy/ess",
    "policy/weight_mean",
    "policy/weight_tail",
    "policy/non_finite_ratios",
    "rollout/logprob_gap",
    "time/waiting_s",
    "rollout/carried_fraction",
    "rollout/held_groups",
    "rollout/staleness_mean",
    "rollout/staleness_max",
    "length/begun",
    "length/unlearned",
    "time/iteration_s",
    "tokens/generated",
]


def pytest_addoption(parser):
    parser.addoption("--chaos", metavar="FILE", help="kill tests at length; writes their figures as JSON")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.args_source is config.ArgsSource.TESTPATHS:  # all tests are here: test_architecture.py asks
        config.unmet = [pattern for pattern in SLOW if not any(re.search(pattern, item.nodeid) for item in items)]
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern in SLOW):
            item.add_marker("slow")
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        if config.getoption("--chaos"):
            item.add_marker(pytest.mark.timeout(CHAOS_S))
        elif any(item.get_closest_marker(mark) for mark in ("slow", "gpu")) or "launch" in item.fixturenames:
            item.add_marker(pytest.mark.timeout(SLOW_S))
        if "faults" in Path(item.fspath).parts:
            item.add_marker("chaos")
        for mark in item.iter_markers("fault"):
            item.user_properties.append(("fault", mark.args[0]))


@pytest.fixture
def times(request):
    """How often something is done: seldom with the other tests, often in `make chaos`."""
    return lambda seldom, often: often if request.config.getoption("--chaos") else seldom


@pytest.fixture
def figure(record_property):
    """Note what of how many; `make chaos` prints it."""
    return lambda name, found, of, **more: record_property("figure", [name, found, of, more])


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--chaos")
    if not path:
        return
    sums, failed, seen = {}, set(), set()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for kind, value in report.user_properties:
                if kind == "fault":
                    seen.add(value)
                    failed |= {value} if outcome != "passed" else set()
                elif report.when == "call":
                    name, found, of, more = value
                    row = sums.setdefault(name, {"found": 0, "of": 0})
                    row["found"], row["of"] = row["found"] + found, row["of"] + of
                    row |= {key: max(row.get(key, number), number) for key, number in more.items()}
    figures = {"faults survived with nothing lost": {"found": len(seen - failed), "of": 26}, **sums}
    for name, row in figures.items():
        more = ", ".join(f"{k} {v:.1f}" for k, v in row.items() if k not in ("found", "of"))
        terminalreporter.write_line(f"{name}: {row['found']} of {row['of']}" + (f" ({more})" if more else ""))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def pytest_sessionfinish(session, exitstatus):
    """EEPO_FORBID_SKIPS=1: a skipped test fails the session, so that CI cannot pass by lacking a tool."""
    close_groups()  # a sharded policy alone in this process has opened one
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("EEPO_FORBID_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = 1


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def tiny_model(tokenizer):
    """Two layers, tied embeddings, sharpened so that some of its distributions are peaked and some are flat."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6)
    return model


@pytest.fixture
def make_policy(tiny_model):
    def make(**settings):
        defaults = dict(
            compute_dtype=torch.float32,
            temperature=1.0,
            micro_batch_tokens=64,
            pad_id=0,
            optimizer=make_test_config().optimizer,
        )
        return TorchPolicy(tiny_model, **{**defaults, **settings})

    return make


@pytest.fixture
def make_engine(tiny_model):
    def make(dtype=torch.float32, **settings):
        return HfEngine(tiny_model, dtype=dtype, **{"max_sequences": 64, "pad_id": 0, **settings})

    return make


def make_test_config(**sections):
    values = {
        "model": {"path": "unused"},
        "data": {"train": "arithmetic", "numbers": 3, "num_rows": 64, "max_prompt_tokens": 32},
        "rollout": {"group_size": 4, "max_new_tokens": 8, "dtype": "float32"},
        "grpo": {"kl_coef": 0.0, "entropy_coef": 0.0},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"iterations": 2, "prompts_per_iteration": 4, "prompts_per_update": 2, "micro_batch_tokens": 64},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return make_config(values)


@pytest.fixture
def test_config():
    return make_test_config


@pytest.fixture
def prompts(tokenizer):
    texts = ["1,2,3=6:", "2,2,2=8:", "1,9,9=81:", "4,5,6=26:"]
    return [Prompt(Problem(f"p{i}", t, "1"), t, tokenizer(t)["input_ids"]) for i, t in enumerate(texts)]


@pytest.fixture
def more_prompts(prompts):
    """Three times as many, under names of their own."""
    return [replace(p, problem=replace(p.problem, id=f"{p.id}-{k}")) for k in range(3) for p in prompts]


@pytest.fixture
def make_rollouts(prompts):
    """Rollouts of given lengths with fixed random tokens; one prompt after the other."""

    def make(lengths, stage=1, forgotten=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        rollouts = []
        for i, n in enumerate(lengths):
            ids = torch.randint(2, 20, (n,), generator=generator).tolist()
            logprobs = (-torch.rand(n, generator=generator)).tolist()
            segment = Segment(ids, logprobs, WeightsVersion(0, forgotten))
            rollouts.append(Rollout(prompts[i % len(prompts)], stage, i, [segment], True, reward=0.0))
        return rollouts

    return make


@pytest.fixture(scope="session")
def launch():
    """Runs a script of tests/eepo_fast on two ranks under torchrun; returns what it printed behind FOUND."""
    here = Path(__file__).parent / "eepo_fast"

    def run(script, *arguments, timeout=300):
        paths = [str((here / script).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        done = subprocess.run(
            [*command, str(here / script), *arguments], env=environment, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
        return json.loads(found.removeprefix("FOUND "))

    return run


@pytest.fixture(scope="session")
def metric_keys():
    return set(METRIC_KEYS)


@pytest.fixture
def count_allocations():
    """bench/common.py's: the memory that a function asks for on a CPU, allocation by allocation."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    import common

    return common.count_allocations


class CoinGrader(ArithmeticGrader):
    """Rewards that differ inside a group: by the parity of the completion's length, missing where told."""

    def __init__(self, missing=()):
        self.missing = missing

    def grade(self, problems, completions, *, seconds=None):
        grades = [Grade(float(len(c) % 2), "ok", 0.0) for c in completions]
        return [Grade(0.0, "timeout", 5.0) if i in self.missing else g for i, g in enumerate(grades)]


@pytest.fixture
def make_trainer(make_policy, make_engine, prompts, tokenizer, test_config):
    def make(*, grader=None, reference=False, config=None, **sections):
        config = config or test_config(**sections)
        policy = make_policy(
            micro_batch_tokens=config.train.micro_batch_tokens,
            optimizer=config.optimizer,
            temperature=config.rollout.temperature,
        )
        ref = None
        if reference:
            ref = policy.with_model(copy.deepcopy(policy.model))
        return Trainer(
            config,
            policy=policy,
            reference=ref,
            engine=make_engine(getattr(torch, config.rollout.dtype)),
            grader=grader or CoinGrader(),
            prompts=prompts,
            tokenizer=tokenizer,
            stop_token_ids=[1],
        )

    return make


@pytest.fixture
def iterations(monkeypatch):
    """The state of every iteration that is begun, in their order."""
    found, make = [], Iteration.__init__

    def noted(self, *arguments):
        found.append(self)
        make(self, *arguments)

    monkeypatch.setattr(Iteration, "__init__", noted)
    return found


@pytest.fixture
def save_checkpoint(tokenizer):
    """Save a trainer's state as a run in `run_dir` does; the checkpoint's folder."""

    def save(run_dir, trainer, config=None):
        run = RunConfig(root=str(run_dir.parent), name="run").model_copy(update={"name": run_dir.name})
        config = (config or trainer.config).model_copy(update={"run": run})
        return CheckpointWriter(config, trainer.policy, tokenizer, {}, 9).save(trainer.state)

    return save


@pytest.fixture
def coin_grader():
    return CoinGrader


@pytest.fixture(scope="session")
def scored():
    """Log-probs [T] of a completion's tokens under a model, by a plain forward pass."""

    def score(model, r, temperature=1.0):
        ids = torch.tensor([r.prompt.token_ids + r.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(r.prompt.token_ids) - 1 : -1] / temperature
        return torch.log_softmax(logits, -1)[range(r.num_tokens), r.token_ids]

    return score
