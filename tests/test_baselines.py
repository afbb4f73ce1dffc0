"""Compare the baselines with their equations, and train, evaluate and resume them by the scripts."""

import copy
import json
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval as eval_script
import train
from benchmarks import deploy
from common.errors import InputError
from config import COUNTING, MODEL_PRESETS, ModelSettings, TrainingSettings
from dataloader import Batch
from datasets.catalog import load_catalog
from experiments import cold_items
from model.baselines import sasrec
from model.baselines.counting import SHRINKAGE, ItemKNN, Popularity
from model.baselines.lrurec import DenseLRU
from model.baselines.sasrec import SASRec
from model.dropout import set_share
from model.registry import MODELS, CountingModel, build_model
from serving import export
from trainer import testing
from trainer.load_run import load_run
from trainer.runs import read_config, read_log, unfinished
from trainer.step import Step

NUM_ITEMS, DIM, MAX_LEN = 20, 8, 9
LENGTHS = (3, 1, 1, 9, 2, 5)


def make_model(name, dim=DIM, **options):
    torch.manual_seed(0)
    settings = {"lru_max_len": MAX_LEN, "lru_r_min": 0.8, "lru_r_max": 0.99} | options
    return build_model(NUM_ITEMS, [], ModelSettings(model_code=name, mrl_hidden_sizes=(dim,), **settings))


def a_model(name, **options):
    """Return a model in float64 with weights far from 0."""
    model = make_model(name, **{"num_heads": 2 if name == "sasrec" else 1} | options)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if not parameter_name.endswith(("nu_log", "theta_log")):
                parameter.normal_(std=0.5)
    return model.double().eval()


def packed(lengths=LENGTHS):
    """Return x, position and longest of histories of these lengths, packed one after another."""
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.cat([torch.arange(length) for length in lengths]), max(lengths)


TRAINED = ["sasrec", "lrurec", "gru4rec"]
trained = pytest.mark.parametrize("name", TRAINED)


# ------------------------------------------------------------------------------------------------------- the equations


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


@pytest.mark.parametrize("bias", [True, False])
def test_the_dense_lru_is_the_complex_recurrence(bias):
    torch.manual_seed(0)
    lru, (x, position, longest) = DenseLRU(DIM, 12, bias, 0.5, 0.99).double(), packed()
    B, C = torch.complex(lru.B_re, lru.B_im), torch.complex(lru.C_re, lru.C_im)
    b = torch.complex(lru.B_bias_re, lru.B_bias_im) if bias else 0
    c = lru.C_bias if bias else 0
    eigenvalue = torch.exp(torch.complex(-torch.exp(lru.nu_log), torch.exp(lru.theta_log)))
    assert (eigenvalue.abs() > 0.5).all() and (eigenvalue.abs() < 0.99).all()
    expected, h = [], None
    for x_t, steps in zip(x.to(torch.complex128), position, strict=True):
        before = h if steps > 0 else torch.zeros(12, dtype=torch.complex128)
        h = eigenvalue * before + lru.gamma_log.exp() * (B @ x_t + b)
        expected.append((C @ h).real + c)
    torch.testing.assert_close(lru(x, position, longest), torch.stack(expected))


def test_lrurec_is_the_equations_of_its_docstring():
    model, (x, position, longest) = a_model("lrurec"), packed()
    norm = lambda x, module: F.layer_norm(x, (DIM,), module.weight, module.bias)  # noqa: E731
    h = norm(x, model.norm)
    for block in model.blocks:
        h = norm(h + block.lru(h, position, longest), block.norm1)
        h = norm(h + block.W2(F.gelu(block.W1(h))), block.norm2)
    torch.testing.assert_close(model.encode(x, position, longest), h)

    shapes = {name: list(parameter.shape) for name, parameter in model.blocks[1].named_parameters()}
    assert (shapes["lru.B_re"], shapes["W1.weight"]) == ([2 * DIM, DIM], [4 * DIM, DIM])  # as published


