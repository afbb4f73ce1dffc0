"""Engines against the model that they were sliced from, and answers of a Recommender in Python and over HTTP."""

import asyncio
import base64
import dataclasses
import gc
import itertools
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save

from common.errors import InputError
from config import COUNTING, MODEL_PRESETS, Config
from model import build_model
from serving import Recommender, http, ranking, recommender, torch_engine
from serving.engines import OnnxEngine, State, Table, open_engine
from serving.export import arguments_parser, check_baseline_flags, export_baseline
from serving.folder import GRAPHS, read_folder, write_folder
from serving.hub import graphs_of_folder
from serving.requests import Batcher, Metrics
from serving.torch_engine import TorchEngine
from serving.weights import BASELINES, dequantize, quantize
from tests.made_up import (
    IDS,
    KINDS,
    NEAR_1,
    SAME,
    N,
    assert_same_answer,
    everything,
    made_up_catalog,
    random_model,
    with_random_weights,
    write_export,
)
from trainer.checkpoint import RunItems

# -------------------------------------------------------------------------------------------------------------- engines

NUM_ITEMS = 30

# Sizes, blocks, max_len, options of the model: every power of two that the scan may end on, sizes down to width 1.
SHAPES = [
    ((5,), 1, 1, {}),
    ((1, 2, 12), 2, 2, {"lru_use_bias": False, "post_norm": True}),
    ((3, 30), 3, 7, {}),
    ((4, 9, 10, 33), 2, 50, {"post_norm": True}),
]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "export"
    sizes, num_blocks, max_len, options = request.param
    model = random_model(sizes, num_blocks, ring=NEAR_1, **options)
    return model, max_len, read_folder(write_export(folder, model, max_len=max_len))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("one"), random_model((8, 16, 32), num_items=NUM_ITEMS, ring=NEAR_1)
    kinds = ("none", "int8")
    return {kind: read_folder(write_export(folder / kind, model, max_len=20, quantize=kind)) for kind in kinds}


def exported_baseline(folder, name):
    options = {} if name in COUNTING else {"mrl_hidden_sizes": (8,), "num_heads": 2 if name == "sasrec" else 1}
    run = {"model_code": name, "dataset_code": "made-up", "lru_max_len": 7}
    settings = Config(**{**MODEL_PRESETS[name], **options, **run})
    torch.manual_seed(0)
    model = build_model(NUM_ITEMS, [], settings).eval()
    if name in COUNTING:
        model.count(torch.randint(20, (200,)), torch.randint(1, NUM_ITEMS + 1, (200,)))
    else:
        with_random_weights(model, 0.8)
    items = RunItems.of(made_up_catalog(NUM_ITEMS))
    export_baseline(model, folder, config=settings, items=items, run=folder / "no-such-run", quantize="none")
    return model, Recommender.from_pretrained(folder)


def histories_of(lengths, longest, num_items=NUM_ITEMS) -> np.ndarray:
    """Return random histories of these lengths, left-padded: [B, longest]."""
    rows = np.random.default_rng(0).integers(1, num_items + 1, (len(lengths), longest))
    return np.where(np.arange(longest, 0, -1) <= np.array(lengths)[:, None], rows, 0)


def all_items(table: Table) -> tuple[np.ndarray, int]:
    bias = np.full((1, table.width), -np.inf, dtype=np.float32)
    bias[0, 1 : len(table)] = 0
    return bias, len(table) - 1


def full_ranking(engine, export, history) -> np.ndarray:
    """Return the scores of all items in numerical order [B, N]; check that they came sorted, and every item once."""
    table = engine.table(export)
    return by_item(engine.recommend(history.copy(), table, *all_items(table)))


def by_item(ranked) -> np.ndarray:
    scores, items = map(np.asarray, ranked)
    assert (np.sort(items, axis=1) == np.arange(1, items.shape[1] + 1)).all() and (np.diff(scores, axis=1) <= 0).all()
    return np.take_along_axis(scores, np.argsort(items, axis=1), axis=1)


def assert_close(actual, expected, tolerance=1e-5):
    actual, expected = map(np.asarray, (actual, expected))
    assert actual.shape == expected.shape and np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def test_an_export_scores_histories_of_every_length_and_steps_as_the_model_does(exported, engine):
    model, max_len, export = exported
    history, expected = histories_of(range(max_len + 1), max_len), []
    with torch.no_grad():
        table = model.item_table()
        for length, row in enumerate(history):
            tokens = torch.from_numpy(row[-max(length, 1) :])  # an empty history is token 0 alone
            z = model.encode(table[tokens], torch.arange(len(tokens)), len(tokens))
            expected.append((table @ z[-1])[1:].numpy())
    engine = open_engine(export, engine, threads=1)
    assert_close(full_ranking(engine, export, history), np.stack(expected))
    table, hidden = engine.table(export), np.zeros((1, export.config["num_blocks"], 2, model.sizes[-1]), np.float32)
    for item in history[-1]:
        z, hidden = engine.step(np.array([item]), hidden, table)
    assert_close(by_item(engine.rank(z, table, *all_items(table))), expected[-1:])


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_a_user_alone_is_answered_to_the_last_bit_as_in_a_batch_however_padded(one, engine, kind):
    export, lengths = one[kind], [*range(21), 20, 3, 12]
    engine, history = open_engine(export, engine, threads=1), histories_of(lengths, 20)
    together = full_ranking(engine, export, history)
    for row, length in enumerate(lengths):
        for padded in {max(length, 1), min(length + 2, 20), 20}:
            alone = full_ranking(engine, export, history[row : row + 1, -padded:])
            np.testing.assert_array_equal(alone, together[row : row + 1])
    table = engine.table(export)
    z = np.random.default_rng(0).normal(size=(2, export.config["size"])).astype(np.float32)
    alone = by_item(engine.rank(z[:1], table, *all_items(table)))
    beside_a_large_one = by_item(engine.rank(z * np.float32([[1], [1e4]]), table, *all_items(table)))
    assert_close(beside_a_large_one[:1], alone)


