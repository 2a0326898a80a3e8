"""Settings of a training run, and the command line that sets them."""

import argparse
import ast
import dataclasses
from collections.abc import Sequence

from stem import patterns
from stem.config import StemConfig
from stem.experiments.training.distributed import PARALLEL
from stem.experiments.training.model import ModelSize
from stem.experiments.training.tasks import TASKS
from stem.impl.coverage import IMPLS
from stem.validation import check_choice, check_integer, check_number

SMALLEST = {
    "steps": 1, "batch_size": 1, "accumulate": 1, "seq_len": 32, "start_len": 0, "grow_steps": 0, "warmup": 0,
    "seed": 0, "checkpoint_every": 1,
}  # fmt: skip
LARGEST = 1e6  # of lr and weight_decay, so that AdamW's factors do not overflow fp32
FREE = ("out", "device", "accumulate", "checkpoint_every", "parallel", "deterministic")  # change rounding at most


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; a bad value, or values that do not fit together, raise ValueError or TypeError."""

    out: str = "runs/default"  # folder of log.csv and checkpoint.safetensors; every process must see it
    attention: str = "dense"  # or one of stem.patterns.names()
    tasks: str = "text,recall"  # names from tasks.TASKS, separated by commas; the rows of a batch take them in turn
    steps: int = 300  # optimizer steps of the whole schedule
    batch_size: int = 8  # rows of one step over all processes, at length `seq_len`
    accumulate: int = 1  # parts into which each process splits its rows, to save memory
    seq_len: int = 512  # tokens in a row, >= 32
    start_len: int = 0  # tokens in a row of the first step: `seq_len` halved some times, >= 32; 0 means `seq_len`
    grow_steps: int = 0  # steps over which rows double from `start_len` to `seq_len`; a step keeps its number of tokens
    lr: float = 3e-3  # highest learning rate, reached after the warm-up
    warmup: int = 20  # steps of linear warm-up, followed by a cosine to a tenth of `lr`
    weight_decay: float = 0.1  # of matrices; the gains of the norms have none
    clip: float = 1.0  # gradients with a larger norm are scaled down to this norm
    seed: int = 0  # seed of the weights and of the data
    bf16: bool = False  # matrix products in bfloat16 (autocast); weights and optimizer stay fp32
    checkpoint_every: int = 100  # steps between checkpoints; the last step always writes one
    device: str = ""  # "cpu" or "cuda"; empty takes CUDA where there is one
    impl: str | None = None  # of sparse attention, see stem.block_sparse_attention; None chooses. Not for "dense"
    parallel: str = "ddp"  # how several processes share the model: "ddp" (a copy each) or "fsdp" (FSDP2, a shard each)
    deterministic: bool = False  # refuse operations that differ from run to run; else a CUDA run resumes up to rounding
    size: ModelSize = dataclasses.field(default_factory=ModelSize)
    stem_config: StemConfig = dataclasses.field(default_factory=StemConfig)

    def __post_init__(self):
        for name, low in SMALLEST.items():
            check_integer(name, getattr(self, name), low)
        check_number("lr", self.lr, 0, LARGEST, open_below=True)
        check_number("clip", self.clip, 0, open_below=True)
        check_number("weight_decay", self.weight_decay, 0, LARGEST)
        check_choice("attention", self.attention, patterns.names())
        check_choice("impl", self.impl, (None, *IMPLS))
        check_choice("device", self.device, ("", "cpu", "cuda"))
        check_choice("parallel", self.parallel, PARALLEL)
        if self.impl and self.attention == "dense":
            raise ValueError(f"impl={self.impl!r} has no effect on attention='dense'; accepted: None")
        for name in self.tasks.split(","):
            check_choice("each of tasks", name, tuple(TASKS))
        if self.start_len and (self.start_len < 32 or self.start_len << self.doublings != self.seq_len):
            raise ValueError(
                f"start_len={self.start_len}; accepted: 0, or seq_len={self.seq_len} halved some times, from 32"
            )
        if bool(self.start_len) != bool(self.grow_steps):
            raise ValueError(f"start_len={self.start_len} and grow_steps={self.grow_steps} go together")

    @property
    def doublings(self) -> int:
        return max(0, (self.seq_len // self.start_len).bit_length() - 1) if self.start_len else 0

    def settings(self) -> dict:
        """Fields that a resumed run must share with its checkpoint, such as "stem_config.density": all but FREE."""
        flat = {}
        for name, value in dataclasses.asdict(self).items():
            flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
        return {name: value for name, value in flat.items() if name not in FREE}


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """Read a TrainConfig from a command line with one option for each field of TrainConfig, ModelSize and StemConfig.

    Raises:
        SystemExit: For a bad option, with status 2, after the usage and one line that names it.
    """
    parser = argparse.ArgumentParser(
        prog="python -m stem.experiments.training.train", description="Train a small language model."
    )
    nested = {"size": ModelSize, "stem_config": StemConfig}
    for kind in (TrainConfig, *nested.values()):
        group = parser.add_argument_group(kind.__name__)
        for field in dataclasses.fields(kind):
            option = "--" + field.name.replace("_", "-")
            if isinstance(field.default, bool):
                group.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
            elif field.name not in nested:
                kind_of_value = str if isinstance(field.default, str) else _literal
                group.add_argument(option, type=kind_of_value, default=field.default, help=f"default {field.default!r}")
    values = vars(parser.parse_args(arguments))
    try:
        for name, kind in nested.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def _literal(text: str):
    """Read a Python literal such as a number, a tuple or None; other text is returned as it is."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
