"""Selection quality: every method reads the same windows at the density that was asked for."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stem import StemConfig, pretrained
from stem.experiments import records
from stem.experiments.long_context import __main__, loss, samples

KINDS = ("prose", "licences")
STUDY = loss.LossStudy(("stem", "sliding_window", "adaptive"), 320, 2, (0.5,), (16,), KINDS, adaptive_densities=(0.4,))


@pytest.fixture(scope="module")
def found():
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))
    torch.manual_seed(1)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, initializer_range=0.3, **sizes)
    return list(loss.rows(STUDY, LlamaForCausalLM(config).eval(), tokenizer, "tiny", show=lambda line: None))


def test_rows_are_those_of_the_study(found):
    asked = [("stem", 0.5), ("sliding_window", 0.5), ("adaptive", 0.5), ("adaptive", 0.4)]
    assert [(row["method"], row["asked"], row["text"]) for row in found] == [
        (*x, kind) for x in asked for kind in KINDS
    ]
    assert all(row["gap"] == pytest.approx(row["loss"] - row["dense_loss"], abs=2e-5) for row in found)
    assert len({row["dense_loss"] for row in found}) == len(KINDS)


def test_densities_are_those_asked_for(found):
    for row in found:
        # "adaptive" gets its threshold from other texts
        assert row["density"] == pytest.approx(row["asked"], abs=0.1 if row["method"] == "adaptive" else 0.02)
        assert (row["threshold"] is not None) == (row["method"] == "adaptive")


def test_calibration_reads_other_texts_than_the_rows():
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))
    prompts = samples.calibration_windows(tokenizer, 256, 2)
    windows = samples.document_windows(tokenizer, 256, 2, KINDS)
    read = {tuple(ids.tolist()) for ids in torch.cat(list(windows.values()))}
    assert [prompt.shape for prompt in prompts] == [(2, 256), (2, 256)]
    assert not read & {tuple(ids.tolist()) for ids in torch.cat(prompts)}


def test_the_published_method_is_the_paper_preset():
    assert loss.selector("stem", 0.3, 64, None, None) == StemConfig.preset("paper", density=0.3, block_size=64)


def test_a_run_of_some_methods_and_block_sizes_leaves_the_other_rows(monkeypatch, tmp_path, capsys):
    def rows(study, model, tokenizer, name):
        about = dict(asked=0.3, text="prose", tokens=320, model=name)
        return (dict(about, method=method, block_size=size) for method in study.names for size in study.block_sizes)

    def measured(*options):
        __main__.main(["loss", "--profile", "full", *options])
        found = records.read_rows("long_context/loss")
        return [*zip(found.method, found.block_size, strict=True)]

    monkeypatch.setenv("STEM_RESULTS", str(tmp_path))
    monkeypatch.setattr(records, "machine_name", lambda: "made-up")
    monkeypatch.setattr(records, "repository_root", lambda: tmp_path)
    monkeypatch.setattr(loss, "rows", rows)
    monkeypatch.setattr(loss, "load", lambda name: (None, None, "tiny"))
    everything = [(name, size) for name in loss.STUDIES["full"].names for size in (128, 64, 32)]
    assert measured() == everything
    again = [("stem", 64), ("adaptive", 64)]
    assert measured("--methods", "stem", "adaptive", "--block-sizes", "64") == [
        *(pair for pair in everything if pair not in again),
        *again,
    ]
    with pytest.raises(SystemExit):
        measured("--methods", "sten")
    assert "invalid choice: 'sten'" in capsys.readouterr().err