def test_the_int8_graphs_multiply_integers_of_63_steps_a_side_with_rows_of_127(one):
    export = one["int8"]
    np.testing.assert_allclose(export.scale, np.abs(one["none"].table).max(axis=1) / 127, rtol=1e-5)
    error = np.abs(dequantize(export.table, export.scale, axis=1) - one["none"].table)
    assert (error <= export.scale[:, None] * 0.501).all()
    engine = OnnxEngine(export, threads=1)
    table = engine.table(export)
    z = np.random.default_rng(0).normal(size=(5, export.config["size"])).astype(np.float32)
    z[4] = 0
    step = np.maximum(np.abs(z).max(axis=1, keepdims=True), 1e-9) / np.float32(63)
    expected = (np.rint(z / step).astype(np.int64) @ export.table[1:].astype(np.int64).T) * step * export.scale[1:]
    scores = by_item(engine.rank(z, table, *all_items(table)))
    assert_close(scores, expected, 1e-6)
    assert not scores[4].any()


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_the_graphs_are_valid_and_read_their_weights_from_the_weights_file(one, kind):
    export, history = one[kind], histories_of(range(9), 20)
    engine = OnnxEngine(export, threads=1)
    expected = full_ranking(engine, export, history)
    for name in GRAPHS:
        onnx.checker.check_model(str(export.folder / name), full_check=True)
        graph = onnx.load(export.folder / name, load_external_data=False).graph
        assert all(t.data_location for t in graph.initializer if np.prod(t.dims) >= 32 * 32)  # 1: in another file
    engine._recommend = open_session(export.folder / "recommend.onnx")  # without those that the engine gives
    np.testing.assert_array_equal(full_ranking(engine, export, history), expected)


# A weight is off by at most half of 1/127 of its column's largest, an activation by half of 1/63 of its row's: 0.5 %
# and 1 % of a product. A score after 3 blocks sums 13: 4 % of their spread, and the largest is 2 to 4 times the spread.
BOUNDS = {"onnx": (0.02, 0.08), "torch": (0.005, 0.02)}  # (rms, largest) error / largest score


def test_int8_scores_are_close_to_float32_scores(tmp_path, engine):
    model = random_model((8, 16, 32), 3, num_items=100, ring=NEAR_1)
    history, scores = histories_of(range(51), 50, num_items=100), []
    for kind, name in (("none", "torch"), ("int8", engine)):
        export = read_folder(write_export(tmp_path / kind, model, max_len=50, quantize=kind))
        scores.append(full_ranking(open_engine(export, name, threads=1), export, history))
    error = (scores[1] - scores[0]) / np.abs(scores[0]).max()
    rms, largest = BOUNDS[engine]
    assert 0 < np.sqrt((error**2).mean()) <= rms and np.abs(error).max() <= largest
    q, scale = quantize(np.array([[0, 0], [1e-44, 0], [4, -4]], np.float32), axis=1)
    assert (q.tolist(), scale[:2].tolist()) == ([[0, 0], [0, 0], [127, -127]], [1, 1])


@pytest.mark.parametrize(("chunk", "k"), [(1, 10), (10, 1), (10, 10), (10, 63), (64, 10)])
def test_ranking_is_a_stable_sort_however_the_catalogue_is_chunked(one, monkeypatch, engine, chunk, k):
    monkeypatch.setattr(torch_engine, "CHUNK", chunk)
    rng = np.random.default_rng(0)  # whole numbers, so that scores are exact and many equal
    z, table = (rng.integers(-1, 2, size=(rows, 32)).astype(np.float32) for rows in (5, 64))
    table[:, 4:] = 0
    bias = np.zeros((5, 64), dtype=np.float32)
    bias[:, 0] = bias[0, 10:] = bias[1, :20] = -np.inf
    expected = np.argsort(-(z @ table.T + bias), axis=1, kind="stable")[:, :k]
    scores, items = open_engine(one["none"], engine, 1).rank(z, Table(table, None), bias, k)
    of_expected = np.take_along_axis(z @ table.T + bias, expected, axis=1)
    np.testing.assert_array_equal(scores, of_expected)
    np.testing.assert_array_equal(np.asarray(items)[of_expected > -np.inf], expected[of_expected > -np.inf])


@pytest.mark.parametrize("users", [1, 3, 64])
def test_identical_items_come_by_number_whoever_is_in_the_batch(one, engine, users):
    rng = np.random.default_rng(0)
    kinds, kind = rng.normal(size=(50, 32)).astype(np.float32), rng.integers(0, 50, 12_102)
    z, table = rng.normal(size=(64, 32)).astype(np.float32), Table(kinds[kind], None)
    scores = (z.astype(np.float64) @ kinds.T)[:, kind]
    scores[:, 0] = -np.inf
    engine = open_engine(one["none"], engine, threads=1)
    for start in range(0, 64, users):
        part = slice(start, start + users)
        _, items = engine.rank(z[part], table, all_items(table)[0], 20)
        np.testing.assert_array_equal(items, np.argsort(-scores[part], axis=1, kind="stable")[:, :20])


