"""Block scores: how much each key block matters to each query block (Output-Aware Metric)."""

from torch import Tensor

from stem.autocast import autocast_once
from stem.cells import cell_scores, group_sums, mask_future, pad_to_grid
from stem.config import StemConfig, check_config
from stem.transforms import refused_by_name
from stem.validation import check_finite, check_impl, check_qkv, check_scale, compute_dtype

LOG_EPS = 1e-6  # added to value norms before the logarithm by AngelSlim and hpc-ops; smallest deviation of a z-score


@refused_by_name("block_scores")
@autocast_once
def block_scores(
    q: Tensor, k: Tensor, v: Tensor, config: StemConfig, *, scale: float | None = None, impl: str | None = None
) -> Tensor:
    """Routing term plus value term of every causal block pair (Eq. 7, pooled as in Algorithm 1).

    The routing term is the mean of q.k * scale over the antidiagonal samples, by exact factorisation into group sums;
    missing rows count as zeros. With `reduction="softmax"` the score is the logarithm of the block's share of the row.

    Args:
        q, k, v, scale: As in stem_attention; the scale is ignored by `routing_scale="raw"`.
        impl: "torch", "triton" or None (Triton on CUDA). fp64 inputs are scored in fp64 by "torch".
    Returns:
        fp32 (fp64 for fp64 inputs) [B, Hq, nq, nk], larger = keep, -inf where the key block is in the future.
    Raises:
        ValueError, TypeError: For bad shapes, dtypes, devices or names, and for non-finite input on the CPU.
    """
    check_qkv(q, k, v)
    check_finite(q=q, k=k, v=v)
    check_config(config)
    impl = check_impl(impl, ("torch", "triton"), q.device, q.dtype)
    return score(q, k, v, config, check_scale(scale, q.shape[-1]), impl)


def score(q: Tensor, k: Tensor, v: Tensor, config: StemConfig, scale: float, impl: str) -> Tensor:
    """block_scores of checked arguments."""
    q, k, v = q.detach(), k.detach(), v.detach()
    if not q.numel():
        nk = -(-k.shape[2] // config.block_size)
        num_q_blocks = nk - (k.shape[2] - q.shape[2]) // config.block_size
        return q.new_zeros(*q.shape[:2], num_q_blocks, nk, dtype=compute_dtype(q.dtype))
    heads = config.pooled_heads(q.shape[1], k.shape[1])
    if config.reduction == "softmax":
        scores = cell_scores(q, k, cell_bonus(v, config, impl), config, scale, impl=impl)
    elif impl == "triton":
        from stem.kernels.block_scores import score_blocks
        from stem.kernels.score_inputs import score_inputs

        inputs = score_inputs(q, k, v, config.block_size, config.score_stride, *config.value_term, heads=heads)
        scores = score_blocks(*inputs, routing_scale(q.shape[-1], config, scale) / heads)
    else:
        grid, scale = (config.block_size, config.score_stride), routing_scale(q.shape[-1], config, scale)
        q_sums = group_sums(q, *grid, reverse=True, offset=k.shape[2] - q.shape[2]).unflatten(1, (-1, heads)).mean(2)
        scores = pair_sums(q_sums, group_sums(k, *grid), cell_bonus(v, config, impl), scale)
    return scores if heads == 1 else scores.repeat_interleave(heads, 1)


def pair_sums(q_sums: Tensor, k_sums: Tensor, bonus: Tensor | None, scale: float) -> Tensor:
    """Scores [B, Hq, nq, nk] from sums of queries and of keys, [B, H, blocks, S * D], and bonus [B, Hkv, nk]."""
    routing = q_sums.unflatten(1, (k_sums.shape[1], -1)) @ k_sums[:, :, None].mT * scale  # [B, Hkv, G, nq, nk]
    return mask_future((routing if bonus is None else routing + bonus[:, :, None, None]).flatten(1, 2))


def cell_bonus(v: Tensor, config: StemConfig, impl: str) -> Tensor | None:
    """Value term times its weight, which is added to scores or to the logits of cells: [B, Hkv, nk]; None is zero."""
    return config.value_weight * value_term(v, config, impl=impl) if config.value_weight else None


def routing_scale(head_dim: int, config: StemConfig, scale: float | None = None) -> float:
    """Factor between the group-sum product of a block pair and its routing score.

    "mean" divides by the B^2 / S samples and applies the softmax scale; "raw" divides by the (B / S)^2 cells only.
    """
    cells = (config.block_size // config.score_stride) ** 2
    if config.routing_scale == "raw":
        return 1.0 / cells
    return (head_dim**-0.5 if scale is None else scale) / (cells * config.score_stride)


def value_term(v: Tensor, config: StemConfig, *, impl: str = "torch") -> Tensor:
    """Value magnitude of each key block before its weight, >= 0: fp32 (fp64 for fp64 inputs) [B, Hkv, nk].

    "log" is max(0, log of the block's largest norm) (Eq. 7). "zscore" takes the largest norm of each stride group,
    z-scores its logarithm over the prompt (unbiased), and averages the positive part over the block's groups; "padded"
    includes the empty groups of a ragged tail in mean and standard deviation, as hpc-ops does.
    """
    if impl == "triton":
        from stem.kernels.value_norms import value_norms
    else:
        value_norms = group_value_norms
    return norms_term(value_norms(v, config.block_size, config.score_stride), v.shape[2], config)


def norms_term(norms: Tensor, kv_len: int, config: StemConfig) -> Tensor:
    """value_term from the largest norm of each group, [B, Hkv, nk, block_size / score_stride], 0 where no row."""
    if config.value_norm == "log":
        return norms.amax(-1).log().clamp_min(0)
    groups = norms.shape[2] * norms.shape[3]
    valid = groups if config.value_norm == "zscore_padded" else -(-kv_len // config.score_stride)
    log_norms = (norms + LOG_EPS).log().flatten(2)  # [B, Hkv, groups]
    sample = log_norms[..., :valid]
    deviation = sample.std(-1, correction=min(1, valid - 1), keepdim=True)
    bonus = ((log_norms - sample.mean(-1, keepdim=True)) / deviation.clamp_min(LOG_EPS)).clamp_min(0)  # empty groups: 0
    return bonus.unflatten(2, norms.shape[2:]).mean(-1)


def group_value_norms(v: Tensor, block_size: int, group_size: int) -> Tensor:
    """Largest L2 norm of each group of consecutive rows: [B, Hkv, nk, block_size / group_size], 0 where no row."""
    norms = pad_to_grid(v, block_size).to(compute_dtype(v.dtype)).norm(dim=-1)
    return norms.unflatten(2, (-1, block_size // group_size, group_size)).amax(-1)
