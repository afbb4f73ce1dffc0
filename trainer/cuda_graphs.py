"""The training step as CUDA graphs.

A step of this model is hundreds of small kernels, which a GPU finishes faster than Python can start them. On a GPU a
step is therefore recorded once for each shape of batch, and replayed for all later batches of that shape.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from common import processes
from dataloader import Batch
from trainer.step import Step

TENSORS = ("tokens", "labels", "position", "num_labels")  # of a batch
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class GraphedStep:
    """A `Step` on a GPU, recorded and replayed. Its plain twin is the step itself.

    The first batch of a shape is an ordinary step, which also allocates what a recording needs; the second is recorded.
    Learning rates must be tensors, so that a recording reads the current ones.

    Under torchrun a recording includes the sum of the gradients over all ranks. Every step has this one sum, so a rank
    may replay while another one, whose share has another shape, takes an ordinary step or records.
    """

    def __init__(self, step: Step, record: Recorder | None = None) -> None:
        """record: turns a function into one that repeats it; by default a CUDA graph."""
        self.step, self.record = step, record or cuda_graphs()
        self.model, self.optimizer, self.clipped = step.model, step.optimizer, step.clipped
        self.rows = step.rows
        self._seen: set[tuple[int, int, int]] = set()
        self._recorded: dict[tuple[int, int, int], tuple[Batch, Callable[[], Tensor]]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        longest = 2 ** (batch.longest - 1).bit_length()  # the recurrence doubles its reach: few shapes, the same result
        key = len(batch.tokens), longest, batch.share[1]
        if key not in self._seen:
            self._seen.add(key)
            return self.step(batch)
        if key not in self._recorded:
            static = replace(batch, longest=longest, **{name: getattr(batch, name).clone() for name in TENSORS})
            if processes.world_size() > 1:  # the share begins elsewhere in every batch
                first = torch.tensor(batch.share[0], device=batch.tokens.device)
                static = replace(static, share=(first, batch.share[1]))
            self._recorded[key] = static, self.record(lambda: self.step(static))
        static, replay = self._recorded[key]
        for name in TENSORS:
            getattr(static, name).copy_(getattr(batch, name))
        if isinstance(static.share[0], Tensor):
            static.share[0].fill_(batch.share[0])
        return replay().clone()


def cuda_graphs() -> Recorder:
    """Return a recorder of CUDA graphs.

    All graphs share one memory pool, as large as the largest of them needs. No graph reads what another left there:
    gradients are cleared, and the loss is copied at once.
    """
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = work()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return record
