"""Prompts of a transformers model that several ranks share: every rank runs the model on its own tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from stem.config import StemConfig
from stem.distributed import Layout, stem_attention
from stem.distributed.attention import TIMEOUT
from stem.distributed.exchange import Peers
from stem.distributed.layout import slots_of
from stem.hf.report import Layer
from stem.impl.attend import apply_sinks
from stem.reference import masked_attention

DENSE = StemConfig(density=1.0)  # of layers whose config is None
LARGEST_BLOCK = 128  # a layout of such blocks suits every config [tokens]
INPUTS = ("input_ids", "inputs_embeds")
RESULTS = ("logits", "last_hidden_state")


class SharedPrompt:
    """State of a model whose prompts are shared: hooks cut the inputs and put the logits together.

    A call with several tokens is a prompt, or the next chunk of one if its cache holds tokens. Every rank calls the
    model with all of the chunk's tokens, computes those of its part of a zigzag layout, and gets the logits of all. A
    rank's cache keeps its own keys and values. A call with one token runs on every rank, and each attends to its part.

    Attributes:
        config: Of the first sparse layer, for which the layout is balanced.
        layout: Of the keys in the caches.
        decoded: Tokens after the prompt. All caches hold them; the rank of the prompt's end attends to them.
    """

    def __init__(self, mesh: DeviceMesh, config: StemConfig) -> None:
        self.mesh, self.peers, self.config = mesh, Peers.of(mesh, TIMEOUT), config
        self.layout, self.decoded, self.handles = None, 0, []

    def install(self, model: nn.Module) -> None:
        before = model.register_forward_pre_hook(self._before, with_kwargs=True)
        self.handles = [before, model.register_forward_hook(self._after, with_kwargs=True)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(zip(INPUTS, args, strict=False)) | kwargs  # the ids are the first argument
        name = next((name for name in INPUTS if kwargs.get(name) is not None), None)
        if name is None or len(args) > 1:
            raise ValueError("a model that shares prompts takes input_ids, alone or with named arguments")
        tokens, cache = kwargs[name], kwargs.get("past_key_values")
        self._check(kwargs)
        has_tokens = cache is not None and int(cache.get_seq_length()) > 0
        self.layout, self.decoded = getattr(cache, "stem_state", (None, 0)) if has_tokens else (None, 0)
        if has_tokens and self.layout is None:
            raise ValueError("past_key_values: tokens that were not computed by ranks that share a prompt")
        self._grow(tokens.shape[1])
        if tokens.shape[1] == 1:
            positions = torch.tensor([self.layout.num_tokens + self.decoded - 1])
        else:
            positions = torch.from_numpy(self.layout.positions(self.peers.rank))
            positions = positions[positions >= self.layout.start]
            kwargs[name] = tokens[:, (positions - self.layout.start).to(tokens.device)]
            kwargs |= self._kept(kwargs, positions)
        kwargs["position_ids"] = positions.to(tokens.device).expand(tokens.shape[0], -1)
        kwargs["attention_mask"] = torch.zeros(1, 1, 1, 3, dtype=torch.int64)  # transformers passes on what has 4 dims
        return (), kwargs

    def _check(self, kwargs: dict) -> None:
        """Raise ValueError for arguments that mean another thing on a part of the prompt."""
        mask = kwargs.get("attention_mask")
        if mask is not None and not (mask.ndim == 2 and bool(mask.all())):
            raise ValueError("attention_mask: prompts that several ranks share have no padding; pass none, or ones")
        for name in ("labels", "cu_seq_lens_q", "token_type_ids", "output_hidden_states"):
            given = kwargs.get(name)
            if given is not None and given is not False:
                raise ValueError(f"{name}: a model that shares prompts does not take it; use its logits")

    def _grow(self, num_tokens: int) -> None:
        """Add the tokens of a call to the layout."""
        size, world = LARGEST_BLOCK, self.peers.world_size
        if num_tokens == 1 and self.layout:
            self.decoded += 1
            return
        if num_tokens < 2 * world:
            raise ValueError(
                f"a prompt that {world} ranks share must have at least {2 * world} tokens, got {num_tokens}"
            )
        if self.decoded:
            raise ValueError("a second prompt after decoding: start it with a new cache, which holds all tokens")
        while size > 1 and num_tokens < 2 * world * size:  # every rank needs a token
            size //= 2
        if self.layout:
            self.layout = self.layout.extended(num_tokens, size)
        elif size == LARGEST_BLOCK == self.config.block_size:
            self.layout = Layout.for_config(self.config, num_tokens, world)
        else:
            self.layout = Layout.zigzag(num_tokens, world, size)

    def _kept(self, kwargs: dict, positions: Tensor) -> dict:
        """logits_to_keep as the places of these tokens among the rank's own."""
        keep = kwargs.get("logits_to_keep", 0)
        if not isinstance(keep, int):
            raise ValueError(f"logits_to_keep must be an int where ranks share a prompt, got {keep!r}")
        self.first_kept = max(self.layout.start, self.layout.num_tokens - keep) if keep else self.layout.start
        return {"logits_to_keep": torch.nonzero(positions >= self.first_kept)[:, 0]} if keep else {}

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output):
        cache = getattr(output, "past_key_values", None)
        if cache is not None:
            cache.stem_state = self.layout, self.decoded
        if not self.decoded:
            for name in RESULTS:
                if getattr(output, name, None) is not None:
                    output[name] = self._whole(output[name].detach(), name == "logits")
        return output

    def _whole(self, x: Tensor, is_kept: bool) -> Tensor:
        """Rows [B, n, ...] of all ranks in the prompt's order: of all queries, or of those of logits_to_keep."""
        first = self.first_kept if is_kept else self.layout.start
        parts = [self.layout.positions(rank) for rank in range(self.peers.world_size)]
        parts = [part[part >= first] - first for part in parts]
        slots, width = slots_of(parts)
        slots = torch.from_numpy(slots).to(x.device)
        return self.peers.collect(x.movedim(1, 0), width, slots, "the exchange of logits")().movedim(0, 1)

    def attend(
        self, layer: Layer, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of a layer, [B, Nq, Hq, value dim]; see stem.hf.forward."""
        value_dim, own = v.shape[3], len(self.layout.positions(self.peers.rank))
        v = pad(v, (0, q.shape[3] - value_dim)) if value_dim < q.shape[3] else v
        if self.decoded:
            ends_here = self.layout.owners[-1] == self.peers.rank
            keys = slice(0, own + self.decoded if ends_here else own)
            out = self._decode(q, k[:, :, keys], v[:, :, keys], scale, sinks)
        else:
            options = dict(scale=scale, sinks=sinks, impl=layer.impl, prompt_length=layer.prompt_length)
            if layer.prompt_length is not None:
                options["prompt_length"] = max(layer.prompt_length, self.layout.num_tokens)
            config = DENSE if layer.config is None else layer.config
            tensors = q, k[:, :, :own], v[:, :, :own]
            shared = dict(mesh=self.mesh, layout=self.layout, return_selection=True)
            out, selection = stem_attention(*tensors, config, **shared, **options)
            if layer.config is not None:
                first, blocks = (x // config.block_size for x in (self.layout.start, self.layout.num_tokens - 1))
                causal = (blocks + 1 - first) * (first + blocks + 2) // 2
                layer.add(selection.head_kept.to(q.device), q.shape[0] * causal)
        return out[..., :value_dim].transpose(1, 2).contiguous()

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor | None) -> Tensor:
        """Dense attention of one query to the keys of all ranks."""
        out, lse = masked_attention(q, k, v, q.new_ones(1, 1, dtype=torch.bool), scale, return_lse=True)
        parts = self.peers.gather(torch.cat([out.to(lse.dtype), lse[..., None]], -1), "the exchange while decoding")()
        weights = parts[..., -1:].softmax(0)
        out, lse = (weights * parts[..., :-1]).sum(0).to(q.dtype), parts[..., -1].logsumexp(0)
        return apply_sinks(out, lse, sinks)[0]
