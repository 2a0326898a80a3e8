"""Train the small language model on one CPU, on one GPU or on many, with the same script.

    python -m stem.experiments.training.train --out runs/stem --attention stem --density 0.25 --block-size 32
    torchrun --nproc-per-node=8 -m stem.experiments.training.train --out runs/stem --attention stem --parallel fsdp

The batch of a step is split over the processes, and each process splits its rows into `accumulate` parts. The loss is
the mean over all targets of the whole batch, so that the curve does not depend on the split. A run that is started
again in the same folder goes on from its last checkpoint. It takes the same steps as an uninterrupted run, also on
another number of processes.
"""

import contextlib
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from stem.experiments.training import checkpoints
from stem.experiments.training.config import TrainConfig, parse_config
from stem.experiments.training.distributed import Processes, choose_device, gradient_sync, join_processes, share, whole
from stem.experiments.training.model import LanguageModel, attend
from stem.experiments.training.tasks import IGNORED, Batch, make_batch


def learning_rate(step: int, config) -> float:
    """Learning rate of a step: linear warm-up to config.lr, then half a cosine to a tenth of it at config.steps."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def row_length(step: int, config: TrainConfig) -> int:
    """Tokens in the rows of a step: `start_len`, doubled evenly over `grow_steps`, then `seq_len`."""
    if step >= config.grow_steps:
        return config.seq_len
    return config.start_len << step * config.doublings // config.grow_steps


def row_parts(step: int, config: TrainConfig, processes: Processes) -> list[range]:
    """Row numbers of the endless stream that this process takes at a step, in `accumulate` parts.

    Raises:
        ValueError: If batch_size is not a multiple of accumulate times the number of processes.
    """
    parts = config.accumulate * processes.world
    if config.batch_size % parts:
        raise ValueError(f"batch_size={config.batch_size} must be a multiple of accumulate * processes = {parts}")
    total = config.batch_size * config.seq_len // row_length(step, config)
    rows = total // parts
    first = step * total + processes.rank * config.accumulate * rows
    return [range(first + part * rows, first + (part + 1) * rows) for part in range(config.accumulate)]


def token_losses(model: torch.nn.Module, batch: Batch, bf16: bool = False) -> Tensor:
    """Cross-entropy of every position [nats], fp32 [B, N]; 0 at positions without a target."""
    with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=bf16):
        logits = model(batch.inputs)  # [B, N, vocab]
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none")
    return losses.view_as(batch.targets)


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW (betas 0.9, 0.95) with weight decay on matrices only."""
    weights = list(model.parameters())
    matrices = {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": config.weight_decay}
    gains = {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, gains], lr=config.lr, betas=(0.9, 0.95), fused=weights[0].is_cuda)


def train(
    config: TrainConfig, *, progress: bool = False, on_step: Callable[[int, LanguageModel], None] | None = None
) -> LanguageModel:
    """Train to the last step of a run, going on from its checkpoint if any, and return the model in eval mode.

    Args:
        config: The run. Without a checkpoint in `config.out`, it starts from step 0 and replaces log.csv.
        progress: Show a tqdm bar on the main process.
        on_step: Called on every process after each step with the number of steps done and the model.
    Raises:
        ValueError: If `check_run` refuses the run, or another process trains in the same folder. Nothing has been
            written then.
        FloatingPointError: If the training diverges; see take_step. The last checkpoint is from before.
    """
    check_run(config)
    with (
        deterministic(config.deterministic),
        join_processes(config.device) as processes,
        checkpoints.only_writer(Path(config.out)) if processes.is_main else contextlib.nullcontext(),
    ):
        processes.wait()  # from here on nobody else writes the checkpoint
        model = run_steps(config, processes, progress, on_step)
        processes.wait()
    return model.eval()


