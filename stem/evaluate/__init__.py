"""Evaluation on real models: lm-eval with Stem as a model, RULER rows, and long-document loss.

`python -m stem.evaluate ...` is lm-eval's own command line with one more model name, `stem`. `ruler_rows` and
`document_loss_rows` give one row per sample and method, all methods on the same samples, for notebooks.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from lm_eval.models.huggingface import HFLM

from stem import hf, patterns, pretrained
from stem.config import StemConfig
from stem.evaluate.harness import resolved  # this import also registers the model name
from stem.evaluate.local_data import local_data
from stem.experiments import documents
from stem.experiments.long_context import ruler

MEASURES = ("generated", "teacher_forced")


def window_control(block_size: int = 64, local_blocks: int = 2) -> StemConfig:
    """A method that must fail: one sink block and a short window, whatever the scores say (our choice).

    Its budget is spent on forced blocks alone, so a measure on which it does as well as dense attention cannot see
    a broken prefill.
    """
    return StemConfig(
        block_size=block_size, k_start=1 + local_blocks, decay=1.0, sink_blocks=1, local_blocks=local_blocks
    )


def ruler_rows(
    methods: Mapping[str, StemConfig | hf.Selector | None],
    tasks: Sequence[str] = ("niah_single_1", "niah_single_2"),
    lengths: Sequence[int] = (1024, 2048),
    samples: int = 4,
    seed: int = 0,
    *,
    model: str | tuple = "smollm2",
    measures: Sequence[str] = MEASURES,
    max_new_tokens: int = 24,
) -> list[dict]:
    """RULER through lm-eval for several attention methods on the same samples, one row per sample.

    Args:
        methods: Name -> what `stem.hf.enable` takes; None is the model's own dense attention.
        tasks: Names of `stem.experiments.long_context.ruler.TASKS` (teacher-forced: of `stem.experiments.long_context.ruler.ONE_ANSWER`).
        lengths: Longest prompt plus answer of each group of samples [tokens].
        samples, seed: Samples per task and length, and where they come from; see `stem.experiments.long_context.ruler.build_samples`.
        model: A name for `stem.pretrained.load`, or a loaded (model, tokenizer).
        measures: "generated" (greedy answer, dense decode) and "teacher_forced" (answer in one sparse forward).
        max_new_tokens: Longest generated answer [tokens].
    Returns:
        Rows with method, task, length, tokens (real prompt length), sample, measure, score (0..1: the answer is in the
        text, or every answer token is the likeliest), logp (of the answer [nats], teacher-forced only), response,
        density (realised, mean over layers of this method, task and length), prompt (hash), model, seed.
    Raises:
        ValueError: On an unknown measure, task or a length that does not fit.
    """
    if unknown := [measure for measure in measures if measure not in MEASURES]:
        raise ValueError(f"measures={unknown}: expected names out of {MEASURES}")
    name, network, tokenizer = _loaded(model)
    with ruler.quiet():
        lm = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=1, max_length=max(lengths) + max_new_tokens + 64)
    rows = []
    for measure in measures:
        for task in tasks:
            for length in lengths:
                forced = measure == "teacher_forced"
                loaded = ruler.load_tasks([task], tokenizer, [length], samples, seed, teacher_forced=forced)
                if not forced:
                    loaded["tasks"][task].set_config("generation_kwargs", {"max_gen_toks": max_new_tokens}, update=True)
                for method, config in methods.items():
                    scored, density = _scored(lm, loaded, config)
                    for sample in scored[task]:
                        rows.append(
                            {
                                "method": method,
                                "task": task,
                                "length": length,
                                "tokens": len(tokenizer(sample["arguments"][0][0]).input_ids),
                                "sample": sample["doc_id"],
                                "measure": measure,
                                "score": sample[str(length)],
                                "logp": sample.get("logp", float("nan")),
                                "response": None if forced else sample["resps"][0][0],
                                "density": density,
                                "prompt": sample["prompt_hash"][:12],
                                "model": name,
                                "seed": seed,
                            }
                        )
    return rows


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
        methods: As in `ruler_rows`.
        texts: Name -> text of more than `length` tokens, see `stem.experiments.documents`.
        length: Tokens predicted in one forward, all of it prefill [tokens].
        bucket: Positions per row [tokens], a divisor of `length`.
        model: As in `ruler_rows`.
    Returns:
        Rows with method, document, start (first position of the bucket), bucket, length, loss (mean negative
        log-likelihood [nats per token]), density, text (fingerprint), model.
    Raises:
        ValueError: If a text is too short, or `bucket` does not divide `length`.
    """
    if bucket < 1 or length % bucket:
        raise ValueError(f"bucket must divide length={length}, got {bucket}")
    name, network, tokenizer = _loaded(model)
    rows = []
    for document, text in texts.items():
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : length + 1].to(network.device)
        if ids.shape[1] <= length:
            raise ValueError(f"texts[{document!r}] has {ids.shape[1]} tokens, more than length={length} are needed")
        for method, config in methods.items():
            with _prefill(network, config) as report:
                losses = token_losses(network, ids)
            for start in range(0, length, bucket):
                rows.append(
                    {
                        "method": method,
                        "document": document,
                        "start": start,
                        "bucket": bucket,
                        "length": length,
                        "loss": losses[start : start + bucket].mean().item(),
                        "density": _density(report),
                        "text": documents.fingerprint(text),
                        "model": name,
                    }
                )
    return rows


