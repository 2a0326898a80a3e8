"""vLLM's CUDA engine, fp16: answers of stem.hf with both model runners, graphs for decode."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
import torch

HAS_SM90 = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HAS_SM90, reason="needs a GPU of compute capability 9.0")
SETTINGS = dict(density=0.2, sink_blocks=1, local_blocks=1)  # of 128 tokens a block
LENGTHS = (8192, 3000, 12345, 129)
TIE = 1e-3  # scores this close, over the largest of a row, may be ordered otherwise in fp16


def topics(length, seed):
    """A prompt in which every block has three tokens of its own: no two blocks have nearly the same score."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 97, (-(-length // 128), 3), generator=draw).repeat_interleave(128, 0)
    return words.gather(1, torch.randint(0, 3, (len(words), 1), generator=draw))[:length, 0].tolist()


def differences() -> dict[str, float]:
    """Mean difference of log-probabilities between engines of vLLM and transformers; runs in a process of its own."""
    import serving_engine as tools
    from tiny_models import build
    from vllm import LLM

    import stem
    import stem.vllm.cuda

    sizes = dict(hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, max_position_embeddings=2**14)
    model = build("Llama", **sizes, vocab_size=tools.VOCABULARY, eos_token_id=None, bos_token_id=None)
    model = model.to("cuda", torch.float16)
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    prompts = [topics(length, length) for length in LENGTHS]
    methods = [stem.StemConfig(**SETTINGS)] * 2
    sparse, dense = tools.expected(model, prompts, 1, methods), tools.expected(model, prompts, 1)
    graphs = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[1, 2, 4, 8])
    common = {**tools.COMMON, "dtype": "float16", "max_model_len": 2**14, "enforce_eager": False, "block_size": 128}
    common |= dict(compilation_config=graphs, kv_cache_memory_bytes=4 << 30, gpu_memory_utilization=0.2)
    ours = dict(attention_backend="CUSTOM", scheduler_cls="stem.vllm.AlignedScheduler")

    def mean(found, wanted):  # of the first token: later ones follow from it
        return sum((x - y)[0].abs().mean().item() for x, y in zip(found, wanted, strict=True)) / len(wanted)

    stock = tools.answers(LLM(folder, max_num_batched_tokens=2**14, **common), prompts, 4)
    found = {"dense against sparse": mean(dense, sparse), "vLLM against transformers": mean(stock, dense)}
    patch = pytest.MonkeyPatch()
    rows, read_pages, are_read = tools.row_errors(patch, stem.vllm.cuda.StemCUDAImpl), stem.vllm.cuda.readable_rows, []
    for chunk in (2**14, 1000):
        llm = LLM(folder, max_num_batched_tokens=chunk, additional_config={"stem": SETTINGS}, **ours, **common)
        for joins_at in ((), (0, 2, 3, 4)):
            patch.setattr(
                stem.vllm.cuda, "readable_rows", lambda *args: are_read.append(read_pages(*args)) or are_read[-1]
            )
            found[f"chunks of {chunk}, {joins_at}"] = mean(tools.answers(llm, prompts, 4, joins_at), sparse)
            llm.reset_prefix_cache()
        patch.setattr(stem.vllm.cuda, "readable_rows", lambda *args: None)
        found[f"chunks of {chunk}, copied"] = mean(tools.answers(llm, prompts, 4), sparse)
    patch.undo()
    assert len(rows) == 6 * 2 * len(LENGTHS)  # cases, layers, prompts
    errors, gaps = (torch.cat([x.flatten() for x in parts]) for parts in zip(*rows, strict=True))
    found |= {"rows without ties": errors[gaps > TIE].max().item(), "ties": (gaps <= TIE).float().mean().item()}
    assert are_read and None not in are_read
    return found


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_answers_are_those_of_stem_hf(runner):
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2")), "PYTHONPATH": path}
    process = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.splitlines()[-1])
    assert found.pop("rows without ties") < 5e-3 and found.pop("ties") < 0.02
    scale, noise = found.pop("dense against sparse"), found.pop("vLLM against transformers")
    assert scale > 5 * noise
    assert len(found) == 6 and all(difference < 2 * noise for difference in found.values()), (found, noise)


if __name__ == "__main__":
    print(json.dumps(differences()))
