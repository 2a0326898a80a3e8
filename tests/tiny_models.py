"""Small random transformers models, and attention through a token mask to compare their sparse layers with."""

import math

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import stem

SIZES = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SLIDING = dict(sliding_window=24)
GEMMA3 = dict(
    head_dim=256, num_key_value_heads=1, layer_types=["sliding_attention"] * 2 + ["full_attention"], **SLIDING
)
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": dict(head_dim=32),
    "Qwen3Moe": dict(head_dim=16, **MOE),
    "Mistral": dict(sliding_window=None),
    "Gemma3Text": GEMMA3,
    "Phi3": {},
    "GPTNeoX": dict(num_key_value_heads=4),
    "Olmo2": {},
    "SmolLM3": {},
    "Phi": dict(num_key_value_heads=4),
    "Starcoder2": dict(sliding_window=None),
    "Cohere": dict(logit_scale=1.0),
    "Mixtral": dict(sliding_window=None, num_local_experts=4, num_experts_per_tok=2),
    "Glm": dict(head_dim=16),
    "Ernie4_5": dict(head_dim=16),
    "GPT2": dict(n_positions=512, n_embd=64, n_layer=3, n_head=4),
    "Gemma": dict(head_dim=40, num_key_value_heads=1),
    "Granite": dict(attention_multiplier=0.1),
    "GptOss": dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, **SLIDING),
    "GraniteSWA": dict(head_dim=16, attention_multiplier=0.25, **SLIDING),
}
SPARSE = stem.StemConfig(density=0.4, block_size=16, score_stride=4, sink_blocks=1, local_blocks=1)
FIXED = SPARSE.replace(density=None, k_start=3, decay=1.0)  # the budget of a row does not depend on the prompt's length
DENSE = SPARSE.replace(density=1.0)


def build(family="Llama", seed=0, **overrides):
    """A small random model in eval mode; the same seed gives the same weights."""
    torch.manual_seed(seed)
    settings = {**SIZES, **FAMILIES.get(family, {}), **overrides}
    config = getattr(transformers, f"{family}Config")(**settings)
    classes = {"Gemma3Text": "Gemma3ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, classes.get(family, f"{family}ForCausalLM"))(config).eval()
    for parameter in model.parameters():  # far from the tiny initial values, so that attention is far from uniform
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter.shape[1]))
    for module in model.modules():  # sinks that take a part of the softmax, another one in each head
        if getattr(module, "sinks", None) is not None:
            nn.init.normal_(module.sinks, std=2.0)
    return model


def tokens(length=150, batch=1, seed=1):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits


def masked_forward(module, query, key, value, attention_mask, scaling=None, s_aux=None, **kwargs):
    """Attention through a token mask in fp64, which sparse layers are compared with."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    token_mask, value_dim = attention_mask, value.shape[3]
    value = nn.functional.pad(value, (0, query.shape[3] - value_dim))
    if getattr(module, "sliding_window", None) is None:
        scores = stem.block_scores(query, key, value, SPARSE, scale=scale)
        budget = stem.block_budget(scores.shape[-1], SPARSE)
        selection = stem.select_blocks(scores, budget, SPARSE, q_len=query.shape[2], kv_len=key.shape[2])
        token_mask = selection.to_token_mask()
    if token_mask is None:
        token_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    token_mask = token_mask.expand(query.shape[0], query.shape[1], -1, -1)
    doubles = query.double(), key.double(), value.double()
    out = stem.reference.masked_attention(*doubles, token_mask, scale, sinks=s_aux)
    return out[..., :value_dim].to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("masked_for_tests", masked_forward)
AttentionMaskInterface.register("masked_for_tests", sdpa_mask)
