"""Parts of the plug-in by themselves: settings, names of vLLM that it relies on, pages, versions."""

import ast
import inspect
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from serving_engine import SETTINGS
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import AttentionType

import stem
import stem.vllm
from stem.vllm import settings
from stem.vllm.backend import Chunk, block_pairs, prompt_chunks, with_pages
from stem.vllm.cpu import gather_packed
from stem.vllm.prompts import Prompts

PAGE = 128


def definitions(module):
    """Text of each class and of each method of a module of vLLM, by dotted name; the module is not imported."""
    with open(find_spec(module).origin) as file:
        text = file.read()
    lines, found = text.split("\n"), {}

    def add(name, node):  # ast.get_source_segment would split the text again for each
        found[name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])

    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef):
            add(node.name, node)
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    add(f"{node.name}.{member.name}", member)
    return found


def test_vllm_has_the_private_names_that_hand_over_the_prompt_lengths():
    v1 = definitions("vllm.v1.worker.gpu_model_runner")["GPUModelRunner._build_attention_metadata"]
    assert "query_start_loc_cpu=" in v1 and "build_metadata" in v1
    assert "self.num_prompt_tokens = " in definitions("vllm.v1.worker.gpu_input_batch")["InputBatch"]
    assert "InputBatch" in definitions("vllm.v1.worker.gpu.model_runner")["GPUModelRunner.prepare_inputs"]
    assert "self.prompt_len = " in definitions("vllm.v1.worker.gpu.states")["RequestState"]
    batch = definitions("vllm.v1.worker.gpu.input_batch")["InputBatch"]
    assert "idx_mapping_np: np.ndarray" in batch and "query_start_loc_np: np.ndarray" in batch


def test_vllm_has_the_private_names_of_the_scheduler():
    from vllm.v1.core.sched.scheduler import Scheduler

    assert list(inspect.signature(Scheduler._mamba_block_aligned_split).parameters)[:5] == [
        "self", "request", "num_new_tokens", "num_new_local_computed_tokens", "num_external_computed_tokens",
    ]  # fmt: skip
    assert "if self.need_mamba_block_aligned_split:" in inspect.getsource(Scheduler.schedule)


def test_prompts_are_told_from_decoding_requests():
    starts, ends = torch.tensor([0, 128, 384, 385, 513, 516, 516]), torch.tensor([384, 512, 900, 640, 1003, 1000])
    common = SimpleNamespace(query_start_loc_cpu=starts, seq_lens_cpu_upper_bound=ends)
    prompts = Prompts(np.array([1000, 512, 800, 640, 1001]), list("abcde"))  # and padding
    assert prompt_chunks(common, prompts) == [
        Chunk(0, slice(0, 128), 384, 1000),
        Chunk(1, slice(128, 384), 512, 512),
        Chunk(3, slice(385, 513), 640, 640),
        Chunk(4, slice(513, 514), 1001, 1001),  # resumed: two answered tokens come after its prompt's last one
    ]
    assert [chunk.is_last for chunk in prompt_chunks(common, prompts)] == [False, True, True, True]


def test_sums_are_taken_over_where_a_chunk_goes_on():
    pages = torch.arange(40, dtype=torch.int32).view(4, 10)
    common, chunk = SimpleNamespace(block_table_tensor=pages), Chunk(2, slice(100, 228), 384, 1000)
    earlier = [chunk._replace(stop=stop, sums={"layer": "sums"}) for stop in (256, 128)]
    found = [with_pages(chunk, common, before) for before in (*earlier, None)]
    assert [x.sums for x in found] == [{"layer": "sums"}, {}, {}]
    assert all(torch.equal(x.pages, pages[2]) and x.pages.data_ptr() != pages[2].data_ptr() for x in found)


@pytest.mark.parametrize("options", [{"block_size": 16}, {"forced": "on_top"}, {"preset": "adaptive"}])
def test_block_pairs_of_a_chunk(options):
    (config,) = settings.configs_by_layer(options, 1)
    size, prompt_length = config.block_size, 60 * config.block_size - 5
    tokens, stop = 20 * size, 50 * size  # query blocks 30 to 49
    kept, causal, is_dense = block_pairs(tokens, stop, prompt_length, config, 0)
    budget = [int(x) for x in stem.block_budget(60, config)[30:50]]
    by_scores = config.allocation == "adaptive" or config.forced == "on_top"
    assert (kept, causal, is_dense) == (0 if by_scores else sum(budget), sum(range(31, 51)), False)
    assert block_pairs(tokens, stop, prompt_length, config, prompt_length + 1) == (causal, causal, True)
    assert block_pairs(tokens, stop, prompt_length, config, prompt_length) == (kept, causal, False)
    dense = block_pairs(tokens, stop, prompt_length, stem.StemConfig(density=1.0, block_size=size), 0)
    assert dense == (causal, causal, True)


