"""vLLM's CUDA engine: answers of stem.hf with both model runners, graphs for decode; two GPUs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

# not in the processes that start engines: vLLM can fork its workers, with all modules, where CUDA is not in use yet
HAS_SM90 = __name__ != "__main__" and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HAS_SM90, reason="needs a GPU of compute capability 9.0")
SETTINGS = dict(density=0.2, sink_blocks=1, local_blocks=1)  # of 128 tokens a block
LENGTHS = (8192, 3000, 12345, 129)
SMALL_LOGITS = 1 / 8  # of a random model's: then they stay below 1, where the last bit of bf16 is worth 0.004
TIMEOUT = 200  # of a process [s]: two take 40 s beside each other on an idle machine
TIE = 1e-3  # scores this close, over the largest of a row, may be ordered otherwise in fp16


def topics(length, seed):
    """A prompt in which every block has three tokens of its own: no two blocks have nearly the same score."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 97, (-(-length // 128), 3), generator=draw).repeat_interleave(128, 0)
    return words.gather(1, torch.randint(0, 3, (len(words), 1), generator=draw))[:length, 0].tolist()


def saved_model(dtype, logits=1.0):
    """Folder of a random Llama whose logits are multiplied by a number."""
    import serving_engine as tools
    from tiny_models import build

    sizes = dict(hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=2**14)
    model = build("Llama", **sizes, vocab_size=tools.VOCABULARY, eos_token_id=None, bos_token_id=None)
    model.lm_head.weight.data *= logits
    folder = tempfile.mkdtemp()
    model.to(dtype).save_pretrained(folder)
    return folder


def prompts_of_topics():
    return [topics(length, length) for length in LENGTHS]


def engine(folder, dtype, settings=None, chunk=2**14, **options):
    """A vllm.LLM on the folder, with Stem if there are settings."""
    import serving_engine as tools
    from vllm import LLM

    common = tools.COMMON | dict(dtype=dtype, max_model_len=2**14, block_size=128, max_num_batched_tokens=chunk)
    common |= dict(kv_cache_memory_bytes=1 << 28, gpu_memory_utilization=0.05)
    if settings:
        common |= dict(attention_backend="CUSTOM", scheduler_cls="stem.vllm.AlignedScheduler")
    return LLM(folder, additional_config={"stem": settings} if settings else {}, **common | options)


def differences() -> dict[str, float]:
    """Differences of log-probabilities between vLLM and transformers, in the mean, and of rows; in its own process."""
    import serving_engine as tools
    from transformers import AutoModelForCausalLM

    import stem
    import stem.vllm.cuda

    folder, prompts = saved_model(torch.float16), prompts_of_topics()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).to("cuda")
    methods = [stem.StemConfig(**SETTINGS)] * 2
    sparse, dense = tools.expected(model, prompts, 1, methods), tools.expected(model, prompts, 1)
    graphs = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[1, 2, 4, 8])
    graphs = dict(enforce_eager=False, compilation_config=graphs)

    def mean(found, wanted):  # of the first token: later ones follow from it
        return sum((x - y)[0].abs().mean().item() for x, y in zip(found, wanted, strict=True)) / len(wanted)

    llms = [engine(folder, "float16", **graphs)]  # all stay: they share memory for CUDA graphs
    stock, given = tools.answers(llms[0], prompts, 4), []
    found = {"dense against sparse": mean(dense, sparse), "vLLM against transformers": mean(stock, dense)}

    def add(name, llm, *joins_at):
        given.append(tools.answers(llm, prompts, 4, *joins_at))
        found[name] = mean(given[-1], sparse)
        llm.reset_prefix_cache()

    patch = pytest.MonkeyPatch()
    rows, read_pages, are_read = tools.row_errors(patch, stem.vllm.cuda.StemCUDAImpl), stem.vllm.cuda.readable_rows, []
    for chunk in (2**14, 1000):
        llms.append(llm := engine(folder, "float16", SETTINGS, chunk, **graphs))
        for joins_at in ((), (0, 2, 3, 4)):
            patch.setattr(
                stem.vllm.cuda, "readable_rows", lambda *args: are_read.append(read_pages(*args)) or are_read[-1]
            )
            add(f"chunks of {chunk}, {joins_at}", llm, joins_at)
        patch.setattr(stem.vllm.cuda, "readable_rows", lambda *args: None)
        add(f"chunks of {chunk}, copied", llm)
    patch.undo()
    errors, gaps = (torch.cat([x.flatten() for x in parts]) for parts in zip(*rows, strict=True))
    found["between them"] = max(mean(answers, given[0]) for answers in given[1:])
    found |= {"rows without ties": errors[gaps > TIE].max().item(), "ties": (gaps <= TIE).float().mean().item()}
    return found | {"prompts in layers": len(rows), "copied": sum(x is None for x in are_read) / len(are_read)}


