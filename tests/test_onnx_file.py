"""--format onnx-file: one file that plain onnxruntime runs, with the Recommender's answers, and the model card."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from common.errors import InputError
from serving import Recommender
from serving.card import graphs_of_folder
from serving.folder import GRAPHS, read_folder
from tests.exported import write_export
from tests.made_up import NEAR_1, random_model

NODE_MODULES = Path(__file__).parents[1] / "serving/page/node_modules"
ITEMS, MAX_LEN = 60, 7
KINDS = ("none", "float16", "int8")


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


@pytest.fixture(scope="module")
def session(exports):
    return open_session(exports["none", "onnx-file"] / "recommend.onnx")


def run(session, histories, exclude=True, **inputs):
    named = {"history": np.array(histories, dtype=np.int64), "exclude_history": np.array([exclude]), **inputs}
    return session.run(None, named)


@pytest.mark.parametrize("file", ["recommend.onnx", "recommend.ort"])
@pytest.mark.parametrize("kind", KINDS)
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


def test_padding_on_either_side_and_unknown_numbers_change_nothing(session):
    rows = [[0, 0, 3, 5, 9], [3, 5, 9, 0, 0], [3, 0, ITEMS + 1, 5, 9], [3, 5, -1, 0, 9]]
    for found, expected in zip(run(session, rows), run(session, [[3, 5, 9]]), strict=True):
        np.testing.assert_allclose(found, np.repeat(expected, len(rows), axis=0), rtol=1e-5)
    assert run(session, [[0, ITEMS + 1]])[0].tolist() == run(session, np.zeros((1, 0)))[0].tolist()


def test_k_allowed_and_boost_may_be_given_and_items_that_are_not_left_are_0(session):
    allowed = np.zeros((1, ITEMS), dtype=bool)
    allowed[0, [3, 4, 8, 20]] = True
    items, scores, _ = run(session, [[5], [1]], allowed=allowed, k=np.array([5]))
    assert [set(row) for row in items.tolist()] == [{4, 9, 21, 0}, {4, 5, 9, 21, 0}]
    assert (items == 0).tolist() == np.isneginf(scores).tolist() == [[False] * 3 + [True] * 2, [False] * 4 + [True]]
    boost = np.zeros((2, ITEMS), dtype=np.float32)
    boost[1, 20] = 1e6
    assert [row[0] == 21 for row in run(session, [[5], [5]], boost=boost)[0]] == [False, True]
    assert run(session, [[5]], k=np.array([10 * ITEMS]))[0].shape == (1, ITEMS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_valid_holds_its_weights_as_stored_and_describes_itself(exports, kind):
    folder = exports[kind, "onnx-file"]
    onnx.checker.check_model(str(folder / "recommend.onnx"), full_check=True)
    model = onnx.load(folder / "recommend.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in tensors.values())
    stored = {"none": "FLOAT", "float16": "FLOAT16", "int8": "INT8"}[kind]
    assert tensors["table"].data_type == onnx.TensorProto.DataType.Value(stored)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert metadata["size"] == "32" and metadata["dataset"] == "made-up" and metadata["commit"] == config["commit"]
    assert len(json.loads((folder / metadata["items_file"]).read_text(encoding="utf-8"))["ids"]) == ITEMS
    assert model.doc_string and all(v.doc_string for v in [*model.graph.input, *model.graph.output])
    assert set(config["files"]) == {"recommend.onnx", "recommend.ort", "items.json"}
    with pytest.raises(InputError, match=r"one ONNX file for other runtimes.*--format torch or onnx"):
        read_folder(folder)


def blocks(folder, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (folder / "README.md").read_text("utf-8"), re.M | re.S)


def test_the_card_begins_with_the_hubs_front_matter_and_its_python_runs(exports, monkeypatch, capsys):
    front = (exports["float16", "onnx-file"] / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    for line in ("license: unknown", "library_name: fmrlrec", "- onnx", '- "made-up"', "- ndcg"):
        assert f"{line}\n" in front
    expected = Recommender.from_pretrained(exports["float16", "onnx"], "torch").recommend([[1, 2]])[0].ids
    for format in ("onnx-file", "onnx"):
        folder = exports["float16", format]
        monkeypatch.chdir(folder)
        exec(blocks(folder, "python")[0], {})
        assert capsys.readouterr().out.strip() == str(expected)


def test_the_cards_javascript_prints_what_python_does(exports, tmp_path):
    if not shutil.which("node") or not (NODE_MODULES / "onnxruntime-node").exists():
        pytest.skip("needs node and, in serving/page, npm install --ignore-scripts --no-save onnxruntime-node")
    folder = shutil.copytree(exports["none", "onnx-file"], tmp_path / "export")
    (folder / "node_modules").symlink_to(NODE_MODULES)
    (folder / "run.mjs").write_text(blocks(folder, "js")[0], encoding="utf-8")
    done = subprocess.run(["node", "run.mjs"], cwd=folder, capture_output=True, text=True, check=True)
    expected = Recommender.from_pretrained(exports["none", "onnx"], "torch").recommend([[1, 2]])[0].ids
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_the_card_lists_the_inputs_and_outputs_of_every_graph(exports, kind):
    described = graphs_of_folder(int8=kind == "int8")
    assert tuple(described) == GRAPHS
    for name, tensors in described.items():
        graph = onnx.load(exports[kind, "onnx"] / name, load_external_data=False).graph
        for values, documented in zip((graph.input, graph.output), tensors, strict=True):
            assert {v.name: len(v.type.tensor_type.shape.dim) for v in values} == {
                name: shape.partition("]")[0].count(",") + 1 for name, (shape, _) in documented.items()
            }
    text = (exports[kind, "onnx"] / "README.md").read_text(encoding="utf-8")
    assert all(f"\n`{name}`, " in text for name in GRAPHS)
