"""The processes that torchrun started together: which one this is, how many there are, waiting and adding up.

In a process of its own everything here is done at once, and torch is not imported. Rank 0 is the first.
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
PATIENCE = timedelta(days=1)  # the others wait while one finishes its share; torchrun ends them where one fails


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0 on."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def on_this_machine() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


def command() -> str:
    """What started these processes, as a user types it."""
    return "python" if world_size() == 1 else f"torchrun --nproc_per_node={on_this_machine()}"


def start() -> None:
    """Meet the others, at the first call: gloo for what lies in memory, NCCL for what lies on a GPU."""
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # imported later its defaults would hold the group, whose threads then outlive end()

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(end)


def barrier() -> None:
    """Wait until all have come here."""
    if world_size() > 1:
        import torch

        add_up(torch.zeros(1))  # in memory, where dist.barrier would want a GPU


def share(count: int) -> tuple[int, int]:
    """(start, stop) of this process's share of so many things, shares one after another in the order of ranks."""
    return rank() * count // world_size(), (rank() + 1) * count // world_size()


def on_main_process(work: Callable[[], T]) -> T:
    """What `work()` returns on rank 0, which alone calls it, on every rank; an InputError of it is raised on each."""
    if world_size() == 1:
        return work()
    import torch
    import torch.distributed as dist

    start()
    answer: list[Any] = [None, None]  # what work() gave, its InputError
    if rank() == 0:
        try:
            answer[0] = work()
        except InputError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise InputError(answer[1])
    return answer[0]


def add_up(tensor: "Tensor") -> "Tensor":
    """The sum of a tensor over the ranks, in its place: the same bits on every rank."""
    if world_size() > 1:
        import torch.distributed as dist

        start()
        dist.all_reduce(tensor)
    return tensor


def print_main(line: str) -> None:
    """Print a line, on rank 0 alone."""
    if rank() == 0:
        print(line, flush=True)


def end() -> None:
    """Leave the others, as the process does by itself when it ends."""
    import torch.distributed as dist

    crashed = hasattr(sys, "last_value")  # then the others may never come to this, and NCCL would wait for them
    if dist.is_initialized() and not crashed:
        dist.destroy_process_group()
