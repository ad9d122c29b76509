"""Counts, from a model's dimensions, what a micro-batch holds on a device. Nothing is loaded, not even PyTorch.

The figures of a model in fp32 under autocast, and of one in 16 bits, are what a traced pass on a CUDA device that is
not there comes to, to a few percent (tests/rehearsal); those of one computed in fp32 are arithmetic. Liger's kernels
are not counted: with them it is less.

Sizes in the formulas: D hidden, I intermediate, A of all query heads, K of all key (or value) heads, V vocabulary. They
give the bytes of one token unless said.
"""

from dataclasses import dataclass
from typing import Any

AUTOCAST = 0
"""An itemsize of its own: weights in fp32, products in 16 bits."""
BUCKET_ELEMENTS = 64 << 20
"""Elements that the unlearning pass sends to their owners at once (shards.py)."""
CHUNK_BYTES = {"cuda": 3 << 30, "cpu": 128 << 20}
"""The fused head's chunk, as its own default has it."""
KEYS = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Holds the dimensions of a model of the Llama family, which say what its tokens cost."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    norms_heads: bool = False
    """Queries and keys have a norm of their own, as Qwen3's."""

    @classmethod
    def of(cls, known: dict[str, Any]) -> "Shape | None":
        """Reads what a model's config.json has; None where it does not say enough."""
        if not all(isinstance(known.get(name), int) for name in KEYS):
            return None
        head_dim = known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"]
        tied, family = bool(known.get("tie_word_embeddings", False)), str(known.get("model_type", ""))
        norms = family.startswith("qwen3")
        return cls(**{k: known[k] for k in KEYS}, head_dim=head_dim, tie_word_embeddings=tied, norms_heads=norms)

    @property
    def layer_weights(self) -> int:
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def weights(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.layer_weights + embeddings + self.hidden_size

    @property
    def multiplied_weights(self) -> int:
        """Returns how many a token is multiplied with: every layer's and the head's."""
        return self.num_hidden_layers * self.layer_weights + self.vocab_size * self.hidden_size

    def kv_bytes(self, itemsize: int = 2) -> int:
        """Returns the bytes of one token's keys and values."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * itemsize

    def attention_flops(self, length: float) -> float:
        """Returns what scores and mixing cost a token's forward pass: it sees half of `length` tokens on average."""
        return 2 * 2 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * length / 2


def layer_bytes(shape: Shape, itemsize: int) -> int:
    """Returns what a layer keeps of a token for its backward pass. Under autocast: of each norm its input and what it
    has normalised, in fp32, and a rounded copy for each product that reads it (26 D); queries and their mix of values,
    keys and values (8 A + 4 K); the four factors of SwiGLU (8 I). In 16 bits a norm is taken in fp32, and all else kept
    as it is (12 D); in fp32 there are no copies. Norms of heads keep their input in fp32, and what they have normalised
    (6 A + 6 K)."""
    d, i = shape.hidden_size, shape.intermediate_size
    a, k = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    if itemsize == 4:
        return 4 * (4 * d + 4 * a + 3 * k + 4 * i)
    base = 26 * d + 8 * a + 4 * k if itemsize == AUTOCAST else 12 * d + 8 * a + 4 * k
    return base + 8 * i + (6 * (a + k) if shape.norms_heads else 0)


def kept_bytes(shape: Shape, tokens: int, itemsize: int, checkpointing: bool) -> float:
    """Returns what a micro-batch keeps from its forward pass to its backward pass: all layers, or their inputs with
    checkpointing; and what surrounds the head, in 12 bytes an element of the last hidden states."""
    width = 2 if itemsize == 2 else 4
    layer = width * shape.hidden_size if checkpointing else layer_bytes(shape, itemsize)
    return tokens * (shape.num_hidden_layers * layer + 3 * width * shape.hidden_size)


def head_bytes(shape: Shape, itemsize: int, device: str, *, gradient: bool) -> float:
    """Adds up the fused head's chunk, its weight rounded for the products, and its weight's gradient in fp32."""
    words = shape.vocab_size * shape.hidden_size
    return CHUNK_BYTES[device] + (2 * words if itemsize == AUTOCAST else 0) + (4 * words if gradient else 0)


def recomputed_bytes(shape: Shape, tokens: int, itemsize: int) -> float:
    """Returns what checkpointing takes while a layer is computed again: that layer, three gradients of SwiGLU's size
    and two of its input's, a weight's in two dtypes, and the head's, where the embedding's is added to it."""
    d, i = shape.hidden_size, shape.intermediate_size
    moving = 3 * (4 if itemsize == 4 else 2) * i + 8 * d
    head = (2 if itemsize == 2 else 4) * shape.vocab_size * d if shape.tie_word_embeddings else 0
    return tokens * (layer_bytes(shape, itemsize) + moving) + 6 * i * d + head


def pass_bytes(
    shape: Shape, tokens: int, itemsize: int, device: str, *, checkpointing: bool, backward_bytes: float = 0.0
) -> float:
    """Returns the peak of a micro-batch's two passes, beside the weights and the gradients that are summed: while the
    head has its chunk, or, with checkpointing, while the last layer is computed again. backward_bytes: what else the
    backward pass holds, as the buckets that gradients are sent in."""
    kept = kept_bytes(shape, tokens, itemsize, checkpointing)
    head = head_bytes(shape, itemsize, device, gradient=True)
    width = 2 if itemsize == 2 else 4
    again = recomputed_bytes(shape, tokens, itemsize) - 3 * width * tokens * shape.hidden_size if checkpointing else 0.0
    return kept + max(head, again + backward_bytes)


def score_bytes(shape: Shape, tokens: int, itemsize: int, device: str) -> float:
    """Returns what a pass without gradients holds: one layer's at a time, and the head's chunk."""
    d = shape.hidden_size
    return head_bytes(shape, itemsize, device, gradient=False) + tokens * (12 * d + 6 * shape.intermediate_size)
