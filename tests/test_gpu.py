"""Compute on a GPU as on the CPU; skipped without a GPU."""

import json
import shlex

import pytest
import torch

import eval as eval_script
import train
from model.extensions.objective import Objective
from model.extensions.sampled_loss import NegativeSampler, Sample, sampled_matryoshka_cross_entropy
from model.loss import Factors, matryoshka_cross_entropy
from tests.prepared import cut_off_after
from trainer.checkpoint import load_state
from trainer.runs import EVERY_SIZE, read_log

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZES = (4, 8, 16)
TINY = "--dataset_code tiny --language_encoder lexical --img_encoder pixel --lr 0.01 --warmup_steps 1"
NESTED = f"{TINY} --mrl_hidden_sizes 4,8,16 --num_epochs 3 --train_batch_size 6"
CASES = {
    "faithful": NESTED,
    "plus": f"{NESTED} --preset plus --num_negatives 0",
    "sasrec": f"{TINY} --model_code sasrec --mrl_hidden_sizes 8 --num_epochs 3",
    "itemknn": "--dataset_code tiny --model_code itemknn",
}
NO_DROPOUT = "--lru_dropout 0 --lru_attn_dropout 0"  # which every device draws in its own way


def trained(case, device, flags=""):
    """Train a case and return its run."""
    return train.main(shlex.split(f"{CASES[case]} --device {device} --run_name {case}-{device} {flags}"))


def losses_and_gradients(device):
    """Return the exact and the sampled loss with every option, and their gradients."""
    draw = torch.Generator().manual_seed(0)
    z, weight, own, V = (
        torch.randn(shape, generator=draw).to(device).requires_grad_()
        for shape in ((40, 16), (16, 6), (40, 16), (31, 8))
    )
    features, log_scale = torch.randn(31, 6, generator=draw).to(device), torch.zeros(3, device=device).requires_grad_()
    labels = torch.randint(31, (40,), generator=draw).to(device)
    items, objective = torch.randint(1, 31, (9,), generator=draw).to(device), Objective(log_scale, 0.5)
    log_kq = NegativeSampler(torch.ones(31, device=device), 9).draw()[1]
    exact = matryoshka_cross_entropy(z, Factors(features, weight, V), labels, SIZES, objective=objective)
    sample = Sample(own, (features @ weight.T)[items], items, log_kq)
    sampled = sampled_matryoshka_cross_entropy(z, sample, labels, SIZES, objective=objective)
    gradients = torch.autograd.grad(exact + sampled, (z, weight, own, V, log_scale))
    return [part.cpu() for part in (exact, sampled, *gradients)]


def test_a_gpu_computes_the_losses_and_gradients_of_the_cpu():
    torch.testing.assert_close(losses_and_gradients(GPU), losses_and_gradients("cpu"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_trains_as_the_cpu_which_evaluates_its_run_alike(workplace, case):
    """Batches of a repeated shape are replayed from a CUDA graph."""
    runs = [trained(case, device, "" if case == "itemknn" else NO_DROPOUT) for device in (GPU, "cpu")]
    logs = [[(line.get("loss", 0), line["val"]) for line in read_log(run)] for run in runs]
    torch.testing.assert_close(*logs, rtol=1e-3, atol=1e-3)
    found = json.loads((runs[0] / EVERY_SIZE).read_text())
    on_cpu = eval_script.main(["--run", str(runs[0]), "--device", "cpu"])
    torch.testing.assert_close({str(m): on_cpu[m] for m in on_cpu}, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["faithful", "plus"])
def test_a_training_that_was_cut_off_is_resumed_to_the_same_weights(workplace, case):
    whole = trained(case, GPU)
    with cut_off_after(1):
        trained(case, GPU, "--run_name cut")
    cut = train.main(["--resume", "latest", "--run_name", "cut"])
    states = [load_state(run / "last.pt")["model"] for run in (whole, cut)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)  # a GPU adds gradients up in any order
