"""Small decoder-only language model whose attention can be changed at any time.

The model has the shape of Llama: pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU
feed-forward, tied embeddings, no biases and no dropout.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stem import patterns
from stem.attention import block_sparse_attention, stem_attention
from stem.config import StemConfig
from stem.experiments.training.tasks import VOCAB_SIZE
from stem.validation import check_choice, check_integer

ROTARY_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """Sizes that decide the number of weights, each >= 1; other values raise a ValueError or TypeError."""

    layers: int = 4
    width: int = 128  # of the residual stream, an even multiple of `heads`
    heads: int = 4  # of queries, a multiple of `kv_heads`
    kv_heads: int = 2
    hidden: int = 384  # inner width of the feed-forward

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_integer(field.name, getattr(self, field.name), 1)
        if self.width % self.heads or self.head_dim % 2:
            raise ValueError(f"width={self.width} must be an even multiple of heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def attend(
    q: Tensor, k: Tensor, v: Tensor, attention: str, config: StemConfig | None, impl: str | None = None
) -> Tensor:
    """Causal attention by name; the gradient flows through the kept blocks, never through their selection.

    Args:
        q, k, v: [B, Hq, N, D], [B, Hkv, N, D] and [B, Hkv, N, D], of one dtype.
        attention: One of `stem.patterns.names()`; "dense" is torch's own causal attention.
        config: None takes the default. Unused by "dense".
        impl: See stem.block_sparse_attention; unused by "dense".
    Returns:
        [B, Hq, N, D], the dtype of `q`.
    Raises:
        ValueError: If `impl` or `config` does not fit the tensors.
        FloatingPointError: If sparse attention on the CPU gets NaN or infinity.
    """
    if attention == "dense":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    try:
        if attention == "stem":
            return stem_attention(q, k, v, config, impl=impl)
        with torch.no_grad():
            selection = patterns.select(attention, q, k, v, config)
        return block_sparse_attention(q, k, v, selection, impl=impl)
    except ValueError as error:
        if all(x.isfinite().all() for x in (q, k, v)):
            raise
        raise FloatingPointError("NaN or infinity in q, k or v") from error


def rotary_angles(num_tokens: int, size: ModelSize, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles, fp32 [N, head_dim / 2] each (RoFormer, Eq. 15)."""
    frequencies = ROTARY_BASE ** (-torch.arange(0, size.head_dim, 2, device=device) / size.head_dim)
    angles = torch.arange(num_tokens, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by the angle of its position: [B, H, N, D] in the dtype of x."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, size: ModelSize):
        super().__init__()
        self.size = size
        self.qkv = nn.Linear(size.width, size.width + 2 * size.kv_heads * size.head_dim, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *how) -> Tensor:
        size = self.size
        qkv = self.qkv(x).unflatten(-1, (-1, size.head_dim)).transpose(1, 2)  # [B, Hq + 2 Hkv, N, D]
        q, k, v = qkv.split([size.heads, size.kv_heads, size.kv_heads], dim=1)
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, *how)  # how: attention, config, impl
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, size: ModelSize):
        super().__init__()
        self.gate_up = nn.Linear(size.width, 2 * size.hidden, bias=False)
        self.out = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """Attention and feed-forward, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, size: ModelSize):
        super().__init__()
        self.attention_norm = nn.RMSNorm(size.width)
        self.attention = Attention(size)
        self.feed_forward_norm = nn.RMSNorm(size.width)
        self.feed_forward = FeedForward(size)

    def forward(self, x: Tensor, *attention_arguments) -> Tensor:
        x = x + self.attention(self.attention_norm(x), *attention_arguments)
        return x + self.feed_forward(self.feed_forward_norm(x))


class LanguageModel(nn.Module):
    """Compute next-token logits from tokens.

    `model.attention`, `model.stem_config` and `model.impl` (see `attend`) may be assigned at any time.
    An unknown `attention` raises ValueError.
    """

    def __init__(
        self, size: ModelSize, attention: str = "dense", stem_config: StemConfig | None = None, impl: str | None = None
    ):
        super().__init__()
        check_choice("attention", attention, patterns.names())
        self.size, self.attention, self.stem_config, self.impl = size, attention, stem_config, impl
        self.embedding = nn.Embedding(VOCAB_SIZE, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self._initialise()

    def _initialise(self) -> None:
        """Draw normal weights: embedding std 0.02, matrices 1/sqrt(inputs), outputs smaller by sqrt(2 layers)."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writers = 2 * self.size.layers if name.endswith("out") else 1
                nn.init.normal_(module.weight, std=(module.in_features * writers) ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute next-token logits [B, N, VOCAB_SIZE] from int64 tokens [B, N]."""
        cos, sin = rotary_angles(tokens.shape[1], self.size, tokens.device)
        x = self.embedding(tokens)  # [B, N, width]
        for block in self.blocks:
            x = block(x, cos, sin, self.attention, self.stem_config, self.impl)
        return F.linear(self.norm(x), self.embedding.weight)

    def num_weights(self) -> int:
        """Number of trained numbers; the tied embedding counts once."""
        return sum(weight.numel() for weight in self.parameters())