@torch.no_grad()
def token_losses(model, ids: torch.Tensor, chunk: int = 512) -> torch.Tensor:
    """Loss of every next token of one sequence, without ever holding all logits.

    Args:
        model: Hugging Face causal language model whose logits are its output embedding of the last hidden state.
        ids: int64 [1, N+1] tokens.
        chunk: Positions per block of logits [tokens].
    Returns:
        fp32 [N] on the CPU, entry t = -log p(ids[t+1] | ids[:t+1]) [nats].
    Raises:
        ValueError: If the model changes its logits after the output embedding (soft-capping, scaling).
    """
    head = model.get_output_embeddings()
    probe = ids[:, :8]
    hidden = model.get_decoder()(probe, use_cache=False).last_hidden_state
    if not torch.allclose(head(hidden), model(probe, use_cache=False).logits, rtol=1e-2, atol=1e-2):
        raise ValueError(f"model={type(model).__name__} changes its logits after the output embedding; not supported")
    hidden = model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state[0]  # [N, hidden size]
    parts = zip(hidden.split(chunk), ids[0, 1:].split(chunk), strict=True)
    return torch.cat([F.cross_entropy(head(h).float(), target, reduction="none").cpu() for h, target in parts])


@torch.no_grad()
def last_row_keeps(model, ids: torch.Tensor, config: StemConfig, pattern: str = "stem") -> torch.Tensor:
    """Which key blocks the last query block of a prompt keeps, in every layer and head of a sparse prefill.

    Args:
        model: Hugging Face causal language model.
        ids: int64 [1, N] tokens.
        config, pattern: As in `stem.patterns.select`.
    Returns:
        bool [layers, Hq, nk] on the CPU, True = kept.
    """
    kept = []

    def select(q, k, v):
        selection = patterns.select(pattern, q, k, v, config)
        kept.append(selection.to_mask()[0, :, -1].cpu())
        return selection

    with hf.stem_prefill(model, select):
        model(ids, use_cache=False, logits_to_keep=1)
    return torch.stack(kept)


def paired_differences(
    rows: Iterable[Mapping] | pd.DataFrame,
    value: str,
    by: Sequence[str],
    pair: Sequence[str],
    *,
    baseline: str = "dense",
    resamples: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean difference of each method to `baseline` on the same samples, with a bootstrap interval over samples.

    Args:
        rows: Rows with the columns method, `value`, `by` and `pair`.
        value: Column to compare, for example "logp".
        by: Columns of one result besides method, for example ["task", "length"].
        pair: Columns that name a sample within a group, for example ["sample"].
        baseline: Method that the others are compared to.
        resamples, seed: Bootstrap draws and their seed.
    Returns:
        Columns method, *by, difference (mean), low, high (95% percentile interval), samples.
    Raises:
        ValueError: If a method and the baseline do not have the same samples.
    """
    frame = pd.DataFrame(rows)
    keys = [*by, *pair]
    wide = frame.pivot(index=keys, columns="method", values=value)
    if baseline not in wide:
        raise ValueError(f"baseline must be one of the methods {sorted(wide)}, got {baseline!r}")
    if wide.isna().any(axis=None):
        raise ValueError(f"{value} must be there for every method and every {keys}; it is missing in some")
    generator = np.random.default_rng(seed)
    results = []
    for method in dict.fromkeys(frame["method"]):
        if method == baseline:
            continue
        difference = wide[method] - wide[baseline]
        for group, values in difference.groupby(level=list(by), sort=False) if by else [((), difference)]:
            draws = generator.choice(values.to_numpy(), (resamples, len(values))).mean(axis=1)
            low, high = np.quantile(draws, [0.025, 0.975])
            group = dict(zip(by, group, strict=True))
            results.append(
                {
                    "method": method,
                    **group,
                    "difference": values.mean(),
                    "low": low,
                    "high": high,
                    "samples": len(values),
                }
            )
    return pd.DataFrame(results)


def main() -> None:
    """lm-eval's command line, in which the model `stem` exists and the name smollm2 means the embedded model.

    One option more: `--data_dir`, a folder with files that tasks would download, see `stem.evaluate.local_data`.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging, simple_parse_args_string

    setup_logging()
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--data_dir")
    own, sys.argv[1:] = ours.parse_known_args()
    command_line = HarnessCLI()
    arguments = command_line.parse_args()
    if arguments.command == "run":
        ruler.provide_sentence_splitter()
        file = EvaluatorConfig.load_yaml_config(arguments.config) if arguments.config else {}
        for option in ("model_args", "metadata"):
            given = getattr(arguments, option) or file.get(option) or {}
            given = simple_parse_args_string(given) if isinstance(given, str) else given
            names = {key: resolved(given[key]) for key in ("pretrained", "tokenizer") if key in given}
            setattr(arguments, option, {**given, **names})
    with local_data(own.data_dir):
        command_line.execute(arguments)


def _loaded(model: str | tuple) -> tuple:
    """(name, model, tokenizer) from a name or a loaded pair."""
    network, tokenizer = pretrained.load(model) if isinstance(model, str) else model
    name = model if isinstance(model, str) else network.name_or_path
    return (Path(name).name if Path(name).is_dir() else name), network, tokenizer


def _prefill(network, config):
    return contextlib.nullcontext() if config is None else hf.stem_prefill(network, config)


def _scored(lm: HFLM, tasks: dict, config) -> tuple[dict, float]:
    """lm-eval's samples by task under one attention method, and the density that was computed."""
    import lm_eval

    with ruler.quiet(), _prefill(lm.model, config) as report:
        samples = lm_eval.evaluate(lm, tasks, bootstrap_iters=0)["samples"]
    return samples, _density(report)


def _density(report) -> float:
    return 1.0 if report is None else report.density()
