"""All options beyond the paper at once: slices, exports, new products, resuming."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch

import eval as eval_script
import train
from config import EXTENSIONS, Config
from dataloader import eval_batches, eval_rows
from datasets.features.load import load_features
from model import slice_model
from model.extensions.whitening import whiten
from model.registry import build_model
from serving import Recommender, export
from tests.prepared import write_prepared
from trainer.checkpoint import load_state
from trainer.load_run import load_run
from trainer.trainer import Trainer

SIZES, ITEMS = (2, 4, 8), 40
PICTURES = (
    "--dataset_code tiny --preset plus --dropout_from 2 --no-use_language_encoder --img_encoder pixel "
    "--mrl_hidden_sizes 2,4,8 --num_epochs 3 --lr 0.01 --warmup_steps 1 --lru_num_blocks 1 --lru_max_len 6 --device cpu"
)
BOTH = PICTURES.replace("--no-use_language_encoder", "--language_encoder lexical --num_negatives 7")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """The folder that these tests run in, with data/tiny prepared."""
    folder = tmp_path_factory.mktemp("home")
    write_prepared(folder / "data", "tiny", users=40, items=ITEMS, pictures=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def run(home):
    """A run with text and pictures and every option."""
    return home / train.main(shlex.split(BOTH))


@pytest.fixture(scope="module")
def loaded(run):
    """(settings, catalogue, model)."""
    return load_run(run)


@torch.no_grad()
def scores_of(model, catalog, size=None):
    """The scores [U, N+1] of every user's history by the first `size` dimensions."""
    (batch,) = eval_batches(eval_rows(catalog.sequences, 6, "test"), 1000, torch.device("cpu"))
    table = model.item_table()
    z = model.encode(table[batch.tokens], batch.position, batch.longest)[batch.last]
    return z[:, :size] @ table[:, :size].T


def test_a_run_has_learned_all_that_the_options_add(loaded):
    config, catalog, model = loaded
    assert config.preset == "plus" and config.embedded == SIZES[-1]
    state, fresh = model.state_dict(), build_model(catalog.num_items, features_of(config, catalog), config)
    for name in ("items.V", "log_scale"):
        assert not torch.equal(state[name], fresh.state_dict()[name]), name
    for name in ("items.whitening.mean_0", "items.whitening.matrix_1"):
        torch.testing.assert_close(state[name], fresh.state_dict()[name])


def features_of(config, catalog):
    return load_features(config, catalog, "cpu")


@pytest.mark.parametrize("size", SIZES)
def test_a_slice_scores_as_the_models_prefix_and_learned_its_own_scales(loaded, size):
    _, catalog, model = loaded
    small = slice_model(model, size)
    torch.testing.assert_close(scores_of(small, catalog), scores_of(model, catalog, size), rtol=1e-5, atol=1e-5)
    assert torch.equal(small.log_scale, model.log_scale[: len(small.sizes)])
    assert torch.equal(small.items.V, model.items.V[:, :size])


def test_every_slice_tested_alone_has_the_metrics_of_the_one_pass(run):
    together = json.loads((run / "test_mrl_metrics.json").read_text())
    alone = eval_script.main(["--run", str(run), "--alone"])
    assert {str(size): metrics for size, metrics in alone.items()} == together


# -------------------------------------------------------------------------------------------------------------- serving


@pytest.fixture(scope="module", params=[4, 8])
def exported(run, request):
    """(an export's folder, its size)."""
    folder = run.parent / f"export-{request.param}"
    export.main(shlex.split(f"--run {run} --size {request.param} --format onnx --quantize none --out {folder}"))
    return folder, request.param


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_an_export_recommends_what_the_model_scores_highest(loaded, exported, engine):
    _, catalog, model = loaded
    folder, size = exported
    expected = scores_of(slice_model(model, size), catalog)[:, 1:]
    histories = [catalog.sequences.of(user)[:-1].tolist() for user in range(len(catalog.sequences))]
    recommender = Recommender.from_pretrained(folder, engine)
    for scores, answer in zip(expected, recommender.recommend(histories, 5, exclude_history=False), strict=True):
        best = scores.topk(5)
        np.testing.assert_allclose(answer.scores, best.values, rtol=1e-4, atol=1e-4)
        assert answer.numbers == (best.indices + 1).tolist()


