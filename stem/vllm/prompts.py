"""Length of the whole prompt of each request in a batch, which vLLM's attention metadata does not hold.

A chunk needs it, because the budget of a row depends on the whole prompt. vLLM's pull request #39745 would add it to
the metadata. Until then, methods of vLLM's two model runners are wrapped here. tests/serving guards their names.
"""

from __future__ import annotations

from functools import wraps

import numpy as np

_lengths: np.ndarray | None = None  # int32 [requests], of the batch that is being prepared
_query_starts: np.ndarray | None = None  # of that batch; None where the wrapper itself bounds its life


def prompt_lengths(common_metadata) -> np.ndarray | None:
    """Tokens of the whole prompt of each request in this batch, int32 [requests]; None for a dummy batch."""
    if _query_starts is not None and not np.shares_memory(common_metadata.query_start_loc_cpu.numpy(), _query_starts):
        return None
    return _lengths


def follow_prompts(vllm_config) -> None:
    """Wrap the model runner that this engine uses. Raises AttributeError if it does not have the wrapped method."""
    if vllm_config.device_config.device_type != "cpu" and getattr(vllm_config, "use_v2_model_runner", False):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "prepare_inputs", _after_preparing)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "_build_attention_metadata", _while_building)


def _wrap(owner: type, name: str, around) -> None:
    method = getattr(owner, name)
    if not hasattr(method, "is_followed"):
        wrapped = wraps(method)(lambda runner, *args, **kwargs: around(method, runner, *args, **kwargs))
        wrapped.is_followed = True
        setattr(owner, name, wrapped)


def _while_building(method, runner, *args, **kwargs):
    """Runner V1: the lengths are known while the metadata is built."""
    global _lengths, _query_starts
    _lengths, _query_starts = runner.input_batch.num_prompt_tokens, None
    try:
        return method(runner, *args, **kwargs)
    finally:
        _lengths = None


def _after_preparing(method, runner, *args, **kwargs):
    """Runner V2: the lengths are known from the prepared batch until the next one."""
    global _lengths, _query_starts
    batch = method(runner, *args, **kwargs)
    _lengths, _query_starts = runner.req_states.prompt_len.np[batch.idx_mapping_np], batch.query_start_loc_np
    return batch
