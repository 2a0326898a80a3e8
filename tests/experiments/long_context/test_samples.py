"""Samples of exact length: prompts, document windows, and the cache of RULER samples."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from stem.experiments import documents
from stem.experiments.long_context import ruler, samples


def test_prompts_have_the_length_they_say_and_end_with_the_answer(ruler_rows, tokenizer):
    prompts = samples.exact_prompts("niah_multikey_1", tokenizer, 512, 3)
    assert prompts.ids.shape == (3, 512)
    for ids, count, answers in zip(prompts.ids, prompts.answer_tokens, prompts.answers, strict=True):
        assert tokenizer.decode(ids[-count:]) == " " + ", ".join(answers)
        assert tokenizer.decode(ids).endswith(f"They are {', '.join(answers)}")
    several = samples.exact_prompts("niah_multivalue", tokenizer, 512, 2)
    assert tokenizer.decode(several.ids[1]).endswith("They are two, one")  # in the order of the text


def test_what_a_tokenizer_begins_a_text_with_stands_at_the_start_and_nowhere_else(ruler_rows, tokenizer, monkeypatch):
    mark = tokenizer.bos_token
    marking = copy.deepcopy(tokenizer)
    marking.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokenizer.bos_token_id)]
    )
    monkeypatch.setitem(documents.KINDS, "prose", (lambda: documents.prose()[:20_000],))
    monkeypatch.setattr(samples, "_TOKENS", {})
    ways = [
        lambda of: samples.exact_prompts("niah_multikey_1", of, 256, 3).ids,
        lambda of: samples.document_windows(of, 256, 3, ["prose"])["prose"],
    ]
    for made in ways:
        marked, plain = made(marking), made(tokenizer)
        assert marked.shape == plain.shape == (3, 256)
        assert (marked == tokenizer.bos_token_id).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
        assert not (plain == tokenizer.bos_token_id).any()


def test_tasks_without_an_order_of_answers_and_lengths_that_do_not_fit_are_named(ruler_rows, tokenizer):
    with pytest.raises(ValueError, match="task must be one of .*'ruler_cwe'"):
        samples.exact_prompts("ruler_cwe", tokenizer, 512, 1)
    with pytest.raises(ValueError, match="length=8: a sample of niah_single_1 has"):
        samples.exact_prompts("niah_single_1", tokenizer, 8, 1)


@pytest.mark.parametrize("kind", list(documents.KINDS))
def test_every_kind_of_document_is_long_and_repeats_no_text(kind):
    """Eight windows of 32K tokens of Qwen2.5's tokenizer have at most 4.8 characters a token in every kind."""
    texts = [text() for text in documents.KINDS[kind]]
    assert len(texts[0]) > 300_000 and sum(map(len, texts)) > 4.8 * 8 * 2**15
    parts = [part for text in texts for part in text.split("\n\n\n") if len(part) > 20_000]
    assert len(parts) == len(set(parts))


def test_windows_do_not_overlap():
    found = documents.windows(range(1000), 90, 11)
    assert [len(of) for of in found] == [90] * 11 and found[1][0] == 90
    with pytest.raises(ValueError, match="count=12 windows of length=90 need 1080 tokens, got 1000"):
        documents.windows(range(1000), 90, 12)


def test_windows_read_the_next_text_of_a_kind_only_where_they_need_its_tokens(tokenizer, monkeypatch):
    texts = documents.prose()[:4_000], "\n".join(documents.licences()[:4_000].split()), "never read"
    monkeypatch.setitem(documents.KINDS, "prose", tuple((lambda text=text: text) for text in texts))
    first, second, _ = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    short = samples.document_windows(tokenizer, len(first) // 2, 2, ("prose",))["prose"]
    assert short.tolist() == [first[: len(first) // 2], first[len(first) // 2 :][: len(first) // 2]]
    both = samples.document_windows(tokenizer, (len(first) + len(second)) // 2, 2, ("prose",))["prose"]
    assert both.flatten().tolist() == (first + second)[: both.numel()] and both.numel() > len(first)


def test_no_two_kinds_and_no_calibration_text_hold_the_same_documentation():
    explained = documents.explanations()
    assert "Command-line parsing library" not in explained  # of argparse, in "python source"
    assert "Random variable generators" not in explained  # of random, for calibration
    assert "HTTP/1.1 client library" in explained


def test_stored_samples_are_built_once_and_again_only_for_more(tokenizer, tmp_path, monkeypatch):
    built = []

    def build(task, tokenizer, length, samples, seed):
        built.append(samples)
        return [{"input": f"{task} {length} {seed} {i}"} for i in range(samples)]

    monkeypatch.setenv("STEM_CACHE", str(tmp_path))
    monkeypatch.setattr(ruler, "build_samples", build)
    three = ruler.stored_samples("ruler_vt", tokenizer, 512, 3, 1)
    assert ruler.stored_samples("ruler_vt", tokenizer, 512, 2, 1) == three[:2] and built == [3]
    assert len(ruler.stored_samples("ruler_vt", tokenizer, 512, 5, 1)) == 5 and built == [3, 5]
    ruler.stored_samples("ruler_vt", tokenizer, 512, 5, 2)
    assert built == [3, 5, 5] and len(list((tmp_path / "ruler").iterdir())) == 2


def test_calibration_reads_other_texts_than_the_rows(tokenizer):
    prompts = samples.calibration_windows(tokenizer, 256, 2)
    windows = samples.document_windows(tokenizer, 256, 2, ("python source", "licences"))
    read = {tuple(ids.tolist()) for ids in torch.cat(list(windows.values()))}
    assert [prompt.shape for prompt in prompts] == [(2, 256), (2, 256)]
    assert not read & {tuple(ids.tolist()) for ids in torch.cat(prompts)}
