"""One update of the weights: items -> encode -> loss -> backward -> step. T tokens, D dimensions, K negatives."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import processes
from common.errors import InputError
from config import TrainingSettings
from dataloader import Batch
from model.base import SequenceModel
from model.dropout import set_share
from model.extensions.history import history_items, learned_bias
from model.extensions.objective import Objective
from model.extensions.sampled_loss import SAMPLED_LOSSES, NegativeSampler, Sample
from model.items import Factors
from model.loss import LOSSES
from trainer.sparse_rows import SparseRows


class Step:
    """A training step. Nothing in it waits for a GPU."""

    def __init__(
        self,
        model: SequenceModel,
        optimizer: torch.optim.Optimizer,
        settings: TrainingSettings,
        sampler: NegativeSampler | None = None,
        rows: SparseRows | None = None,
    ) -> None:
        """sampler: draws the items of a sampled softmax; None: the exact one. rows: updates the learned item embedding
        by rows; None: the optimizer does.

        Raises InputError for an unknown loss.
        """
        self.model, self.optimizer, self.settings, self.sampler = model, optimizer, settings, sampler
        self.rows, self.lookup = rows, rows.read if rows else F.embedding
        self.clipped = torch.zeros((), device=next(model.parameters()).device)  # steps whose gradient was clipped
        losses = SAMPLED_LOSSES if sampler else LOSSES
        if settings.loss not in losses:
            raise InputError(f"--loss {settings.loss!r} must be one of {', '.join(losses)}")
        self.loss = losses[settings.loss]

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
            if not self.sampler:
                table: Factors | Sample | Tensor = model.items.factors(dtype)  # [N+1, D]
            else:
                negatives, log_kq = self.sampler.draw()  # [K], [K]
                with self._autocast(batch):  # own [T, D], drawn [K, D]
                    own, drawn = (model.items(items, lookup=self.lookup) for items in (batch.labels, negatives))
                    table = Sample(own, drawn.to(dtype), negatives, log_kq, x)

            objective = Objective(getattr(model, "log_scale", None), settings.distill, *_history(model, batch))
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
