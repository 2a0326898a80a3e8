"""Context extension: what a training sequence holds, that training lowers the loss, and that the result loads."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stem import pretrained
from stem.experiments import documents, records
from stem.experiments.long_context import __main__, comparison, extension, measures, mixture
from stem.experiments.training.train import learning_rate

TEXT = "\n".join(documents.stdlib_documents(("argparse", "typing")).values())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))


@pytest.fixture(scope="module")
def made(tokenizer):
    return mixture.Mixture(tokenizer, TEXT, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    torch.manual_seed(1)
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3)
    rope = {"rope_type": "default", "rope_theta": 1e5}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **sizes)
    config.max_position_embeddings, config.rope_parameters = 256, rope
    folder = tmp_path_factory.mktemp("tiny") / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_every_answer_of_a_sequence_follows_from_its_text(made, tokenizer):
    found = {"facts": 0, "chains": 0}
    for index in range(40):
        ids, answers = made.sequence(index, 1024)
        assert ids.shape == answers.shape == (1025,) and answers.any() and not answers[:100].any()
        text = tokenizer.decode(ids)
        context, *questions = re.split(r"\n(?=What (?:is|are all) the |Question: )", text)
        assert questions
        for question in questions:
            if question.startswith("Question"):
                value = re.search(r"assigned the value (\d+)", question)[1]
                (name,) = re.findall(rf"VAR (\w+) = {value}", context)
                names = [name]
                while follower := re.search(rf"VAR (\w+) = VAR {names[-1]} ", context):
                    names.append(follower[1])
                assert question.endswith(f"they are: {', '.join(names)}")
                found["chains"] += 1
            else:
                keys, said = re.search(r" for (.+?) mentioned .+ text (?:is|are) ([^ ].*)$", question, re.S).groups()
                values = [re.findall(rf" for {key} is: (\S+)\.\n", context) for key in re.split(r", and |, ", keys)]
                assert sorted(said.split(", ")) == sorted(value for of in values for value in of)
                found["facts"] += 1
    assert min(found.values()) > 2


def test_marks_cover_the_answers_and_nothing_else(made, tokenizer):
    for index in range(10):
        ids, answers = made.sequence(index, 768)
        starts = (answers[1:] & ~answers[:-1]).nonzero()[:, 0] + 1
        for start in starts.tolist():
            assert re.search(r" (is|are|are:)$", tokenizer.decode(ids[start - 3 : start]))
        assert answers[-1]


def test_sequences_depend_on_seed_index_and_length_alone(made, tokenizer):
    again = mixture.Mixture(tokenizer, TEXT, seed=3)
    assert torch.equal(made.sequence(5, 512)[0], again.sequence(5, 512)[0])
    assert not torch.equal(made.sequence(5, 512)[0], made.sequence(6, 512)[0])
    assert not torch.equal(made.sequence(5, 512)[0], mixture.Mixture(tokenizer, TEXT, seed=4).sequence(5, 512)[0])
    batch = made.batch(2, 512, 3)
    assert torch.equal(batch.ids[1], made.sequence(7, 512)[0]) and batch.answers.shape == (3, 513)


def test_training_text_leaves_out_what_is_evaluated():
    text = mixture.training_text(600_000)
    assert len(text) >= 600_000
    held_out = documents.stdlib_documents(("argparse", "ast"))
    assert not any(source[2000:2400] in text for source in held_out.values())


def test_the_rate_warms_up_and_falls_to_a_tenth():
    config = extension.ExtensionConfig(stages=((512, 100, 1),), warmup=10, lr=1.0)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[99] == pytest.approx(0.1, abs=0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_short_extension_learns_and_loads_with_its_base_and_length(tiny, tmp_path):
    stages = ((256, 6, 2), (512, 6, 1))
    config = extension.ExtensionConfig(model=tiny, rope_theta=3e6, stages=stages, lr=1e-2, warmup=2, text_tokens=64)
    told = []
    model, tokenizer, log = extension.extend(config, TEXT, told.append)
    assert [row["length"] for row in log] == [256] * 6 + [512] * 6 and "step 12/12, 512 tokens" in told[-1]
    assert log[-1]["text_loss"] < log[0]["text_loss"] - 0.5
    folder = extension.save(model.cpu(), tokenizer, tmp_path / "long")
    assert extension.save(model, tokenizer, tmp_path / "long") == folder and list(tmp_path.iterdir()) == [folder]
    loaded, _ = pretrained.load(str(folder), device="cpu")
    assert loaded.config.rope_parameters["rope_theta"] == 3e6 and loaded.config.max_position_embeddings == 512
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    rows = extension.curve_rows(config, log, 4)
    assert len(rows) == 2 * 4 and sum(row["count"] for row in rows) == 2 * 12
    mean = sum(row["answer_loss"] for row in log[:3]) / 3
    assert rows[0]["measure"] == "answer_loss" and rows[0]["value"] == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stages": ()}, "stages"),
        ({"stages": ((64, 1, 1),)}, "stages"),
        ({"lr": 0}, "lr"),
        ({"rope_theta": -1}, "theta"),
    ],
)
def test_bad_recipes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        extension.ExtensionConfig(**change)


def test_the_command_trains_saves_compares_and_writes_rows(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("STEM_RESULTS", str(tmp_path / "results"))

    def run(study, model, tokenizer, name, seed, *, limit_s, show, save):
        save(rows := [dict(model=name, asked=(study.names, limit_s))])
        return rows

    monkeypatch.setattr(comparison, "run", run)
    monkeypatch.setattr(measures, "load", lambda name: (None, None, Path(name).name))
    monkeypatch.setattr(extension, "SMOKE", dict(model=tiny, stages=((256, 2, 1),), warmup=1, text_tokens=8))
    options = ["--seed", "7", "--limit", "9", "--model", tiny]
    __main__.main(["extension", "--out", str(tmp_path / "long"), *options])
    rows = records.read_rows("long_context/extension").query("profile == 'smoke'")
    assert set(rows.measure.dropna()) == set(extension.LOSSES) and set(rows.seed.dropna()) == {7}
    assert dict(rows[["model", "asked"]].dropna().to_numpy()) == {
        Path(tiny).name: "(('dense',), 9.0)",
        "long": "(('stem',), 9.0)",
    }