def lengthened(model, size, rows):
    """Rows of no embedding, cut to a size, times how much longer an embedding makes those of the catalogue."""
    table = model.item_table()[1:, :size].detach()
    lengths = [np.linalg.norm(part, axis=1).mean() for part in (table, table - model.items.V[1:, :size].detach())]
    return rows[:, :size].detach().numpy() * lengths[0] / lengths[1]


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_a_new_product_is_whitened_and_projected_to_the_length_of_others_without_an_embedding(loaded, exported, engine):
    _, catalog, model = loaded
    folder, size = exported
    recommender = Recommender.from_pretrained(folder, engine)
    product = {"title": "Warm Red Lamp", "brand": "Alder", "picture": "data/photos/tiny/B000000001.png"}
    features = recommender.embed_items([product, catalog.metadata[2] | {"picture": None}])
    recommender.add_items(["NEW", "WITHOUT PICTURE"], features)
    parts = torch.from_numpy(features).split([part.shape[1] for part in model.items.features], dim=1)
    transforms = model.items.whitening.transforms()
    whitened = torch.cat([whiten(part, *how) for part, how in zip(parts, transforms, strict=True)], dim=1)
    assert not whitened[1, parts[0].shape[1] :].any()
    rows = recommender.items.table.rows()[-2:]
    projected = lengthened(model, size, model.items.projection(whitened))
    np.testing.assert_allclose(rows, projected, rtol=1e-4, atol=1e-5)
    recommender.save_pretrained(folder.parent / f"more-{engine}-{size}")
    again = Recommender.from_pretrained(folder.parent / f"more-{engine}-{size}", engine)
    (answer,) = again.recommend([["B000000003"]], top_k=ITEMS + 2, exclude_history=False)
    assert sorted(answer.numbers) == list(range(1, ITEMS + 3))


def test_a_known_product_that_is_added_again_is_its_row_without_its_embedding(loaded, exported):
    config, catalog, model = loaded
    folder, size = exported
    recommender = Recommender.from_pretrained(folder)
    raw = np.concatenate([part[:5] for part in features_of(config, catalog)], axis=1, dtype=np.float32)
    recommender.add_items([f"AGAIN{i}" for i in range(5)], raw)
    expected = lengthened(model, size, (model.item_table() - model.items.V)[1:6])
    np.testing.assert_allclose(recommender.items.table.rows()[-5:], expected, rtol=5e-3, atol=5e-3)


def test_products_that_no_training_saw_are_recommended_beside_those_it_saw(loaded, exported):
    config, catalog, _ = loaded
    recommender = Recommender.from_pretrained(exported[0])
    raw = np.concatenate(features_of(config, catalog), axis=1, dtype=np.float32)
    recommender.add_items([f"AGAIN{i}" for i in range(ITEMS)], raw)
    histories = [catalog.sequences.of(user)[:-1].tolist() for user in range(len(catalog.sequences))]
    new = [sum(n > ITEMS for n in answer.numbers) for answer in recommender.recommend(histories, top_k=10)]
    assert 0 < sum(new) < 10 * len(new)


def test_an_export_says_that_its_features_are_whitened(exported):
    config = json.loads((exported[0] / "config.json").read_text())
    assert config["features"]["whitened"] == [1024, 240] and config["features"]["dim"] == 1264


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("negatives", [0, 7])
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights_bit_by_bit(monkeypatch, negatives):
    flags = f"{PICTURES} --num_negatives {negatives}"
    whole, keep = train.main(shlex.split(f"{flags} --run_name whole")), Trainer._keep

    def interrupt(self, *arguments):
        keep(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_keep", interrupt)
        train.main(shlex.split(f"{flags} --run_name cut"))
    cut = train.main(["--resume", "latest"])
    states = [load_state(run / "last.pt")["model"] for run in (whole, cut)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert (whole / "test_mrl_metrics.json").read_bytes() == (cut / "test_mrl_metrics.json").read_bytes()


# ------------------------------------------------------------------------------------------------------------------ off


def test_without_options_nothing_is_held_or_asked_for_beside_the_papers(loaded):
    config, catalog, _ = loaded
    plain = dataclasses.replace(config, **{name: getattr(Config, name) for name in EXTENSIONS})
    features = features_of(config, catalog)
    model = build_model(catalog.num_items, features, plain).train()
    assert [part.data_ptr() for part in model.items.features] == [part.ctypes.data for part in features]
    assert model.items.factors(torch.float32).embedding is None
    assert not any(name in key for key in model.state_dict() for name in ("items.V", "log_scale", "whitening"))
