"""One update of the weights: items -> encode -> loss -> backward -> step. T tokens, D dimensions, K negatives."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import processes
from common.errors import InputError
from config import TrainingSettings
from dataloader import Batch
from model.base import SequenceModel, set_share
from model.extensions.objective import Objective, Teachers, history_items, learned_bias
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample
from model.items import Factors
from model.loss import LOSSES
from trainer.sparse_rows import SparseRows


def find_loss(settings: TrainingSettings, sampled: bool) -> Callable[..., Tensor]:
    """Return the loss that `--loss` names, sampled or exact. Raises InputError if there is none."""
    losses = SAMPLED_LOSSES if sampled else LOSSES
    if settings.loss not in losses:
        condition = "with --num_negatives" if sampled else "without --num_negatives"
        raise InputError(f"--loss {settings.loss!r}: {condition} it must be one of {', '.join(losses)}")
    return losses[settings.loss]


class Step:
    """A training step. Nothing in it waits for a GPU."""

    def __init__(
        self,
        model: SequenceModel,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        sampler: NegativeSampler | None = None,
        rows: SparseRows | None = None,
        teachers: Teachers | None = None,
        prior: Tensor | None = None,
    ) -> None:
        """sampler: draws the items of a sampled softmax; None: the exact one. rows: updates the learned item embedding
        by rows; None: the optimizer does. teachers: trained models to learn from; None: the largest size teaches.
        prior: [N+1], added to the scaled logits of each token; None: 0.

        Raises InputError for an unknown loss.
        """
        self.model, self.optimizer, self.settings, self.sampler = model, optimizer, settings, sampler
        self.teachers, self.prior = teachers, prior
        self.rows, self.lookup = rows, rows.read if rows else F.embedding
        self.clipped = torch.zeros((), device=next(model.parameters()).device)  # steps whose gradient was clipped
        self.loss = find_loss(settings, sampled=sampler is not None)

    def __call__(self, batch: Batch) -> Tensor:
        """Update the weights with one batch, and return its loss, a scalar.

        Under torchrun the batch is this rank's share, and so is the loss.
        """
        model, settings = self.model, self.settings
        with _matmul_precision(settings.precision):
            set_share(model, batch.share)
            with self._autocast(batch):
                x = model.items(batch.tokens, not self.sampler, self.lookup)  # [T, D]
                z = model.encode(x, batch.position, batch.longest)  # [T, D]
            set_share(model, None)

            dtype = torch.bfloat16 if settings.precision == "bf16" else z.dtype
            negatives = None
            if not self.sampler:
                table: Factors | Sample | Tensor = model.items.factors(dtype)  # [N+1, D]
            else:
                negatives, log_kq = self.sampler.draw()  # [K], [K]
                with self._autocast(batch):  # own [T, D], drawn [K, D]
                    own, drawn = (model.items(items, lookup=self.lookup) for items in (batch.labels, negatives))
                    table = Sample(own, drawn.to(dtype), negatives, log_kq, x)

            bias, history = _history(model, batch)
            teacher = self._teach(batch, negatives, history, dtype) if self.teachers else None  # [T, K]
            objective = Objective(
                getattr(model, "log_scale", None), settings.distill, bias, history, teacher, self.prior
            )
            how = {"reduction": settings.mrl_loss, "count": batch.num_labels, "objective": objective}
            loss = self.loss(z, table, batch.labels, model.sizes, **how)
            loss.backward()

        all_reduce_gradients(model)
        parameters = [*model.parameters(), *([self.rows.collect()] if self.rows else [])]
        if settings.max_grad_norm:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm([*gradients, *([self.rows.gradient_or_norm()] if self.rows else [])])
            nn.utils.clip_grads_with_norm_(parameters, settings.max_grad_norm, norm)
            self.clipped += norm > settings.max_grad_norm
        self.optimizer.step()
        if self.rows:
            self.rows.update(float(self.optimizer.param_groups[0]["lr"]))
        self.optimizer.zero_grad(set_to_none=True)  # now, since the next forward pass needs the memory
        return loss.detach()

    def _teach(self, batch: Batch, negatives: Tensor | None, history: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the teachers' logits of the loss's candidates, [T, K]."""
        assert self.teachers
        with self._autocast(batch):
            z = self.teachers.encode(batch.tokens, batch.position, batch.longest)
        z = z.to(self.teachers.table.dtype)
        if negatives is None:
            return self.teachers.logits(z, dtype)
        longest = 0 if history is None else history.shape[1]
        return self.teachers.sampled_logits(z, batch.labels, negatives, batch.tokens, longest, dtype)

    def _autocast(self, batch: Batch) -> torch.autocast:
        # Without autocast's cache, which would keep the weights of a CUDA graph's recording.
        enabled = self.settings.precision == "bf16"
        return torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


