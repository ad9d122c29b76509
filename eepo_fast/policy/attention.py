"""Computes attention over packed sequences: each token sees its own sequence up to itself and nothing else.

It is registered with transformers under NAME, so that any model with exchangeable attention can use it. On a GPU below
fp32 it calls flash-attn where that is installed, else torch's own variable-length attention. Elsewhere it calls one
causal attention for each sequence, which costs what the blocks of a block mask cost and no more.

Shapes: A query heads, K key and value heads, L packed tokens, E head size.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AttentionInterface, PreTrainedModel

from eepo_fast.types import UserError

NAME = "eepo_packed"
windows: list[int | None] | None = None
"""Lists the window of each call, while `windows_asked_for` listens."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    boundaries: Tensor,
    lengths: list[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Maps query [1, A, L, E], key and value [1, K, L, E] to [1, L, A, E]. boundaries: [S + 1] int32, where the S
    sequences begin and end; lengths: theirs. attention_mask is None: transformers makes none for this function."""
    assert attention_mask is None and not dropout and query.shape[0] == 1
    assert not kwargs.get("softcap") and kwargs.get("s_aux") is None, "attention with a cap or sinks"
    longest = max(lengths)
    if windows is not None:
        windows.append(sliding_window)
    window = sliding_window if sliding_window and sliding_window < longest else None
    if query.is_cuda:
        query, key, value = _one_dtype(query, key, value)
    if query.is_cuda and query.dtype != torch.float32:
        flat = [t[0].transpose(0, 1) for t in (query, key, value)]  # [L, heads, E]
        return _varlen()(*flat, boundaries, longest, scaling, window)[None], None
    parts = []
    grouped = query.shape[1] != key.shape[1]
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True):
        mask = None if window is None or q.shape[2] <= window else _band(q.shape[2], window, q.device)
        parts.append(attend(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped))
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Returns all three in one dtype: under autocast the rotary embedding leaves queries and keys in fp32."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Returns [length, length] bool: each row sees its last `window` tokens, its own included."""
    rows = torch.arange(length, device=device)
    distance = rows[:, None] - rows[None]
    return (distance >= 0) & (distance < window)


@functools.cache
def _varlen() -> Callable[..., Tensor]:
    """Returns (q [L, A, E], k, v [L, K, E], boundaries, longest, scale, window) -> [L, A, E]."""
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func

        def flash(q, k, v, boundaries, longest, scale, window):
            limits = (window - 1, 0) if window else (-1, -1)
            return flash_attn_varlen_func(
                q, k, v, boundaries, boundaries, longest, longest,
                softmax_scale=scale, causal=True, window_size=limits,
            )  # fmt: skip

        return flash

    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters

    def own(q, k, v, boundaries, longest, scale, window):
        options = {"window_size": (window - 1 if window else -1, 0)} if "window_size" in known else {"is_causal": True}
        if window and "window_size" not in known:
            raise UserError("train.packing: this torch has no sliding-window packed attention; install flash-attn")
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in known:
                options["enable_gqa"] = True
            else:
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        if scale is not None and "scale" in known:
            options["scale"] = scale
        elif scale is not None:
            q = q * (scale * q.shape[-1] ** 0.5)
        return varlen_attn(q, k, v, boundaries, boundaries, longest, longest, **options)

    return own


AttentionInterface.register(NAME, packed_attention)


@contextmanager
def windows_asked_for() -> Iterator[list[int | None]]:
    """Lists the sliding windows that the calls inside are given. A layer that says its window in a mask alone, which
    packed attention is not given, would see all of a sequence once that is longer than the window."""
    global windows
    windows = found = []
    try:
        yield found
    finally:
        windows = None


def num_windowed(model: PreTrainedModel) -> int:
    """Returns how many of the model's layers see a part of a sequence only; AssertionError for chunks."""
    config: Any = model.config.get_text_config()
    kinds = [str(kind) for kind in getattr(config, "layer_types", None) or ()]
    assert not any("chunked" in kind for kind in kinds), "attention in chunks"
    if not getattr(config, "sliding_window", None):
        return 0
    return sum("sliding" in kind for kind in kinds) if kinds else config.num_hidden_layers


def use_packed_attention(model: PreTrainedModel) -> None:
    """Raises a UserError where the model's attention cannot be exchanged, or its layers carry state across tokens."""
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", False):
        raise UserError(
            f"train.packing: expected a model whose attention can be exchanged, found {type(model).__name__}; set "
            "train.packing=false"
        )
    model.set_attn_implementation(NAME)