def test_gru4rec_is_a_gru_over_each_history():
    model = a_model("gru4rec", lru_num_blocks=2)
    position = torch.cat([torch.arange(4), torch.tensor([0, 0, 1])])  # a begin token, whose state is not carried on
    x = torch.randn(7, DIM, dtype=torch.float64)
    expected, h = [], [None] * 2
    for x_t, steps in zip(x, position, strict=True):
        for k, gru in enumerate(model.layers):
            before = h[k] if steps > 0 else torch.zeros(DIM, dtype=torch.float64)
            r, u, n = (gru.weight_ih_l0 @ x_t + gru.bias_ih_l0).split(DIM)
            h_r, h_u, h_n = (gru.weight_hh_l0 @ before + gru.bias_hh_l0).split(DIM)
            u = (u + h_u).sigmoid()
            x_t = h[k] = u * before + (1 - u) * (n + (r + h_r).sigmoid() * h_n).tanh()
        expected.append(x_t)
    torch.testing.assert_close(model.encode(x, position, 4), torch.stack(expected))


# ----------------------------------------------------------------------------------------------------- packed histories


@trained
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_packed_history_is_encoded_as_alone_and_at_some_tokens_as_at_all(name, num_blocks):
    model, (x, position, longest) = a_model(name, lru_num_blocks=num_blocks), packed()
    alone = torch.cat([model.encode(own, torch.arange(len(own)), len(own)) for own in x.split(LENGTHS)])
    at = torch.tensor([0, 20, 7, 7])
    torch.testing.assert_close(model.encode(x, position, longest), alone)
    torch.testing.assert_close(model.encode(x, position, 16), alone)  # longest may be larger
    torch.testing.assert_close(model.encode(x, position, longest, at=at), alone[at])


@trained
def test_a_token_reads_its_own_history_up_to_itself(name):
    model, (x, position, longest) = a_model(name), packed()
    reads = (
        torch.autograd.functional.jacobian(lambda x: model.encode(x, position, longest), x).abs().sum(dim=(1, 3)) > 0
    )
    token = torch.arange(len(x))
    own = (token <= token[:, None]) & (token >= (token - position)[:, None])
    assert torch.equal(reads, own)


# ----------------------------------------------------------------------------------------------------------- training


@trained
def test_shares_of_a_batch_have_the_dropout_of_the_batch(name):
    cut = 14
    model, (x, position, longest) = a_model(name, lru_dropout=0.4, lru_attn_dropout=0.3).train(), packed()
    torch.manual_seed(0)
    whole = model.encode(x, position, longest)
    for first, last in ((0, cut), (cut, len(x))):
        set_share(model, (first, len(x)))
        torch.manual_seed(0)
        share = model.encode(x[first:last], position[first:last], longest)
        torch.testing.assert_close(share, whole[first:last])
    set_share(model, None)
    assert (model.eval().encode(x, position, longest) - whole).abs().max() > 0.1


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in TRAINED), ("sasrec", "bf16")])
def test_training_learns_what_comes_next(name, precision):
    model = make_model(name, dim=16, lru_dropout=0.1, lru_attn_dropout=0.1)
    step = Step(model, torch.optim.AdamW(model.parameters(), lr=0.03), TrainingSettings(precision=precision))
    first = torch.randint(1, NUM_ITEMS + 1, (16, 1))
    rows = (first + torch.arange(6) * 3 - 1) % NUM_ITEMS + 1  # 3 further each time, round and round
    tokens, labels, position = rows[:, :-1].flatten(), rows[:, 1:].flatten(), torch.arange(5).repeat(16)
    batch = Batch(tokens, labels, position, 5, (0, 80), torch.tensor(80))
    losses = [step(batch).item() for _ in range(90)]
    assert losses[0] > 2 and losses[-1] < 0.5
    with torch.no_grad():
        z = model.eval().encode(model.items(tokens), position, 5)
    assert ((z @ model.item_table().T).argmax(dim=1) == labels).float().mean() > 0.95


