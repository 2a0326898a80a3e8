"""Train the small language model: one CPU, one GPU or many, with the same script.

    python -m stem.train --out runs/stem --attention stem --density 0.25 --block-size 32
    torchrun --nproc-per-node=8 -m stem.train --out runs/stem --attention stem --bf16

Each step's batch is split over the processes and over `accumulate` parts, and the loss is the mean over all targets of
the whole batch, so the curve does not depend on the split. A run that is started again in the same folder goes on from
its last checkpoint and takes the same steps as an uninterrupted one.
"""

import argparse
import ast
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from stem.config import StemConfig
from stem.model import LanguageModel, ModelSize
from stem.runs import Log, load_checkpoint, save_checkpoint
from stem.tasks import IGNORED, Batch, make_batch


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. Everything that changes its losses is here."""

    out: str = "runs/default"
    """Folder of log.csv and checkpoint.safetensors; every process must see it."""
    attention: str = "dense"
    """"dense" or one of stem.patterns.names()."""
    tasks: str = "text,recall"
    """Names from stem.tasks.TASKS, taken in turn by the rows of a batch."""
    steps: int = 300
    """Optimizer steps in the whole schedule."""
    batch_size: int = 8
    """Rows of one step over all processes."""
    accumulate: int = 1
    """Parts into which each process splits its rows, to save memory."""
    seq_len: int = 512
    """Tokens in a row."""
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
    size: ModelSize = dataclasses.field(default_factory=ModelSize)
    stem_config: StemConfig = dataclasses.field(default_factory=StemConfig)

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; accepted: 1 or more")

    def settings(self) -> dict:
        """What a resumed run must share: every field but those that change no loss beyond rounding."""
        free = ("out", "device", "accumulate", "checkpoint_every")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those of the run; without torchrun it is alone."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values


@contextlib.contextmanager
def join_processes(device: str = ""):
    """Join the group that torchrun announces in the environment, and leave it at the end; yields Processes.

    Args:
        device: "cpu", "cuda" or "" (CUDA where there is one). NCCL joins GPUs, gloo joins CPUs.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    if "RANK" not in os.environ:
        yield Processes(0, 1, local)
        return
    dist.init_process_group("nccl" if local.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), local)
    finally:
        dist.destroy_process_group()


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from `lr` to a tenth of it at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def row_parts(step: int, config: TrainConfig, processes: Processes) -> list[range]:
    """The rows of the endless stream that this process takes at this step, in `accumulate` parts.

    Raises:
        ValueError: If batch_size is not a multiple of accumulate times the number of processes.
    """
    parts = config.accumulate * processes.world
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of accumulate * processes = "
            f"{config.accumulate} * {processes.world}"
        )
    rows = config.batch_size // parts
    first = step * config.batch_size + processes.rank * config.accumulate * rows
    return [range(first + part * rows, first + (part + 1) * rows) for part in range(config.accumulate)]


def token_losses(model: torch.nn.Module, batch: Batch, bf16: bool = False) -> Tensor:
    """Cross entropy of every position [nats], fp32 [B, N]; 0 where nothing is asked."""
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=bf16):
        logits = model(batch.inputs)
    # [B, vocab, N] against [B, N]
    return F.cross_entropy(logits.float().mT, batch.targets, ignore_index=IGNORED, reduction="none")


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.95) that decays matrices only."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))


