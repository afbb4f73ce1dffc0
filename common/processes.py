"""Distributed helpers for torchrun: ranks, collectives and code for rank 0 only.

In a single process every function returns at once without importing torch.
"""

import atexit
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # ranks may wait long for a slow share; torchrun ends all of them if one fails


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Return the rank of this process, 0 in a single process."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also its GPU's index."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def command() -> str:
    """Return the command that started these processes, as a user types it."""
    return "python" if world_size() == 1 else f"torchrun --nproc_per_node={local_world_size()}"


def start() -> None:
    """Initialise the process group once: gloo for CPU tensors, NCCL for GPU tensors."""
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # a later import would keep the group, and its threads, alive after end()

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
        atexit.register(end)


def barrier() -> None:
    """Wait until every rank has reached this call."""
    if world_size() > 1:
        import torch

        add_up(torch.zeros(1))  # on the CPU; dist.barrier would need a GPU


def share(count: int) -> tuple[int, int]:
    """Return (start, stop) of this rank's contiguous share of `count` things."""
    return rank() * count // world_size(), (rank() + 1) * count // world_size()


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only and return its result on every rank.

    An InputError of `function` is raised on every rank.
    """
    if world_size() == 1:
        return function()
    import torch
    import torch.distributed as dist

    start()
    answer: list[Any] = [None, None]  # result, message of the InputError
    if rank() == 0:
        try:
            answer[0] = function()
        except InputError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise InputError(answer[1])
    return answer[0]


def add_up(tensor: "Tensor") -> "Tensor":
    """Sum a tensor over the ranks in place and return it, bit-identical on all ranks."""
    if world_size() > 1:
        import torch.distributed as dist

        start()
        dist.all_reduce(tensor)
    return tensor


def print_main(line: str) -> None:
    """Print a line on rank 0 only."""
    if rank() == 0:
        print(line, flush=True)


def end() -> None:
    """Destroy the process group; runs automatically at exit."""
    import torch.distributed as dist

    crashed = hasattr(sys, "last_value")  # other ranks may never get here, and NCCL would wait for them
    if dist.is_initialized() and not crashed:
        dist.destroy_process_group()