# ----------------------------------------------------------------------------------------------------------- counting

USERS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
ITEMS = torch.tensor([1, 2, 3, 1, 2, 4, 1, 4])  # the third user had item 4 twice


@pytest.mark.parametrize("name", MODELS)
def test_models_that_only_count_have_nothing_to_train(name):
    model = make_model(name, dim=1)
    assert isinstance(model, CountingModel) == (not list(model.parameters())) == (name in COUNTING)


def test_popularity_counts_how_often_an_item_is_in_training():
    model = Popularity(5)
    model.count(USERS, ITEMS)
    assert model.scores(torch.tensor([2, 5])).tolist() == [[0, 3, 2, 1, 2, 0]] * 2


def test_itemknn_ranks_by_the_shrunk_cosine_with_the_last_item_then_by_popularity():
    model = ItemKNN(5)
    model.count(USERS, ITEMS)
    one, three, five = model.scores(torch.tensor([1, 3, 5])).tolist()
    shrunk = lambda both, product: pytest.approx(both / (product**0.5 + SHRINKAGE))  # noqa: E731
    assert one[2:5] == [shrunk(2, 3 * 2), shrunk(1, 3 * 1), shrunk(1, 3 * 1)]
    assert three[1:3] == [shrunk(1, 1 * 3), shrunk(1, 1 * 2)]
    assert one[1] < 0 and one[5] < one[1]  # not its own neighbour
    assert three[3] < three[4] < 0 < min(three[1:3])
    assert five[1] > five[2] == five[4] > five[3] > five[5] == -1  # no user had it: popularity


def test_itemknn_counts_every_pair_of_every_user():
    generator = torch.Generator().manual_seed(0)
    users = torch.randint(0, 30, (200,), generator=generator).sort().values
    items = torch.randint(1, 13, (200,), generator=generator)
    model = ItemKNN(14)
    model.count(users, items)
    had = torch.zeros(30, 15)
    had[users, items] = 1
    together, n = had.T @ had, had.sum(dim=0)
    expected = together / ((n[:, None] * n).sqrt() + SHRINKAGE)
    expected.fill_diagonal_(0)
    torch.testing.assert_close(model.scores(torch.arange(15)).clamp_min(0), expected)
    other = ItemKNN(14)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.scores(torch.arange(15)), model.scores(torch.arange(15)))


# ----------------------------------------------------------------------------------------------------------------- runs

TINY = "--dataset_code tiny --device cpu --lr 0.01 --warmup_steps 1 --train_batch_size 8 --lru_num_blocks 1"
COUNTED = {"popularity": Popularity, "itemknn": ItemKNN}


def run_train(model, flags=""):
    epochs = "" if model in COUNTED else "--num_epochs 2 --mrl_hidden_sizes 8"
    return train.main(shlex.split(f"--model_code {model} {TINY} {epochs} {flags}"))


def metrics_in(run, suffix=""):
    found = json.loads((run / f"test_mrl_metrics{suffix}.json").read_text())
    return {int(size): metrics for size, metrics in found.items()}


@pytest.mark.parametrize("model", MODEL_PRESETS)
def test_a_baseline_is_trained_and_evaluated_like_any_model(workplace, model):
    run = run_train(model)
    config, sources = read_config(run)
    size = config.mrl_hidden_sizes[-1]
    assert run.name.endswith(f"-{model}-{size}")
    assert (config.branch, sources["use_img_encoder"]) == ("id", "preset")
    assert {p.name for p in run.iterdir()} - {"last.pt"} == {
        "config.json",
        "env.json",
        "log.jsonl",
        "best.safetensors",
        "items.json.gz",
        "test_metrics.json",
        "test_mrl_metrics.json",
        "test_mrl_metrics.png",
        "test_ranks.npz",
    }
    assert unfinished(run) == ""
    assert read_log(run)[-1]["val"].keys() == {str(size)}
    tested = metrics_in(run)
    assert tested == {size: json.loads((run / "test_metrics.json").read_text())}
    (run / "test_mrl_metrics.json").unlink()
    assert eval_script.main(["--model_code", model]) == tested == metrics_in(run)
    masked = eval_script.main(["--run", str(run), "--mask_history", "--test_batch_size", "3"])
    assert metrics_in(run, "_history_masked") == masked
    assert masked[size]["NDCG@10"] > tested[size]["NDCG@10"]  # 12 items, several of them in the history


