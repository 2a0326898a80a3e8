"""Realised density of each layer: the counts that prefill adds to, and the report that reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from stem.budget import BlockRows, causal_pairs
from stem.config import StemConfig
from stem.selection import BlockSelection

NAME = "stem"  # the attention implementation that `enable` chooses in the model's config

Selector = Callable[[Tensor, Tensor, Tensor], BlockSelection]

MOST_COUNTS = 1 << 18  # counts of rows that a layer keeps before it sums them: 1 MiB
WHAT = "the report of densities, which all ranks read together"
_HANDLES = count(1)
LAYERS: WeakValueDictionary[int, Layer] = WeakValueDictionary()


@lru_cache(maxsize=4096)
def causal_blocks(rows: BlockRows) -> int:
    """Causal block pairs of these query blocks in one head."""
    return causal_pairs(rows.stop) - causal_pairs(rows.first)


@dataclass(eq=False)
class Layer:
    """State of one attention module while Stem is enabled on it: its attribute `stem_layer`."""

    index: int
    config: StemConfig | Selector | None
    impl: str | None
    prompt_length: int | None  # tokens of the whole prompt, of which a call may give a chunk
    own: str | None  # why the layer is not sparse whatever its config: "sliding_attention", "dense: head_dim 512", ...
    settings: PreTrainedConfig  # the module's config, in which the user may choose another attention implementation
    previous: str  # the implementation that `disable` restores
    heads: int = 0  # query heads Hq
    causal: int = 0  # causal block pairs of one head since `enable`
    known: int = 0  # block pairs that each head kept since `enable` in calls where the data do not decide how many
    counts: list[Tensor] = field(default_factory=list)  # of other calls, int [B or 1, Hq, rows]: blocks of each row
    shared: object = None  # stem.hf.shared.SharedPrompt, if several ranks share the model's prompts
    peers: object = None  # stem.distributed.exchange.Peers of tensor parallelism, each with a part of the heads
    gaps: int = 0  # prompts attended to densely since `enable`, because their padding has gaps
    gapped: dict[int, int] = field(default_factory=dict)  # batch rows of such prompts: position of their last chunk
    plans: dict = field(default_factory=dict)  # of earlier calls, of all layers with one config; see stem.hf.forward
    handle: int = 0  # its key in LAYERS, by which a compiled graph names it

    def __post_init__(self) -> None:
        self.handle = next(_HANDLES)
        LAYERS[self.handle] = self

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(plans={})

    def __setstate__(self, state: dict) -> None:  # a copied or unpickled layer is another layer
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def attention(self) -> str:
        if self.settings._attn_implementation != NAME:
            return str(self.settings._attn_implementation)
        if self.own or self.config is None:
            return self.own or "dense"
        name = "stem" if isinstance(self.config, StemConfig) else "selector"
        return f"{name}; prompts dense because of gaps in their padding: {self.gaps}" if self.gaps else name

    def count(self, q: Tensor, causal: int, kept: Tensor | int) -> None:
        """Add a call with q [B, Hq, Nq, D] and `causal` block pairs in each head; nothing here waits for the device.

        `kept` is how many pairs each head keeps, or how many blocks each row keeps, int [B or 1, Hq, rows].
        """
        batch, self.heads, *_ = q.shape
        self.causal += batch * causal
        if isinstance(kept, int):
            self.known += batch * kept
            return
        self.counts.append(kept)  # summed later: two launches in every call would cost more than this whole function
        if len(self.counts) * kept.numel() > MOST_COUNTS:
            self.counts = [self._counted()]

    def add(self, kept: Tensor, causal: int) -> None:
        """Add kept block pairs of each head, int [Hq], and causal block pairs of one head."""
        self.heads, self.causal = len(kept), self.causal + causal
        self.counts.append(kept[None, :, None])
        self.counts = [self._counted()]

    def count_gaps(self, q: Tensor, k: Tensor, rows: list[int], offset: int) -> None:
        """Add a dense call, q [B, Hq, Nq, D] and k [B, Hkv, Nkv, D], as one that kept every causal block pair.

        Prompts of these batch rows, with their first query at `offset`, count once, whatever their number of chunks,
        and not again where a backward pass recomputes the call (gradient checkpointing).
        """
        size = (self.config if isinstance(self.config, StemConfig) else StemConfig()).block_size
        every = causal_blocks(BlockRows.of(q.shape[2], k.shape[2], size))
        self.count(q, every, every)
        if torch._C._current_graph_task_id() < 0:
            self.gaps += sum(self.gapped.get(row, offset) >= offset for row in rows)
            self.gapped.update(dict.fromkeys(rows, offset))

    def begin(self, rows: list[int]) -> None:
        """Note that prompts without gaps begin in these batch rows."""
        for row in rows if self.gapped else ():
            self.gapped.pop(row, None)

    def kept(self) -> Tensor:
        """Kept block pairs of each head since `enable`, int64 [Hq]; of all ranks with tensor parallelism."""
        kept = torch.full((self.heads,), self.known) + (self._counted().flatten().cpu() if self.counts else 0)
        if self.peers is None or len(kept) == self.settings.num_attention_heads:
            return kept
        found = self.peers.gather(kept.to(self.peers.device_type), WHAT)()
        return self.peers.to_host(found, WHAT).flatten()

    def _counted(self) -> Tensor:
        """Sum of all counts for each head, int64 [1, Hq, 1], in a few launches whatever their number."""
        found: dict[torch.dtype, list[Tensor]] = {}  # cat copies tensors one by one where their dtypes differ
        for counts in self.counts:
            found.setdefault(counts.dtype, []).append(counts.transpose(0, 1).flatten(1))
        return sum(torch.cat(rows, 1).sum(1, dtype=torch.int64) for rows in found.values())[None, :, None]


class Report(Sequence):
    """Realised density: a sequence with one row for each attention layer; it follows what the model computes.

    Each row is a dict:
        layer: Index of the layer in the model. Linear layers of hybrid models have no row: see `layer`.
        attention: "stem" or "selector", and how many prompts were dense because of gaps in their padding. "dense" for
            config None, "dense: ..." with the limit. The model's "sliding_attention", or a later choice like "eager".
        density: Kept over causal block pairs in prefill since `enable`, in [0, 1]: the mean of head_density. 1.0 for
            dense layers. None for other attention, and before the first prefill.
        head_density: Density of each head, or None. With tensor parallelism of all ranks' heads: all ranks read a row
            together.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, position):
        """Row at a position, or a list of rows for a slice; positions count attention layers only."""
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        layer = self._layers[position]
        attention = layer.attention
        heads = (layer.kept().double() / layer.causal).tolist() if layer.causal else None
        density = sum(heads) / len(heads) if heads else 1.0 if attention.startswith("dense") else None
        return {"layer": layer.index, "attention": attention, "density": density, "head_density": heads}

    def layer(self, index: int) -> dict:
        """Row of the layer with this index in the model. Raises ValueError if the model has no such attention layer."""
        indices = [layer.index for layer in self._layers]
        if type(index) is not int or index not in indices:  # True is no layer 1
            raise ValueError(f"index must be an attention layer of the model, one of {indices}, got {index!r}")
        return self[indices.index(index)]

    def density(self) -> float:
        """Mean over the layers that have a density; NaN before the first prefill."""
        known = [row["density"] for row in self if row["density"] is not None]
        return sum(known) / len(known) if known else float("nan")
