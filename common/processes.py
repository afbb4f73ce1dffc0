"""Distributed helpers for torchrun: ranks, machines, collectives and code for some ranks only.

In a single process every function returns at once without importing torch. Machines share neither memory nor disks.
"""

import atexit
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # ranks may wait long for a slow share; torchrun ends all of them if one fails
PIECE = 1 << 24  # bytes of a file that are sent at once

_first_machine: Any = None  # process group of the collectives within `on_first_machine`; None: all processes


def world_size() -> int:
    """Return the number of processes, within `on_first_machine` those of the first machine."""
    return _environment("LOCAL_WORLD_SIZE" if _first_machine else "WORLD_SIZE", 1)


def rank() -> int:
    """Return the rank of this process, 0 in a single process."""
    return _environment("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also its GPU's index."""
    return _environment("LOCAL_RANK", 0) if world_size() > 1 else 0


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return _environment("LOCAL_WORLD_SIZE", world_size()) if world_size() > 1 else 1


def machine() -> int:
    """Return the number of this machine, from 0; rank 0 is on machine 0."""
    return _environment("GROUP_RANK", 0) if world_size() > 1 else 0


def machines() -> int:
    """Return the number of machines."""
    return _environment("GROUP_WORLD_SIZE", 1) if world_size() > 1 else 1


def command() -> str:
    """Return the command that started these processes, as a user types it."""
    nodes = f"--nnodes={machines()} " if machines() > 1 else ""
    return "python" if world_size() == 1 else f"torchrun {nodes}--nproc_per_node={local_world_size()}"


def start() -> None:
    """Initialise the process group once: gloo for CPU tensors, NCCL for GPU tensors."""
    if world_size() == 1:
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # a later import would keep the group, and its threads, alive after end()

    if not dist.is_initialized():
        options: dict[str, Any] = {"backend": "gloo"}
        if torch.cuda.is_available():
            options["backend"] = "cpu:gloo,cuda:nccl"
            if local_rank() < torch.cuda.device_count():  # otherwise resolve_device raises an InputError later
                options["device_id"] = torch.device("cuda", local_rank())
        with _connected():
            dist.init_process_group(timeout=TIMEOUT, **options)
        atexit.register(end)


def share(count: int) -> tuple[int, int]:
    """Return (start, stop) of this rank's contiguous share of `count` things."""
    return rank() * count // world_size(), (rank() + 1) * count // world_size()


def on_main_process(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only and return its result on every rank.

    An InputError of `function` is raised on every rank.
    """
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]  # result, message of the InputError
    if rank() == 0:
        try:
            answer[0] = function()
        except InputError as error:
            answer[1] = str(error)
    _broadcast_objects(answer)
    if answer[1] is not None:
        raise _raised_everywhere(answer[1])
    return answer[0]


def together(function: Callable[[], T]) -> T:
    """Call `function` on every rank and return the rank's own result.

    InputErrors of any ranks are raised on every rank as one, which names their machines if there are several.
    """
    if world_size() == 1:
        return function()
    result: Any = None
    message = where = None
    try:
        result = function()
    except InputError as error:
        message = str(error)
        where = f"{_machine_name()}: {message}" if machines() > 1 and not error.on_every_rank else message
    found = _gather((message, where))
    if len({message for message, _ in found}) > 1:  # not the same on every rank
        raise _raised_everywhere("\n".join(dict.fromkeys(where for _, where in found if where)))
    if message is not None:
        raise _raised_everywhere(message)
    return result


def on_each_machine(function: Callable[[], object]) -> None:
    """Call `function` on one rank of each machine while the others wait. InputErrors as in `together`."""
    together(lambda: function() if local_rank() == 0 else None)


def on_first_machine(function: Callable[[], T]) -> T:
    """Call `function` on every rank of the first machine and return rank 0's result on every rank of all machines.

    Within `function` the other machines do not count: world_size and every collective are those of the first machine.
    InputErrors as in `together`.
    """
    if machines() == 1:
        return function()
    global _first_machine
    import torch.distributed as dist

    count = on_main_process(local_world_size)
    group = dist.new_group(range(count), timeout=TIMEOUT, backend="gloo")  # every rank takes part in making it

    def call() -> T | None:
        global _first_machine
        if machine():
            return None
        _first_machine = group
        try:
            return function()
        finally:
            _first_machine = None

    result = together(call)
    if machine() == 0:
        dist.destroy_process_group(group)
    return on_main_process(lambda: result)  # type: ignore[return-value]  # rank 0 has one


def check_same(what: str, digest: str, hint: str) -> None:
    """Raise InputError on every rank, naming the machine, if a rank has another digest than rank 0."""
    if world_size() == 1:
        return
    found = _gather((digest, _machine_name()))
    for other, name in found:
        if other != found[0][0]:
            raise _raised_everywhere(
                f"{what}: the digest is {other} on {name} and {found[0][0]} on {found[0][1]}; {hint}"
            )


def any_rank(found: bool) -> bool:
    """Return whether `found` is true on any rank."""
    return found if world_size() == 1 else any(_gather(found))


def pieces_of(path: Path) -> Iterator[bytes]:
    """Yield a file of rank 0 in pieces on every rank. Each rank must read them to the end."""
    import torch
    import torch.distributed as dist

    size = on_main_process(lambda: path.stat().st_size)
    with (path if rank() == 0 else Path(os.devnull)).open("rb") as file:
        for at in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - at), dtype=torch.uint8)
            if rank() == 0:
                piece = torch.frombuffer(bytearray(file.read(len(piece))), dtype=torch.uint8)
            with _connected():
                dist.broadcast(piece, src=0, group=_first_machine)
            yield piece.numpy().tobytes()


def add_up(tensor: "Tensor") -> "Tensor":
    """Sum a tensor over the ranks in place and return it, bit-identical on all ranks."""
    if world_size() > 1:
        import torch.distributed as dist

        start()
        with _connected():
            dist.all_reduce(tensor, group=_first_machine)
    return tensor


def broadcast(tensor: "Tensor") -> None:
    """Replace a tensor on all ranks by that of rank 0, in place."""
    if world_size() > 1:
        import torch.distributed as dist

        start()
        with _connected():
            dist.broadcast(tensor, src=0, group=_first_machine)


def exchange(tensors: "Sequence[Tensor]") -> "list[Tensor]":
    """Send the r-th tensor to rank r; return the tensors received, in the order of the ranks.

    They may have any numbers of rows, of one shape and type.
    """
    import torch
    import torch.distributed as dist

    start()
    sent = torch.tensor([len(tensor) for tensor in tensors], device=tensors[0].device)
    received, send = torch.empty_like(sent), torch.cat(list(tensors))
    with _connected():
        dist.all_to_all_single(received, sent, group=_first_machine)
        found = send.new_empty(int(received.sum()), *send.shape[1:])
        dist.all_to_all_single(found, send, received.tolist(), sent.tolist(), group=_first_machine)
    return list(found.split(received.tolist()))


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


def _environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def _machine_name() -> str:
    return f"machine {machine()} ({socket.gethostname()})"


def _raised_everywhere(message: str) -> InputError:
    """Return an InputError that every rank raises, so that rank 0 alone prints it."""
    error = InputError(message)
    error.on_every_rank = True
    return error


def _broadcast_objects(objects: list[Any]) -> None:
    """Replace the objects by those of rank 0."""
    import torch
    import torch.distributed as dist

    start()
    with _connected():
        dist.broadcast_object_list(objects, src=0, group=_first_machine, device=torch.device("cpu"))


def _gather(value: T) -> list[T]:
    """Return the values of all ranks, in order."""
    import torch.distributed as dist

    start()
    found: list[Any] = [None] * world_size()
    with _connected():
        dist.all_gather_object(found, value, group=_first_machine)
    return found


@contextmanager
def _connected() -> Iterator[None]:
    """Raise InputError if the connection to another process is lost, whose own message says why it ended."""
    try:
        yield
    except RuntimeError as error:  # of the backend
        lines = str(error).strip().splitlines() or [""]
        raise _raised_everywhere(
            f"a process of this training ended early or cannot be reached ({lines[0][:200]}); its own message, perhaps "
            f"on another machine, says why"
        ) from error
