"""Adapt a pretrained model to sparse attention: a few hundred steps of next-token training with Stem on.

Fine-tuning on source code lowers every loss on source code. The control is therefore the same fine-tuning with dense
attention. The cost of Stem after adaptation is the loss of the Stem-tuned model read with Stem, minus the loss of the
dense-tuned model read dense. Training text and held-out text are different modules of the standard library.
"""

import contextlib
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stem import hf, pretrained
from stem.config import StemConfig
from stem.experiments.documents import LONG_MODULES, stdlib_documents
from stem.experiments.losses import token_losses
from stem.experiments.training.train import learning_rate

ARMS = ("dense", "stem")  # attention during the fine-tuning
LOGITS_AT_ONCE = 2048  # positions


@dataclass(frozen=True)
class AdaptConfig:
    """Settings of a fine-tuning and of the reading before and after it."""

    stem_config: StemConfig = field(default_factory=lambda: StemConfig(block_size=64, density=0.16))
    steps: int = 200  # optimizer steps of one sequence each
    length: int = 4096  # tokens of a training sequence
    read: int = 8192  # tokens of a held-out document
    bucket: int = 2048  # positions averaged in a row [tokens]
    lr: float = 5e-5  # highest learning rate; see stem.experiments.training.train.learning_rate

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up, a tenth of all."""
        return max(1, self.steps // 10)


def training_tokens(tokenizer) -> Tensor:
    """Tokens of all modules of the standard library except the held-out ones, int64 [M]."""
    texts = [text for name, text in stdlib_documents(None).items() if name not in LONG_MODULES]
    ids = tokenizer(texts, verbose=False).input_ids
    return torch.tensor([token for text in ids for token in text])


def fine_tune(model, tokens: Tensor, config: AdaptConfig, *, sparse: bool, seed: int = 0) -> list[dict]:
    """Train all weights of a model on random windows of `tokens`, with Stem or with the model's own dense attention.

    Args:
        model: Hugging Face causal language model in fp32, changed in place. On CUDA it runs in bfloat16 autocast.
        tokens: int64 [M], M > config.length.
        seed: Seed of the windows, which are the same for both kinds of attention.
    Returns:
        One row for each step: step, loss [nats], grad_norm.
    """
    device, cuda = model.device, model.device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=cuda)
    random = np.random.default_rng(seed)
    rows, start = [], time.perf_counter()
    with hf.stem_prefill(model, config.stem_config) if sparse else contextlib.nullcontext():
        for step in range(config.steps):
            first = int(random.integers(len(tokens) - config.length))
            window = tokens[None, first : first + config.length + 1].to(device)
            with _autocast(device):
                loss = token_losses(model, window[:, :-1], window[:, 1:], LOGITS_AT_ONCE).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rows.append(dict(step=step + 1, loss=loss.item(), grad_norm=norm.item()))
            if (step + 1) % max(1, config.steps // 3) == 0:
                done = f"step {step + 1}/{config.steps}: loss {rows[-1]['loss']:.3f}"
                print(f"adapt_{ARMS[sparse]} seed {seed}: {done}, {time.perf_counter() - start:.0f} s", flush=True)
    return rows


@torch.no_grad()
def held_out_rows(model, tokenizer, config: AdaptConfig) -> list[dict]:
    """Loss of the held-out documents by position, read dense and read with Stem: a row per document and bucket."""
    rows = []
    for name, text in stdlib_documents(LONG_MODULES).items():
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : config.read + 1].to(model.device)
        for inferred in ARMS:
            prefill = hf.stem_prefill(model, config.stem_config) if inferred == "stem" else contextlib.nullcontext()
            with prefill as report, _autocast(model.device):
                losses = token_losses(model, ids[:, :-1], ids[:, 1:], LOGITS_AT_ONCE)[0].cpu()
            about = dict(inferred=inferred, task=f"held_out_{name}", density=report.density() if report else 1.0)
            for start in range(0, config.read, config.bucket):
                place = dict(place="position", start=start, stop=start + config.bucket, count=config.bucket)
                value = losses[start : start + config.bucket].mean().item()
                rows.append(about | place | dict(measure="loss", value=value))
    return rows


def run_arm(config: AdaptConfig, arm: str, seed: int) -> list[dict]:
    """Fine-tune the model with the attention of an arm (one of ARMS) and read the held-out text after it.

    For arm "dense" and seed 0, the held-out text is also read before the fine-tuning.

    Returns:
        Rows like those of stem.experiments.training.probe. Column trained is "pretrained", "adapt_dense" or
        "adapt_stem", inferred is "dense" or "stem". Task "adaptation" holds loss and grad_norm of the training by step,
        task "held_out_<module>" the loss by position.
    """
    model, tokenizer = pretrained.load("smollm2")
    rows, name = [], f"adapt_{arm}"
    if (arm, seed) == ("dense", 0):
        rows += [dict(trained="pretrained") | row for row in held_out_rows(model, tokenizer, config)]
    for row in fine_tune(model, training_tokens(tokenizer), config, sparse=arm == "stem", seed=seed):
        span = dict(inferred=arm, task="adaptation", place="step", start=row["step"], stop=row["step"] + 1, count=1)
        rows += [dict(trained=name, measure=key, value=row[key]) | span for key in ("loss", "grad_norm")]
    rows += [dict(trained=name) | row for row in held_out_rows(model, tokenizer, config)]
    return [dict(seed=seed, seq_len=config.read) | row for row in rows]


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
