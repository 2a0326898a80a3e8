"""A scheduler of vLLM whose prompt chunks end between pages, so that they give the result of the whole prompt."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler


class AlignedScheduler(AsyncScheduler):
    """vLLM's scheduler with chunks of prompts that end at a page or at the prompt's end.

    `--scheduler-cls stem.vllm.AlignedScheduler`. A step has a budget of tokens, max_num_batched_tokens, which decoding
    requests share. A prompt waits for the next step where less than a page of it is left.

    Raises ValueError if a whole page does not fit into a step.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        most = {
            "max_num_batched_tokens": self.max_num_scheduled_tokens,
            "long_prefill_token_threshold": self.scheduler_config.long_prefill_token_threshold or self.block_size,
        }
        for name, tokens in most.items():
            if tokens < self.block_size:
                raise ValueError(f"{name} must be at least a page of {self.block_size} tokens, got {tokens}")
        self._is_mamba_aligned = self.need_mamba_block_aligned_split
        self.need_mamba_block_aligned_split = True  # vLLM's hook for chunks of models with a recurrent state

    def _mamba_block_aligned_split(self, request, num_new_tokens: int, local: int = 0, external: int = 0) -> int:
        """Tokens of a request in this step, at most num_new_tokens, after `local` and `external` cached ones."""
        if self._is_mamba_aligned:
            num_new_tokens = super()._mamba_block_aligned_split(request, num_new_tokens, local, external)
        start = request.num_computed_tokens + local + external
        end = start + num_new_tokens
        if end >= request.num_prompt_tokens:  # the prompt ends in this step, or is already complete
            return num_new_tokens
        return max(0, end // self.block_size * self.block_size - start)
