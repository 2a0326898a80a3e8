"""The small model: causal, equal to dense at full density under every pattern, and trainable through each."""

import dataclasses
import inspect

import pytest
import torch
import torch.nn.functional as F

import stem
from stem import patterns
from stem.experiments.training import model as model_module
from stem.experiments.training.model import LanguageModel, ModelSize, rotary_angles, rotate
from stem.experiments.training.tasks import VOCAB_SIZE

SIZE = ModelSize(layers=2, width=64, heads=4, kv_heads=2, hidden=96)
SPARSE = stem.StemConfig(block_size=16, score_stride=4, density=0.4, sink_blocks=1, local_blocks=1)
FULL = stem.StemConfig(block_size=16, score_stride=4, density=1.0, sink_blocks=1, local_blocks=1)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (batch, length))


def test_the_module_is_short():
    assert len(inspect.getsource(model_module).splitlines()) <= 200


@pytest.mark.parametrize("length", [1, 15, 100])
def test_logits_have_the_shape_of_the_tokens(length):
    assert LanguageModel(SIZE)(tokens(2, length)).shape == (2, length, VOCAB_SIZE)


def test_number_of_weights():
    width, kv_width, hidden = SIZE.width, SIZE.kv_heads * SIZE.head_dim, SIZE.hidden
    layer = width * (width + 2 * kv_width) + width * width + 3 * width * hidden + 2 * width
    assert LanguageModel(SIZE).num_weights() == VOCAB_SIZE * width + SIZE.layers * layer + width


@pytest.mark.parametrize("name", patterns.names())
def test_every_pattern_at_full_density_equals_dense(name):
    model, read = LanguageModel(SIZE, stem_config=FULL).eval(), tokens(2, 70)
    with torch.no_grad():
        dense = model(read)
        model.attention = name
        torch.testing.assert_close(model(read), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", patterns.names())
def test_every_pattern_trains(name):
    model, read = LanguageModel(SIZE, name, SPARSE), tokens(2, 96)
    F.cross_entropy(model(read).flatten(0, 1), read.flatten()).backward()
    for weight_name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), weight_name
        assert weight.grad.abs().max() > 0, weight_name


def test_sparse_attention_changes_the_function_and_attention_may_be_switched():
    model, read = LanguageModel(SIZE, "dense", SPARSE).eval(), tokens(1, 160)
    with torch.no_grad():
        dense = model(read)
        model.attention = "stem"
        sparse = model(read)
        model.attention = "dense"
        assert torch.equal(model(read), dense)
    torch.testing.assert_close(sparse[:, :16], dense[:, :16], rtol=1e-4, atol=1e-4)  # the first block is whole
    assert (sparse - dense).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["dense", "stem"])
def test_no_position_sees_a_later_block(attention):
    model, read = LanguageModel(SIZE, attention, SPARSE).eval(), tokens(1, 128)
    changed = read.clone()
    changed[:, 96:] = (changed[:, 96:] + 1) % VOCAB_SIZE
    with torch.no_grad():
        torch.testing.assert_close(model(changed)[:, :96], model(read)[:, :96])


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    cos, sin = rotary_angles(40, SIZE, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, SIZE.head_dim).expand(2, 1, 1, 40, SIZE.head_dim)
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    logits = (turned_q @ turned_k.mT)[0, 0]
    torch.testing.assert_close(logits[5:, 5:], logits[:-5, :-5], rtol=1e-4, atol=1e-4)


def test_impl_is_passed_on():
    """FlexAttention and the gathering implementation sum in another order."""
    read = tokens(1, 96)
    torch.manual_seed(0)
    model = LanguageModel(SIZE, "stem", SPARSE).eval()
    with torch.no_grad():
        gathered = model(read)
        model.impl = "flex"
        flexed = model(read)
    torch.testing.assert_close(flexed, gathered, rtol=1e-4, atol=1e-4)
    assert not torch.equal(flexed, gathered)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 65}, "width=65"),
        ({"kv_heads": 3}, "heads=4"),
        ({"width": 36}, "width=36"),
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"layers": 1.5}, "layers must be an int >= 1, got 1.5"),
    ],
)
def test_bad_sizes_are_named(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        dataclasses.replace(SIZE, **change)


def test_unknown_attention_is_named():
    with pytest.raises(ValueError, match="attention must be one of .*'stem'.*, got 'stemm'"):
        LanguageModel(SIZE, "stemm")
