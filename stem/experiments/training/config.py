"""TrainConfig: everything that a training run can be told, and the command line that says it."""

import argparse
import ast
import dataclasses
import math
from collections.abc import Sequence

from stem import patterns
from stem.attention import IMPLS
from stem.config import StemConfig
from stem.experiments.training.distributed import PARALLEL
from stem.experiments.training.model import ModelSize
from stem.experiments.training.tasks import TASKS, VOCAB_SIZE

LEAST = {
    "steps": 1, "batch_size": 1, "accumulate": 1, "seq_len": 32, "start_len": 0, "grow_steps": 0, "warmup": 0,
    "seed": 0, "checkpoint_every": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. Everything that changes its losses is here."""

    out: str = "runs/default"
    """Folder of log.csv and checkpoint.safetensors; every process must see it."""
    attention: str = "dense"
    """"dense" or one of stem.patterns.names()."""
    tasks: str = "text,recall"
    """Names from stem.experiments.training.tasks.TASKS, taken in turn by the rows of a batch."""
    steps: int = 300
    """Optimizer steps in the whole schedule."""
    batch_size: int = 8
    """Rows of one step over all processes."""
    accumulate: int = 1
    """Parts into which each process splits its rows, to save memory."""
    seq_len: int = 512
    """Tokens in a row."""
    start_len: int = 0
    """Tokens in a row of the first step, `seq_len` halved a few times; 0 takes `seq_len` from the start."""
    grow_steps: int = 0
    """Steps in which rows double, evenly, from `start_len` to `seq_len`; every step has as many tokens."""
    lr: float = 3e-3
    """Highest learning rate, reached after the warm-up."""
    warmup: int = 20
    """Steps of linear warm-up before the cosine to a tenth of `lr`."""
    weight_decay: float = 0.1
    """Of matrices; gains of the norms have none."""
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    """Of the weights and of the data."""
    bf16: bool = False
    """Autocast matrix products to bfloat16; weights and optimizer stay fp32."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step always writes one."""
    device: str = ""
    """"cpu" or "cuda"; empty takes CUDA where there is one."""
    impl: str | None = None
    """Of block-sparse attention, see stem.block_sparse_attention; None chooses."""
    parallel: str = "ddp"
    """How several processes share the model: "ddp" (a copy each) or "fsdp" (FSDP2, a shard each)."""
    deterministic: bool = False
    """Refuse operations that differ from run to run; without it, a resumed run on CUDA is equal up to rounding."""
    size: ModelSize = dataclasses.field(default_factory=ModelSize)
    stem_config: StemConfig = dataclasses.field(default_factory=StemConfig)

    def __post_init__(self):
        for name, least in LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}; accepted: whole numbers from {least}")
        for name, low in {"lr": 0.0, "clip": 0.0, "weight_decay": -1e-30}.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low < value < math.inf:
                raise ValueError(f"{name}={value!r}; accepted: finite numbers {'above' if low == 0 else 'from'} 0")
        accepted = {
            "attention": patterns.names(),
            "impl": (None, *IMPLS),
            "device": ("", "cpu", "cuda"),
            "parallel": PARALLEL,
        }
        for name, choices in accepted.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; accepted: {', '.join(map(repr, choices))}")
        if unknown := [name for name in self.tasks.split(",") if name not in TASKS]:
            raise ValueError(f"tasks={self.tasks!r}: unknown {unknown}; accepted: names out of {', '.join(TASKS)}")
        if self.start_len and (self.start_len < 32 or self.start_len << self.doublings != self.seq_len):
            raise ValueError(
                f"start_len={self.start_len}; accepted: 0, or seq_len={self.seq_len} halved some times, from 32"
            )
        if self.size.vocab_size < VOCAB_SIZE:
            raise ValueError(
                f"vocab_size={self.size.vocab_size}; accepted: {VOCAB_SIZE}, the ids of the tasks, or more"
            )
        if bool(self.start_len) != bool(self.grow_steps):
            raise ValueError(f"start_len={self.start_len} and grow_steps={self.grow_steps} go together")

    @property
    def doublings(self) -> int:
        """How often rows double in length."""
        return max(0, (self.seq_len // self.start_len).bit_length() - 1) if self.start_len else 0

    def settings(self) -> dict:
        """What a resumed run must share: every field but those that change no loss beyond rounding."""
        free = ("out", "device", "accumulate", "checkpoint_every", "parallel", "deterministic")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The run that a command line describes: one option for each field of TrainConfig, ModelSize and StemConfig."""
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
    except (TypeError, ValueError) as error:  # a bad option: usage and one line, exit status 2
        parser.error(str(error))


def _literal(text: str):
    """A number, tuple or None if it reads as one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
