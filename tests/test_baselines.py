"""The baselines against their equations and by the scripts, and the examples of model/README.md."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as eval_script
import train
from benchmarks import deploy
from common.errors import InputError
from config import COUNTING, MODEL_PRESETS, FeatureSettings, ModelSettings, TrainingSettings
from dataloader import Batch
from datasets.catalog import load_catalog
from datasets.features import registry
from experiments import cold_items
from model.baselines import sasrec
from model.baselines.counting import SHRINKAGE, ItemKNN
from model.loss import LOSSES
from model.registry import MODELS, CountingModel, build_model
from serving import export
from tests.made_up import with_random_weights
from tests.prepared import feature_parts, write_prepared
from trainer import evaluation, testing
from trainer.load_run import load_run
from trainer.runs import read_config, read_log, unfinished
from trainer.step import Step

NUM_ITEMS, DIM, MAX_LEN = 20, 8, 9
LENGTHS = (3, 1, 1, 9, 2, 5)


def a_model(name, **options):
    """Return a model in float64 with weights far from 0, but for the LRU's eigenvalues."""
    torch.manual_seed(0)
    settings = {"lru_max_len": MAX_LEN, "lru_r_min": 0.8, "lru_r_max": 0.99, "num_heads": 2} | options
    model = build_model(NUM_ITEMS, [], ModelSettings(model_code=name, mrl_hidden_sizes=(DIM,), **settings))
    return with_random_weights(model, 0.8).double().eval()


def packed(lengths=LENGTHS):
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.cat([torch.arange(length) for length in lengths]), max(lengths)


TRAINED = ["sasrec", "lrurec", "gru4rec"]


def test_sasrec_is_the_equations_of_its_docstring(monkeypatch):
    monkeypatch.setattr(sasrec, "ROWS", 2)  # attention in chunks
    model = a_model("sasrec")
    x = packed((5,))[0]

    def norm(x, module):
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias

    h = DIM**0.5 * x + model.positions[[4, 3, 2, 1, 0]]
    for block in model.blocks:
        q, a = norm(h, block.norm1), block.attention
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = a.W_Q(q)[:, head] @ a.W_K(h)[:, head].T / 4**0.5
            scores[torch.ones(5, 5, dtype=torch.bool).triu(1)] = -torch.inf
            heads.append(scores.softmax(dim=1) @ a.W_V(h)[:, head])
        f = norm(q + torch.cat(heads, dim=1), block.norm2)
        h = f + block.W2(block.W1(f).clamp_min(0))
    torch.testing.assert_close(model.encode(x, torch.arange(5), 5), norm(h, model.norm))


def test_lrurec_is_the_equations_of_its_docstring():
    model, (x, position, longest) = a_model("lrurec"), packed((7,))
    norm = lambda x, module: F.layer_norm(x, (DIM,), module.weight, module.bias)  # noqa: E731

    def recurrence(lru, x):
        """h_k = λ ⊙ h_{k-1} + γ ⊙ (B x_k + b), y_k = Re(C h_k) + c, in complex numbers."""
        B, C = torch.complex(lru.B_re, lru.B_im), torch.complex(lru.C_re, lru.C_im)
        b = torch.complex(lru.B_bias_re, lru.B_bias_im)
        eigenvalue, h, y = torch.exp(torch.complex(-torch.exp(lru.nu_log), torch.exp(lru.theta_log))), 0, []
        for x_t in x.to(torch.complex128):
            h = eigenvalue * h + lru.gamma_log.exp() * (B @ x_t + b)
            y.append((C @ h).real + lru.C_bias)
        return torch.stack(y)

    h = norm(x, model.norm)
    for block in model.blocks:
        h = norm(h + recurrence(block.lru, h), block.norm1)
        h = norm(h + block.W2(F.gelu(block.W1(h))), block.norm2)
    torch.testing.assert_close(model.encode(x, position, longest), h)
    assert (model.blocks[1].lru.B_re.shape, model.blocks[1].W1.weight.shape) == ((2 * DIM, DIM), (4 * DIM, DIM))


def test_gru4rec_is_torchs_gru_layer_by_layer():
    model, (x, position, longest) = a_model("gru4rec", lru_num_blocks=2), packed((7,))
    h = x
    for gru in model.layers:
        h, _ = gru(h)
    torch.testing.assert_close(model.encode(x, position, longest), h)


