"""Processes of a training run, which share the model as whole copies (DDP) or as shards (FSDP2)."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class Processes:
    """Rank of this process, number of processes, and device; without torchrun, a process is alone."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the process that writes the files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place, and return it."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until every process calls this."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def join_processes(device: str = "") -> Iterator[Processes]:
    """Join the group that torchrun announces in the environment, and leave it at the end of the with block.

    Args:
        device: "cpu", "cuda" or "" (CUDA where there is one). The group uses NCCL on GPUs and gloo on CPUs.
    Raises:
        ValueError: If this process has no GPU of its own to run on.
    """
    local = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
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


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """Device of the process number `local_rank` of this machine; see `join_processes`."""
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ValueError(f"device={device!r}: process {local_rank} of this machine needs a GPU, {gpus} found")
    return torch.device("cuda", local_rank)


def share(model: nn.Module, parallel: str, processes: Processes) -> nn.Module:
    """Return the module to call: the model itself if alone, else in a DistributedDataParallel or sharded in place.

    The optimizer must be made afterwards, from the parameters of `model`. FSDP2 gathers a block at a time.
    """
    if processes.world == 1:
        return model
    if parallel == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gradient_sync(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Context of one part of a step, in which backward exchanges gradients only if `wanted`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


def whole(value: Tensor) -> Tensor:
    """Gather the full tensor of a shard, which all processes must ask for; other tensors are returned as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, shard: Tensor) -> Tensor:
    """Move a full tensor to the device of `shard`, and shard it alike if `shard` is one of its shape."""
    value = value.to(shard.device)
    if isinstance(shard, DTensor) and value.shape == shard.shape:
        return distribute_tensor(value, shard.device_mesh, shard.placements)
    return value
