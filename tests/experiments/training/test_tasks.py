"""The tasks: rows that any process can make, and answers that the inputs really hold."""

import pytest
import torch

from stem.experiments.training.tasks import ANSWER, IGNORED, NUM_VALUES, RECORD, TASKS, corpus, make_batch


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seq_len", [32, 33, 63, 512, 1000])
def test_shapes_ids_and_answers(name, seq_len):
    batch = make_batch([name], range(8), seq_len)
    assert batch.inputs.shape == batch.targets.shape == batch.distance.shape == (8, seq_len)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    asked = batch.targets != IGNORED
    assert asked.any(dim=1).all(), "every row asks something"
    assert batch.inputs.min() >= 0 and batch.inputs.max() < 256
    assert batch.targets[asked].min() >= 0 and batch.targets[asked].max() < 256
    assert (batch.distance[~asked] == 0).all()


def test_the_answer_stands_where_distance_says():
    batch = make_batch(["recall"], range(16), 257)
    row, asking = (batch.targets != IGNORED).nonzero(as_tuple=True)
    back = batch.distance[row, asking]
    assert (back > 0).all() and (asking - back >= 0).all(), "the answer is in the past and in the row"
    evidence, answer = batch.inputs[row, asking - back], batch.targets[row, asking]
    assert torch.equal(ANSWER + (evidence - RECORD) % NUM_VALUES, answer)


def test_answers_are_never_inputs():
    batch = make_batch(["recall"], range(16), 256)
    answers = batch.targets[batch.targets != IGNORED]
    assert not torch.isin(batch.inputs, answers.unique()).any()


def test_answers_spread_over_the_values_and_the_distances():
    batch = make_batch(["recall"], range(200), 256)
    asked = batch.targets != IGNORED
    shares = torch.bincount(batch.targets[asked] - ANSWER, minlength=NUM_VALUES) / asked.sum()
    assert (shares - 1 / NUM_VALUES).abs().max() < 0.05, "always saying one value scores at chance"
    assert batch.distance.max() > 240 and (batch.distance[asked] < 64).any()


def test_a_row_depends_on_its_number_alone():
    names = ["text", "recall"]
    whole = make_batch(names, range(12), 128, seed=3)
    parts = [make_batch(names, range(start, start + 3), 128, seed=3) for start in (0, 3, 6, 9)]
    for field in ("inputs", "targets", "distance", "task"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    assert whole.task.tolist() == [0, 1] * 6


@pytest.mark.parametrize("change", [{"seed": 1}, {"split": "validation"}])
@pytest.mark.parametrize("name", TASKS)
def test_seed_and_split_change_the_rows(name, change):
    assert not torch.equal(make_batch([name], range(4), 128).inputs, make_batch([name], range(4), 128, **change).inputs)


def test_text_is_ascii_and_validation_text_is_kept_out_of_training():
    train, validation = (bytes(corpus(split).astype("uint8")) for split in ("train", "validation"))
    assert max(train) < 128 and max(validation) < 128
    assert len(train) > 1_000_000 and len(validation) > 100_000
    assert b"class ArgumentParser(" in validation and b"class ArgumentParser(" not in train


def test_text_targets_are_the_next_byte():
    batch = make_batch(["text"], range(4), 64)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"names": ["reqall"]}, "reqall"),
        ({"names": []}, "accepted: text"),
        ({"split": "test"}, "split must be one of 'train', 'validation', got 'test'"),
        ({"seq_len": 31}, "seq_len must be >= 32, got 31"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_batch(**{"names": ["text"], "rows": range(2), "seq_len": 64} | arguments)
