"""Adapt a pretrained model to sparse attention: a few hundred steps of next-token training with Stem on.

The control is the same training with dense attention: fine-tuning on text of the same kind lowers every loss, so what
Stem costs after adaptation is the loss of the Stem-tuned model read sparse over that of the dense-tuned one read dense.
Training text and held-out text are different modules of the standard library.
"""

import contextlib
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stem import hf, pretrained
from stem.config import StemConfig
from stem.experiments.documents import LONG_MODULES, stdlib_documents
from stem.experiments.training.config import TrainConfig
from stem.experiments.training.train import learning_rate

ARMS = ("dense", "stem")  # attention during the fine-tuning


@dataclass(frozen=True)
class Plan:
    """How to fine-tune and what to read."""

    config: StemConfig = field(default_factory=lambda: StemConfig(block_size=64, density=0.16))
    steps: int = 200
    """Optimizer steps of one sequence each."""
    length: int = 4096
    """Tokens of a training sequence."""
    read: int = 8192
    """Tokens of a held-out document."""
    bucket: int = 2048
    """Positions averaged in a row [tokens]."""
    lr: float = 5e-5
    """Highest learning rate; warm-up over a tenth of the steps, cosine to a tenth."""
    model: str = "smollm2"


def training_tokens(tokenizer) -> Tensor:
    """All modules of the standard library but the held-out ones, int64 [M]."""
    texts = [text for name, text in stdlib_documents(None).items() if name not in LONG_MODULES]
    ids = tokenizer(texts, verbose=False).input_ids
    return torch.tensor([token for text in ids for token in text])


def token_losses(model, ids: Tensor, chunk: int = 2048) -> Tensor:
    """Loss of every next token of one sequence, fp32 [N] from int64 [1, N + 1]; logits live a chunk at a time."""
    head = model.get_output_embeddings()
    hidden = model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state[0]  # [N, width]

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    pairs = zip(hidden.split(chunk), ids[0, 1:].split(chunk), strict=True)
    return torch.cat([checkpoint(loss, *pair, use_reentrant=False) for pair in pairs])


def fine_tune(model, tokens: Tensor, plan: Plan, *, sparse: bool, seed: int = 0, impl: str | None = None, say=print):
    """Train all weights of a model on random windows of `tokens`, with Stem or with its own dense attention.

    Args:
        model: Hugging Face causal language model in fp32, changed in place; bfloat16 autocast on CUDA.
        tokens: int64 [M], M > plan.length.
        plan: Steps, length, learning rate and Stem's config.
        sparse: Train with Stem on.
        seed: Of the windows; the same windows for both kinds of attention.
        impl: See stem.hf.enable.
        say: Takes progress lines.
    Returns:
        Rows, one a step: step, loss [nats], grad_norm.
    """
    device = model.device
    schedule = TrainConfig(steps=plan.steps, warmup=max(1, plan.steps // 10), lr=plan.lr)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    random = np.random.default_rng(seed)
    rows, start = [], time.perf_counter()
    if sparse:
        hf.enable(model, plan.config, impl)
    for step in range(plan.steps):
        first = int(random.integers(len(tokens) - plan.length))
        window = tokens[None, first : first + plan.length + 1].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = token_losses(model, window).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append(dict(step=step + 1, loss=loss.item(), grad_norm=norm.item()))
        if (step + 1) % max(1, plan.steps // 3) == 0:
            say(f"step {step + 1}/{plan.steps}: loss {rows[-1]['loss']:.3f}, {time.perf_counter() - start:.0f} s")
    if sparse:
        hf.disable(model)
    return rows


@torch.no_grad()
def held_out_rows(model, tokenizer, plan: Plan) -> list[dict]:
    """Loss of the held-out documents by position, read dense and read with Stem: a row per document and bucket."""
    rows = []
    for name, text in stdlib_documents(LONG_MODULES).items():
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : plan.read + 1].to(model.device)
        for inferred in ARMS:
            prefill = hf.stem_prefill(model, plan.config) if inferred == "stem" else contextlib.nullcontext()
            with (
                prefill as report,
                torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"),
            ):
                losses = token_losses(model, ids).cpu()
            for start in range(0, plan.read, plan.bucket):
                place = dict(place="position", start=start, stop=start + plan.bucket, count=plan.bucket)
                found = dict(measure="loss", value=losses[start : start + plan.bucket].mean().item())
                density = report.density() if report else 1.0
                rows.append(dict(inferred=inferred, task=f"held_out_{name}", density=density) | place | found)
    return rows


def run_arm(plan: Plan, arm: str, seed: int, impl: str | None = None, say=print) -> list[dict]:
    """Fine-tune the model with one attention and read the held-out text before (seed 0 of "dense" only) and after.

    Returns:
        Rows as of stem.experiments.training.probe: trained is "pretrained", "adapt_dense" or "adapt_stem", inferred "dense" or "stem"; task
        is "adaptation" (of the training: loss and grad_norm by step) or "held_out_<module>" (loss by position).
    """
    model, tokenizer = pretrained.load(plan.model)
    rows = []
    if (arm, seed) == ("dense", 0):
        rows += [dict(trained="pretrained") | row for row in held_out_rows(model, tokenizer, plan)]
    name = f"adapt_{arm}"
    steps = fine_tune(
        model, training_tokens(tokenizer), plan, sparse=arm == "stem", seed=seed, impl=impl,
        say=lambda line: say(f"{name} seed {seed}: {line}"),
    )  # fmt: skip
    for row in steps:
        span = dict(inferred=arm, task="adaptation", place="step", start=row["step"], stop=row["step"] + 1, count=1)
        rows += [dict(trained=name, measure=key, value=row[key]) | span for key in ("loss", "grad_norm")]
    rows += [dict(trained=name) | row for row in held_out_rows(model, tokenizer, plan)]
    return [dict(seed=seed, seq_len=plan.read) | row for row in rows]
