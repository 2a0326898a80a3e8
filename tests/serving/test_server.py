"""A server of vLLM with Stem: concurrent clients, a killed request, the log line and the metrics."""

import json
import re
import threading
import time
import urllib.error
import urllib.request

import pytest
from serving_engine import SETTINGS, expected, prompt, sparse

import stem

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def address(server):
    """The server's address once it answers."""
    process, url, log = server
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10)
            return url
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)


def ask(address, ids, **options):
    body = dict(model="tiny", prompt=ids, temperature=0, ignore_eos=True, **options)
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=600)


def metrics(address, name):
    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return {int(layer): float(x) for layer, x in re.findall(rf'^stem:{name}{{.*layer="(\d)"}} (.*)$', text, re.M)}


def test_concurrent_clients_get_the_answers_of_stem_hf(address, model):
    prompts = [prompt(length, 90 + length) for length in (1000, 640, 333)]
    found = [None] * len(prompts)

    def client(i):
        found[i] = json.load(ask(address, prompts[i], max_tokens=6, logprobs=5))["choices"][0]["logprobs"]

    threads = [threading.Thread(target=client, args=(i,)) for i in range(len(prompts))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for answer, wanted in zip(found, expected(model, prompts, 6, sparse()), strict=True):
        assert answer["tokens"] == [f"t{token}" for token in wanted.argmax(-1).tolist()]
        for row, known in zip(answer["top_logprobs"], wanted, strict=True):
            assert len(row) >= 5
            assert max(abs(known[int(token[1:])].item() - x) for token, x in row.items()) < TOLERANCE


def test_a_killed_request_leaves_the_others_alone(address, model):
    killed = ask(address, prompt(1200, 1), max_tokens=500, stream=True)
    killed.read(50)
    killed.close()
    ids = prompt(800, 2)
    answer = json.load(ask(address, ids, max_tokens=4))["choices"][0]["text"]
    wanted = expected(model, [ids], 4, sparse())[0].argmax(-1).tolist()
    assert answer.split() == [f"t{token}" for token in wanted]


def test_the_metrics_hold_the_density(address):
    before = metrics(address, "kept_block_pairs_total"), metrics(address, "causal_block_pairs_total")
    json.load(ask(address, prompt(960, 3), max_tokens=1))
    after = metrics(address, "kept_block_pairs_total"), metrics(address, "causal_block_pairs_total")
    budget = stem.block_budget(60, stem.StemConfig(**SETTINGS))  # blocks of 16 tokens
    for layer in range(3):
        kept, causal = (now[layer] - then[layer] for now, then in zip(after, before, strict=True))
        assert (kept, causal) == (4 * int(budget.sum()), 4 * 60 * 61 // 2)
    assert all(0.25 < density < 0.4 for density in metrics(address, "prefill_density").values())


def test_the_log_names_the_sparse_layers(address, server):
    text = server[2].read_text()
    assert len(re.findall("Stem: sparse prefill in 3 of 3 attention layers", text)) == 1
    assert "changes results a little" not in text