@pytest.mark.parametrize("name", ["fmrlrec", *TRAINED])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_packed_history_is_encoded_as_alone_and_at_some_tokens_as_at_all(name, num_blocks):
    model, (x, position, longest) = a_model(name, lru_num_blocks=num_blocks), packed()
    alone = torch.cat([model.encode(own, torch.arange(len(own)), len(own)) for own in x.split(LENGTHS)])
    at = torch.tensor([0, 20, 7, 7])
    found = model.encode(x.requires_grad_(), position, longest, at=at)
    torch.testing.assert_close(model.encode(x, position, longest), alone)
    torch.testing.assert_close(model.encode(x, position, 16), alone)  # longest may be larger
    torch.testing.assert_close(found, alone[at])
    gradients = [torch.autograd.grad((z**3).sum(), x)[0] for z in (found, model.encode(x, position, longest)[at])]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", TRAINED)
def test_settings_reach_a_baseline(name):
    flags = {"lru_dropout": 0.1, "lru_attn_dropout": 0.2, "lru_num_blocks": 3, "lru_use_bias": False, "num_heads": 4}
    model = a_model(name, **flags, lru_r_min=0.6, lru_r_max=0.61)
    layers = model.layers if name == "gru4rec" else model.blocks
    inner = model.hidden_dropout if name == "gru4rec" else layers[-1].attn_dropout
    assert (model.sizes, len(layers), model.dropout.p, inner.p) == ((DIM,), 3, 0.1, 0.2)
    if name == "sasrec":
        assert (layers[0].attention.num_heads, len(model.positions)) == (4, MAX_LEN)
    if name == "lrurec":
        modulus = torch.exp(-torch.exp(layers[0].lru.nu_log))
        assert layers[0].lru.B_bias_re is None and 0.599 < modulus.min() <= modulus.max() < 0.611


def test_itemknn_ranks_by_the_shrunk_cosine_with_the_last_item_then_by_popularity():
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(0, 30, (200,), generator=generator).sort().values
    items = torch.randint(1, 13, (200,), generator=generator)
    model = ItemKNN(14)
    model.count(users, items)
    had = torch.zeros(30, 15)
    had[users, items] = 1
    together, n = had.T @ had, had.sum(dim=0)
    expected = together / ((n[:, None] * n).sqrt() + SHRINKAGE)
    expected.fill_diagonal_(0)  # an item is not its own neighbour
    scores = model.scores(torch.arange(15))
    torch.testing.assert_close(scores.clamp_min(0), expected)
    counts = items.bincount(minlength=15)
    assert (scores[13].argsort(stable=True) == counts.argsort(stable=True)).all()  # no user had item 13
    assert (scores[expected == 0] < 0).all() and scores[13, 14] == -1


TINY = "--dataset_code tiny --device cpu --lr 0.01 --warmup_steps 1 --train_batch_size 8 --lru_num_blocks 1"


def run_train(model, flags=""):
    epochs = "" if model in COUNTING else "--num_epochs 2 --mrl_hidden_sizes 8"
    return train.main(shlex.split(f"--model_code {model} {TINY} {epochs} {flags}"))


def metrics_in(run, suffix=""):
    found = json.loads((run / f"test_mrl_metrics{suffix}.json").read_text())
    return {int(size): metrics for size, metrics in found.items()}


@pytest.mark.parametrize("model", MODEL_PRESETS)
def test_a_baseline_is_trained_and_evaluated_like_any_model(workplace, model):
    run = run_train(model)
    config, sources = read_config(run)
    size = config.mrl_hidden_sizes[-1]
    assert run.name.endswith(f"-{model}-{size}") and unfinished(run) == ""
    assert (config.branch, sources["use_img_encoder"]) == ("id", "preset")
    assert read_log(run)[-1]["val"].keys() == {str(size)}
    tested = metrics_in(run)
    assert tested == {size: json.loads((run / "test_metrics.json").read_text())}
    assert eval_script.main(["--model_code", model]) == tested == metrics_in(run)
    masked = eval_script.main(["--run", str(run), "--mask_history", "--test_batch_size", "3"])
    assert metrics_in(run, "_history_masked") == masked
    assert masked[size]["NDCG@10"] > tested[size]["NDCG@10"]  # 12 items, several of them in the history


@pytest.mark.parametrize(
    ("model", "cut_at"), [("itemknn", (ItemKNN, "count")), ("popularity", (testing, "test_every_size"))]
)
def test_a_counting_run_that_was_cut_off_is_counted_again_and_tested(workplace, monkeypatch, model, cut_at):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    whole = run_train(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*cut_at, stop)
        run_train(model, "--run_name cut")
    cut = train.main(["--resume", "latest"])
    assert cut.name.endswith("cut") and [line["epoch"] for line in read_log(cut)] == [1]
    assert metrics_in(cut) == metrics_in(whole)


