"""One update of the weights, and the same as a CUDA graph.

A step of this model is hundreds of small kernels, which a GPU finishes faster than Python can start them. On a GPU a
step is therefore recorded once for each shape of batch, and played back for all later batches of that shape.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from common import processes
from dataloader import Batch
from model.base import SequenceModel
from model.dropout import set_share
from model.extensions.objective import Objective
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample
from model.items import Factors
from model.loss import LOSSES

Trainable = SequenceModel  # what a step trains
TENSORS = ("tokens", "labels", "position", "num_labels")  # of a batch
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class Step:
    """Forward pass, loss, gradients, clipping and update; nothing in it waits for a GPU."""

    def __init__(
        self,
        model: Trainable,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str,
        reduction: str = "mean",
        distill: float = 0.0,
        loss: str = "fast",
        max_grad_norm: float = 0.0,
        sampler: NegativeSampler | None = None,
    ) -> None:
        """precision: of the matrix products, fp32, tf32 or bf16. max_grad_norm: 0 does not clip. sampler: draws the
        items that stand for the catalogue in the softmax; None: all. distill: see model/extensions/objective.py."""
        self.model, self.optimizer, self.precision, self.reduction = model, optimizer, precision, reduction
        self.distill, self.max_grad_norm, self.sampler = distill, max_grad_norm, sampler
        self.loss_function = (SAMPLED_LOSSES if sampler else LOSSES)[loss]

    def __call__(self, batch: Batch) -> Tensor:
        """One update. Returns the loss, a scalar, of which a rank has the part of its labels."""
        with _products_in(self.precision):
            loss = self.loss(batch)
            loss.backward()
        add_up_gradients(self.model)
        if self.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # not at the next step, whose forward pass needs the memory
        return loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, or of this rank's share of it."""
        model, narrow = self.model, self.precision == "bf16"
        set_share(model, batch.share)
        # Without the cache: it would keep a recording's weights.
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=narrow, cache_enabled=False):
            x = model.items(batch.tokens, sparse_gradient=not self.sampler)
            z = model.encode(x, batch.position, batch.longest)
        set_share(model, None)
        dtype = torch.bfloat16 if narrow else z.dtype
        if not self.sampler:
            table: Tensor | Factors | Sample = model.items.factors(dtype)
        else:
            items, log_kq = self.sampler.draw()
            with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=narrow, cache_enabled=False):
                table = Sample(model.items(batch.labels), model.items(items).to(dtype), items, log_kq)
        return self.loss_function(
            z,
            table,
            batch.labels,
            model.sizes,
            reduction=self.reduction,
            count=batch.num_labels,
            objective=self.objective(),
        )

    def objective(self) -> Objective:
        """What the loss is asked for."""
        return Objective(getattr(self.model, "log_scale", None), self.distill)  # a baseline has no scale


def build_optimizer(model: nn.Module, name: str, lr: float, weight_decay: float, eps: float) -> torch.optim.Optimizer:
    """AdamW or Adam that decays everything but the biases (LayerNorm weights and ν, θ, γ too, as the released code). On
    a GPU the learning rate is a tensor, for a step that is recorded."""
    biases = [p for n, p in model.named_parameters() if "bias" in n]
    others = [p for n, p in model.named_parameters() if "bias" not in n]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
    on_gpu = others[0].device.type == "cuda"
    options = {"lr": torch.tensor(lr, device=others[0].device), "capturable": True} if on_gpu else {"lr": lr}
    return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name](groups, eps=eps, fused=True, **options)


class GraphedStep:
    """A `Step` on one GPU that is recorded and played back. Its plain twin is the step itself.

    A shape's first batch is an ordinary step, which also makes what a recording needs to be there already; its second
    is recorded. Learning rates must be tensors, so that a recording reads the current ones.
    """

    def __init__(self, step: Step, record: Recorder | None = None) -> None:
        """record: makes of a function one that does the same again; by default a CUDA graph."""
        self.step, self.record = step, record or cuda_graphs()
        self.model, self.optimizer = step.model, step.optimizer
        self._seen: set[tuple[int, int]] = set()
        self._recorded: dict[tuple[int, int], tuple[Batch, Callable[[], Tensor]]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        longest = 2 ** (batch.longest - 1).bit_length()  # the recurrence doubles its reach: few shapes, the same result
        key = len(batch.tokens), longest
        if key not in self._seen:
            self._seen.add(key)
            return self.step(batch)
        if key not in self._recorded:
            held = replace(batch, longest=longest, **{name: getattr(batch, name).clone() for name in TENSORS})
            self._recorded[key] = held, self.record(lambda: self.step(held))
        held, replay = self._recorded[key]
        for name in TENSORS:
            getattr(held, name).copy_(getattr(batch, name))
        return replay().clone()


def cuda_graphs() -> Recorder:
    """A recorder of CUDA graphs: what it makes of a function plays back its kernels, recorded without being done.

    All its graphs compute in the same memory, as much as the largest one needs: what one leaves there (gradients, a
    loss that is copied at once) no other one reads.
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


@contextlib.contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """float32 products in TF32 within, where that was asked for and the device has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_up_gradients(model: nn.Module) -> None:
    """Give every rank the gradients of the whole batch, of which it has those of its share: one sum of all of them."""
    if processes.world_size() > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        nn.utils.vector_to_parameters(processes.add_up(nn.utils.parameters_to_vector(gradients)), gradients)
