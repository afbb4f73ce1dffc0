"""Large tensors in mapped files: the system can write their pages out, and they need not stay resident."""

import ctypes
import math
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

LARGE = 2**28  # bytes from which on a tensor is worth a file, or unmapping its pages
MADV_DONTNEED = 4  # of Linux


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor, mapped from an unnamed file in the temporary folder.

    Its disk space is reserved first. Without enough of it the tensor is in memory.
    """
    size = math.prod(shape)
    with suppress(OSError, AttributeError), tempfile.NamedTemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(*shape)
    return torch.empty(*shape, dtype=dtype)


def unmap_pages(tensor: Tensor) -> None:
    """Take the pages of a large tensor that is mapped from a file out of resident memory; a read maps them again.

    A tensor in memory is left alone. Values written to a copy-on-write map would be lost.
    """
    if tensor.nbytes < LARGE or tensor.device.type != "cpu":
        return
    with suppress(OSError), Path("/proc/self/maps").open(encoding="utf-8") as lines:
        for line in lines:
            span, _, _, _, inode = line.split(maxsplit=5)[:5]
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= tensor.data_ptr() < high and inode != "0":
                ctypes.CDLL(None).madvise(ctypes.c_void_p(low), ctypes.c_size_t(high - low), MADV_DONTNEED)
