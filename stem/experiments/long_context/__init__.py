"""The experiment of notebook 06: pretrained models on long prompts, every method against dense attention.

Each part writes the rows of one folder in results/long_context/; `python -m stem.experiments.long_context` runs all.

    answers           right answers, losses, generated answers and prefill times of SmolLM2 at 4K and 8K tokens
    loss              loss of every method on documents, beside the density that it computed
    selection_cost    time of the adaptive selection beside the whole operator, on a GPU
    extension         SmolLM2 trained to 32K tokens, and the methods compared there
"""
