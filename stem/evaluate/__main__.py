r"""`python -m stem.evaluate`: lm-eval's command line with the model name `stem`.

    # needs no files: see stem.evaluate.local_data
    python -m stem.evaluate --model stem --model_args pretrained=smollm2,density=0.25,block_size=64 \
        --tasks niah_single_1,ruler_vt --metadata '{"max_seq_lengths":[2048]}' --limit 10
    # another method with its own parameter, the first two layers dense; needs pip install "lm_eval[longbench]"
    python -m stem.evaluate --model stem \
        --model_args pretrained=Qwen/Qwen3-8B,pattern=xattention,tau=0.9,dense_layers=2 --tasks longbench
    # files of the folder data in place of downloads
    python -m stem.evaluate --model stem --model_args pretrained=smollm2 --data_dir data \
        --tasks niah_single_2,ruler_qa_squad
    # all GPUs share the requests; two CPU processes share them after `accelerate launch --cpu --num_processes 2`
    accelerate launch -m stem.evaluate --model stem --model_args pretrained=Qwen/Qwen3-8B --tasks longbench2

Options of single layers need JSON: `--model_args '{"pretrained": "smollm2", "layers": {"3": {"density": 0.5}, "4":
null}}'` gives layer 3 another density and makes layer 4 dense. `stem.evaluate.harness.StemLM` lists all options.

lm-eval cuts prompts longer than max_length minus the tokens to generate on the left: give a max_length that holds them.
"""

import argparse
import sys
from itertools import pairwise

from lm_eval._cli import HarnessCLI
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.utils import setup_logging, simple_parse_args_string

from stem.evaluate.harness import resolved
from stem.evaluate.local_data import local_data
from stem.evaluate.offline import provide_sentence_splitter


def main() -> None:
    """Run lm-eval's command line with the model `stem`, names of `stem.pretrained.load`, and option `--data_dir`."""
    setup_logging()
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--data_dir")
    own, sys.argv[1:] = ours.parse_known_args()
    command_line = HarnessCLI()
    try:
        arguments = command_line.parse_args()
    except ValueError as error:  # of JSON, without the option
        option = next((name for name, value in pairwise(sys.argv) if value in str(error)), "command line")
        raise ValueError(f"{option}: {error}") from None
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
