"""Small inputs of the tests of patterns, and masks from lists of kept blocks."""

import oracles
import torch

from stem import StemConfig, patterns

BLOCK = 16
CONFIG = StemConfig(block_size=BLOCK, score_stride=4, density=0.45, sink_blocks=2, local_blocks=2)
LENGTHS = {"whole": (192, 192), "ragged": (187, 187), "chunk": (64, 192), "unaligned": (75, 187)}
NAMES = patterns.names()


def draw(q_len=192, kv_len=192, q_heads=4, kv_heads=2, dtype=torch.float64):
    """Return random q, k, v. Heads differ in sharpness, values in size, and the first key draws attention."""
    q = 3 * torch.randn(1, q_heads, q_len, 16, dtype=dtype) * torch.linspace(0.1, 1, q_heads)[:, None, None]
    k, v = (torch.randn(1, kv_heads, kv_len, 16, dtype=dtype) for _ in range(2))
    q[..., 0] += 1
    k[:, :, 0, 0] += 4
    return q, k, v * torch.rand(1, kv_heads, kv_len, 1, dtype=dtype).exp()


def heads(x, num_q_heads):
    """Return lists of vectors, one list for each query head, of [1, H, N, D]."""
    return oracles.repeat_heads(x, num_q_heads)[0].tolist()


def as_mask(rows_of_heads, nk):
    """Return the mask of the kept blocks of each head and row: bool [1, Hq, nq, nk]."""
    mask = torch.zeros(1, len(rows_of_heads), len(rows_of_heads[0]), nk, dtype=torch.bool)
    for head, kept_rows in enumerate(rows_of_heads):
        for row, kept in enumerate(kept_rows):
            mask[0, head, row, sorted(kept)] = True
    return mask
