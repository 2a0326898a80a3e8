"""lm-eval with Stem attention: the model name `stem`, and lm-eval's command line as `python -m stem.evaluate`.

`import stem.evaluate` registers the model name, so that `lm_eval.simple_evaluate(model="stem", ...)` works as well.
"""

from stem.evaluate.harness import StemLM
from stem.evaluate.local_data import local_data

__all__ = ["StemLM", "local_data"]
