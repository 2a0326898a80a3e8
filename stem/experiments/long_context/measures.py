"""Measures of one attention on one model: right answers, losses, generated answers, kept blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from stem import hf, pretrained
from stem.budget import block_budget
from stem.config import StemConfig
from stem.experiments.long_context.samples import Prompts
from stem.experiments.losses import check_output_embedding, token_losses
from stem.metrics import block_attention_mass
from stem.scores import block_scores
from stem.selection import select_blocks

NUMBERS_PER_BATCH = {"cuda": 240_000_000, "cpu": 5_000_000}  # hidden states of one layer
LOGITS_AT_ONCE = {"cuda": 8_192, "cpu": 512}  # positions
RESAMPLES = 20_000  # draws of a bootstrap; with 2,000, ends of intervals near zero change their sign with the seed


def load(name: str) -> tuple:
    """Model of a name for `stem.pretrained.load`, in bfloat16 on a GPU, its tokenizer, and its name in rows."""
    model, tokenizer = pretrained.load(name, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    check_output_embedding(model)
    return model, tokenizer, Path(model.name_or_path).name


@torch.no_grad()
def answer_scores(model, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Teacher-forced scores of the right answers, each in one forward of prompt and answer.

    Returns:
        Log-likelihood of each answer, fp32 [samples] [nats], and bool [samples], True where every token of the answer
        is the likeliest.
    """
    logp, right = [], []
    for logits, targets, asked in _answer_logits(model, prompts):
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        logp.append(-(losses * asked).sum(-1).cpu())
        right.append(((logits.argmax(-1) == targets) | ~asked).all(-1).cpu())
    return torch.cat(logp), torch.cat(right)


@torch.no_grad()
def answer_distributions(model, prompts: Prompts) -> list[Tensor]:
    """Log-probabilities of every token at the places of each answer: fp32 [answer tokens, vocabulary], on the CPU."""
    batches = ((logits.log_softmax(-1).cpu(), asked.cpu()) for logits, _, asked in _answer_logits(model, prompts))
    return [logp[of] for logits, asked in batches for logp, of in zip(logits, asked, strict=True)]


def divergence(expected: list[Tensor], found: list[Tensor]) -> float:
    """Kullback-Leibler divergence of `found` from `expected`, summed over an answer, mean over the answers [nats]."""
    each = [F.kl_div(b, a, log_target=True, reduction="sum") for a, b in zip(expected, found, strict=True)]
    return float(torch.stack(each).mean())


@torch.no_grad()
def document_losses(model, ids: Tensor) -> Tensor:
    """Loss of every next token of documents int64 [n, N], each in one prefill: fp32 [n, N - 1] on the CPU [nats]."""
    batches = (batch for (batch,) in _batches(model, ids))
    return torch.cat([token_losses(model, x, x[:, 1:], LOGITS_AT_ONCE[x.device.type]).cpu() for x in batches])


@torch.no_grad()
def generated_scores(model, tokenizer, prompts: Prompts) -> Tensor:
    """Share of the right answers in greedy text after a sparse prefill and dense decoding: fp32 [samples], 0..1.

    Raises:
        ValueError: If the answers differ in length, because the prompts then differ in length.
    """
    count = int(prompts.answer_tokens[0])
    if (prompts.answer_tokens != count).any():
        raise ValueError(f"answers of {prompts.task} must have one length, got {prompts.answer_tokens.tolist()} tokens")
    texts, options = [], dict(do_sample=False, max_new_tokens=count + 4, pad_token_id=tokenizer.eos_token_id)
    for (ids,) in _batches(model, prompts.ids[:, :-count]):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :])
    hits = [np.mean([answer in text for answer in of]) for text, of in zip(texts, prompts.answers, strict=True)]
    return torch.tensor(hits, dtype=torch.float32)


def interval(differences: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of paired differences [n]."""
    values = differences.double().numpy()
    chosen = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[chosen].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


class InChunks:
    """A model that reads its prompts in chunks of some tokens through a cache, for `answer_scores` and the losses."""

    def __init__(self, model, tokens: int) -> None:
        self.model, self.tokens = model, tokens

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def get_decoder(self):
        return self._read

    def _read(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        cache, decoder = DynamicCache(config=self.model.config), self.model.get_decoder()
        parts = [decoder(part, past_key_values=cache, use_cache=True) for part in ids.split(self.tokens, 1)]
        return SimpleNamespace(last_hidden_state=torch.cat([part.last_hidden_state for part in parts], 1))


class LastRow(NamedTuple):
    """Choice of the last query block of a prompt among the key blocks: tensors [layers, Hq, nk]."""

    mass: Tensor  # fp32, true attention probability on each key block, given the outputs of the layers below
    rank: Tensor  # int64, place of the block in Stem's score, 0 = best
    kept: Tensor  # bool, True = Stem kept the block


@torch.no_grad()
def last_row(model, ids: Tensor, config: StemConfig) -> LastRow:
    """Attention mass, rank and choice of every key block for the last query block of int64 [1, N], on the CPU."""
    found = []

    def select(q: Tensor, k: Tensor, v: Tensor):
        scores = block_scores(q, k, v, config)
        budget = block_budget(scores.shape[-1], config)
        selection = select_blocks(scores, budget, config, q_len=q.shape[2], kv_len=k.shape[2])
        row = q[:, :, (selection.num_q_blocks - 1) * config.block_size :]
        mass = block_attention_mass(row, k, config.block_size)[0, :, -1]
        rank = scores[0, :, -1].argsort(descending=True).argsort()
        found.append([of.cpu() for of in (mass.float(), rank, selection.to_mask()[0, :, -1])])
        return selection

    with hf.stem_prefill(model, select):
        model(ids, use_cache=False, logits_to_keep=1)
    return LastRow(*(torch.stack(of) for of in zip(*found, strict=True)))


def _answer_logits(model, prompts: Prompts) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits fp32 [batch, longest answer, vocabulary], tokens, and bool, True at the places of an answer."""
    head, longest = model.get_output_embeddings(), int(prompts.answer_tokens.max())
    for ids, counts in _batches(model, prompts.ids, prompts.answer_tokens):
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state[:, -longest - 1 : -1]
        asked = torch.arange(longest, device=ids.device) >= longest - counts[:, None]  # answers end together
        yield head(hidden).float(), ids[:, -longest:], asked


def _batches(model, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching rows of the tensors in batches of about one size, on the model's device; the first is [n, tokens]."""
    device = next(model.parameters()).device
    tokens = NUMBERS_PER_BATCH[device.type] // model.config.get_text_config().hidden_size
    most = max(1, tokens // tensors[0].shape[1])
    size = math.ceil(len(tensors[0]) / math.ceil(len(tensors[0]) / most))
    for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        yield tuple(part.to(device) for part in parts)
