"""Next-token losses of Hugging Face models, without ever holding the logits of all positions."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_losses(model, ids: Tensor, targets: Tensor, chunk: int = 512) -> Tensor:
    """Cross-entropy of every target, with the logits of one chunk of positions in memory at a time.

    Args:
        model: Hugging Face causal language model that passes `check_output_embedding`.
        ids: int64 [B, N], what the model reads in one forward.
        targets: int64 [B, M] with M <= N; entry t is the token that follows ids[:, : t + 1].
    Returns:
        fp32 [B, M] on the model's device [nats]. The backward pass recomputes each chunk's logits.
    """
    head = model.get_output_embeddings()
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[:, : targets.shape[1]]

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    chunks = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    return torch.cat([checkpoint(loss, *pair, use_reentrant=False) for pair in chunks]).view_as(targets)


@torch.no_grad()
def check_output_embedding(model) -> None:
    """Raise ValueError if a model changes its logits after the output embedding (soft-capping, scaling)."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    if not torch.allclose(logits, model(ids, use_cache=False).logits, rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"model must be one whose logits are its output embedding of the last hidden state, "
            f"got {type(model).__name__}, which soft-caps or scales them"
        )
