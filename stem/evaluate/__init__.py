"""lm-eval with Stem attention: the model name `stem`, and lm-eval's command line as `python -m stem.evaluate`.

`import stem.evaluate` also registers the model name for `lm_eval.simple_evaluate(model="stem", ...)`, and gives each
model and configuration a cache of its own under `--use_cache`.
"""

import lm_eval.api.model

from stem.evaluate.harness import AnswerCache, StemLM
from stem.evaluate.local_data import local_data

__all__ = ["AnswerCache", "StemLM", "local_data"]

lm_eval.api.model.CachingLM = AnswerCache  # `simple_evaluate` looks the class up there