def test_the_default_engine_is_onnx_if_there_are_graphs_else_torch_and_others_are_refused(one, tmp_path, monkeypatch):
    assert isinstance(open_engine(one["none"], None, 1), OnnxEngine)
    bare = read_folder(write_export(tmp_path / "bare", random_model((4,)), format="torch"))
    assert isinstance(open_engine(bare, None, 1), TorchEngine)
    damaged = read_folder(write_export(tmp_path / "damaged", random_model((4,))))
    path = damaged.folder / "step.onnx"
    path.write_bytes(path.read_bytes()[:500])
    for folder, name, threads, missing, problem in (
        (one["none"], "tensorrt", 1, "", "engine 'tensorrt' is unknown; use one of torch, onnx"),
        (one["none"], None, -1, "", "threads -1 must be a whole number, 0 for one per core"),
        (bare, "onnx", 1, "", "bare has no ONNX graphs; export it with --format onnx, or use engine torch"),
        (damaged, "onnx", 1, "", rf"{path} cannot be loaded by onnxruntime \S+ \(.*export the model again"),
        (one["none"], "onnx", 1, "onnxruntime", "the onnx engine needs .*pip install onnxruntime"),
        (one["none"], "torch", 1, "serving.torch_engine", "the torch engine needs .*export with --format onnx"),
    ):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(InputError, match=problem):
            open_engine(folder, name, threads)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baselines_export_answers_as_its_model(tmp_path, name):
    model, r = exported_baseline(tmp_path / "export", name)
    histories = [[], [3], [9, 3, 9, 30, 1], [4, 2, 30, 7, 7, 1, 29]]
    for history, in_batch in zip(histories, r.recommend(histories, top_k=30, exclude_history=False), strict=True):
        tokens = torch.tensor(history or [0])
        with torch.no_grad():
            if name in COUNTING:
                scores = model.scores(tokens[-1:])[0]
            else:
                table = model.item_table()
                scores = table @ model.encode(table[tokens], torch.arange(len(tokens)), len(tokens))[-1]
        answer, expected = everything(r, history), scores[1:].numpy()
        np.testing.assert_allclose(answer.scores, -np.sort(-expected), atol=1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(expected[np.array(answer.numbers) - 1], answer.scores, atol=1e-5, rtol=1e-4)
        assert_same_answer(in_batch, answer)
        if name in COUNTING:  # many scores are equal
            assert answer.numbers == (np.argsort(-expected, kind="stable") + 1).tolist()
        few = everything(r, history, candidates=[5, 29])
        assert few.numbers == [i for i in answer.numbers if i in (5, 29)]
        if name == "sasrec":
            with pytest.raises(InputError, match="sasrec reads the whole history each time and has no states"):
                r.start(history)
            continue
        state = r.step(r.start(history[:-1]), history[-1]) if history else r.start()
        stepped = everything(r, State.from_bytes(state.to_bytes()))
        np.testing.assert_allclose(stepped.scores, answer.scores, rtol=1e-4, atol=1e-5)
    r.remove_items([5])
    r.save_pretrained(tmp_path / "saved")
    assert f"# made-up, {name}\n" in (tmp_path / "saved/README.md").read_text()
    assert len(Recommender.from_pretrained(tmp_path / "saved")) == 29


def test_a_baseline_refuses_what_it_cannot_do_by_name(tmp_path):
    _, r = exported_baseline(tmp_path / "e", "itemknn")
    flags = arguments_parser().parse_args(["--size", "4"])
    for ask, problem in (
        (lambda: r.embed_items([{"title": "a"}]), "itemknn knows items by id alone and cannot embed products"),
        (lambda: r.user_vectors([[3]]), "itemknn counts and has no vectors of users and items"),
        (lambda: r.add_items(["NEW"], np.ones((1, 2))), "learned without features, so no items can be added"),
        (lambda: Recommender.from_pretrained(tmp_path / "e", "onnx"), "e is a itemknn, which NumPy serves"),
        (lambda: check_baseline_flags(flags, "itemknn"), "--size is for runs of fmrlrec"),
    ):
        with pytest.raises(InputError, match=problem):
            ask()
    weights = load_file(tmp_path / "e" / "model.safetensors")
    files = {"items.safetensors": tmp_path / "e" / "items.safetensors"}
    for changed in ({"neighbours": weights["neighbours"] + NUM_ITEMS}, {"alike": weights["begins"]}):
        write_folder(tmp_path / "d", r.config, files | {"model.safetensors": save(weights | changed)}, overwrite=True)
        with pytest.raises(InputError, match=r"model.safetensors: (the neighbours are not of 30|alike does not fit a)"):
            read_folder(tmp_path / "d")


# ------------------------------------------------------------------------------------------------------------ onnx file
# --format onnx-file: one file that plain onnxruntime runs, with the Recommender's answers, and the model card.

NODE_MODULES = Path(__file__).parents[1] / "serving/page/node_modules"
ITEMS, MAX_LEN = 60, 7


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    options = {"ring": NEAR_1, "post_norm": True, "history_bias": (0.0, 0.0, 0.4)}
    model = random_model((8, 16, 32), num_blocks=2, num_items=ITEMS, **options)
    return {
        (kind, format): write_export(root / f"{kind}-{format}", model, max_len=MAX_LEN, quantize=kind, format=format)
        for kind in KINDS
        for format in ("onnx-file", "onnx")
    }


def open_session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session, histories, exclude=True, **inputs):
    named = {"history": np.array(histories, dtype=np.int64), "exclude_history": np.array([exclude]), **inputs}
    return session.run(None, named)


