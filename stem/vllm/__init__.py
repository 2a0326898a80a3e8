r"""Stem's sparse prefill in vLLM, as a plug-in: nothing in vLLM is edited.

    vllm serve MODEL --attention-backend CUSTOM --block-size 128 \
        --scheduler-cls stem.vllm.AlignedScheduler \
        --additional-config '{"stem": {"density": 0.25, "min_tokens": 4096}}'

The same options go to `vllm.LLM(...)`. vLLM loads the plug-in in every process through the entry point group
`vllm.general_plugins`; the environment variable VLLM_PLUGINS="" turns it off. On a CPU, where vLLM ignores the choice
of a back end, the settings alone enable it. `stem.vllm.density()` tells what was computed, and so do the metrics
`stem:prefill_density`, `stem:kept_block_pairs` and `stem:causal_block_pairs` of the server's /metrics endpoint (not
with several API servers, --api-server-count).

Settings, the dict "stem" in additional_config:
    the fields of `stem.StemConfig`, and preset, a name for `StemConfig.preset`.
    min_tokens: Prompts with fewer tokens keep vLLM's own attention, default 0.
    dense_layers: Number of first layers that keep vLLM's own attention, or a list of layers; -1 is the last one.
    layers: Mapping from layer to the options that differ there, or to None for vLLM's own attention.

Prompts are sparse; decode, and rows that keep every block, run in vLLM's own attention. So do layers with a sliding
window, local chunks, attention sinks, ALiBi, soft-capped scores, an FP8 cache, no causal mask, or more than 256
dimensions a head; a log line names them. A model without any sparse layer, speculative decoding, context parallelism
and steps in microbatches raise ValueError.

Chunks of a prompt give the result of the whole prompt if they end between blocks and the value term is not z-scored (as
in the presets "angelslim" and "hpc_ops"). vLLM ends chunks anywhere, so use
`AlignedScheduler`. Without it, the rows of a cut block are selected in two parts; a warning says so.

In half precision, answers differ between engines by rounding alone, and sparse ones more than dense ones: a near tie of
two scores may turn, and the other block is kept. Notebook 09 shows how much.

A prefix that vLLM finds in its cache holds what its first request computed. The blocks that a row keeps depend on the
length of the whole prompt, so the same prefix of a longer prompt, or of one below min_tokens, would have been computed
a little differently. The same prompt again gives the same answer. `--no-enable-prefix-caching` makes every
answer independent of earlier requests.

On an NVIDIA GPU of sm_90, kernels read vLLM's pages where the block and the page have 128 tokens, and scores are means
(every preset but "adaptive"). A chunk then reads only its own keys for scores: sums over the blocks of earlier chunks
stay on the GPU until the prompt ends, an eighth of its keys and values. With compute="fp8", so do the keys and values
themselves, in FP8: another half. vLLM does not count this memory. Chunks in FP8 differ a little from the whole prompt:
the mean key and the scales of the values are those of the first chunk. Elsewhere, a request's keys and values are
copied from its pages in each layer.

vLLM does not hand the length of the whole prompt to attention (vLLM's pull request #39745 would); see prompts.py.
"""

from __future__ import annotations

from stem.vllm.report import Report, density

__all__ = ["SUPPORTED", "AlignedScheduler", "Report", "density", "register"]

SUPPORTED = ("0.26.0", "0.32.0")  # vLLM; 0.26.0 was run on an NVIDIA H200, and CI runs the CPU build of 0.32.0


def register() -> None:
    """Make Stem known to the vLLM of this process; vLLM calls it. May be called again.

    Raises RuntimeError if the version of vLLM is outside the supported range.
    """
    import vllm
    from packaging.version import InvalidVersion, Version

    try:
        release = Version(vllm.__version__).release[:2]
    except InvalidVersion:
        release = ()
    if not Version(SUPPORTED[0]).release[:2] <= release <= Version(SUPPORTED[1]).release[:2]:
        raise RuntimeError(
            f"stem.vllm supports vLLM {SUPPORTED[0]} to {SUPPORTED[1]}, found vLLM {vllm.__version__}: install one of "
            'these, or set VLLM_PLUGINS="" to run vLLM without Stem'
        )
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from stem.vllm import report, settings

    report.share_counts()
    if current_platform.is_cpu():  # vLLM always takes CPU_ATTN there
        register_backend(AttentionBackendEnum.CPU_ATTN, "stem.vllm.cpu.StemCPUBackend")
    elif current_platform.is_cuda():
        register_backend(AttentionBackendEnum.CUSTOM, "stem.vllm.cuda.StemCUDABackend")
        settings.require_custom_backend(current_platform)


def __getattr__(name: str):
    if name == "AlignedScheduler":  # imports vLLM
        from stem.vllm.scheduler import AlignedScheduler

        return AlignedScheduler
    raise AttributeError(f"module 'stem.vllm' has no attribute {name!r}")
