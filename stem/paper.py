"""Numbers of the paper (arXiv 2603.06274, version 1), to stand beside ours. Nothing here was measured here."""

TABLE_1 = {  # mean squared error against dense, Qwen3-8B, 30 LongBench samples of 8K tokens, top-k of 1024 tokens
    "score-aware": {"layer 5": 1.5e-5, "layer 15": 2.0e-4, "layer 25": 8.5e-4, "layer 35": 6.0e-3, "logits": 0.3368},
    "output-aware": {"layer 5": 1.4e-5, "layer 15": 2.0e-4, "layer 25": 8.1e-4, "layer 35": 5.2e-3, "logits": 0.3126},
}

FIGURE_1 = {"dense_ms": 1540, "stem_ms": 420}  # 128K tokens, H20, dense by FlashAttention-2; from the paper's text

TABLE_5 = {  # LongBench averages at equal cost
    "Qwen3-8B": {"uniform": 29.41, "+ position decay": 31.43, "+ output-aware metric": 31.64},
    "Llama-3.1-8B-Instruct": {"uniform": 37.48, "+ position decay": 40.85, "+ output-aware metric": 41.48},
}

TABLE_5_FAMILIES = (19.43, 61.03, 11.34, 14.94, 20.44, 60.92)  # of the last Qwen3-8B entry above
