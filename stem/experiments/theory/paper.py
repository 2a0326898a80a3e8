"""Numbers and cost formulas of the paper (arXiv 2603.06274 v1), to show beside ours; none was measured here."""

import pandas as pd

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

# (model, method) -> scores [%]
_TABLE_2 = {
    ("Qwen3-8B", "Dense"): (19.09, 63.10, 11.23, 15.06, 20.63, 62.92, 32.01, 100),
    ("Qwen3-8B", "MInference"): (18.91, 61.87, 10.78, 14.46, 20.26, 55.32, 30.27, 69),
    ("Qwen3-8B", "FlexPrefill"): (19.75, 55.31, 10.76, 13.49, 21.18, 50.83, 28.55, 31),
    ("Qwen3-8B", "XAttention"): (21.03, 62.30, 11.42, 14.64, 20.47, 52.92, 30.46, 28),
    ("Qwen3-8B", "Stem"): (19.43, 61.84, 11.22, 14.97, 20.21, 62.19, 31.64, 25),
    ("Llama-3.1-8B-Instruct", "Dense"): (36.08, 64.29, 27.54, 31.19, 25.10, 67.92, 42.02, 100),
    ("Llama-3.1-8B-Instruct", "MInference"): (35.43, 62.98, 25.42, 29.00, 25.12, 68.41, 41.06, 81),
    ("Llama-3.1-8B-Instruct", "FlexPrefill"): (34.65, 59.51, 17.17, 21.62, 24.46, 59.10, 36.09, 34),
    ("Llama-3.1-8B-Instruct", "XAttention"): (37.23, 63.61, 22.15, 28.23, 25.30, 50.95, 37.91, 35),
    ("Llama-3.1-8B-Instruct", "Stem"): (35.86, 62.89, 26.33, 30.53, 24.93, 68.32, 41.48, 31),
}
_TABLE_4 = {
    ("Qwen3-8B", "Dense"): (95.44, 93.08, 92.71, 92.12, 79.57, 73.03, 87.66, 100),
    ("Qwen3-8B", "MInference"): (95.01, 92.56, 91.70, 91.68, 77.54, 71.87, 86.73, 76),
    ("Qwen3-8B", "FlexPrefill"): (95.06, 91.98, 91.17, 90.93, 77.31, 70.28, 86.12, 30),
    ("Qwen3-8B", "XAttention"): (95.03, 92.56, 91.76, 91.72, 78.60, 71.80, 86.91, 35),
    ("Qwen3-8B", "Stem"): (95.18, 92.68, 92.11, 91.85, 78.78, 72.31, 87.15, 25),
    ("Llama-3.1-8B-Instruct", "Dense"): (95.52, 94.06, 93.43, 88.19, 84.86, 77.11, 88.86, 100),
    ("Llama-3.1-8B-Instruct", "MInference"): (95.51, 93.56, 92.70, 91.68, 80.06, 76.67, 88.36, 55),
    ("Llama-3.1-8B-Instruct", "FlexPrefill"): (94.98, 93.91, 92.68, 89.51, 82.66, 75.40, 88.19, 27),
    ("Llama-3.1-8B-Instruct", "XAttention"): (95.46, 93.83, 93.65, 89.82, 81.60, 74.35, 88.12, 26),
    ("Llama-3.1-8B-Instruct", "Stem"): (95.17, 93.96, 93.73, 89.92, 82.67, 75.37, 88.47, 25),
}


def uniform_cost(num_tokens: float, k: float) -> float:
    """Query-key pairs of a constant budget of k tokens: N k - k^2 / 2 (Eq. 2, an approximation)."""
    return num_tokens * k - k**2 / 2


def decay_cost(num_tokens: float, k_start: float, decay: float) -> float:
    """Query-key pairs of Token Position-Decay, budgets in tokens (Eq. 4, an approximation)."""
    return num_tokens * k_start - k_start**2 / 2 - k_start * (1 - decay) * (num_tokens - k_start) / 2


def longbench() -> pd.DataFrame:
    """Table 2: LongBench scores by task family, their average and the computed share of token pairs [%]."""
    return _frame(_TABLE_2, "CC", "FSL", "MD1", "MD2", "SUM", "SYN")


def ruler() -> pd.DataFrame:
    """Table 4: RULER scores by context length, their average and the computed share of token pairs [%]."""
    return _frame(_TABLE_4, "4K", "8K", "16K", "32K", "64K", "128K")


def _frame(table: dict, *columns: str) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(table, names=["model", "method"])
    return pd.DataFrame(list(table.values()), index=index, columns=[*columns, "average", "budget"])
