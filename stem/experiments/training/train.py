"""Train the small language model: one CPU, one GPU or many, with the same script.

    python -m stem.experiments.training.train --out runs/stem --attention stem --density 0.25 --block-size 32
    torchrun --nproc-per-node=8 -m stem.experiments.training.train --out runs/stem --attention stem --bf16 --parallel fsdp

Each step's batch is split over the processes and over `accumulate` parts, and the loss is the mean over all targets of
the whole batch, so the curve does not depend on the split. A run that is started again in the same folder goes on from
its last checkpoint and takes the same steps as an uninterrupted one, also on another number of processes.
"""

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stem.experiments.training.checkpoints import (
    Log,
    check_settings,
    load_checkpoint,
    only_writer,
    save_checkpoint,
    training_state,
)
from stem.experiments.training.config import TrainConfig, parse_config
from stem.experiments.training.distributed import Processes, choose_device, gradient_sync, join_processes, share, whole
from stem.experiments.training.model import LanguageModel
from stem.experiments.training.tasks import IGNORED, Batch, make_batch


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine from `lr` to a tenth of it at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def row_length(step: int, config: TrainConfig) -> int:
    """Tokens in the rows of this step: `start_len`, doubled evenly over `grow_steps`, then `seq_len`."""
    if step >= config.grow_steps:
        return config.seq_len
    return config.start_len << step * config.doublings // config.grow_steps


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
    total = config.batch_size * config.seq_len // row_length(step, config)
    rows = total // parts
    first = step * total + processes.rank * config.accumulate * rows
    return [range(first + part * rows, first + (part + 1) * rows) for part in range(config.accumulate)]


def token_losses(model: torch.nn.Module, batch: Batch, bf16: bool = False) -> Tensor:
    """Cross entropy of every position [nats], fp32 [B, N]; 0 where nothing is asked."""
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=bf16):
        logits = model(batch.inputs)  # [B, N, vocab]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(batch.targets)


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (betas 0.9, 0.95) that decays matrices only."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=weights[0].is_cuda)


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
        ValueError: For settings that do not fit together or with the checkpoint in `config.out`, and if another
            process trains there.
        FloatingPointError: If the loss stops being finite; the last checkpoint is from before.
    """
    check_run(config)
    with (
        deterministic(config.deterministic),
        join_processes(config.device) as processes,
        only_writer(checkpoint_path(config).parent) if processes.is_main else contextlib.nullcontext(),
    ):
        processes.wait()  # from here on nobody else writes the checkpoint
        model = run_steps(config, processes, progress=progress, on_step=on_step)
        processes.wait()
    return model.eval()


def run_steps(
    config: TrainConfig,
    processes: Processes,
    *,
    progress: bool = False,
    on_step: Callable[[int, LanguageModel], None] | None = None,
) -> LanguageModel:
    """The part of `train` that is done in the group of its processes.

    The DistributedDataParallel lives in this call only, because it must not outlive the group: as the last owner of a
    gloo group it would wait, holding the GIL, for a thread of gloo that needs the GIL to end.
    """
    names = config.tasks.split(",")
    checkpoint = checkpoint_path(config)
    torch.manual_seed(config.seed)
    model = LanguageModel(config.size, config.attention, config.stem_config, config.impl).to(processes.device)
    shared = share(model, config.parallel, processes)
    optimizer = make_optimizer(model, config)
    done = load_checkpoint(checkpoint, config.settings(), model, optimizer) if checkpoint.exists() else 0
    log = None
    if processes.is_main:
        log = Log(checkpoint.with_name("log.csv"), done, log_columns(names))
    steps = tqdm(range(done, config.steps), initial=done, total=config.steps, disable=not (progress and log))
    for step in steps:
        row = take_step(step, config, names, shared, optimizer, processes)
        if log:
            log.write(row)
            steps.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            state = training_state(model, optimizer)
            if log:
                log.sync()
                save_checkpoint(checkpoint, step + 1, config.settings(), state)
        if on_step:
            on_step(step + 1, model)
    if log:
        log.file.close()
    return model


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Have torch refuse operations whose result differs from run to run, if wanted, and put its setting back."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_run(config: TrainConfig) -> None:
    """Raise ValueError if this machine, the number of processes or the folder does not fit, before anything is made."""
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    row_parts(0, config, Processes(0, int(os.environ.get("WORLD_SIZE", 1)), device))
    if checkpoint_path(config).exists():
        check_settings(checkpoint_path(config), config.settings())


def checkpoint_path(config: TrainConfig) -> Path:
    """Where the run keeps its one checkpoint."""
    return Path(config.out) / "checkpoint.safetensors"


def log_columns(names: Sequence[str]) -> list[str]:
    """Columns of log.csv: losses [nats], gradient norm before clipping, speed of the whole run, memory of a process."""
    losses = [f"loss_{name}" for name in names]
    return ["step", "loss", *losses, "grad_norm", "lr", "tokens_per_second", "peak_memory_mib"]


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process has held so far [MiB]: tensors on a GPU, everything (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def take_step(
    step: int, config: TrainConfig, names: Sequence[str], model: torch.nn.Module, optimizer, processes: Processes
) -> dict[str, float]:
    """One optimizer step over the whole batch of all processes; returns its row of the log.

    `model` is the plain or the distributed one. The loss is the sum over all targets divided by their number in the
    whole batch; DDP and FSDP2 average gradients, so each process multiplies its share by their number.
    """
    start = time.perf_counter()
    seq_len = row_length(step, config)
    batches = [
        make_batch(names, rows, seq_len, seed=config.seed).to(processes.device)
        for rows in row_parts(step, config, processes)
    ]
    num_targets = processes.sum(sum((batch.targets != IGNORED).sum() for batch in batches))
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=processes.device)  # loss, targets
    for part, batch in enumerate(batches):
        with gradient_sync(model, part == len(batches) - 1):
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
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    by_task = (sums[:, 0] / sums[:, 1]).tolist()
    return {
        "step": step + 1,
        "loss": loss,
        **{f"loss_{name}": value for name, value in zip(names, by_task, strict=True)},
        "grad_norm": grad_norm,
        "lr": rate,
        "tokens_per_second": config.batch_size * config.seq_len / (time.perf_counter() - start),
        "peak_memory_mib": peak_memory_mib(processes.device),
    }


def main() -> None:
    """Train what the command line describes; a run that cannot start ends with one line and status 1."""
    config = parse_config()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it before its first use
    try:
        check_run(config)
    except ValueError as error:
        raise SystemExit(f"stem.experiments.training.train: {error}") from error
    train(config, progress=True)


if __name__ == "__main__":
    main()
