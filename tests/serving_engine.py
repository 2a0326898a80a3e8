"""Answers of vLLM's CPU engine and of stem.hf for a small random Llama; skips whoever imports it without vLLM."""

import os
import tempfile

import pytest

pytest.importorskip("vllm.v1", reason="vLLM is not installed; `make serve-test` installs it")

ENGINE = dict(  # one process, one thread: two threads on a busy machine are 20 times slower
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1",
)  # fmt: skip
os.environ.update(ENGINE)

import torch  # noqa: E402

import stem  # noqa: E402
from stem import hf  # noqa: E402

VOCABULARY = 97
SETTINGS = dict(density=0.3, block_size=16, score_stride=4, sink_blocks=1, local_blocks=1)
COMMON = dict(skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=2048, max_num_seqs=4)
COMMON |= dict(max_logprobs=VOCABULARY, disable_log_stats=True)
FOLDER = tempfile.TemporaryDirectory(prefix="tiny-llama-")


def prompt(length, seed=1):
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(llm, prompts, tokens=1, joins_at=()):
    """Log-probabilities [tokens, vocabulary] of each greedy answer; prompt i joins at step joins_at[i], default 0."""
    from vllm import SamplingParams

    engine, waiting, done = llm.llm_engine, list(enumerate(prompts)), {}
    params = SamplingParams(max_tokens=tokens, temperature=0, logprobs=VOCABULARY, detokenize=False, ignore_eos=True)
    step = 0
    while waiting or engine.has_unfinished_requests():
        for i, ids in list(waiting):
            if not joins_at or joins_at[i] <= step:
                engine.add_request(f"{id(prompts)}-{i}", dict(prompt_token_ids=ids), params)
                waiting.remove((i, ids))
        for output in engine.step():
            if output.finished:
                done[int(output.request_id.split("-")[1])] = output.outputs[0]
        step += 1
    rows = [done[i].logprobs for i in range(len(prompts))]
    return [torch.tensor([[row[token].logprob for token in range(VOCABULARY)] for row in answer]) for answer in rows]


@torch.no_grad()
def expected(model, prompts, tokens=1, methods=None):
    """The answers of transformers, with stem.hf's prefill if `methods` gives one for each layer."""
    found = []
    for ids in prompts:
        if methods:
            hf.enable(model, methods)
        out = model(torch.tensor([ids], device=model.device), use_cache=True)
        rows = [out.logits[0, -1].float().log_softmax(-1)]
        while len(rows) < tokens:
            out = model(rows[-1].argmax().view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1].float().log_softmax(-1))
        hf.disable(model)
        found.append(torch.stack(rows).cpu())
    return found


def sparse(**changes):
    """stem.hf's methods for SETTINGS with some changes."""
    return [stem.StemConfig(**{**SETTINGS, **changes})] * 3


def largest_difference(found, wanted):
    return max((x - y).abs().max().item() for x, y in zip(found, wanted, strict=True))
