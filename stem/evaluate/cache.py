"""lm-eval's `--use_cache` with one file for each model and configuration of Stem."""

from pathlib import Path

from lm_eval.api.model import CachingLM, hash_args

from stem.evaluate.harness import StemLM

REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class AnswerCache(CachingLM):
    """lm-eval's cache of answers, whose file name ends in the fingerprint of a StemLM.

    lm-eval looks answers up by the request alone: one file for two densities would answer for both from the first.
    Other models are cached as lm-eval does it.
    """

    def __init__(self, lm, cache_db: str) -> None:
        if isinstance(lm, StemLM):
            file = Path(cache_db)
            cache_db = str(file.with_name(f"{file.stem}_{lm.fingerprint()}{file.suffix}"))
            lm.from_cache = 0
        super().__init__(lm, cache_db)

    def __getattr__(self, name: str):
        found = super().__getattr__(name)
        if name not in REQUESTS or not isinstance(self.lm, StemLM):
            return found

        def answer(requests):
            self.lm.from_cache += sum(self._holds(name, request.args) for request in requests)
            return found(requests)

        return answer

    def _holds(self, name: str, arguments: tuple) -> bool:
        sampled = name == "generate_until" and arguments[1].get("do_sample", False)  # lm-eval computes these again
        return not sampled and hash_args(name, arguments) in self.dbdict
