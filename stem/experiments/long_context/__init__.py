"""The experiment of notebook 06: pretrained models on long prompts, every method against dense attention.

Each part writes the rows of one folder in results/long_context/; `python -m stem.experiments.long_context` runs all.

    answers           needles: RULER's right answers under every method
    loss              documents: loss of every method on five kinds of text
    logits            errors of the logits: the value term (Table 1), and which rows may be pruned (Fig. 3)
    selection_cost    time of the adaptive selection beside the whole operator, on a GPU
    extension         SmolLM2 trained to 32K tokens, and the methods compared there

`comparison.py` measures the answers and losses of any model, with the forced blocks with which each method does best.
"""