@pytest.mark.parametrize("file", ["recommend.onnx", "recommend.ort"])
def test_the_file_recommends_the_items_that_the_recommender_does(exports, kind, file):
    recommender = Recommender.from_pretrained(exports[kind, "onnx"], engine="torch")
    session = open_session(exports[kind, "onnx-file"] / file)
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, ITEMS + 1, size=length).tolist() for length in range(2 * MAX_LEN)]
    for exclude in (True, False):
        for history, answer in zip(histories, recommender.recommend(histories, exclude_history=exclude), strict=True):
            items, scores, _ = run(session, [history], exclude)
            assert items[0].tolist() == answer.numbers
            np.testing.assert_allclose(scores[0], answer.scores, rtol=1e-4, atol=1e-5)
    users = [run(session, [history])[2][0] for history in histories]
    np.testing.assert_allclose(users, recommender.user_vectors(histories), rtol=1e-4, atol=1e-5)


def test_padding_and_unknown_numbers_change_nothing_and_k_allowed_and_boost_may_be_given(exports):
    session = open_session(exports["none", "onnx-file"] / "recommend.onnx")
    rows = [[0, 0, 3, 5, 9], [3, 5, 9, 0, 0], [3, 0, ITEMS + 1, 5, 9], [3, 5, -1, 0, 9]]
    for found, expected in zip(run(session, rows), run(session, [[3, 5, 9]]), strict=True):
        np.testing.assert_allclose(found, np.repeat(expected, len(rows), axis=0), rtol=1e-5)
    assert run(session, [[0, ITEMS + 1]])[0].tolist() == run(session, np.zeros((1, 0)))[0].tolist()
    allowed = np.zeros((1, ITEMS), dtype=bool)
    allowed[0, [3, 4, 8, 20]] = True
    items, scores, _ = run(session, [[5], [1]], allowed=allowed, k=np.array([5]))
    assert [set(row) for row in items.tolist()] == [{4, 9, 21, 0}, {4, 5, 9, 21, 0}]  # 0: no item is left
    assert (items == 0).tolist() == np.isneginf(scores).tolist() == [[False] * 3 + [True] * 2, [False] * 4 + [True]]
    boost = np.zeros((2, ITEMS), dtype=np.float32)
    boost[1, 20] = 1e6
    assert [row[0] == 21 for row in run(session, [[5], [5]], boost=boost)[0]] == [False, True]
    assert run(session, [[5]], k=np.array([10 * ITEMS]))[0].shape == (1, ITEMS)