def run_steps(
    config: TrainConfig, processes: Processes, progress: bool, on_step: Callable[[int, LanguageModel], None] | None
) -> LanguageModel:
    """Do all steps of `train` that are left, in the group of its processes.

    The DistributedDataParallel lives in this call only, because it must not outlive the group. As the last owner of a
    gloo group it would hold the GIL and wait for a gloo thread that needs the GIL to end.
    """
    folder, settings, columns = Path(config.out), config.settings(), log_columns(config)
    checkpoint, log = folder / checkpoints.CHECKPOINT, folder / checkpoints.LOG
    torch.manual_seed(config.seed)
    model = LanguageModel(config.size, config.attention, config.stem_config, config.impl).to(processes.device)
    shared = share(model, config.parallel, processes)
    optimizer = make_optimizer(model, config)
    checkpoints.check_resumable(folder, settings, columns)  # once more: another run may have ended here since check_run
    done = checkpoints.load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    if processes.is_main:
        checkpoints.cut_log(log, done, columns)
    steps = range(done, config.steps)
    steps = tqdm(steps, initial=done, total=config.steps, disable=not (progress and processes.is_main))
    for step in steps:
        row = take_step(step, config, shared, optimizer, processes)
        if processes.is_main:
            checkpoints.append_row(log, row)
            steps.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
            state = checkpoints.training_state(model, optimizer)
            if not all(value.isfinite().all() for value in state.values()):
                raise diverged(step, config, row["loss"], "the new weights are not finite")
            if processes.is_main:
                checkpoints.force_to_disk(log)  # a checkpoint must not outlive the rows before it
                checkpoints.save_checkpoint(checkpoint, step + 1, settings, state)
        if on_step:
            on_step(step + 1, model)
    return model


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Make torch refuse operations that differ from run to run, if wanted, and restore its setting afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_run(config: TrainConfig) -> None:
    """Raise ValueError if device, processes, `impl`, folder, checkpoint or log do not fit a run; write nothing."""
    device = choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    row_parts(0, config, Processes(0, int(os.environ.get("WORLD_SIZE", 1)), device))
    if config.impl:
        check_impl(config, device)
    checkpoints.check_folder(Path(config.out))
    checkpoints.check_resumable(Path(config.out), config.settings(), log_columns(config))


def check_impl(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError if `impl` cannot attend on this device in the shapes and the dtype of the run."""
    size, length, dtype = config.size, row_length(0, config), torch.bfloat16 if config.bf16 else torch.float32
    q, kv = (torch.ones(1, n, length, size.head_dim, device=device, dtype=dtype) for n in (size.heads, size.kv_heads))
    try:
        attend(q, kv, kv, config.attention, config.stem_config, config.impl)
    except (TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def log_columns(config: TrainConfig) -> list[str]:
    """Columns of log.csv: losses [nats], gradient norm before clipping, speed of all processes, memory of this one."""
    losses = [f"loss_{name}" for name in config.tasks.split(",")]
    return ["step", "loss", *losses, "grad_norm", "lr", "tokens_per_second", "peak_memory_mib"]


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far [MiB]: of tensors on a GPU, of the whole process (resident) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def take_step(
    step: int, config: TrainConfig, model: torch.nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> dict[str, float]:
    """Take one optimizer step over the batch of all processes and return its row of the log.

    DDP and FSDP2 average gradients, so each process multiplies its share of the loss by the number of processes.
    `model` is the plain model, or the model that `share` returned.

    Raises:
        FloatingPointError: If the loss or the gradient norm is not finite; names both, the step and the learning rate.
            The weights are still those of the step before.
    """
    start = time.perf_counter()
    names, seq_len, parts = config.tasks.split(","), row_length(step, config), row_parts(step, config, processes)
    batches = [make_batch(names, rows, seq_len, seed=config.seed).to(processes.device) for rows in parts]
    num_targets = processes.sum(sum((batch.targets != IGNORED).sum() for batch in batches))
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=processes.device)  # loss, targets
    for part, batch in enumerate(batches):
        with gradient_sync(model, part == len(batches) - 1):
            try:
                losses = token_losses(model, batch, config.bf16)
            except FloatingPointError as error:
                raise diverged(step, config, math.nan, str(error)) from error
            (losses.sum() * processes.world / num_targets).backward()
        counts = (batch.targets != IGNORED).sum(-1)
        sums.index_add_(0, batch.task, torch.stack([losses.detach().sum(-1), counts], dim=-1).double())
    processes.sum(sums)
    loss = (sums[:, 0].sum() / sums[:, 1].sum()).item()
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)).item()
    if not math.isfinite(loss + grad_norm):
        raise diverged(step, config, loss, f"grad_norm={grad_norm}")
    rate = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    speed = config.batch_size * config.seq_len / (time.perf_counter() - start)
    by_task = (sums[:, 0] / sums[:, 1]).tolist()
    values = [step + 1, loss, *by_task, grad_norm, rate, speed, peak_memory_mib(processes.device)]
    return dict(zip(log_columns(config), values, strict=True))


def diverged(step: int, config: TrainConfig, loss: float, reason: str) -> FloatingPointError:
    return FloatingPointError(
        f"step {step + 1}: loss={loss:g}, {reason}, learning rate {learning_rate(step, config):g}; the training "
        f"diverges: lower lr={config.lr:g} or clip={config.clip:g}, or raise warmup={config.warmup}"
    )


def main() -> None:
    """Train the run of the command line; a run that cannot start or go on ends with one line and status 1."""
    config = parse_config()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it before its first use
    try:
        train(config, progress=True)
    except (ValueError, FloatingPointError, OSError) as error:
        raise SystemExit(f"stem.experiments.training.train: {error}") from error


if __name__ == "__main__":
    main()
