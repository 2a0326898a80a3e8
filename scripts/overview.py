"""Draw README's picture: the blocks that Stem keeps on one small causal attention map."""

from functools import partial

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import stem
from stem.experiments import figures, records

TOKENS, HEAD_DIM, BLOCK_SIZE = 4096, 64, 64


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v [1, 1, TOKENS, HEAD_DIM] fp32 with recency, a sink, and some key blocks that all queries attend to."""
    generator, blocks = torch.Generator().manual_seed(0), TOKENS // BLOCK_SIZE
    normal = partial(torch.randn, generator=generator)
    common, drift = normal(HEAD_DIM), torch.zeros(blocks, HEAD_DIM)
    for block in range(1, blocks):  # neighbouring blocks are about similar things
        drift[block] = 0.85 * drift[block - 1] + 0.5 * normal(HEAD_DIM)
    heavy = (torch.rand(blocks, generator=generator) < 0.12).float() + (torch.arange(blocks) == 0)
    drift, heavy = drift.repeat_interleave(BLOCK_SIZE, 0), heavy.repeat_interleave(BLOCK_SIZE)[:, None]
    q = 0.5 * normal(1, 1, TOKENS, HEAD_DIM) + drift + 0.6 * common
    k = 0.5 * normal(1, 1, TOKENS, HEAD_DIM) + drift + 0.6 * heavy * common
    return q, k, normal(1, 1, TOKENS, HEAD_DIM)


def main() -> None:
    """Write results/figures/overview.png: true attention per block, the budget of each row, and the kept blocks."""
    q, k, v = example()
    config = stem.StemConfig(density=0.25, block_size=BLOCK_SIZE, sink_blocks=1, local_blocks=3)
    _, selection = stem.stem_attention(q, k, v, config, return_selection=True)
    blocks = TOKENS // BLOCK_SIZE
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    weights = (q[0, 0] @ k[0, 0].T * HEAD_DIM**-0.5).masked_fill(~causal, -torch.inf).softmax(-1)
    mass = weights.view(blocks, BLOCK_SIZE, blocks, BLOCK_SIZE).sum((1, 3)) / BLOCK_SIZE
    future = torch.ones(blocks, blocks).triu(1).bool()
    figure, (left, mid, right) = plt.subplots(1, 3, figsize=(11, 3.8), width_ratios=(1, 0.8, 1), layout="constrained")
    left.imshow(mass.masked_fill(future, torch.nan).sqrt(), cmap="Greys")
    left.set(title="what dense attention computes", xlabel="key block", ylabel="query block")
    rows = torch.arange(blocks)
    mid.barh(rows, rows + 1, color="0.85", label="dense")
    mid.barh(rows, stem.block_budget(blocks, config), color=figures.COLOURS["stem"], label="Stem's budget")
    mid.set(
        title="early rows keep all, later rows less",
        xlabel="number of key blocks",
        ylabel="query block",
        ylim=(blocks - 0.5, -0.5),
    )
    mid.legend(frameon=False, loc="upper right")
    shown = torch.where(selection.to_mask()[0, 0], 1.0, 0.12).masked_fill(future, torch.nan)
    right.imshow(shown, cmap="Blues", vmin=0, vmax=1.3)
    right.set(title=f"what Stem computes: {selection.density():.0%} of it", xlabel="key block", ylabel="query block")
    for axes in (left, right):
        axes.spines[:].set_visible(False)
    path = records.repository_root() / "results" / "figures" / "overview.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
