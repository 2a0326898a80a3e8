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
from torch.nn.functional import pad  # noqa: E402

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


def row_errors(monkeypatch, impl):
    """List that gets (error, gap) of each prompt and layer when the prompt ends; impl is the class that attends.

    Both are [Hq, rows]: of a query block, the attention's relative L2 distance from that of the whole prompt in fp32,
    from the layer's own queries, keys and values; and the score by which the worst chosen block wins, over the largest
    score of the row.
    """
    attend, parts, found = impl.attend, {}, []

    def watched(self, layer, q, kv_cache, chunk, out):
        attend(self, layer, q, kv_cache, chunk, out)
        key = layer.layer_name, int(chunk.pages[0])
        parts.setdefault(key, []).append((q.float(), out.float()))
        if chunk.is_last:
            k, v = (x.float() for x in self.gathered(layer, kv_cache, chunk.pages, chunk.stop))
            queries, outs = (torch.cat(x, 2) for x in zip(*parts.pop(key), strict=True))
            found.append(compared(queries, outs, k, v, self))

    monkeypatch.setattr(impl, "attend", watched)
    return found


def compared(q, out, k, v, impl):
    """One entry of row_errors; the queries are the last ones of the prompt."""
    config = impl.stem_config
    size, rows = config.block_size, out.shape[2]
    expected, selection = stem.stem_attention(q, k, v, config, scale=impl.scale, impl="torch", return_selection=True)
    before = (k.shape[2] - rows) % size  # of the first query's block

    def norms(x):  # [Hq, rows]
        squares = pad(x[0].square().sum(-1), (before, -(before + rows) % size))
        return squares.unflatten(-1, (-1, size)).sum(-1).sqrt()

    scores, kept = stem.block_scores(q, k, v, config, scale=impl.scale)[0], selection.to_mask()[0]
    blocks = torch.arange(scores.shape[-1], device=q.device)
    diagonal = blocks[-scores.shape[-2] :, None]
    forced = (blocks < config.sink_blocks) | (blocks > diagonal - config.local_blocks)
    worst = scores.masked_fill(~kept | forced, float("inf")).amin(-1)
    best_dropped = scores.masked_fill(kept | (blocks > diagonal), -float("inf")).amax(-1)
    largest = scores.masked_fill(blocks > diagonal, 0.0).abs().amax(-1)
    return (norms(out - expected) / norms(expected)).cpu(), ((worst - best_dropped) / largest).cpu()
