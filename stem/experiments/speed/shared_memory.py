"""Memory of one of several GPUs that share a model's prompt, measured on one GPU.

    python -m stem.experiments.speed.shared_memory --profile full

The other ranks do not exist: torch's fake process group copies instead of exchanging. All tensors have the sizes that
they have among several GPUs; their values and the time mean nothing. Rows go to
results/speed/shared_memory/<machine>.csv.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import stem
from stem import hf
from stem.experiments import records
from stem.experiments.speed.first_token import LLAMA_8B, TINY, random_llama

RANKS = (8, 4)
TOKENS = {"full": 2**20, "smoke": 2**11}
CONFIG = stem.StemConfig(density=0.08)


@torch.inference_mode()
def memory_row(model: nn.Module, tokens: int, ranks: int) -> dict[str, Any]:
    """Row of rank 0 [MiB]: weights, its part of the key-value cache, and on CUDA the peak of a prefill."""
    on_cuda = model.device.type == "cuda"
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        mesh = init_device_mesh(model.device.type, (ranks,))
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        with hf.stem_prefill(model, CONFIG, mesh=mesh):
            cache = model(ids.to(model.device), use_cache=True, logits_to_keep=1).past_key_values
        cached = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    finally:
        dist.destroy_process_group()
    weights = sum(x.nbytes for x in model.parameters())
    row = dict(operation="memory", ranks=ranks, tokens=tokens, layers=model.config.num_hidden_layers)
    row |= dict(weights_mib=weights / 2**20, cache_mib=cached / 2**20)
    return row | (dict(peak_memory_mib=torch.cuda.max_memory_allocated() / 2**20) if on_cuda else {})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure with each number of ranks, and write the rows after each."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.speed.shared_memory", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    profile, on_cuda = parser.parse_args(arguments).profile, torch.cuda.is_available()
    if profile == "full" and not on_cuda:
        print("skipped: the memory of GPUs that share a prompt needs a GPU")
        return
    settings, dtype = (LLAMA_8B, torch.bfloat16) if profile == "full" else (TINY, torch.float32)
    model, rows = random_llama(settings, "cuda" if on_cuda else "cpu", dtype), []
    for ranks in RANKS:
        rows.append(memory_row(model, TOKENS[profile], ranks))
        print(rows[-1], flush=True)
        records.write_rows("speed/shared_memory", rows, profile)


if __name__ == "__main__":
    main()
