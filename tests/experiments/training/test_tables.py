"""stem.experiments.training.report: the generated table from made-up rows."""

from stem.experiments import records
from stem.experiments.training import report


def test_training(made_up_machine):
    common = dict(seed=0, task="text", trained="dense", place="position")
    rows = [
        dict(common, measure="loss", seq_len=length, inferred=inferred, value=value, count=count)
        for length in (512, 1024)
        for inferred, value, count in [("dense", 1.0, 3), ("dense", 2.0, 1), ("sliding_window", 4.0, 4)]
    ]
    recall = common | dict(measure="correct", place="distance", seq_len=512, inferred="dense", value=0.875, count=8)
    curve = common | dict(measure="loss", place="step", seq_len=512, inferred="dense", value=9.0, count=1)
    records.write_rows("training", [*rows, recall, curve], profile="full")
    text = report.training()
    assert "| trained with | read with | text loss [nats], 512 | text loss [nats], 1K | recall, 512 |" in text
    assert "| dense | dense | 1.250 | 1.250 | 87.5% |" in text
    assert "| dense | sliding_window | 4.000 | 4.000 | – |" in text
    adapted = common | dict(measure="loss", task="held_out_tarfile", seq_len=4096, start=2048, count=1)
    losses = [("pretrained", "dense", 1.0), ("pretrained", "stem", 1.2), ("adapt_dense", "dense", 0.8)]
    losses += [("adapt_dense", "stem", 1.0), ("adapt_stem", "dense", 0.8), ("adapt_stem", "stem", 0.85)]
    held_out = [adapted | dict(trained=name, inferred=read, value=loss) for name, read, loss in losses]
    records.write_rows("training", [*rows, recall, *held_out], profile="full")
    with_adaptation = report.training()
    assert with_adaptation.startswith(text) and "removes 75 % of the gap" in with_adaptation