def _history(model: SequenceModel, batch: Batch) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the learned bias b [M] and the history items [T, L] that it is added to; None, None without it."""
    parameter = getattr(model, "history_bias", None)
    if parameter is None:
        return None, None
    longest = 2 ** (batch.longest - 1).bit_length()  # as of a GraphedStep: another width would round otherwise
    return learned_bias(parameter), history_items(batch.tokens, batch.position, longest)


def build_optimizer(
    model: nn.Module, settings: TrainingSettings, rows: SparseRows | None = None
) -> torch.optim.Optimizer:
    """Return AdamW or Adam, which decays all parameters but biases, as the released code does.

    LayerNorm weights and ν, θ, γ are decayed too. On a GPU the learning rate is a tensor, for CUDA graphs.
    rows: updates the learned item embedding in place of the optimizer.
    """
    biases = [p for n, p in model.named_parameters() if "bias" in n]
    others = [p for n, p in model.named_parameters() if "bias" not in n and not (rows and p is rows.weight)]
    groups = [{"params": others, "weight_decay": settings.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    on_gpu = others[0].device.type == "cuda"
    lr = (
        {"lr": torch.tensor(settings.lr, device=others[0].device), "capturable": True}
        if on_gpu
        else {"lr": settings.lr}
    )
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    return kind(groups, eps=settings.adam_epsilon, fused=True, **lr)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """Compute float32 products in TF32 within the block, if that was asked for and the device has it.

    On a GPU, products of bfloat16 are summed in float32 throughout: the loss sums over the whole catalogue.
    """
    before = torch.get_float32_matmul_precision()
    cuda = torch.backends.cuda.matmul
    reduced = cuda.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        cuda.allow_bf16_reduced_precision_reduction = reduced


def all_reduce_gradients(model: nn.Module) -> None:
    """Sum the gradients of all ranks' shares, so that every rank has those of the whole batch."""
    if processes.world_size() > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        nn.utils.vector_to_parameters(processes.add_up(nn.utils.parameters_to_vector(gradients)), gradients)


# ------------------------------------------------------------------------------------------------------------ averaging
# Exponential moving average of the weights, for evaluation and saving.


class WeightAverage:
    """Weight average Σ_s d^(t-s) w_s / Σ_s d^(t-s) over steps s = 1..t.

    w_s are the weights after step s. The average covers about the last 1/(1-d) steps. An average of
    nested weights is nested, so slicing stays exact.
    """

    def __init__(self, model: SequenceModel, decay: float, rows: SparseRows | None = None) -> None:
        """decay: d, between 0 and 1 (exclusive). rows: averages the learned item embedding itself; None: this does."""
        copies = {id(constant): constant for constant in (*model.buffers(), model.items.whitening)}  # shared
        if rows:
            copies[id(rows.weight)] = rows.start_average(decay)
        self.model = copy.deepcopy(model, copies).requires_grad_(False)
        self.decay, self.rows = decay, rows

    @torch.no_grad()
    def update(self, model: SequenceModel, step: int) -> None:
        """Update the average with the weights after step `step` (1-based)."""
        share = (1 - self.decay) / (1 - self.decay**step)  # 1 at step 1, which discards the initial weights
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            if not self.rows or weight is not self.rows.weight:
                average.lerp_(weight, share)


# ---------------------------------------------------------------------------------------------------------- cuda graphs
# The training step as CUDA graphs.
#
# A step of this model is hundreds of small kernels, which a GPU finishes faster than Python can start them. On a GPU a
# step is therefore recorded once for each shape of batch, and replayed for all later batches of that shape.

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
