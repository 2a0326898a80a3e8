"""Features that each implementation covers, tried on a small problem and compared with the reference.

    python -m stem.experiments.speed.coverage --profile full

Rows go to results/speed/coverage/<machine>.csv: the relative L2 error against fp64 attention to the same blocks, or the
error that the call raised.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import stem
from stem.experiments import records
from stem.experiments.markdown import by_device, full_rows, markdown_table, not_run
from stem.experiments.speed.bench import first_line
from stem.experiments.speed.candidates import SHAPES
from stem.impl.coverage import IMPLS

TOKENS, HEADS, HEAD_DIM = 1000, (4, 2), 64  # of query and key-value heads
BLOCKS = stem.StemConfig(density=0.3)
FEATURES = {  # feature -> config and further arguments of `attend`
    "blocks of 128": (BLOCKS, {}),
    "blocks of 64": (BLOCKS.replace(block_size=64), {}),
    "groups, blocks of 64": (BLOCKS.replace(block_size=64, lists="group"), {}),
    "`adaptive`": (stem.StemConfig.preset("adaptive", dense_up_to=0), {}),
    'FP8 (`compute="fp8"`)': (BLOCKS.replace(compute="fp8"), {}),
    'means (`dropped="mean"`)': (BLOCKS.replace(dropped="mean"), {}),
    "sinks": (BLOCKS, dict(with_sinks=True)),
    "chunks": (BLOCKS, dict(q_len=300)),
    "decode": (BLOCKS, dict(q_len=1)),
    "gradients": (BLOCKS, dict(gradients=True)),
}


def attend(
    config: stem.StemConfig,
    impl: str,
    device: str,
    *,
    q_len: int = TOKENS,
    with_sinks: bool = False,
    gradients: bool = False,
    seed: int = 0,
) -> float:
    """Relative L2 error of an implementation on random normal q, k and v; of the gradient of q with `gradients`."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(1, HEADS[0], q_len, HEAD_DIM)] + [(1, HEADS[1], TOKENS, HEAD_DIM)] * 2
    dtype = getattr(torch, SHAPES[device].dtype)
    q, k, v = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    dout = torch.randn(sizes[0], generator=generator).to(device, dtype)
    sinks = torch.randn(HEADS[0], generator=generator).to(device) if with_sinks else None
    q.requires_grad_(gradients)
    out, selection = stem.stem_attention(q, k, v, config, impl=impl, sinks=sinks, return_selection=True)
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (q, k, v)]
    expected = stem.block_sparse_attention(
        *exact, selection, impl="reference", sinks=None if sinks is None else sinks.double()
    )
    if gradients:
        (out,), (expected,) = torch.autograd.grad(out, q, dout), torch.autograd.grad(expected, exact[0], dout.double())
    return _distance(out, expected)


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def rows(device: str, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A row for each implementation and feature: `error`, or the `message` of the call's error."""
    for impl in IMPLS:
        for feature, (config, more) in FEATURES.items():
            try:
                found = dict(error=attend(config, impl, device, **more, seed=seed), message="")
            except Exception as error:
                found = dict(message=first_line(error))
            yield dict(implementation=impl, feature=feature, dtype=SHAPES[device].dtype) | found


def table() -> str:
    """For each machine a table of `rows`: relative errors, or the number of the error message below the table."""
    found = full_rows("speed/coverage")
    if found.empty:
        return not_run("make speed PROFILE=full")
    parts = []
    for device, part in by_device(found):
        messages, lines = [], []
        for impl, group in part.groupby("implementation", sort=False):
            cells = []
            for row in group.to_dict("records"):
                message = row["message"] if isinstance(row["message"], str) else ""
                if message and message not in messages:
                    messages.append(message)
                cells.append(f"error {messages.index(message) + 1}" if message else f"{row['error']:.1e}")
            lines.append([f"`{impl}`", *cells])
        shown = markdown_table(["implementation", *part.feature.unique()], lines)
        legend = "\n".join(f"{number}. `{message}`" for number, message in enumerate(messages, 1))
        parts.append(f"**{device}**, {part.dtype.iloc[0]}\n\n{shown}\n\n{legend}".rstrip())
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, try everything, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m stem.experiments.speed.coverage", description=__doc__)
    parser.add_argument("--profile", choices=records.PROFILES, default="smoke")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = list(rows(device, options.seed))
    for row in found:
        print(*row.values(), sep="  ")
    print(f"wrote {records.write_rows('speed/coverage', found, options.profile)}")


if __name__ == "__main__":
    main()