@pytest.mark.parametrize(
    ("model", "flags", "expected"),
    [
        ("sasrec", "--num_heads 4 --lru_num_blocks 3 --lru_max_len 7 --num_negatives 5", (3, 4, 7)),
        ("lrurec", "--lru_num_blocks 3 --no-lru_use_bias --lru_r_min 0.6 --lru_r_max 0.61 --lr 1e-6", (3, None, True)),
    ],
)
def test_settings_reach_a_baseline(workplace, model, flags, expected):
    run = run_train(model, f"--num_epochs 1 --lru_dropout 0.1 --lru_attn_dropout 0.2 {flags}")
    _, _, model = load_run(run)
    block = model.blocks[-1]
    assert (model.sizes, model.dropout.p, block.dropout.p, block.attn_dropout.p) == ((8,), 0.1, 0.1, 0.2)
    if isinstance(model, SASRec):
        assert (len(model.blocks), block.attention.num_heads, len(model.positions)) == expected
    else:
        modulus = torch.exp(-torch.exp(block.lru.nu_log))
        in_ring = bool(modulus.min() > 0.599 and modulus.max() < 0.611)
        assert (len(model.blocks), block.lru.B_bias_re, in_ring) == expected


@pytest.mark.parametrize(("model", "cut_at"), [("itemknn", "count"), ("popularity", "test_run")])
def test_a_counting_run_that_was_cut_off_is_counted_again_and_tested(workplace, monkeypatch, model, cut_at):
    def stop(*arguments, **named):
        raise KeyboardInterrupt

    whole = run_train(model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((COUNTED[model], "count") if cut_at == "count" else (testing, "test_every_size")), stop)
        run_train(model, "--run_name cut")
    cut = train.main(["--resume", "latest"])
    assert cut.name.endswith("cut") and [line["epoch"] for line in read_log(cut)] == [1]
    assert metrics_in(cut) == metrics_in(whole)
    with pytest.raises(InputError, match="is finished"):
        train.main(["--resume", "latest"])


def test_all_training_items_are_counted_however_old(workplace):
    run = run_train("popularity", "--lru_max_len 1")
    sequences = load_catalog("data", "tiny").sequences
    counts = np.bincount(np.concatenate([sequences.of(u)[:-2] for u in range(20)]), minlength=13)
    _, _, model = load_run(run)
    assert model.counts.tolist() == counts.tolist()


def test_a_baseline_is_neither_exported_nor_sliced(workplace):
    run = run_train("popularity")
    for command in (export.main, deploy.main):
        with pytest.raises(InputError, match="is a run of popularity; only runs of fmrlrec can be exported"):
            command(["--run", str(run)])
        with pytest.raises(InputError, match=r"matches --model_code fmrlrec(.|\n)*: model_code popularity"):
            command([])
    with pytest.raises(InputError, match="is a run, not an export"):
        cold_items.main(["test", str(run)])
    with pytest.raises(InputError, match=r"--alone tests slices of fmrlrec; .* is a run of popularity: leave"):
        eval_script.main(["--run", str(run), "--alone"])


def test_a_counting_model_is_validated_with_the_history_masked_on_demand(workplace):
    kept, masked = (read_log(run_train("popularity", flags))[0]["val"] for flags in ("", "--val_mask_history"))
    assert masked["1"]["Recall@50"] >= kept["1"]["Recall@50"]
    assert masked["1"]["NDCG@10"] > kept["1"]["NDCG@10"]
