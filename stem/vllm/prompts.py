"""Name and prompt length of each request in a batch, which vLLM's attention metadata does not hold.

A chunk needs the length of the whole prompt, because the budget of a row depends on it. vLLM's pull request #39745
would add it to the metadata. Until then, methods of vLLM's two model runners are wrapped here. tests/serving guards
their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import NamedTuple

import numpy as np


class Prompts(NamedTuple):
    """The requests of a batch, in its order."""

    lengths: np.ndarray  # int32, tokens of the whole prompt
    names: Sequence[str]  # vLLM's


_prompts: Prompts | None = None  # of the batch that is being prepared
_query_starts: np.ndarray | None = None  # of that batch; None where the wrapper itself bounds its life


def prompts_of(common_metadata) -> Prompts | None:
    """The prompts of this batch; None for a dummy batch."""
    if _query_starts is not None and not np.shares_memory(common_metadata.query_start_loc_cpu.numpy(), _query_starts):
        return None
    return _prompts


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
    """Runner V1: the prompts are known while the metadata is built."""
    global _prompts, _query_starts
    batch = runner.input_batch
    _prompts, _query_starts = Prompts(batch.num_prompt_tokens, batch.req_ids), None
    try:
        return method(runner, *args, **kwargs)
    finally:
        _prompts = None


def _after_preparing(method, runner, *args, **kwargs):
    """Runner V2: the prompts are known from the prepared batch until the next one."""
    global _prompts, _query_starts
    batch = method(runner, *args, **kwargs)
    lengths = runner.req_states.prompt_len.np[batch.idx_mapping_np]
    _prompts, _query_starts = Prompts(lengths, batch.req_ids), batch.query_start_loc_np
    return batch