def test_the_file_is_valid_holds_its_weights_as_stored_and_describes_itself(exports, kind):
    folder = exports[kind, "onnx-file"]
    onnx.checker.check_model(str(folder / "recommend.onnx"), full_check=True)
    model = onnx.load(folder / "recommend.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in tensors.values())
    stored = {"none": "FLOAT", "float16": "FLOAT16", "int8": "INT8"}[kind]
    assert tensors["table"].data_type == onnx.TensorProto.DataType.Value(stored)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["size"] == "32" and metadata["dataset"] == "made-up"
    assert len(json.loads((folder / metadata["items_file"]).read_text(encoding="utf-8"))["ids"]) == ITEMS
    with pytest.raises(InputError, match=r"one ONNX file for other runtimes.*--format torch or onnx"):
        read_folder(folder)


def blocks(folder, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (folder / "README.md").read_text("utf-8"), re.M | re.S)


def test_the_card_begins_with_the_hubs_front_matter_and_its_programs_run(exports, tmp_path, monkeypatch, capsys):
    folder = exports["float16", "onnx-file"]
    front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
    assert (front["library_name"], front["datasets"], front["license"]) == ("fmrlrec", ["made-up"], "unknown")
    expected = Recommender.from_pretrained(exports["float16", "onnx"], "torch").recommend([[1, 2]])[0].ids
    for format in ("onnx-file", "onnx"):
        monkeypatch.chdir(exports["float16", format])
        exec(blocks(exports["float16", format], "python")[0], {})
        assert capsys.readouterr().out.strip() == str(expected)
    if not shutil.which("node") or not (NODE_MODULES / "onnxruntime-node").exists():
        pytest.skip("needs node and, in serving/page, npm install --ignore-scripts --no-save onnxruntime-node")
    folder = shutil.copytree(folder, tmp_path / "export")
    (folder / "node_modules").symlink_to(NODE_MODULES)
    (folder / "run.mjs").write_text(blocks(folder, "js")[0], encoding="utf-8")
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_the_card_lists_the_inputs_and_outputs_of_every_graph(exports, kind):
    text = (exports[kind, "onnx"] / "README.md").read_text(encoding="utf-8")
    described = graphs_of_folder(int8=kind == "int8")
    assert tuple(described) == GRAPHS and all(f"\n`{name}`, " in text for name in GRAPHS)
    for name, tensors in described.items():
        graph = onnx.load(exports[kind, "onnx"] / name, load_external_data=False).graph
        for values, documented in zip((graph.input, graph.output), tensors, strict=True):
            ranks = {name: shape.partition("]")[0].count(",") + 1 for name, (shape, _) in documented.items()}
            assert {v.name: len(v.type.tensor_type.shape.dim) for v in values} == ranks


# -------------------------------------------------------------------------------------------------------------- answers

LONG = [3, 17, 5, 9, 1, 4, 20, 2]  # longer than the shop's histories of training, 5


@pytest.mark.parametrize("history", [[], [3], [9, 1, 4, 20, 9]], ids=str)
def test_the_answer_is_the_models_own_ranking_with_ids_and_titles(shop, r, history):
    expected = shop.scores(history)
    answer = everything(r, history)
    best = np.argsort(-expected[1:], kind="stable") + 1
    assert answer.numbers == best.tolist()
    np.testing.assert_allclose(answer.scores, expected[best], atol=1e-5 * np.abs(expected).max())
    assert answer.ids == [IDS[i - 1] for i in best]
    assert answer.titles == [shop.catalog.metadata[i - 1]["title"] for i in best] and answer.notes == []
    assert {type(value) for value in [*answer.numbers, *answer.scores]} == {int, float}


@pytest.mark.parametrize("scores_at_once", [1, 2 * (N + 1)])
def test_answers_come_in_the_order_of_the_histories_also_from_several_batches(r, monkeypatch, scores_at_once):
    histories = [[5, 2, 9], [], r.start([8]), [1], [7, 7, 7, 7, 7], r.start([3, 1]), LONG, [9]]
    expected, asked, true = [r.recommend([history], top_k=8)[0] for history in histories], [], recommender.ranked
    monkeypatch.setattr(recommender, "ranked", lambda *given: asked.append(given[1]) or true(*given))
    monkeypatch.setattr(ranking, "SCORES", scores_at_once)
    monkeypatch.setattr(torch_engine, "CHUNK", 3)
    for actual, answer in zip(r.recommend(histories, top_k=8), expected, strict=True):
        assert_same_answer(actual, answer)
    assert max(map(len, asked)) == max(scores_at_once // (N + 1), 1)
    lengths = [len(request.items) for batch in asked for request in batch if request.state is None]
    assert lengths == [0, 1, 1, 3, 5, 8]  # so that histories of a batch need little padding


def test_the_last_items_of_a_long_history_are_read_and_all_are_excluded(r):
    long, tail = everything(r, LONG), everything(r, LONG[-5:])
    assert long.notes == ["the last 5 of 8 items are read, as in training"]
    assert dataclasses.replace(long, notes=[]) == tail
    [answer] = r.recommend([["no", *LONG[:5], "no"]])  # unknown items do not count
    assert answer.notes == ["unknown: 'no', 'no' (of 20 items); skipped"]
    [answer] = r.recommend([LONG], top_k=N - 8)
    assert answer.numbers == [i for i in tail.numbers if i not in LONG]


def test_a_user_with_too_few_items_left_gets_fewer_and_a_note_and_the_others_all(r):
    histories = [[1, 2, 3], list(range(1, 9)), r.start([4]), r.start(range(1, N + 1))]
    answers = r.recommend(histories, top_k=np.int64(13))
    assert [len(answer.ids) for answer in answers] == [13, 12, 13, 0]
    assert answers[0].notes == [] and answers[1].notes[-1] == "only 12 items are left to rank, fewer than top_k 13"
    assert_same_answer(answers[1], r.recommend([histories[1]], top_k=12)[0])


def scores_of(answer):
    return dict(zip(answer.numbers, answer.scores, strict=True))


FEW, MANY = [IDS[7], 2], [IDS[7], 2, 19, 2, 5, 11]  # ranked from gathered rows, and from the whole table


@pytest.mark.parametrize("candidates", [FEW, MANY], ids=len)
def test_only_candidates_are_ranked_with_the_scores_of_the_whole_ranking(shop, engine, kind, candidates):
    r = shop.open(engine, kind)
    numbers = {r.items.number(item) for item in candidates}
    for history in ([3, 9], [], r.start([3, 9])):
        best = {i: score for i, score in scores_of(everything(r, history)).items() if i in numbers}
        [answer] = r.recommend([history], top_k=len(numbers), candidates=candidates)
        assert answer.numbers == list(best) and answer.notes == []
        np.testing.assert_allclose(answer.scores, list(best.values()), rtol=SAME[kind])


@pytest.mark.parametrize(("kind", "index"), [("none", None), ("float16", "int8"), ("int8", None)])
def test_the_history_bias_is_added_to_items_of_the_history_that_may_be_recommended(engine, kind, index, tmp_path):
    model = random_model((4, 12), num_items=N, history_bias=(3.0, 0.7))
    folder = write_export(tmp_path / "e", model, quantize=kind, index=index)
    r, plain = (Recommender.from_pretrained(folder, engine) for _ in range(2))
    assert plain.config.pop("history_bias") == pytest.approx(0.7)
    ways = {}, {"boost": np.linspace(-1, 1, N)}, {"candidates": [3, 9]}, {"candidates": [*range(2, 16)]}
    histories = ([3, 9, 17, 3], {3, 9, 17}), ([], set()), (r.start([9, 4]), {9, 4})
    for bias, options, (history, read) in itertools.product((0.7, -4.0), ways, histories):
        r.config["history_bias"] = bias
        whole = scores_of(everything(plain, history, **options))
        scores = {i: score + bias * (i in read) for i, score in whole.items()}
        best = sorted(scores, key=lambda i: -scores[i])[:5]
        answer = everything(r, history, top_k=5, **options)
        assert answer.numbers == best
        np.testing.assert_allclose(answer.scores, [scores[i] for i in best], rtol=SAME[kind], atol=SAME[kind])
        excluded = (everything(each, history, exclude_history=True, **options) for each in (r, plain))
        assert len({tuple(answer.scores) for answer in excluded}) == 1
    r.remove_items([9])
    assert 9 not in everything(r, [3, 9]).numbers


def test_each_history_may_have_candidates_of_its_own(r):
    histories, own = [[3], r.start([2]), [2], [5]], [[1, 2], MANY, [2], ["no", 5, 6]]
    answers = r.recommend(histories, top_k=2, candidates=own)
    for history, candidates, answer in list(zip(histories, own, answers, strict=True))[:2]:
        assert_same_answer(answer, r.recommend([history], top_k=2, candidates=candidates)[0])
    assert (answers[2].numbers, answers[2].notes) == ([], ["only 0 items are left to rank, fewer than top_k 2"])
    assert set(answers[3].numbers) == {6} and answers[3].notes[0] == "candidates unknown: 'no' (of 20 items); skipped"
    with pytest.raises(InputError, match="2 lists of candidates for 4 histories; give one for each"):
        r.recommend(histories, candidates=own[:2])


@pytest.mark.parametrize("chosen", [FEW, MANY, np.arange(N) % 2 == 0, [True] * 3], ids=str)
def test_a_filter_answers_as_its_candidates_do_gathered_or_not(r, chosen, monkeypatch):
    items = r.filter(chosen)
    numbers = [r.items.number(i) for i in chosen] if isinstance(chosen[0], str) else np.flatnonzero(chosen) + 1
    for history in ([3], [9, 1]):
        expected = r.recommend([history], candidates=numbers)
        assert r.recommend([history], candidates=items) == expected
    monkeypatch.setattr(ranking, "FEW", 1)  # gather all of them
    assert_same_answer(r.recommend([[9, 1]], candidates=numbers)[0], expected[0])


def test_a_filter_follows_the_catalogue_and_keeps_no_former_one_in_memory(shop, engine):
    r = shop.first(engine, "none", 16)
    rule, boosted, former = r.filter(range(1, 7)), r.filter(boost=np.ones(16)), weakref.ref(r.items)
    for each in (rule, boosted):
        r.recommend([[3]], candidates=each)
    r.remove_items([2])
    r.add_items(["NEW"], shop.features[16:17])
    gc.collect()
    assert former() is None
    assert sorted(everything(r, [], candidates=rule).numbers) == [1, 3, 4, 5, 6]
    plain, raised = (scores_of(everything(r, [3], candidates=each)) for each in (None, boosted))
    assert raised == pytest.approx({i: score + (i != 17) for i, score in plain.items()}, abs=1e-4)  # 17: added later


@pytest.mark.parametrize("candidates", [None, FEW, MANY, [MANY]], ids=str)
def test_boosts_are_added_to_the_scores(shop, engine, kind, candidates):
    r, boost = shop.open(engine, kind), np.linspace(-3, 3, N)
    for history in ([3, 9], [], r.start([3, 9])):
        plain = scores_of(everything(r, history, candidates=candidates))
        boosted = everything(r, history, candidates=candidates, boost=boost)
        expected = {i: score + boost[i - 1] for i, score in plain.items()}
        assert scores_of(boosted) == pytest.approx(expected, abs=SAME[kind] * max(map(abs, expected.values())))
        assert boosted.scores == sorted(boosted.scores, reverse=True)


def test_an_invalid_argument_is_refused(r):
    for ask, problem in (
        (lambda: r.recommend([[]], top_k=0), "top_k 0 must be a whole number from 1"),
        (lambda: r.recommend([[]], top_k=True), "top_k True must be a whole number from 1"),
        (lambda: r.recommend([[]], top_k=10**5000), "top_k .* must be a whole number from 1"),
        (lambda: r.recommend(r.start()), "histories must be a list such as"),
        (lambda: r.recommend("Q0"), r"histories must be a list such as \[.*'id', 'id'\].*, not 'Q0'"),
        (lambda: r.recommend([{"Q0": 1}]), r"each of the histories must be a list such as \['id', 'id'\], not {"),
        (lambda: r.start(7), r"a history must be a list such as \['id', 'id'\], not 7"),
        (lambda: r.recommend([[]], candidates="Q0"), r"candidates must be a list such as \['id', 'id'\], or a list"),
        (lambda: r.recommend([[1]], candidates=["no", 99]), "no candidate is known, so there is nothing to rank"),
        (lambda: r.filter([True] * (N + 1)), "a mask must have a truth value for each of at most 20 items"),
        (lambda: r.filter([False, []]), "a mask must have a truth value for each of at most 20 items"),
        (lambda: r.filter(boost=np.ones(N + 1)), "boost must be an array of at most 20 numbers"),
        (lambda: r.filter(boost=[np.inf]), "boost must be finite; leave items out by a mask"),
        (lambda: r.filter("Q0"), r"items must be a list such as \["),
        (lambda: r.recommend([[1]], candidates=r.filter([1]), boost=[1]), "candidates is a filter, so give"),
    ):
        with pytest.raises(InputError, match=problem):
            ask()


def test_a_users_vector_times_an_items_vector_is_the_score(shop, engine, kind):
    r, histories = shop.open(engine, kind), [[3, 17], [], [9, 1, 4, 20, 2, 7, 3], ["no", 5]]
    users, items = r.user_vectors(histories), r.item_vectors()
    assert users.dtype == items.dtype == np.float32 and items.shape == (N, 12)
    np.testing.assert_array_equal(r.item_vectors([IDS[4], 2]), items[[4, 1]])
    # onnxruntime rounds a user's vector of an int8 export to 63 steps a side.
    tolerance = 0.05 if (engine, kind) == ("onnx", "int8") else 1e-5
    for answer, scores in zip((everything(r, history) for history in histories), users @ items.T, strict=True):
        scores = scores[np.array(answer.numbers) - 1]
        np.testing.assert_allclose(scores, answer.scores, atol=tolerance * np.abs(scores).max())
    np.testing.assert_allclose(r.user_vectors([r.start([3, 17])]), users[:1], rtol=1e-2, atol=1e-2)
    assert r.user_vectors([]).shape == (0, 12)


def test_similar_items_have_the_largest_cosine(shop, engine, kind, monkeypatch):
    monkeypatch.setattr("serving.recommender.CHUNK", 7)
    r = shop.open(engine, kind)
    unit = r.item_vectors() / np.linalg.norm(r.item_vectors(), axis=1, keepdims=True)
    for number, answer in zip([4, 7], r.similar_items([4, IDS[6]], top_k=5), strict=True):
        cosine = unit @ unit[number - 1]
        cosine[number - 1] = -np.inf
        best = np.argsort(-cosine)[:5]
        assert answer.numbers == (best + 1).tolist() and answer.ids == [IDS[i] for i in best]
        np.testing.assert_allclose(answer.scores, cosine[best], rtol=1e-4)
    [among] = r.similar_items([4], candidates=r.filter([4, 1, 2]))
    assert sorted(among.numbers) == [1, 2] and among.notes == ["only 2 items are left to rank, fewer than top_k 10"]
    with pytest.raises(InputError, match="unknown: 'no'"):
        r.similar_items(["no"])


@pytest.mark.parametrize(
    "ids", [["4", "2", "x", "30"], ["Ü1", "ü", "日本"], ["a b", "a", "A", "x" * 256], ["42", "7", "1", "007"]]
)
def test_a_string_is_an_id_and_so_is_a_number_if_all_ids_are_whole_numbers(engine, tmp_path, ids):
    catalog = dataclasses.replace(made_up_catalog(len(ids)), asins=ids)
    model = random_model((4,), num_items=len(ids), features=np.eye(len(ids), dtype=np.float32))
    folder = write_export(tmp_path / "export", model, catalog)
    r = Recommender.from_pretrained(folder, engine)
    assert r.start(ids).items == tuple(range(1, len(ids) + 1)) and sorted(everything(r, []).ids) == sorted(ids)
    assert ids[0] in r and 1 in r and "3" not in r and 5 not in r and r.recommend([]) == []
    if ids[0] == "42":
        assert r.start([7, "7", np.int32(1), "007"]).items == (2, 2, 3, 4)
        assert r.recommend([[4, 42]])[0].notes[0] == "unknown: 4 (of 4 items); skipped"
        assert r.recommend([[10**5000]])[0].unknown == 1
        r.add_items(["new"], np.zeros((1, r.config["features"]["dim"])))
        r.save_pretrained(tmp_path / "later")  # a number still is an id
        assert Recommender.from_pretrained(tmp_path / "later", engine).start([7, "new"]).items == (2, 5)
    elif "2" in ids:
        assert r.start(np.array([2, 4])).items == (2, 4) == r.start(iter(["2", np.uint8(4)])).items


def test_unknown_items_are_skipped_five_are_named_and_alone_they_are_an_empty_history(r):
    unknown = ["", "a\0b", IDS[0] + "\0", IDS[0][:-1], max(IDS, key=len) + "g", "a\udce9", "1", "x" * 70, 0, N + 1]
    *answers, expected = r.recommend([*([3, item, 17] for item in unknown), [3, 17]])
    for item, answer in zip(unknown, answers, strict=True):
        assert answer.notes == [f"unknown: {item!r} (of 20 items); skipped"] and answer.unknown == 1
        assert dataclasses.replace(answer, notes=[], unknown=0) == expected  # which has no note
    [answer, empty, long] = r.recommend([[f"no{i}" for i in range(7)], [], ["9" * 1_000_000]])
    assert answer.notes[0] == "unknown: 'no0', 'no1', 'no2', 'no3', 'no4', ... (of 20 items); skipped"
    assert answer.notes[1] == "no item of the history is known: this is the answer for an empty history"
    assert dataclasses.replace(answer, notes=[], unknown=0) == empty
    assert long.notes[0].startswith("unknown: '99999") and len(long.notes[0]) < 200


@pytest.mark.parametrize("item", [True, np.bool_(True), np.float32(3), None, b"3", [3]], ids=repr)
def test_a_value_that_is_no_string_and_no_whole_number_is_refused(r, item):
    for ask in (lambda: r.recommend([[1, item]]), lambda: r.filter([2, item]), lambda: r.step(r.start(), item)):
        with pytest.raises(InputError, match=r"item .* must be an id \(a string\) or a number from 1 to 20"):
            ask()


# ----------------------------------------------------------------------------------------------------------------- http


@pytest.fixture(scope="module")
def served_export(tmp_path_factory):
    return write_export(tmp_path_factory.mktemp("http") / "export", random_model((4, 12), num_items=N))


@pytest.fixture(scope="module")
def client(served_export):
    testclient = pytest.importorskip("fastapi.testclient", reason="the server needs the extra http")
    with testclient.TestClient(http.create_app(Recommender.from_pretrained(served_export))) as client:
        yield client


@pytest.mark.parametrize("history", [[], ["A3", 5]], ids=str)
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "exclude_history": False, "candidates": ["A1", "A3", "A9"]}])
def test_a_recommendation_is_that_of_the_recommender(client, served_export, history, options):
    [expected] = Recommender.from_pretrained(served_export).recommend([history], **options)
    answer = client.post("/recommend", json={"history": history} | options).raise_for_status().json()
    assert (answer["ids"], answer["titles"], answer["notes"]) == (expected.ids, expected.titles, expected.notes)
    assert answer["scores"] == pytest.approx(expected.scores, rel=1e-5)


