"""Next-token losses: equal to those of all logits, with gradients; models that cap their logits are refused."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from stem.experiments.losses import check_output_embedding, token_losses


@pytest.fixture
def model():
    torch.manual_seed(0)
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=512, **size)).eval()


@pytest.mark.parametrize("count", [100, 37])
def test_losses_and_gradients_are_those_of_all_logits(model, count):
    tokens = torch.randint(0, 128, (2, 101))
    ids, targets = tokens[:, :-1], tokens[:, 1 : count + 1]
    expected = F.cross_entropy(model(ids).logits[:, :count].transpose(1, 2), targets, reduction="none")
    found = token_losses(model, ids, targets, chunk=32)
    torch.testing.assert_close(found, expected)
    weights = list(model.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(losses.mean(), weights) for losses in (found, expected)))


def test_a_model_that_caps_its_logits_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: hidden @ model.lm_head.weight.T)
    check_output_embedding(model)
    handle = model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits.tanh()))
    try:
        with pytest.raises(ValueError, match="LlamaForCausalLM"):
            check_output_embedding(model)
    finally:
        handle.remove()
