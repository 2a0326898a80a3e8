"""SmolLM2 trained from 8K to 32K tokens, and methods compared there: writes results/long_context/extension/.

The extension takes a larger RoPE base and a few hundred steps, with dense attention. It saves the model as a plain
Hugging Face folder in `$STEM_CACHE`. A comparison at 16K and 32K tokens follows, which the original model cannot read.

The loss of a training sequence (see mixture.py) is the mean over its answers plus the mean over a sample of its other
tokens. The model learns to look things up far away, and does not forget to read.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stem import pretrained
from stem.experiments import documents, records
from stem.experiments.long_context import comparison, measures
from stem.experiments.long_context.comparison import DOCUMENTS, Study
from stem.experiments.long_context.mixture import Mixture, Sequences, training_text
from stem.experiments.training.train import learning_rate
from stem.validation import check_number

SMOKE = dict(stages=((512, 2, 1), (1024, 2, 1)), warmup=1, text_tokens=256)
TASKS = ("niah_multikey_1", "niah_multiquery", DOCUMENTS)
STUDIES = {
    "smoke": Study((1024,), ("niah_multikey_1",), ("stem",), (0.5,), (32,), samples=1),
    "full": Study(
        (16384, 32768), TASKS,
        ("stem", "uniform_topk", "adaptive", "xattention", "flashprefill", "vertical_slash", "flexprefill"),
        presets=True,
    ),
}  # fmt: skip
FAST_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]  # fmt: skip
LOSSES = ("answer_loss", "text_loss")


@dataclass(frozen=True)
class ExtensionConfig:
    """Recipe of the extension (our choice; published extensions to 32K take RoPE bases of millions).

    Raises:
        ValueError: If a stage is too short or empty, or a number is not positive.
    """

    model: str = "smollm2"  # a name for `stem.pretrained.load`
    rope_theta: float = 6e5  # new RoPE base; SmolLM2 has 1e5 for 8K, and a smaller base leaves less to relearn
    # (sequence length [tokens], steps, sequences in a step), in order; the last length is the new context
    stages: tuple[tuple[int, int, int], ...] = ((8192, 12, 4), (16384, 20, 2), (32768, 30, 1))
    lr: float = 4e-4  # peak learning rate of AdamW
    warmup: int = 10  # steps of linear warm-up; half a cosine to a tenth of the peak follows
    text_tokens: int = 4096  # positions of each sequence, drawn at random, whose loss on the text counts [tokens]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.stages or any(length < 256 or min(rest) < 1 for length, *rest in self.stages):
            raise ValueError(f"stages must hold (length >= 256, steps >= 1, sequences >= 1), got {self.stages!r}")
        for name in ("rope_theta", "lr", "text_tokens"):
            check_number(name, getattr(self, name), 0, math.inf, open_below=True)

    @property
    def steps(self) -> int:
        return sum(steps for _, steps, _ in self.stages)

    @property
    def length(self) -> int:
        """New context length [tokens]."""
        return self.stages[-1][0]


def load_with_base(config: ExtensionConfig):
    """The model of a recipe with the new RoPE base and length and fp32 weights, and its tokenizer."""
    model, tokenizer = pretrained.load(config.model, "cpu")
    settings = model.config
    settings.rope_parameters = {**settings.rope_parameters, "rope_theta": float(config.rope_theta)}
    settings.max_position_embeddings = max(config.length, settings.max_position_embeddings)
    rebuilt = type(model)._from_config(settings, attn_implementation="sdpa", dtype=torch.float32)
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def losses(model, batch: Sequences, text_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean loss over the answers, and over `text_tokens` other positions per sequence, drawn at random [nats]."""
    ids = batch.ids.to(model.device)
    hidden = model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
    asked, targets = batch.answers[:, 1:].flatten(), ids[:, 1:].flatten()
    others = (~asked).nonzero()[:, 0]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: text_tokens * len(ids)]
    head = model.get_output_embeddings()
    groups = (asked.nonzero()[:, 0].to(ids.device), others[drawn].to(ids.device))
    return tuple(F.cross_entropy(head(hidden[places]).float(), targets[places]) for places in groups)


