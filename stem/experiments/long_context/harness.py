"""lm-eval on a file in LongBench's format, with its own model class and with the class `stem`."""

import contextlib
import io
from pathlib import Path

from stem import hf
from stem.evaluate.local_data import LONGBENCH
from stem.experiments.long_context import signatures

TASK = {  # lm-eval's description of a task: where its data is, the prompt, and how to read an answer
    "task": signatures.TASK,
    "dataset_path": LONGBENCH,  # stem.evaluate.local_data gives longbench/<dataset_name>.jsonl of a folder in its place
    "dataset_name": signatures.TASK,
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": signatures.TEMPLATE.replace("{", "{{").replace("}", "}}") + "\nAnswer: def",
    "doc_to_target": "{{answers[0]}}",
    "generation_kwargs": {"max_gen_toks": 24, "do_sample": False, "until": [":", "\n"]},
    "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_file(folder: Path, tokenizer, length: int, samples: int, seed: int = 0) -> Path:
    """Write `signatures.records` where `local_data(folder)` finds them, and return the file's path."""
    path = folder / "longbench" / f"{signatures.TASK}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    signatures.write(path, signatures.records(tokenizer, length, samples, seed))
    return path


def evaluate(model: str, network, tokenizer, folder: Path, **options) -> tuple[list[str], float, float | None]:
    """Run lm-eval on `TASK` and return the generated answers, the share of exact ones, and the computed density.

    Args:
        model: Class that answers: "hf", lm-eval's own without a density, or "stem".
        network, tokenizer: A transformers model, which keeps its own attention afterwards, and its tokenizer.
        folder: Folder in which `write_file` has written.
        options: Further arguments of the class, for example block_size=32.
    """
    with contextlib.redirect_stderr(io.StringIO()), contextlib.ExitStack() as after:  # progress bars
        import lm_eval
        from lm_eval.tasks import TaskManager

        from stem.evaluate import local_data

        after.callback(hf.disable, network)
        after.enter_context(local_data(folder))
        arguments = dict(pretrained=network, tokenizer=tokenizer, **options)
        found = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments,
            tasks=[dict(TASK)],
            task_manager=TaskManager(include_defaults=False),
            device=str(network.device),
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    samples = sorted(found["samples"][signatures.TASK], key=lambda sample: sample["doc_id"])
    answers = [sample["filtered_resps"][0] for sample in samples]
    score = float(found["results"][signatures.TASK]["exact_match,stripped"])
    return answers, score, found["config"].get("stem", {}).get("density")
