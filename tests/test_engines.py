"""The torch and onnx engines of an export, against the model that it was sliced from."""

import json
import re
import shutil
import subprocess
import sys
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
from model.registry import build_model
from serving import Recommender, export, torch_engine
from serving.engines import OnnxEngine, Table, open_engine
from serving.export import check_baseline_flags, export_baseline
from serving.folder import GRAPHS, read_folder, write_folder
from serving.hub import graphs_of_folder
from serving.states import State
from serving.torch_engine import TorchEngine
from serving.weights import BASELINES, dequantize
from tests.made_up import KINDS, NEAR_1, everything, made_up_catalog, random_model, with_random_weights, write_export
from trainer.checkpoint import RunItems

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
    """(model, max_len, export in float32)."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    sizes, num_blocks, max_len, options = request.param
    model = random_model(sizes, num_blocks, ring=NEAR_1, **options)
    return model, max_len, read_folder(write_export(folder, model, max_len=max_len))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Exports of one model in two storages: {"none": ..., "int8": ...}."""
    folder, model = tmp_path_factory.mktemp("one"), random_model((8, 16, 32), num_items=NUM_ITEMS, ring=NEAR_1)
    kinds = ("none", "int8")
    return {kind: read_folder(write_export(folder / kind, model, max_len=20, quantize=kind)) for kind in kinds}


def exported_baseline(folder, name):
    """Return (a baseline of random weights, its Recommender)."""
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
    """Return (bias, k) that rank every item."""
    bias = np.full((1, table.width), -np.inf, dtype=np.float32)
    bias[0, 1 : len(table)] = 0
    return bias, len(table) - 1


def ranking(engine, export, history) -> np.ndarray:
    """Return the scores of all items in numerical order [B, N]; check that they came sorted, and every item once."""
    table = engine.table(export)
    return by_item(engine.recommend(history.copy(), table, *all_items(table)))


def by_item(ranked) -> np.ndarray:
    scores, items = map(np.asarray, ranked)
    assert (np.sort(items, axis=1) == np.arange(1, items.shape[1] + 1)).all()
    assert (np.diff(scores, axis=1) <= 0).all()
    return np.take_along_axis(scores, np.argsort(items, axis=1), axis=1)


def assert_close(actual, expected, tolerance=1e-5):
    """Equal up to `tolerance` times the largest expected value."""
    actual, expected = map(np.asarray, (actual, expected))
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


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
    assert_close(ranking(engine, export, history), np.stack(expected))
    table, hidden = engine.table(export), np.zeros((1, export.config["num_blocks"], 2, model.sizes[-1]), np.float32)
    for item in history[-1]:
        z, hidden = engine.step(np.array([item]), hidden, table)
    assert_close(by_item(engine.rank(z, table, *all_items(table))), expected[-1:])


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_a_user_alone_is_answered_to_the_last_bit_as_in_a_batch_however_padded(one, engine, kind):
    export, lengths = one[kind], [*range(21), 20, 3, 12]
    engine, history = open_engine(export, engine, threads=1), histories_of(lengths, 20)
    together = ranking(engine, export, history)
    for row, length in enumerate(lengths):
        for padded in {max(length, 1), min(length + 2, 20), 20}:
            alone = ranking(engine, export, history[row : row + 1, -padded:])
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
    expected = ranking(engine, export, history)
    for name in GRAPHS:
        onnx.checker.check_model(str(export.folder / name), full_check=True)
        graph = onnx.load(export.folder / name, load_external_data=False).graph
        assert all(t.data_location for t in graph.initializer if np.prod(t.dims) >= 32 * 32)  # 1: in another file
    engine._recommend = open_session(export.folder / "recommend.onnx")  # without those that the engine gives
    np.testing.assert_array_equal(ranking(engine, export, history), expected)


# A weight is off by at most half of 1/127 of its column's largest, an activation by half of 1/63 of its row's: 0.5 %
# and 1 % of a product. A score after 3 blocks sums 13: 4 % of their spread, and the largest is 2 to 4 times the spread.
BOUNDS = {"onnx": (0.02, 0.08), "torch": (0.005, 0.02)}  # (rms, largest) error / largest score


def test_int8_scores_are_close_to_float32_scores(tmp_path, engine):
    model = random_model((8, 16, 32), 3, num_items=100, ring=NEAR_1)
    history, scores = histories_of(range(51), 50, num_items=100), []
    for kind, name in (("none", "torch"), ("int8", engine)):
        export = read_folder(write_export(tmp_path / kind, model, max_len=50, quantize=kind))
        scores.append(ranking(open_engine(export, name, threads=1), export, history))
    error = (scores[1] - scores[0]) / np.abs(scores[0]).max()
    rms, largest = BOUNDS[engine]
    assert 0 < np.sqrt((error**2).mean()) <= rms and np.abs(error).max() <= largest


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
    for history in ([], [3], [9, 3, 9, 30, 1], [4, 2, 30, 7, 7, 1, 29]):
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
    flags = export.arguments_parser().parse_args(["--size", "4"])
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
    """(storage, format) -> an export of one model."""
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
