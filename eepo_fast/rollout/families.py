"""Knows where model families differ: what they do to logits after the head, what they keep between tokens, buffers."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from eepo_fast.types import UserError

FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere, Falcon-H1, Muse
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM, Inkling
A_FACTOR_IN = {"logits_scaling": ("hyperclovax",)}  # a divisor's name, but these families multiply
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma and NanoChat, Griffin, xLSTM
LARGE = 100.0  # logits that a cap or a scale cannot hide from


class AfterHead(NamedTuple):
    """Holds the steps from the head's output to a model's logits: softcap · tanh(scale · logits / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def after_head(model: PreTrainedModel) -> AfterHead:
    """Returns the steps of the model's family; `check_head` has tried whether they are all."""
    config: Any = model.config.get_text_config()
    scale = 1.0
    for name in FACTORS + DIVISORS:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            is_factor = name in FACTORS or config.model_type in A_FACTOR_IN.get(name, ())
            scale = scale * value if is_factor else scale / value
    caps = [getattr(config, name, None) for name in CAPS]
    return AfterHead(scale, next((float(cap) for cap in caps if isinstance(cap, int | float) and cap > 0), None))


def decoder_of(model: PreTrainedModel) -> Any:
    """Returns the part of a model that gives hidden states: all of it but the head."""
    inner: Any = model.base_model
    return getattr(model, "model", inner) if inner is model else inner


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises a UserError where the model's logits are not the head's output behind the steps that are known. It comes
    before any model of the process is prepared: it runs the model as it was loaded, where it is. The hidden states are
    made so large that no step is small beside them, whatever the weights."""
    kind, head = type(model).__name__, model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"model.path: expected a model with a head of its own, found that {kind} has none")
    probe = torch.arange(4, device=head.weight.device)[None]
    seen: list[Tensor] = []

    def enlarged(hidden: Tensor) -> Tensor:
        largest = float(torch.nn.functional.linear(hidden, head.weight, head.bias).abs().max())
        seen.append(hidden * (LARGE / largest if largest else 1.0))
        return seen[-1]

    def behind_layers(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = enlarged(output.last_hidden_state)
        return output

    def before_head(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (
            None if seen else (enlarged(arguments[0]), *arguments[1:])
        )  # a family that calls its layers past its base

    hooks = [decoder_of(model).register_forward_hook(behind_layers), head.register_forward_pre_hook(before_head)]
    try:
        found = model(probe, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    expected = after_head(model).apply(head(seen[0])) if seen else None
    if expected is None or not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"model.path: {kind} does something to its logits after the head that is not known here (a scale and a "
            "soft cap are); use a model of another family"
        )


def persistent_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """Returns what a model is beside its parameters, by name: the buffers that are saved with it, such as the biases of
    a router. Training leaves them as they are."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def as_saved(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns weights by the names, and in the parts, that the family's checkpoints have them in: experts that the
    model holds stacked [E, …] are one by one there. They may be copies."""
    return revert_weight_conversion(model, dict(weights))


def is_saved_one_by_one(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> bool:
    """Returns whether `as_saved` of each weight alone is that of all together: no part of a checkpoint is made of
    several weights."""
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    alone = [part for name, weight in weights.items() for part in as_saved(model, {name: weight}).items()]
    together = {name: part.shape for name, part in as_saved(model, weights).items()}
    return len(alone) == len(together) and {name: part.shape for name, part in alone} == together


class Memory(NamedTuple):
    """Says how a model remembers the tokens that it has read, so that it can be asked for the next one alone."""

    argument: str | None
    """The name under which it takes and returns its cache; None where it has to read everything again."""
    padded: bool
    """Whether prompts of several lengths may stand side by side, the shorter ones padded on the left."""
    takes_positions: bool = False


def memory_of(model: PreTrainedModel) -> Memory:
    """Returns how the family remembers. What is no cache of keys and values alone (linear attention, state spaces,
    convolutions) would take padding for text."""
    known = inspect.signature(model.forward).parameters
    argument = next((name for name in ("past_key_values", "cache_params") if name in known), None)
    config: Any = model.config.get_text_config()
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    stateful = getattr(model, "_is_stateful", False) or argument == "cache_params"
    plain = not stateful and all("attention" in kind and "linear" not in kind for kind in kinds)
    return Memory(argument, plain, "position_ids" in known)


def rope_limit(model: PreTrainedModel) -> int | None:
    """Returns the tokens from which on a longer sequence would change what the model computes for all positions before
    (LongRoPE, as Phi-3 has it); None where there is no such number."""
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return original if kind == "longrope" else None


def choose_attention(model: PreTrainedModel) -> None:
    """Has the model compute with PyTorch's attention for padded sequences, or, where the family has none, its own: a
    soft cap of attention (Gemma 2) is passed over by PyTorch's, and what transformers loads such a model with."""
    names: tuple[Literal["sdpa"], Literal["eager"]] = ("sdpa", "eager")
    config: Any = model.config.get_text_config()
    for name in names[1:] if getattr(config, "attn_logit_softcapping", None) else names:
        try:
            model.set_attn_implementation(name)
            return
        except (ValueError, ImportError):  # the family lacks it
            continue