def train(
    config: TrainConfig, *, progress: bool = False, on_step: Callable[[int, LanguageModel], None] | None = None
) -> LanguageModel:
    """Run a configuration to its last step, going on from its checkpoint if there is one.

    Args:
        config: The run.
        progress: Show a tqdm bar on the main process.
        on_step: Called on every process after each step with the number of steps done and the model.
    Returns:
        The trained model, in eval mode, on this process's device.
    Raises:
        ValueError: For settings that do not fit together or with the checkpoint in `config.out`.
        FloatingPointError: If the loss stops being finite; the last checkpoint is from before.
    """
    names = config.tasks.split(",")
    make_batch(names, [0], config.seq_len)  # raises for a bad name or length before anything is written
    with join_processes(config.device) as processes:
        row_parts(0, config, processes)
        torch.manual_seed(config.seed)
        model = LanguageModel(config.size, config.attention, config.stem_config).to(processes.device)
        optimizer = make_optimizer(model, config)
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = folder / "checkpoint.safetensors"
        done = load_checkpoint(checkpoint, config.settings(), model, optimizer) if checkpoint.exists() else 0
        columns = ["step", "loss", *(f"loss_{name}" for name in names), "grad_norm", "lr", "tokens_per_second"]
        log = Log(folder / "log.csv", done, columns) if processes.is_main else None
        spread = DistributedDataParallel(model) if processes.world > 1 else model
        steps = tqdm(range(done, config.steps), initial=done, total=config.steps, disable=not (progress and log))
        for step in steps:
            row = take_step(step, config, names, spread, optimizer, processes)
            if log:
                log.write(row)
                steps.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                    save_checkpoint(checkpoint, step + 1, config.settings(), model, optimizer)
            if on_step:
                on_step(step + 1, model)
        if log:
            log.file.close()
        if processes.world > 1:
            dist.barrier()
    return model.eval()


def take_step(
    step: int, config: TrainConfig, names: Sequence[str], model: torch.nn.Module, optimizer, processes: Processes
) -> dict[str, float]:
    """One optimizer step over the whole batch of all processes; returns its row of the log.

    `model` is the plain or the distributed one. The loss is the sum over all targets divided by their number in the
    whole batch; DistributedDataParallel averages gradients, so each process multiplies its share by their number.
    """
    start = time.perf_counter()
    batches = [
        make_batch(names, rows, config.seq_len, seed=config.seed).to(processes.device)
        for rows in row_parts(step, config, processes)
    ]
    num_targets = processes.sum(sum((batch.targets != IGNORED).sum() for batch in batches))
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=processes.device)  # loss, targets
    for part, batch in enumerate(batches):
        last = part == len(batches) - 1
        with contextlib.nullcontext() if last or processes.world == 1 else model.no_sync():
            losses = token_losses(model, batch, config.bf16)
            (losses.sum() * processes.world / num_targets).backward()
        counts = (batch.targets != IGNORED).sum(-1)
        sums.index_add_(0, batch.task, torch.stack([losses.detach().sum(-1), counts], dim=-1).double())
    processes.sum(sums)
    loss = (sums[:, 0].sum() / sums[:, 1].sum()).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {step + 1}: loss={loss}; lower lr={config.lr} or clip={config.clip}")
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    by_task = (sums[:, 0] / sums[:, 1]).tolist()
    tokens_per_second = config.batch_size * config.seq_len / (time.perf_counter() - start)
    return {
        "step": step + 1,
        "loss": loss,
        **{f"loss_{name}": value for name, value in zip(names, by_task, strict=True)},
        "grad_norm": grad_norm,
        "lr": rate,
        "tokens_per_second": tokens_per_second,
    }


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The run that a command line describes: one option for each field of TrainConfig, ModelSize and StemConfig."""
    parser = argparse.ArgumentParser(prog="stem.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    nested = {"size": ModelSize, "stem_config": StemConfig}
    for kind in (TrainConfig, *nested.values()):
        group = parser.add_argument_group(kind.__name__)
        for field in dataclasses.fields(kind):
            option = "--" + field.name.replace("_", "-")
            if isinstance(field.default, bool):
                group.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
            elif field.name not in nested:
                group.add_argument(option, type=_literal, default=field.default, help=f"default {field.default!r}")
    values = vars(parser.parse_args(arguments))
    for name, kind in nested.items():
        values[name] = kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
    return TrainConfig(**values)


def _literal(text: str):
    """A number, tuple or None if it reads as one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


if __name__ == "__main__":
    train(parse_config(), progress=True)