def fp8_differences() -> dict[str, float]:
    """Mean differences of log-probabilities between ways to compute in FP8, and of those to others."""
    import serving_engine as tools
    from transformers import AutoModelForCausalLM

    import stem

    folder, prompts = saved_model(torch.float16, SMALL_LOGITS), prompts_of_topics()[:3]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).to("cuda")
    ways = dict(dense=None, sparse={}, fp8=dict(compute="fp8"))
    known = {
        name: tools.expected(model, prompts, 1, None if way is None else [stem.StemConfig(**SETTINGS, **way)] * 2)
        for name, way in ways.items()
    }
    found = {"dense": known["dense"], "sparse": known["sparse"]}
    for chunk in (2**14, 1000):
        llm = engine(folder, "float16", SETTINGS | ways["fp8"], chunk)
        found[f"chunks of {chunk}"] = tools.answers(llm, prompts)
    return {
        name: sum((x - y).abs().mean().item() for x, y in zip(own, known["fp8"], strict=True)) / len(own)
        for name, own in found.items()
    }


def answers(gpus: str, folder: str) -> list:
    """Log-probabilities of a token after each prompt in bf16, [dense or sparse, prompts, vocabulary].

    vLLM rounds logits to bf16. The last bit of one from 4 to 8 is worth 0.03, so that no engine could keep to 0.01.
    """
    import serving_engine as tools

    found = []
    for settings in (None, SETTINGS):
        options = dict(tensor_parallel_size=int(gpus), disable_custom_all_reduce=True)
        llm = engine(folder, "bfloat16", settings, **options)
        found.append([x[0].tolist() for x in tools.answers(llm, prompts_of_topics())])
        llm.llm_engine.engine_core.shutdown()
    return found


def started(*arguments, **variables) -> subprocess.Popen:
    """A process that calls a function of this file, with environment variables, in a group of processes of its own."""
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    command, env = [sys.executable, __file__, *arguments], os.environ | {"PYTHONPATH": path} | variables
    pipes = dict(stdout=tempfile.TemporaryFile("w+"), stderr=tempfile.TemporaryFile("w+"))
    process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
    process.stdout, process.stderr = pipes.values()
    return process


def results(*processes, seconds=600):
    """Values of the functions of started processes, which are ended with their workers after this time together."""
    end = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(end - time.monotonic(), 0))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        texts = [[file.seek(0) or file.read() for file in (x.stdout, x.stderr)] for x in processes]
        print(*(log[-3000:] for text in texts for log in text), sep="\n")  # shown if the test fails
    assert [process.returncode for process in processes] == [0] * len(processes)
    lines = [reversed(out.splitlines()) for out, _ in texts]  # vLLM logs there too
    return [json.loads(next(x for x in part if x.startswith(('{"', "[[")))) for part in lines]


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_answers_are_those_of_stem_hf(runner):
    (found,) = results(started("differences", VLLM_USE_V2_MODEL_RUNNER=str(int(runner == "V2"))))
    assert found.pop("prompts in layers") == 6 * 2 * len(LENGTHS)  # cases, layers, prompts
    assert found.pop("copied") == 0
    assert found.pop("rows without ties") < 5e-3 and found.pop("ties") < 0.05
    scale, noise = found.pop("dense against sparse"), found.pop("vLLM against transformers")
    assert noise < scale / 200 and found.pop("between them") < noise
    assert len(found) == 6 and all(difference < 2 * noise for difference in found.values()), (found, noise)


def test_fp8_gives_the_answers_of_stem_hf():
    (found,) = results(started("fp8_differences"))
    print(found)
    assert found["chunks of 16384"] < found["sparse"] / 2  # the whole prompt, and rounding to FP8
    assert found["chunks of 1000"] < 2 * found["sparse"] < found["dense"] / 3  # scales of the keys so far


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_answers_of_one():
    folder, only_nccl = saved_model(torch.bfloat16, SMALL_LOGITS), dict(VLLM_ALLREDUCE_USE_SYMM_MEM="0")
    processes = [started("answers", gpus, folder, OMP_NUM_THREADS="1", **only_nccl) for gpus in ("1", "2")]
    one, two = map(torch.tensor, results(*processes, seconds=TIMEOUT))
    assert one.sub(one.mean(-1, keepdim=True)).abs().max() < 1  # logits, up to their mean
    assert (one[0] - one[1]).abs().mean() > 0.1
    assert (one - two).abs().max() < 1e-2
    dense, sparse = (one - two).abs().mean((1, 2)).tolist()
    assert sparse < 1.5 * dense


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    print(json.dumps(globals()[name](*given)), flush=True)