def test_a_baseline_is_exported_by_its_run_and_not_sliced(workplace):
    run = str(run_train("popularity"))
    assert [folder.name for folder in export.main(["--run", run])] == ["tiny-popularity"]
    for main, flags, problem in (
        (deploy.main, ["--run", run], "is a run of popularity; this command takes runs of fmrlrec"),
        (export.main, [], r"matches --model_code fmrlrec(.|\n)*: model_code popularity"),
        (cold_items.main, ["test", run], "is a run, not an export"),
        (eval_script.main, ["--run", run, "--alone"], r"--alone tests slices of fmrlrec; .* is a run of popularity"),
    ):
        with pytest.raises(InputError, match=problem):
            main(flags)


def test_all_training_items_are_counted_however_old(workplace):
    run = run_train("popularity", "--lru_max_len 1")
    sequences = load_catalog("data", "tiny").sequences
    counts = np.bincount(np.concatenate([sequences.of(u)[:-2] for u in range(20)]), minlength=13)
    _, _, model = load_run(run)
    assert isinstance(model, CountingModel) and not list(model.parameters())
    assert model.scores(torch.tensor([2, 5])).tolist() == [counts.tolist()] * 2


PAGE = (Path(__file__).parents[1] / "model/README.md").read_text(encoding="utf-8").partition("## Extend it")[2]
BLOCKS = dict(re.findall(r"^### (.*?)\n.*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
POSITION = torch.tensor([0, 1, 2, 0, 1])


def run_example(heading, registry, name, monkeypatch):
    """Run an example; return what it adds to the registry, which is restored afterwards."""
    monkeypatch.setitem(registry, name, None)
    exec(BLOCKS[heading], {})
    return registry[name]


def step_losses(model, **options):
    tokens, labels = torch.tensor([1, 2, 3, 2, 3]), torch.tensor([2, 3, 0, 3, 4])
    batch = Batch(tokens, labels, POSITION, 3, (0, 5), torch.tensor(4))
    step = Step(model, torch.optim.Adam(model.parameters(), lr=0.05), TrainingSettings(**options))
    return [step(batch).item() for _ in range(40)]


def test_the_model_is_trained_like_any_other(monkeypatch):
    torch.manual_seed(0)
    model = run_example("A model", MODELS, "last_item", monkeypatch)(5, [], ModelSettings(mrl_hidden_sizes=(8,)))
    losses = step_losses(model)
    assert losses[-1] < 0.5 < losses[0]
    x, at = model.item_table()[[1, 2, 3, 2, 3]], torch.tensor([2, 4])
    assert torch.equal(model.encode(x, POSITION, 3, at), model.encode(x, POSITION, 3)[at])


def test_the_loss_trains_a_nested_model_and_the_metric_is_one_number_per_user(monkeypatch):
    torch.manual_seed(0)
    run_example("A loss", LOSSES, "smoothed", monkeypatch)
    settings = ModelSettings(mrl_hidden_sizes=(4, 8), lru_dropout=0.0, lru_attn_dropout=0.0)
    losses = step_losses(MODELS["fmrlrec"](5, [torch.randn(5, 6)], settings), loss="smoothed")
    assert losses[-1] < 1.6 < losses[0]  # the sum of two sizes
    hit = run_example("A metric", evaluation.METRICS, "Hit", monkeypatch)
    assert hit(torch.tensor([1.0, 10.0, 10.5]), 10).tolist() == [1, 1, 0]


def test_the_modality_is_cached_and_made_alike_for_new_products(tmp_path, monkeypatch):
    write_prepared(tmp_path, "tiny")
    catalog, definitions = load_catalog(tmp_path, "tiny"), {}
    exec(BLOCKS["A modality"], definitions)
    monkeypatch.setattr(registry, "REGISTRY", (*registry.REGISTRY, definitions["Brand"]))
    text, brands = feature_parts(catalog, language="lexical", cache_root=tmp_path / "features")
    assert len(list(tmp_path.glob("features/tiny/brand-lexical-*.npy"))) == 1
    assert len(np.unique(brands, axis=0)) == len({record.get("brand") for record in catalog.metadata})

    settings = FeatureSettings(language_encoder="lexical", use_img_encoder=False)
    described = registry.describe_features(settings, [text.shape[1], brands.shape[1]])
    made = registry.embed_records(catalog.metadata, described, registry.described_modalities(described, {}))
    np.testing.assert_allclose(made, np.concatenate([text, brands], axis=1), atol=1e-3)
