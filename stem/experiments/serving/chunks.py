"""A prompt in chunks, as a server computes it: where chunks may end, and what an answer loses by other ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stem.config import StemConfig
from stem.hf import stem_prefill


def aligned_ends(tokens: int, budget: int, page: int) -> list[int]:
    """Ends of a prompt's chunks [tokens]: each holds at most `budget` tokens and ends at a page, the last anywhere.

    Raises ValueError if no page fits into the budget.
    """
    if budget < page:
        raise ValueError(f"budget must be at least a page of {page} tokens, got {budget}")
    return [*range(budget // page * page, tokens, budget // page * page), tokens]


@torch.no_grad()
def next_token(
    network: nn.Module, ids: Tensor, config: StemConfig | None, ends: Sequence[int], prompt_length: int | None
) -> Tensor:
    """Log-probabilities of the token after a prompt, fp32 [vocabulary], computed chunk by chunk over a cache.

    Args:
        ids: int [1, N], the prompt.
        config: None is dense.
        ends: Ends of the chunks, ascending, the last is N [tokens].
        prompt_length: See stem.hf.enable; None lets each chunk be the end of its prompt.
    """
    configs = [config] * network.config.num_hidden_layers
    if config is None:
        out = _chunk_by_chunk(network, ids, ends)
    else:
        with stem_prefill(network, configs, prompt_length=prompt_length):
            out = _chunk_by_chunk(network, ids, ends)
    return out.logits[0, -1].float().log_softmax(-1)


def _chunk_by_chunk(network: nn.Module, ids: Tensor, ends: Sequence[int]):
    cache = None
    for start, end in zip((0, *ends), ends, strict=False):
        out = network(ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
    return out


def differences(network: nn.Module, ids: Tensor, config: StemConfig, budget: int) -> dict[str, float]:
    """Largest difference of a log-probability of the next token from the whole prompt's, for ways to cut the prompt.

    `budget` is the length of a chunk [tokens]; it must not be a multiple of the block size.
    """
    tokens, size = ids.shape[1], config.block_size
    whole = next_token(network, ids, config, [tokens], None)
    aligned, cut = aligned_ends(tokens, budget, size), [*range(budget, tokens, budget), tokens]
    ways = {
        "chunks end between blocks": (config, aligned, tokens),
        "chunks end inside blocks": (config, cut, tokens),
        "the prompt's length is unknown": (config, aligned, None),
        "dense attention": (None, [tokens], None),
    }
    return {name: (next_token(network, ids, *way) - whole).abs().max().item() for name, way in ways.items()}