def extend(config: ExtensionConfig, text: str, show: Callable = print) -> tuple[torch.nn.Module, object, list[dict]]:
    """Train a model for a longer context, on CUDA where there is a GPU.

    Returns:
        (model in eval mode with fp32 weights, tokenizer, log: dicts of step, length [tokens], and `LOSSES` [nats]).
    """
    torch.manual_seed(config.seed)
    model, tokenizer = load_with_base(config)
    mixture = Mixture(tokenizer, text, config.seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), config.lr, (0.9, 0.95), weight_decay=0.0, fused=True)
    log, started = [], time.monotonic()
    steps = [(length, count) for length, steps, count in config.stages for _ in range(steps)]
    for step, (length, count) in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        batch = mixture.batch(step, length, count)
        with torch.autocast(model.device.type, torch.bfloat16), sdpa_kernel(FAST_BACKENDS, set_priority=True):
            answer_loss, text_loss = losses(model, batch, config.text_tokens, step)
        (answer_loss + text_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.append(dict(step=step, length=length, answer_loss=answer_loss.detach(), text_loss=text_loss.detach()))
        if step % 10 == 9 or step + 1 == len(steps):
            answer, other = (fmean(row[name] for row in log[-10:]) for name in LOSSES)
            told = f"step {step + 1}/{len(steps)}, {length} tokens, {time.monotonic() - started:.0f} s"
            show(f"{told}: answers {answer:.3f}, text {other:.3f} nats")
    log = [{name: float(value) if isinstance(value, Tensor) else value for name, value in row.items()} for row in log]
    return model.eval(), tokenizer, log


def save(model, tokenizer, folder: str | Path) -> Path:
    """Write a model for `stem.pretrained.load(folder)`; a complete new folder replaces an older one."""
    folder = Path(folder).expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f"{folder.name}.", ignore_cleanup_errors=True
    ) as scratch:
        model.save_pretrained(Path(scratch) / "new")
        tokenizer.save_pretrained(Path(scratch) / "new")
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(Path(scratch) / "new", folder)
    return folder


def curve_rows(config: ExtensionConfig, log: Sequence[dict], num_bins: int = 40) -> list[dict]:
    """Rows of a training log: means of both losses over bins of steps, start..stop - 1."""
    edges = sorted({round(len(log) * i / num_bins) for i in range(num_bins + 1)})
    rows = []
    for start, stop in pairwise(edges):
        for name in LOSSES:
            value = fmean(row[name] for row in log[start:stop])
            about = dict(method="dense", measure=name, task="training", length=log[start]["length"], seed=config.seed)
            rows.append(dict(**about, start=start, stop=stop, value=float(f"{value:.5g}"), count=stop - start))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="folder of the model (default: $STEM_CACHE/smollm2-32k)")
    parser.add_argument("--evaluate-only", action="store_true", help="do not train; compare with the model in --out")
    comparison.add_arguments(parser)


def main(options: argparse.Namespace) -> None:
    """Train, save, compare methods, and write results/long_context/extension/."""
    full = options.profile == "full"
    config = ExtensionConfig(seed=options.seed) if full else ExtensionConfig(**SMOKE, seed=options.seed)
    config = replace(config, model=options.model)
    name = f"{Path(config.model).name}-{config.length // 1024}k{'' if full else '-smoke'}"
    out = Path(options.out or pretrained.cache_folder() / name)
    show, rows = partial(print, flush=True), []
    if not options.evaluate_only:
        text = training_text() if full else "\n".join(documents.stdlib_documents(None, 20_000).values())[:2_000_000]
        model, tokenizer, log = extend(config, text, show)
        show("saved", save(model, tokenizer, out))
        rows = curve_rows(config, log)
        del model
        torch.cuda.empty_cache()
    study = comparison.with_options(STUDIES[options.profile], options)
    before = replace(study, names=("dense",), tasks=study.tasks[:1], samples=min(4, study.samples), presets=False)
    for of, model in ((before, config.model), (study, str(out))):

        def write(found: list[dict], before: tuple[dict, ...] = tuple(rows)) -> None:
            show("wrote", records.write_rows("long_context/extension", [*before, *found], options.profile))

        told = dict(limit_s=options.limit, show=show, save=write)
        rows += comparison.run(of, *measures.load(model), options.seed, **told)
