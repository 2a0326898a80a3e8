"""`python -m stem.evaluate`: lm-eval's command line with the model name `stem`."""

import argparse
import sys

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging, simple_parse_args_string

from stem.evaluate.harness import resolved
from stem.evaluate.local_data import local_data
from stem.evaluate.offline import provide_sentence_splitter


def main() -> None:
    """Run lm-eval's command line with the model `stem`, names of `stem.pretrained.load`, and one more option.

    `--data_dir` names a folder with files that tasks would download, see `stem.evaluate.local_data`.
    """
    setup_logging()
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--data_dir")
    own, sys.argv[1:] = ours.parse_known_args()
    command_line = HarnessCLI()
    arguments = command_line.parse_args()
    if arguments.command == "run":
        provide_sentence_splitter()
        file = EvaluatorConfig.load_yaml_config(arguments.config) if arguments.config else {}
        for option in ("model_args", "metadata"):
            given = getattr(arguments, option) or file.get(option) or {}
            given = simple_parse_args_string(given) if isinstance(given, str) else given
            names = {key: resolved(given[key]) for key in ("pretrained", "tokenizer") if key in given}
            setattr(arguments, option, {**given, **names})
    with local_data(own.data_dir):
        command_line.execute(arguments)


if __name__ == "__main__":
    main()