@pytest.mark.parametrize("version", ["0.25.1", "0.33.0", "1.0", "0.32.0.unknown+x"])
def test_other_versions_of_vllm_are_refused(version, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError, match=rf"0\.26\.0 to 0\.32\.0, found vLLM {version.replace('+', '.')}"):
        stem.vllm.register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa, head_dim", [("vec", 64), ("vec16", 80), ("amx", 64)])
def test_rows_are_read_from_packed_pages(dtype, isa, head_dim):
    if isa == "amx" and (dtype != torch.bfloat16 or not torch.cpu._is_amx_tile_supported()):
        pytest.skip("AMX is for bfloat16, on machines that have it")
    pages, tokens = torch.tensor([5, 2, 7, 0]), 300
    k, v = torch.randn(2, tokens, 2, head_dim).to(dtype)
    cache = torch.zeros(8, 2, PAGE, 2 * head_dim, dtype=dtype)
    slots = pages[torch.arange(tokens) // PAGE] * PAGE + torch.arange(tokens) % PAGE
    halves = cache.view(8, 2, 2 * PAGE, head_dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(k, v, *halves, slots, isa)
    for found, wanted in zip(gather_packed(cache, pages, 290, isa), (k, v), strict=True):
        assert torch.equal(found, wanted[None, :290].transpose(1, 2))


def layer(**changes):
    impl = dict(stem_config=None, sinks=None, alibi_slopes=None, logits_soft_cap=0, kv_cache_dtype="auto", head_size=64)
    own = dict(attn_type=AttentionType.DECODER, sliding_window=None)
    own |= {name: value for name, value in changes.items() if name in own}
    return SimpleNamespace(impl=SimpleNamespace(**impl | {k: v for k, v in changes.items() if k in impl}), **own)


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(), ""),
        (dict(attn_type=AttentionType.ENCODER_ONLY), "not causal"),
        (dict(sliding_window=128), "sliding window"),
        (dict(sinks=torch.zeros(2)), "attention sinks"),
        (dict(alibi_slopes=[0.5]), "ALiBi"),
        (dict(logits_soft_cap=30.0), "soft-capped scores"),
        (dict(kv_cache_dtype="fp8"), "fp8 cache"),
        (dict(head_size=512), "head dimension 512"),
    ],
)
def test_layers_that_keep_the_attention_of_vllm(changes, reason):
    assert settings.own_attention(layer(**changes)) == reason


def test_layers_with_batches_of_their_own_keep_the_attention_of_vllm():
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

    for kind, reason in ((Attention, ""), (ChunkedLocalAttention, "ChunkedLocalAttention")):
        found = kind.__new__(kind)
        vars(found).update(vars(layer()))
        assert settings.own_attention(found) == reason


def vllm_config(options, layers=2, page=128, **changes):
    sizes = ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size")
    parallel = SimpleNamespace(**dict.fromkeys(sizes, 1))
    return SimpleNamespace(
        additional_config={"stem": options},
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=layers)),
        cache_config=SimpleNamespace(block_size=page),
        **{"speculative_config": None, "parallel_config": parallel, **changes},
    )


def test_every_layer_gets_its_config_or_a_reason():
    layers = {f"model.layers.{i}.self_attn.attn": layer(sliding_window=64 if i == 1 else None) for i in range(3)}
    found = settings.sparse_layers(vllm_config({**SETTINGS, "dense_layers": [-1]}, layers=3), layers)
    assert [x.reason for x in found.values()] == ["", "sliding window", "dense in the settings"]
    assert [x.config for x in found.values()] == [stem.StemConfig(**SETTINGS), None, None]
    with pytest.raises(ValueError, match="every layer to vLLM's own attention: sliding window"):
        settings.sparse_layers(vllm_config(SETTINGS, layers=1), {"layers.0": layer(sliding_window=64)})
    first_stage = vllm_config({**SETTINGS, "dense_layers": 1})
    first_stage.parallel_config.pipeline_parallel_size = 2
    assert [x.config for x in settings.sparse_layers(first_stage, {"layers.0": layer()}).values()] == [None]


def test_pages_must_hold_whole_blocks():
    with pytest.raises(ValueError, match="blocks of 128 tokens, got pages of 16: add --block-size 128"):
        settings.sparse_layers(vllm_config({"density": 0.5}, page=16), {"layers.0": layer(), "layers.1": layer()})