def test_events_lead_to_a_state_and_similar_items_and_the_version_are_those_of_the_recommender(client, served_export):
    served, body = Recommender.from_pretrained(served_export), {}
    for item in ("A3", "A5"):
        body = client.post("/events", json={"item": item} | body).raise_for_status().json()
    assert State.from_bytes(base64.b64decode(body["state"])).items == (3, 5)
    assert client.post("/recommend", json=body).json()["ids"] == served.recommend([["A3", "A5"]])[0].ids
    answers = client.post("/similar", json={"items": ["A3", "A4"], "top_k": 2}).json()
    assert [answer["ids"] for answer in answers] == [answer.ids for answer in served.similar_items(["A3", "A4"], 2)]
    version = client.get("/version").json()
    assert version == version | {"model": served.model, "items": N, "status": "ok"} == client.get("/health").json()


def test_a_bad_request_is_refused_with_the_reason(client):
    for path, body, status, problem in (
        ("/recommend", {"history": "A3"}, 422, "valid list"),
        ("/recommend", {"history": [True]}, 422, "valid string"),
        ("/recommend", {"top_k": 1001}, 422, "less than or equal to 1000"),
        ("/recommend", {"history": ["A"] * 10_001}, 422, "at most 10000 items"),
        ("/recommend", {"topk": 3}, 422, "Extra inputs"),
        ("/recommend", {"top_k": True}, 422, "valid integer"),
        ("/recommend", {"top_k": math.nan, "history": [math.inf]}, 422, "valid integer"),
        ("/recommend", {"\ud800": 1}, 422, "unicode string"),
        ("/recommend", {"state": "é"}, 400, "not base64"),
        ("/recommend", {"state": "no base64"}, 400, "not base64"),
        ("/recommend", {"state": "AAAA"}, 400, "not a state of version 1"),
        ("/recommend", {"state": "AAAA", "history": ["A3"]}, 400, "a history or a state, not both"),
        ("/similar", {"items": ["no"]}, 400, "unknown: 'no'"),
        ("/events", {"item": "no"}, 400, "unknown: 'no' (of 20 items); the state is unchanged"),
        ("/recommend", {"history": ["A" * (1 << 20)]}, 413, "at most 1048576 bytes"),
        ("/nothing", {}, 404, "Not Found"),
    ):
        answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == status and problem in answer.text
    for body, headers in ((iter([b"{}"]), {}), (b"{}", {"Transfer-Encoding": "chunked", "Content-Length": "2"})):
        assert client.post("/recommend", content=body, headers=headers).status_code == 413  # without its length
    without = client.build_request("POST", "/reload")
    del without.headers["Content-Length"]  # as curl -X POST sends it: no body
    assert client.send(without).json()["reloaded"] is False


