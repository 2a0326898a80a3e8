"""The processes of a run and how they share a model: whole copies (DDP) or shards (FSDP2), both torch's own."""

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

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def join_processes(device: str = "") -> Iterator[Processes]:
    """Join the group that torchrun announces in the environment, and leave it at the end.

    Args:
        device: "cpu", "cuda" or "" (CUDA where there is one). NCCL joins GPUs, gloo joins CPUs.
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
    """The device of the process `local_rank` of this machine; see `join_processes`."""
    gpus = torch.cuda.device_count()
    if device == "cpu" or (device == "" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ValueError(f"device={device!r}: process {local_rank} of this machine needs a GPU, {gpus} found")
    return torch.device("cuda", local_rank)


def share(model: nn.Module, parallel: str, processes: Processes) -> nn.Module:
    """The model as the processes run it: itself when alone, a DistributedDataParallel around it, or sharded in place.

    Args:
        model: Holds its blocks in `model.blocks`; FSDP2 gathers one of them at a time.
        parallel: "ddp" or "fsdp". The optimizer must be made after this call.
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
    """Context of one part of a step: backward exchanges gradients only where `wanted`, in the last part."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(model, DistributedDataParallel) and not wanted:
        return model.no_sync()
    return contextlib.nullcontext()


def whole(value: Tensor) -> Tensor:
    """The full tensor of a shard (all processes must ask), any other tensor as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, shard: Tensor) -> Tensor:
    """A full tensor cut up as `shard` is, if that is a shard of the same shape."""
    if isinstance(shard, DTensor) and value.shape == shard.shape:
        return distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements)
    return value
