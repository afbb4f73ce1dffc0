"""Train once, deploy at any size: slices of models, with and without the extensions beyond the paper."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

import train
from config import ModelSettings
from dataloader import eval_batches, eval_rows, train_rows
from datasets.features.load import load_features
from model import FMRLRec, count_parameters, slice_model
from model.extensions.whitening import whiten
from model.registry import build_model
from serving import Recommender, export
from tests.made_up import as_sequences, with_random_weights
from tests.prepared import cut_off_after, write_prepared
from trainer.checkpoint import load_state
from trainer.evaluation import evaluate
from trainer.load_run import load_run

NUM_ITEMS, MAX_LEN, KS = 40, 10, (1, 5, 10)
SIZE_LISTS = [(25, 27), (3, 9, 20, 21, 47)]


def random_model(sizes, branch="both", use_bias=True, seed=0, **options):
    """Return a model with random weights, masked ones too."""
    torch.manual_seed(seed)
    features = torch.randn(NUM_ITEMS, 9) if branch == "both" else None
    settings = ModelSettings(mrl_hidden_sizes=sizes, lru_use_bias=use_bias, lru_r_min=0.3, lru_r_max=0.9, **options)
    return with_random_weights(FMRLRec(NUM_ITEMS, features, settings)).eval()


@pytest.mark.parametrize(
    ("branch", "use_bias", "options"),
    [
        ("both", True, {}),
        ("id", True, {"post_norm": True}),
        ("both", False, {"post_norm": True, "logit_scale": True, "history_bias": True}),
    ],
)
@pytest.mark.parametrize("sizes", SIZE_LISTS, ids=str)
def test_a_slice_has_the_scores_and_metrics_of_the_full_models_prefix(sizes, branch, use_bias, options):
    model, random = random_model(sizes, branch, use_bias, **options), np.random.default_rng(0)
    histories = [random.integers(1, NUM_ITEMS + 1, size=length) for length in random.integers(3, 25, size=15)]
    rows = eval_rows(as_sequences(histories), MAX_LEN, "test")
    (batch,) = eval_batches(rows, 100, torch.device("cpu"))

    @torch.no_grad()
    def scores(model, size):
        table = model.item_table()
        z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
        return z[:, :size] @ table[:, :size].T

    if options.get("history_bias"):
        model.history_bias.data /= 50  # b within 1
    expected = evaluate(model, rows, sizes=sizes, batch_size=4, ks=KS)
    for size in sizes:
        small, prefix = slice_model(model, size), scores(model, size)
        assert (scores(small, size) - prefix).abs().max() <= 1e-5 * prefix.abs().max()
        assert evaluate(small, rows, sizes=(size,), batch_size=4, ks=KS) == {size: expected[size]}


@pytest.mark.parametrize(("size", "by_way_of", "embedding"), [(8, 20, 0), (8, 33, 3), (20, 33, 20), (20, 20, 33)])
@pytest.mark.parametrize("branch", ["both", "id"])
def test_a_slice_or_slice_of_a_slice_owns_the_top_left_of_every_weight(branch, size, by_way_of, embedding):
    options = {"dropout_from": 2, "item_embedding": embedding if branch == "both" else 0}
    model = random_model((3, 8, 20, 33), branch, **options)
    small = slice_model(slice_model(model, by_way_of), size)
    assert slice_model(model.train(), size).training
    sizes = tuple(m for m in model.sizes if m <= size)
    assert small.settings == replace(model.settings, mrl_hidden_sizes=sizes)
    if not embedding:
        assert count_parameters(small) == count_parameters(random_model(sizes, branch))
    owners = zip(small.items.features, model.items.features, strict=True)
    assert all(ours.data_ptr() == theirs.data_ptr() for ours, theirs in owners)  # frozen: without a copy
    small = small.state_dict()
    for name, weight in model.state_dict().items():
        kept = [min(n, size) if n in model.sizes else n for n in weight.shape]
        assert list(small[name].shape) == kept
        assert torch.equal(small[name], weight[tuple(slice(0, n) for n in kept)])
        assert small[name].untyped_storage().nbytes() == small[name].nbytes
        assert small[name].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("size", [0, 4, 20])
def test_an_untrained_size_is_refused_with_the_trained_ones(size):
    with pytest.raises(ValueError, match=f"size {size} was not trained; the model has 3, 8$"):
        slice_model(slice_model(random_model((3, 8, 20)), 8), size)


PLUS_SIZES, SIZE, ITEMS = (2, 4, 8), 4, 40
EVERYTHING = (
    "--dataset_code tiny --language_encoder lexical --img_encoder pixel --preset plus --dropout_from 2 --device cpu "
    "--mrl_hidden_sizes 2,4,8 --num_epochs 3 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --lru_max_len 6 "
    "--num_negatives 7 --item_embedding_updates rows"
)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Change to a folder with data/tiny prepared."""
    folder = tmp_path_factory.mktemp("home")
    write_prepared(folder / "data", "tiny", users=40, items=ITEMS, pictures=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(home):
    """Return a run with texts, pictures and every extension."""
    return home / train.main(shlex.split(EVERYTHING))


@pytest.fixture(scope="module")
def loaded(run):
    """Return the settings, catalogue and model of the run."""
    return load_run(run)


@torch.no_grad()
def scores_of(model, catalog, size=None):
    """Return the scores [U, N+1] of every user's history by the first `size` dimensions."""
    (batch,) = eval_batches(eval_rows(catalog.sequences, 6, "test"), 1000, torch.device("cpu"))
    table = model.item_table()
    z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
    return z[:, :size] @ table[:, :size].T


def test_a_run_trains_the_weights_of_every_extension(loaded):
    config, catalog, model = loaded
    assert config.preset == "plus" and config.embedded == PLUS_SIZES[-1]
    raw = [torch.from_numpy(part) for part in load_features(config, catalog, "cpu")]
    state, fresh = model.state_dict(), build_model(catalog.num_items, raw, config).state_dict()
    assert not any(torch.equal(state[name], fresh[name]) for name in ("items.V", "history_bias", "log_scale"))
    rows = train_rows(catalog.sequences, config.lru_max_len)
    read = np.concatenate([rows.labels, rows.tokens[rows.offsets[:-1]]])
    assert state["items.gate.trained"].tolist() == (np.bincount(read, minlength=ITEMS + 1) > 0).tolist()
    for name in ("items.whitening.mean_0", "items.whitening.matrix_1"):
        torch.testing.assert_close(state[name], fresh[name])


@pytest.mark.parametrize("size", PLUS_SIZES)
def test_a_slice_scores_as_the_models_prefix_and_has_its_own_scales(loaded, size):
    _, catalog, model = loaded
    small = slice_model(model, size)
    torch.testing.assert_close(scores_of(small, catalog), scores_of(model, catalog, size), rtol=1e-5, atol=1e-5)
    assert torch.equal(small.log_scale, model.log_scale[: len(small.sizes)])
    assert torch.equal(small.items.V, model.items.V[:, :size])
    assert small.items.gate.scale == model.items.gate.scale == pytest.approx(model.items.new_item_scale()) != 1


def test_a_run_that_was_cut_off_is_resumed_to_the_same_weights(run):
    with cut_off_after(1):
        train.main(shlex.split(f"{EVERYTHING} --run_name cut"))
    cut = train.main(["--resume", "latest"])
    states = [load_state(path / "last.pt")["model"] for path in (run, cut)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert (run / "test_mrl_metrics.json").read_bytes() == (cut / "test_mrl_metrics.json").read_bytes()


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_an_export_ranks_as_the_slice_and_new_products_are_whitened_projected_and_rescaled(
    run, loaded, engine, tmp_path
):
    _, catalog, model = loaded
    export.main(shlex.split(f"--run {run} --size {SIZE} --format onnx --quantize none --out {tmp_path}/export"))
    recommender = Recommender.from_pretrained(tmp_path / "export", engine)
    assert recommender.config["features"]["whitened"] == [1024, 240]
    expected = scores_of(slice_model(model, SIZE), catalog)[:, 1:]
    histories = [catalog.sequences.of(user)[:-1].tolist() for user in range(len(catalog.sequences))]
    for scores, answer in zip(expected, recommender.recommend(histories, 5, exclude_history=False), strict=True):
        best = scores.topk(5)
        np.testing.assert_allclose(answer.scores, best.values, rtol=1e-4, atol=1e-4)
        assert answer.numbers == (best.indices + 1).tolist()

    # A new product has no V; its row is rescaled to the mean norm of the catalogue's rows.
    table = model.item_table()[1:, :SIZE].detach()
    V = model.items.gate(model.items.V)[1:, :SIZE].detach()
    lengths = [part[V.any(dim=1)].norm(dim=1).mean() for part in (table, table - V)]
    product = {"title": "Warm Red Lamp", "brand": "Alder", "picture": "data/photos/tiny/B000000001.png"}
    features = recommender.embed_items([product, catalog.metadata[2] | {"picture": None}])
    parts = torch.from_numpy(features).split([part.shape[1] for part in model.items.features], dim=1)
    transforms = model.items.whitening.transforms()
    whitened = torch.cat([whiten(part, *how) for part, how in zip(parts, transforms, strict=True)], dim=1)
    assert not whitened[1, parts[0].shape[1] :].any()
    recommender.add_items(["NEW", "WITHOUT PICTURE"], features)
    projected = (model.items.projection(whitened)[:, :SIZE] * lengths[0] / lengths[1]).detach()
    np.testing.assert_allclose(recommender.items.table.rows()[-2:], projected, rtol=1e-4, atol=1e-5)
