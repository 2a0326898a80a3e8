"""A small random Llama on vLLM's CPU engine: in this process, and in a server."""

import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CPU_ENGINE = ("test_engine.py", "test_plugin.py", "test_server.py")
collect_ignore = CPU_ENGINE if torch.cuda.is_available() else ()


def pytest_collection_modifyitems(items):
    """The tests of the server come last: it starts while the others run."""
    items.sort(key=lambda item: item.path.name == "test_server.py")


@pytest.fixture(scope="package", autouse=True)
def rare_collections():
    """vLLM collects garbage eight times for each engine, among all the objects that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "collect", lambda *generation: 0)
        yield


@pytest.fixture(scope="session")
def tools():
    """Module with the settings and answers; imported here, because it skips without vLLM."""
    import serving_engine

    return serving_engine


@pytest.fixture(scope="session")
def model(tools):
    from tiny_models import build
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    sizes = dict(hidden_size=128, num_attention_heads=4, max_position_embeddings=2048, vocab_size=tools.VOCABULARY)
    model = build("Llama", **sizes, eos_token_id=None, bos_token_id=None)
    model.save_pretrained(tools.FOLDER.name)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(tools.VOCABULARY)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(tools.FOLDER.name)
    return model


@pytest.fixture(scope="session", autouse=not torch.cuda.is_available())
def server(tools, model):
    """Address of a server with three requests at a time; it starts while other tests run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = dict(
        model=tools.FOLDER.name, served_model_name="tiny", port=port, dtype="float32", max_model_len=2048,
        max_num_seqs=3, max_num_batched_tokens=500, block_size=128, max_logprobs=tools.VOCABULARY,
        attention_backend="CUSTOM", scheduler_cls="stem.vllm.AlignedScheduler",
        additional_config=json.dumps({"stem": tools.SETTINGS | {"min_tokens": 100}}),
    )  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    log = Path(tools.FOLDER.name) / "server.log"
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    env.pop("STEM_VLLM_COUNTS", None)  # its counts are its own
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    yield process, f"http://127.0.0.1:{port}", log
    process.terminate()
    try:
        process.wait(60)  # on a busy machine
    except subprocess.TimeoutExpired:  # while it starts
        process.kill()


@pytest.fixture(scope="session")
def engine(tools, model):
    """engine(settings, **options): a vllm.LLM on the small model; None gives vLLM without Stem."""
    from vllm import LLM

    def start(settings, **options):
        additional = {} if settings is None else {"stem": settings}
        return LLM(tools.FOLDER.name, additional_config=additional, **{**tools.COMMON, **options})

    return start
