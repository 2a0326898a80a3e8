"""From q, k and v to the kept blocks, in the way that a Plan names; on CUDA without a host synchronisation."""

from functools import lru_cache

import torch
from torch import Tensor

from stem.budget import BlockRows, scored_rows
from stem.cells import kernel_cells
from stem.config import StemConfig
from stem.scores import cell_bonus, routing_scale, score
from stem.selection import BlockSelection, select_blocks
from stem.transforms import lasting_tensors

CHUNK_SCORES = 1 << 26  # block scores held at a time by choose_topk: 256 MiB


@lru_cache(maxsize=256)
def forced_lists(
    batch: int, heads: int, config: StemConfig, rows: BlockRows, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Lists for budgets that forced blocks use up, whatever the scores are; shared between calls, read only."""
    with lasting_tensors():
        scores = torch.zeros(batch, heads, rows.stop - rows.first, rows.stop)
        selection = select_blocks(scores, rows.budget(config), rows.at_the_end(config), impl="torch")
        return selection.kv_indices.to(device), selection.kv_num_blocks.to(device)


def choose_scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, rows: BlockRows, scale: float, impl: str
) -> BlockSelection:
    """Scores of all block pairs in memory, then the selection; covers every config."""
    config_here = rows.at_the_end(config)
    scores = score(q, k, v, config_here, scale, impl)
    return select_blocks(scores, rows.budget(config), config_here, impl=impl, q_len=q.shape[2], kv_len=k.shape[2])


def choose_share(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, rows: BlockRows, scale: float
) -> tuple[Tensor, Tensor]:
    """Lists of the blocks whose share of their row exceeds the threshold, by Triton; scores are never stored."""
    from stem.kernels.share_select import pool_select

    config = rows.at_the_end(config)
    q, k, v = q.detach(), k.detach(), v.detach()
    cells = kernel_cells(q.shape[2], k.shape[2], config, config.pooled_heads(q.shape[1], k.shape[1]))
    rules = config.share_rules(cells.num_kv_blocks)
    return pool_select(q, k, cell_bonus(v, config, "triton"), cells, scale, *rules, config.exact_last_blocks)


def choose_topk(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, rows: BlockRows, scale: float, budget: tuple[Tensor, int]
) -> tuple[Tensor, Tensor]:
    """Lists of the best blocks by mean score, as many as `device_budget` says, by Triton and some rows at a time."""
    from stem.kernels import block_scores, block_select, score_inputs, score_select

    (batch, heads, q_len), kv_len, size, (budget, width) = q.shape[:3], k.shape[2], config.block_size, budget
    num_q_blocks, offset, pooled = rows.stop - rows.first, kv_len - q_len, config.pooled_heads(q.shape[1], k.shape[1])
    lists = block_select.empty_lists(batch, heads // pooled, num_q_blocks, width, q.device)
    scale = routing_scale(q.shape[3], config, scale) / pooled
    step = min(num_q_blocks, max(1, CHUNK_SCORES // (batch * heads // pooled * rows.stop)))
    args = q, k, v, size, config.score_stride, *config.value_term
    scored, (sinks, local, on_top) = scored_rows(rows, config) or range(num_q_blocks), config.always_kept
    if rows.stop <= score_select.MAX_KV_BLOCKS and step == num_q_blocks:
        read = None if on_top else range(sinks, rows.first + scored.stop - max(local, 1))  # the others are forced
        inputs = score_inputs.score_inputs(*args, scored.start, len(scored), pooled, read)
        lists = score_select.score_select(*inputs, scale, budget, sinks, local, on_top, lists, scored.start)
        return block_select.for_all_heads(lists, pooled)
    q_sums, k_sums, value_bonus = score_inputs.score_inputs(*args, scored.start, min(step, len(scored)), pooled)
    of_call = budget, sinks, local, on_top, lists, scored.start
    score_select.compile_for_short_prompts(q_sums, k_sums, value_bonus, scale, *of_call)
    for row in scored[::step]:
        if row > scored.start:
            start, stop = ((rows.first + x) * size - offset for x in (row, row + step))
            grid = dict(reverse=True, offset=offset + start, heads=pooled)
            q_sums = score_inputs.block_sums(q[:, :, start:stop], size, config.score_stride, **grid)
        scores = block_scores.score_blocks(q_sums, k_sums, value_bonus, scale, rows.first + row, num_q_blocks)
        written = range(row if row > scored.start else 0, row + step if row + step < scored.stop else num_q_blocks)
        block_select.select_topk(scores, budget, sinks, local, on_top, width, lists, row, written=written)
    return block_select.for_all_heads(lists, pooled)
