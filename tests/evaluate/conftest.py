"""A tiny model and tiny tasks for lm-eval."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stem import pretrained
from stem.experiments import documents


@pytest.fixture(scope="session")
def texts():
    """Four texts of 40, 80, 120 and 160 words."""
    words = documents.words(documents.prose())
    return [" ".join(words[100 * i : 100 * i + 40 * (i + 1)]) for i in range(4)]


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's tokenizer with its first tokens alone, because each model below reads its file again."""
    whole = AutoTokenizer.from_pretrained(pretrained.resolve("smollm2"))
    rules = json.loads(whole.backend_tokenizer.to_str())
    vocabulary = {token: index for token, index in rules["model"]["vocab"].items() if index < 4000}
    merges = [pair for pair in rules["model"]["merges"] if {*pair, "".join(pair)} <= vocabulary.keys()]
    rules["model"] |= dict(vocab=vocabulary, merges=merges)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        chat_template=whole.chat_template,
        **whole.special_tokens_map,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """A folder with a random two-layer Llama and the small tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory, texts):
    """Folder and names of three small tasks on three local texts, one for each kind of request."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "answer": " the end"} for text in texts[:3]]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
    generation = "generation_kwargs: {max_gen_toks: 4, do_sample: false, until: []}\n"
    kinds = {
        "loglikelihood": ("{{text}}", "metric_list: [{metric: perplexity}, {metric: acc}]"),
        "loglikelihood_rolling": ("", "metric_list: [{metric: byte_perplexity}]"),
        "generate_until": ("{{text}}", generation + "metric_list: [{metric: exact_match}]"),
    }
    for kind, (prompt, rest) in kinds.items():
        target = "{{answer}}" if prompt else "{{text}}"
        fields = f"task: tiny_{kind}\noutput_type: {kind}\ndoc_to_text: '{prompt}'\ndoc_to_target: '{target}'\n"
        (folder / f"{kind}.yaml").write_text(data + fields + rest)
    return folder, [f"tiny_{kind}" for kind in kinds]
