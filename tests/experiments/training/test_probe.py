"""The probe: what is averaged, over which bins, and that it reads with the attention it was asked for."""

import math

import pandas as pd
import pytest
import torch

import stem
from stem.experiments.training import probe, tasks
from stem.experiments.training.config import TrainConfig
from stem.experiments.training.model import LanguageModel, ModelSize
from stem.experiments.training.train import train

SIZE = ModelSize(layers=1, width=32, heads=2, kv_heads=1, hidden=48)
SPARSE = stem.StemConfig(block_size=16, score_stride=4, density=0.4, sink_blocks=1, local_blocks=1)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and sums in a fixed order are equal to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Oracle(torch.nn.Module):
    """Answers every recall question by looking the record up; believes in byte 0 elsewhere."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs):
        logits = torch.zeros(*inputs.shape, tasks.VOCAB_SIZE)
        for row, tokens in enumerate(inputs.tolist()):
            values = {}
            for position, token in enumerate(tokens):
                if tasks.RECORD <= token < tasks.QUESTION:
                    key, values_key = divmod(token - tasks.RECORD, tasks.NUM_VALUES)
                    values[key] = values_key
                elif token >= tasks.QUESTION:
                    logits[row, position, tasks.ANSWER + values[token - tasks.QUESTION]] = 100.0
        return logits


def test_an_oracle_answers_everything_at_every_distance():
    frame = probe.read(Oracle(), "recall", 128, 3)
    assert frame.correct.all() and frame.loss.max() < 1e-4
    assert len(frame) == 3 * (128 - tasks.NUM_KEYS)
    assert frame.distance.between(1, 127).all()


def test_an_untrained_model_is_at_chance():
    frame = probe.read(LanguageModel(SIZE).eval(), "text", 256, 2)
    assert len(frame) == 512 and set(frame.distance) == {0}
    assert frame.loss.mean() == pytest.approx(math.log(tasks.VOCAB_SIZE), abs=0.5)


def test_bins_are_half_open_and_weighted_means_survive_binning():
    frame = pd.DataFrame({"step": range(1, 11), "loss": [float(i) for i in range(1, 11)]})
    rows = probe.binned(frame, "loss", "step", [1, 4, 9, 11, 20])
    assert [(row["start"], row["stop"], row["count"]) for row in rows] == [(1, 4, 3), (4, 9, 5), (9, 11, 2)]
    assert [row["value"] for row in rows] == [2.0, 6.0, 9.5]
    assert sum(row["value"] * row["count"] for row in rows) / 10 == pytest.approx(frame.loss.mean()) == 5.5


def test_rows_of_a_run(tmp_path):
    config = TrainConfig(
        out=str(tmp_path), attention="stem", steps=6, batch_size=4, seq_len=64, size=SIZE, stem_config=SPARSE,
        device="cpu",
    )  # fmt: skip
    model = train(config)
    curve = pd.DataFrame(probe.curve_rows(config, num_bins=3))
    assert set(curve.measure) == {"loss_text", "loss_recall", "grad_norm", "spikes", "largest_spike"}
    assert (curve[~curve.measure.str.contains("spike")]["count"] == 2).all()

    own = pd.DataFrame(probe.evaluation_rows(model, config, [64, 128], num_rows=2))
    model.attention = "dense"
    dense = pd.DataFrame(probe.evaluation_rows(model, config, [64, 128], num_rows=2))
    assert set(own.measure) == {"loss", "correct"} and set(own.seq_len) == {64, 128}
    assert set(own.columns) == set(curve.columns)
    loss = own.measure == "loss"
    assert not own[loss].value.equals(dense[loss].value), "another attention reads differently"
    assert own[loss & (own.seq_len == 64)]["count"].sum() == own[loss & (own.seq_len == 128)]["count"].sum() == 256


def test_a_spike_is_a_jump_over_the_steps_before(tmp_path):
    norms = [1.0] * 20 + [3.9] + [1.0] * 10 + [9.0] + [1.0] * 8
    pd.DataFrame(dict(step=range(1, 41), loss_text=0.0, grad_norm=norms)).to_csv(tmp_path / "log.csv", index=False)
    rows = pd.DataFrame(probe.curve_rows(TrainConfig(out=str(tmp_path), steps=40))).set_index("measure")
    assert rows.value["spikes"] == 1 and rows.value["largest_spike"] == pytest.approx(9.0)