def test_fp8_needs_its_kernel():
    engine = vllm_config({"compute": "fp8"}, device_config=SimpleNamespace(device_type="cpu"))
    engine.model_config.dtype = torch.bfloat16
    with pytest.raises(ValueError, match='compute="fp8" does not cover device cpu, accepted: CUDA of sm_90'):
        settings.sparse_layers(engine, {"layers.0": layer(), "layers.1": layer()})
    engine.additional_config["stem"]["layers"] = {0: None, 1: {"compute": "input"}}
    assert [
        bool(x.config) for x in settings.sparse_layers(engine, {"layers.0": layer(), "layers.1": layer()}).values()
    ] == [False, True]


def test_every_option_of_stem_evaluate():
    configs = settings.configs_by_layer(
        {"preset": "paper", "decay": 0.5, "layers": {"1": {"density": 0.5}, "-1": None}, "dense_layers": 1}, 4
    )
    paper = stem.StemConfig.preset("paper", decay=0.5)
    assert configs == [None, stem.StemConfig.preset("paper", decay=0.5, density=0.5), paper, None]


@pytest.mark.parametrize("options", [{"density": 0.25}, {"preset": "paper"}, {"preset": "adaptive"}])
def test_options_are_checked_while_a_model_is_built_for_a_gpu(options):
    wanted, dtype = settings.configs_by_layer(options, 2), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):  # as little a CPU as a GPU is
            assert settings.configs_by_layer(options, 2) == wanted
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pattern": "xattention"}, "unknown option pattern='xattention'"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"dense_layers": 3}, "dense_layers must be"),
        ({"layers": {"0": {"min_tokens": 5}}}, "unknown option min_tokens=5"),
        ({"layers": {"7": None}}, "layers must map"),
        ({"layers": {"0": 3}}, "layers must map"),
        ({"density": 0}, "density"),
        ({"preset": "fast"}, "preset"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        settings.configs_by_layer(options, 2)


def test_settings_must_be_a_dict():
    with pytest.raises(TypeError, match="must be a dict of options, got 0.25"):
        settings.stem_settings(vllm_config(0.25))
    assert settings.stem_settings(SimpleNamespace(additional_config={})) is None


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(speculative_config=object()), "speculative decoding"),
        (dict(parallel_config=SimpleNamespace(decode_context_parallel_size=2)), "decode context parallelism"),
        (dict(parallel_config=SimpleNamespace(decode_context_parallel_size=1, use_ubatching=True)), "steps in micro"),
    ],
)
def test_unsupported_engines_are_refused(changes, reason):
    with pytest.raises(ValueError, match=f"does not support {reason}"):
        settings.model_configs(vllm_config(SETTINGS, **changes))


def test_the_back_end_of_stem_needs_settings():
    engine = vllm_config(SETTINGS, attention_config=SimpleNamespace(backend=SimpleNamespace(name="CUSTOM")))
    settings.check(engine)
    engine.additional_config = {"Stem": SETTINGS}
    with pytest.raises(ValueError, match="is CUSTOM, but additional_config has no 'stem'"):
        settings.check(engine)
    engine.attention_config.backend = None
    settings.check(engine)


@pytest.mark.parametrize(
    "step, threshold, message",
    [
        (64, 0, "max_num_batched_tokens must be at least a page of 128 tokens, got 64"),
        (500, 100, "long_prefill_token_threshold must be at least a page of 128 tokens, got 100"),
    ],
)
def test_a_step_must_hold_a_page(step, threshold, message, monkeypatch):
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    made = dict(max_num_scheduled_tokens=step, block_size=PAGE, need_mamba_block_aligned_split=False)
    made["scheduler_config"] = SimpleNamespace(long_prefill_token_threshold=threshold)
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda scheduler: vars(scheduler).update(made))
    with pytest.raises(ValueError, match=message):
        stem.vllm.AlignedScheduler()


def test_a_gpu_engine_must_choose_the_back_end(monkeypatch):
    class Platform:
        @classmethod
        def get_attn_backend_cls(cls, selected_backend, *args, **kwargs):
            return "path"

    wanted = vllm_config(SETTINGS)
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: wanted)
    settings.require_custom_backend(Platform())
    settings.require_custom_backend(Platform())  # the plug-in may be loaded twice
    assert Platform.get_attn_backend_cls(SimpleNamespace(name="CUSTOM"), 64) == "path"
    with pytest.raises(ValueError, match="back end is None: choose CUSTOM"):
        Platform.get_attn_backend_cls(None)
    wanted.additional_config = {}
    assert Platform.get_attn_backend_cls(None) == "path"
