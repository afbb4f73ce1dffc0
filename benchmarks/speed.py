"""Time training steps and the evaluation of all sizes against the plain baseline, which is at the end of this file.

python -m benchmarks.speed            # the paper's model on made-up data of Beauty's size
python -m benchmarks.speed --help
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import describe_environment, memory_mb, time_paired
from common.cli import Parser, run_cli
from common.devices import resolve_device
from config import ModelSettings, TrainingSettings, resolve
from dataloader import TrainLoader, eval_rows, train_rows
from datasets.catalog import Sequences
from model import FMRLRec, build_model
from model.base import nested_mask
from model.fmrl import nested_linear_plain
from model.fmrlrec import FeedForward
from model.lru import LRU
from trainer.evaluation import rank_targets, rank_targets_alone
from trainer.step import Step, WeightAverage, build_optimizer
from trainer.trainer import build_step

BASELINE_USERS = 64  # users that the baseline evaluates, in one batch
STEPS = 5  # consecutive steps of one case; its first step must allocate memory again
PLUS = "bf16-plus"  # --preset plus with the exact softmax
SAMPLED = "plus-256"  # --preset plus up to 256 dimensions, with its sampled softmax
PRODUCTS = " products"  # ends the name of a case that computes the matrix products of another
MEMORY_STEPS = 10  # steps before the peak memory is read


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=22363, help="number of users (default: 22363, as in Beauty)")
    parser.add_argument("--items", type=int, default=12101, help="number of items (default: 12101, as in Beauty)")
    parser.add_argument("--features", type=int, default=2048, help="width of the features (default: 2048)")
    parser.add_argument(
        "--sizes", default="8,16,32,64,128,256,512,1024", metavar="N,N", help="nested sizes (default: the paper's)"
    )
    parser.add_argument("--blocks", type=int, default=2, help="number of blocks (default: 2)")
    parser.add_argument("--batch", type=int, default=32, help="users per step (default: 32)")
    parser.add_argument("--runs", type=int, default=5, help="paired runs of each case (default: 5)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device (default: cpu)")
    parser.add_argument("--memory_of", choices=("baseline", "fp32", "bf16", PLUS, SAMPLED), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    steps, evaluations = build(arguments)
    if arguments.memory_of:  # in a separate process: peak memory never decreases
        for _ in range(MEMORY_STEPS):
            steps[arguments.memory_of]()
        print(memory_mb("VmHWM") / 1e3)
        return
    print(describe_environment(arguments.device))
    print(f"{arguments.items} items, features {arguments.features}, sizes {arguments.sizes}, {arguments.blocks} blocks")
    print(f"batch {arguments.batch}; medians of {arguments.runs} paired runs (of {STEPS} steps; one evaluation)")
    bare = {name + PRODUCTS: bare_products(step, STEPS) for name, step in steps.items() if name != "baseline"}
    print_cases("training step", time_paired(steps | bare, arguments.runs, arguments.device, STEPS))
    for name in steps:
        command = [
            sys.executable,
            "-m",
            "benchmarks.speed",
            *(sys.argv[1:] if argv is None else argv),
            "--memory_of",
            name,
        ]
        peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
        print(f"  {name:24} {float(peak):8.2f} GB peak resident memory")
    evaluations["one pass" + PRODUCTS] = bare_products(evaluations["one pass"])
    seconds = time_paired(evaluations, arguments.runs, arguments.device)
    seconds["baseline"] = [value * arguments.users / BASELINE_USERS for value in seconds["baseline"]]
    title = f"evaluation of all sizes, {arguments.users} users (baseline: extrapolated from {BASELINE_USERS} users)"
    print_cases(title, seconds)


def build(arguments: argparse.Namespace) -> tuple[dict[str, Callable], dict[str, Callable]]:
    """Return functions by case: training steps, and evaluations of all users.

    Made-up users have Beauty's history lengths. The baseline evaluates BASELINE_USERS of them.
    """
    rng, device = np.random.default_rng(0), resolve_device(arguments.device)
    torch.manual_seed(0)
    lengths = (4 + rng.geometric(0.2, size=arguments.users)).clip(max=200)  # mean 8.9, as in Beauty
    offsets = np.concatenate([[0], lengths.cumsum()])
    sequences = Sequences(rng.integers(1, arguments.items + 1, size=offsets[-1]), offsets)
    sizes = tuple(map(int, arguments.sizes.split(",")))
    # Unit norm and half precision, like cached features.
    features = F.normalize(torch.randn(arguments.items, arguments.features)).half()
    model = FMRLRec(
        arguments.items, features, ModelSettings(mrl_hidden_sizes=sizes, lru_num_blocks=arguments.blocks)
    ).to(device)
    optimizer = build_optimizer(model, TrainingSettings())
    baseline, plain_optimizer = Baseline(model), torch.optim.AdamW(model.parameters(), fused=False)
    loader = TrainLoader(train_rows(sequences, 50), arguments.batch, 0, device)
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count(1)))

    def plain_step() -> None:
        users = rng.integers(arguments.users, size=arguments.batch)
        rows = [sequences.of(u)[:-2].tolist() for u in users]
        loss = baseline.loss(padded([r[:-1] for r in rows]).to(device), padded(rows).to(device))
        plain_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        plain_optimizer.step()

    rows = eval_rows(sequences, 50, "test")

    def evaluate_fast() -> None:
        rank_targets(model, rows, sizes=sizes, batch_size=256)

    def evaluate_alone() -> None:
        rank_targets_alone(model, rows, sizes=sizes, batch_size=256)

    @torch.inference_mode()
    def evaluate_plain() -> None:
        model.eval()
        tokens = padded([sequences.of(u)[:-1].tolist() for u in range(BASELINE_USERS)]).to(device)
        baseline.ranks(tokens, torch.from_numpy(rows.targets[:BASELINE_USERS]).to(device))

    steps: dict[str, Callable] = {"baseline": plain_step}
    for precision in ("fp32", "bf16"):
        step = Step(model, optimizer, TrainingSettings(precision=precision))
        steps[precision] = lambda step=step: step(next(batches))

    def plus_step(**flags: Any) -> Callable[[], None]:
        flags |= {"lru_num_blocks": arguments.blocks, "preset": "plus"}
        config, _ = resolve({"dataset_code": "beauty", **flags})
        plus = build_model(arguments.items, [features], config).to(device).train()
        assert isinstance(plus, FMRLRec)
        train_plus = build_step(plus, loader, config)
        average = WeightAverage(plus, config.ema_decay, train_plus.rows)

        def run() -> None:
            train_plus(next(batches))
            average.update(plus, step=1000)

        return run

    if arguments.memory_of in (None, PLUS):  # all items are scored, like in the other cases
        steps[PLUS] = plus_step(mrl_hidden_sizes=sizes, precision="bf16", num_negatives=0)
    if arguments.memory_of in (None, SAMPLED):
        # Without whitening, which happens before the first step and takes long.
        steps[SAMPLED] = plus_step(mrl_hidden_sizes=tuple(m for m in sizes if m <= 256), whiten_features=False)
    return steps, {"baseline": evaluate_plain, "one pass": evaluate_fast, "every slice alone": evaluate_alone}


def bare_products(case: Callable, calls: int = 1) -> Callable[[], None]:
    """Return a function that computes the matrix products of `calls` calls of a case, one call's at a time.

    The products have the shapes, strides and types of the case's, but random operands, and nothing between them.
    """
    aten = torch.ops.aten
    first_operand = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1, aten.baddbmm_: 1}
    operands: dict[Any, Tensor] = {}

    class Record(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products: list[tuple[Tensor, Tensor]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with self:  # in inference mode, nn.Linear and @ come whole
                result = function.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
            at = first_operand.get(function.overloadpacket)
            if at is not None:
                a, b = map(stand_in, args[at : at + 2])
                self.products.append((a, b))
            return function(*args, **(kwargs or {}))

    def stand_in(operand: Tensor) -> Tensor:
        key = operand.shape, operand.stride(), operand.dtype
        if key not in operands:
            like = torch.empty_strided(*key[:2], dtype=operand.dtype, device=operand.device)
            operands[key] = like.normal_()
        return operands[key]

    recorded = []
    for _ in range(calls):
        with Record() as record:
            case()
        recorded.append(record.products)
    turns = itertools.cycle(recorded)

    def run() -> None:
        with torch.no_grad():
            for a, b in next(turns):
                a @ b

    return run


def print_cases(title: str, seconds: dict[str, list[float]]) -> None:
    """Print each case's median, its speedup over the first case, its bare products and its ratio to them.

    Speedup and ratio are medians over the paired runs.
    """
    print(f"{title}\n  {'':24}  seconds  speedup  bare products  ratio")
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        if name.endswith(PRODUCTS):
            continue
        speedup = statistics.median(a / b for a, b in zip(first, values, strict=True))
        line = f"  {name:24} {statistics.median(values):8.3f} {speedup:7.1f}x"
        if bare := seconds.get(name + PRODUCTS):
            ratio = statistics.median(a / b for a, b in zip(values, bare, strict=True))
            line += f" {statistics.median(bare):14.3f} {ratio:6.2f}"
        print(line, flush=True)


# --------------------------------------------------------------------------------------------------- the plain baseline
# A straightforward implementation of the method, which shares the weights of an FMRLRec. It pads sequences to 50,
# computes the logits of each size separately at all positions and keeps them all in memory, and runs the recurrence
# with complex B and C over the padding. Evaluation projects the item table for every batch, scores all positions and
# sorts the scores.


class Baseline(torch.nn.Module):
    """An FMRLRec with straightforward computation. B rows, L padded length, N items."""

    def __init__(self, model: FMRLRec) -> None:
        super().__init__()
        self.model = model

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return z [B, L, D] and the item table [N+1, D] for left-padded tokens [B, L]."""
        table = self.model.item_table()
        x, valid = self.model.dropout(table[tokens]), tokens > 0
        for block in self.model.each_block():
            x = x + block.attn_dropout(self._lru(block.lru, block.norm1(x), valid))
            x = x + self._feed_forward(block.ffn, block.norm2(x))
        return x, table

    @staticmethod
    def _lru(lru: LRU, x: Tensor, valid: Tensor) -> Tensor:
        assert lru.B_bias_re is not None and lru.B_bias_im is not None and lru.C_bias is not None  # as in the paper
        eigenvalue = torch.complex(*lru.eigenvalues())
        mask = nested_mask(lru.sizes).to(x.device)
        B = torch.complex(lru.B_re * mask, lru.B_im * mask)
        C = torch.complex(lru.C_re * mask, lru.C_im * mask)
        bias = torch.complex(lru.B_bias_re, lru.B_bias_im)
        h = F.linear(x.to(B.dtype), B, bias) * torch.exp(lru.gamma_log)
        power, shift = eigenvalue, 1
        mask = valid.to(x.dtype)[..., None]
        while shift < x.shape[1]:
            past = F.pad(h[:, :-shift] * mask[:, :-shift], (0, 0, shift, 0))
            h = h + power * past
            power, shift = power * power, shift * 2
        return F.linear(h, C).real + lru.C_bias

    @staticmethod
    def _feed_forward(ffn: FeedForward, x: Tensor) -> Tensor:
        G, W1, W2 = (
            functools.partial(nested_linear_plain, weight=w.weight, bias=w.bias, sizes=w.sizes)
            for w in (ffn.G, ffn.W1, ffn.W2)
        )
        return ffn.dropout(W2(F.silu(G(x)) * ffn.dropout(W1(x))))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy over sizes and labelled positions."""
        z, table = self.encode(tokens)
        logits = torch.stack([z[..., :m] @ table[:, :m].T for m in self.model.sizes])  # [M, B, L, N+1]
        losses = [F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=0) for scores in logits]
        return torch.stack(losses).mean()

    def ranks(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return ranks [M, B] of the targets at every size, by a full sort of the scores."""
        z, table = self.encode(tokens)
        ranks = []
        for m in self.model.sizes:
            scores = (z[..., :m] @ table[:, :m].T)[:, -1]
            scores[:, 0] = -torch.inf
            order = scores.argsort(dim=1, descending=True)
            ranks.append((order == targets[:, None]).nonzero()[:, 1] + 1)
        return torch.stack(ranks)


def padded(rows: list[list[int]], length: int = 50) -> Tensor:
    """Pad rows of tokens on the left with 0: [B, length]."""
    return torch.tensor([[0] * (length - len(row)) + row[-length:] for row in rows])


if __name__ == "__main__":
    run_cli(main)
