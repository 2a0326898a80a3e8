"""Stem attention in Hugging Face models: sparse prefill, dense decode, the model's own code untouched.

    from transformers import AutoModelForCausalLM
    import stem

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", dtype="bfloat16", device_map="cuda")
    stem.hf.enable(model, stem.StemConfig(density=0.25))
    model.generate(**inputs)                 # prefill is sparse from here on
    stem.hf.density(model)                   # one row per layer: what was really computed

A call with several queries is prefill and sparse. A call with one query is decode and dense (SDPA). These stay dense in
prefill: layers whose config is None, layers whose heads have more than 256 dimensions, and prompts with padding between
their tokens. Sliding-window layers keep their own attention. The report tells which attention ran. Attention sinks
(`s_aux`) are kept in all of these calls; a decode step of such a model copies the layer's keys and values once.

`enable` accepts every causal model that attends through transformers' AttentionInterface. Small random models of these
families are tested: Llama, Qwen2, Qwen3 and its MoE, Mistral, Mixtral, Gemma 1 and 3, Phi-1 to 3, GPT-NeoX, GPT-2,
OLMo-2, SmolLM3, StarCoder2, Cohere, GLM, Ernie 4.5, Granite, gpt-oss, MiMo-V2-Flash, DeepSeek-V3, and the attention
layers of Qwen3-Next. At density 1 their logits are the model's own; below it they equal a reference that attends
through a token mask.
Tests also cover padded batches, chunked prefill, cached prefixes, dynamic, static, hybrid and quantised caches, LoRA,
gradient checkpointing, device_map, and torch.compile(model, fullgraph=True) under torch.no_grad().

Assisted decoding verifies its candidates in calls with several queries, so it can give other text than greedy decoding.
Offloaded caches of transformers 5.17 gave other tokens than its dynamic cache on an H200, with SDPA too.
"""

from stem.hf.forward import NAME, stem_attention_forward
from stem.hf.padding import stem_mask
from stem.hf.report import Report, Selector
from stem.hf.switch import density, disable, enable, stem_prefill

__all__ = ["NAME", "Report", "Selector", "density", "disable", "enable", "stem_attention_forward", "stem_mask"]
__all__ += ["stem_prefill"]
