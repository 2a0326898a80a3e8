"""Stem attention in Hugging Face models: sparse prefill, dense decode, the model's own code untouched.

    from transformers import AutoModelForCausalLM
    import stem

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-8B", dtype="bfloat16", device_map="cuda")
    stem.hf.enable(model, stem.StemConfig(density=0.25))
    model.generate(**inputs)                 # prefill is sparse from here on
    stem.hf.density(model)                   # one row per layer: what was really computed

A call with several queries is prefill and sparse; assisted decoding verifies its candidates in such calls. A call with
one query is decode and dense (SDPA). Dense in prefill too: sliding-window layers, layers whose config is None, layers
whose heads have more than 256 dimensions, and prompts with padding between their tokens. The report tells which.
"""

from stem.hf.forward import NAME, stem_attention_forward
from stem.hf.padding import stem_mask
from stem.hf.report import Report, Selector
from stem.hf.switch import density, disable, enable, stem_prefill

__all__ = [
    "NAME",
    "Report",
    "Selector",
    "density",
    "disable",
    "enable",
    "stem_attention_forward",
    "stem_mask",
    "stem_prefill",
]
