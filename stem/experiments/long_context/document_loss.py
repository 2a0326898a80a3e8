"""Loss on long documents by position, every method on the same texts, for notebook 01."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch

from stem import hf, pretrained
from stem.config import StemConfig
from stem.experiments import documents
from stem.experiments.losses import check_output_embedding, token_losses


@torch.no_grad()
def document_loss_rows(
    methods: Mapping[str, StemConfig | hf.Selector | None],
    texts: Mapping[str, str],
    length: int = 4096,
    bucket: int = 1024,
    *,
    model: str | tuple = "smollm2",
) -> list[dict]:
    """Next-token loss by position in the first `length` tokens of long documents, one row per bucket and method.

    Args:
        methods: Name -> attention as `stem.hf.enable` takes it; None is the model's own dense attention.
        texts: Name -> text of more than `length` tokens, see `stem.experiments.documents`.
        length: Tokens predicted in one prefill [tokens].
        bucket: Positions per row [tokens], a divisor of `length`.
        model: A name for `stem.pretrained.load`, or a loaded (model, tokenizer).
    Returns:
        Rows with method, document, start (first position of the bucket), bucket, length, loss (mean negative
        log-likelihood [nats per token]), density, text (fingerprint), model.
    Raises:
        ValueError: If a text is too short, `bucket` does not divide `length`, or the model caps its logits.
    """
    if bucket < 1 or length % bucket:
        raise ValueError(f"bucket must divide length={length}, got {bucket}")
    name, network, tokenizer = _loaded(model)
    check_output_embedding(network)
    rows = []
    for document, text in texts.items():
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : length + 1].to(network.device)
        if ids.shape[1] <= length:
            raise ValueError(f"texts[{document!r}] has {ids.shape[1]} tokens, more than length={length} are needed")
        for method, config in methods.items():
            with contextlib.nullcontext() if config is None else hf.stem_prefill(network, config) as report:
                losses = token_losses(network, ids[:, :-1], ids[:, 1:])[0].cpu()
            for start in range(0, length, bucket):
                rows.append(
                    {
                        "method": method,
                        "document": document,
                        "start": start,
                        "bucket": bucket,
                        "length": length,
                        "loss": losses[start : start + bucket].mean().item(),
                        "density": 1.0 if report is None else report.density(),
                        "text": documents.fingerprint(text),
                        "model": name,
                    }
                )
    return rows


def _loaded(model: str | tuple) -> tuple:
    """(name, model, tokenizer) of a model given by name or as a loaded pair."""
    network, tokenizer = pretrained.load(model) if isinstance(model, str) else model
    name = model if isinstance(model, str) else network.name_or_path
    return (Path(name).name if Path(name).is_dir() else name), network, tokenizer