def test_metrics_count_requests_seconds_and_unknown_ids(client):
    def counts():
        lines = client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = counts()
    client.post("/recommend", json={"history": ["no", "A3", "nope"]})
    client.post("/recommend", json={"top_k": 0})
    client.post("/events", json={"item": "no"})
    change = {name: value - before.get(name, 0) for name, value in counts().items()}
    assert change["fmrlrec_unknown_ids_total"] == 3 and before["fmrlrec_items"] == N
    assert [change[f'fmrlrec_requests_total{{path="/recommend",status="{n}"}}'] for n in (200, 422)] == [1, 1]
    assert change['fmrlrec_request_seconds_count{path="/recommend"}'] == 2
    assert change['fmrlrec_request_seconds_bucket{path="/recommend",le="+Inf"}'] == 2


def test_a_replaced_export_is_served_after_reload(client, served_export):
    before = client.get("/version").json()["model"]
    assert client.post("/reload").json() == {"reloaded": False, "model": before}
    write_export(served_export, random_model((4, 12), num_items=N, seed=1), overwrite=True)
    state = client.post("/events", json={"item": "A3"}).json()["state"]
    answer = client.post("/reload").json()
    assert answer["reloaded"] and answer["model"] != before
    assert "encode the history again" in client.post("/recommend", json={"state": state}).json()["detail"]


def test_waiting_requests_are_answered_together_and_a_bad_one_fails_alone(served_export, monkeypatch):
    served, sizes = Recommender.from_pretrained(served_export), []
    recommend = served.recommend
    monkeypatch.setattr(served, "recommend", lambda asked, *rest: sizes.append(len(asked)) or recommend(asked, *rest))
    options = {"top_k": 3, "exclude_history": True, "candidates": None}
    some, kept = options | {"candidates": ["A1", "A2"]}, options | {"exclude_history": False}
    requests = [([1], options), ([2], options), ([3], options), ([1], some), ([2], some), ([1], kept)]
    requests.append(([None], options))

    async def ask():
        batcher = Batcher(served, Metrics())
        gone = asyncio.create_task(batcher.ask([4], options))
        asked = asyncio.gather(*(batcher.ask(*request) for request in requests), return_exceptions=True)
        await asyncio.sleep(0)
        gone.cancel()  # its client does not wait
        task = asyncio.create_task(batcher.run())
        answers = await asyncio.wait_for(asked, timeout=30)
        task.cancel()
        return answers

    *answers, refused = asyncio.run(ask())
    assert sizes == [5, 1, 1, 1, 1, 1, 2, 1]  # together, then each alone as one was refused, then others by options
    assert [answer.ids for answer in answers[:3]] == [recommend([[i]], 3)[0].ids for i in (1, 2, 3)]
    assert [answer.ids for answer in answers[3:]] == [["A2"], ["A1"], recommend([[1]], 3, False)[0].ids]
    assert isinstance(refused, InputError)


def test_a_port_that_is_taken_is_refused_with_another(client, served_export):
    refused = pytest.raises(InputError, match=r"--port \d+: cannot listen there.* give a free --port, such as 8000")
    with socket.create_server(("127.0.0.1", 0)) as taken, refused:
        http.main([str(served_export), "--port", str(taken.getsockname()[1])])


def test_without_fastapi_the_command_says_what_to_install(served_export, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(InputError, match=r"the server needs FastAPI and uvicorn .*pip install '.\[http\]'"):
        http.main([str(served_export)])
