"""The ONNX graphs of an export: in real arithmetic, for any number of users and items, weights beside them."""

import numpy as np
import onnx
import pytest

from serving.folder import GRAPHS, WEIGHTS
from tests.exported import one_of_each_kind


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One export of each kind of numbers: {"none": ..., "float16": ..., "int8": ...}."""
    return one_of_each_kind(tmp_path_factory.mktemp("one"))


def graphs_of(export):
    return {name: onnx.load(export.folder / name, load_external_data=False) for name in GRAPHS}


def of_initializers(model, external: bool):
    return [t for t in model.graph.initializer if (t.data_location == onnx.TensorProto.EXTERNAL) == external]


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_valid_onnx(one, kind, name):
    onnx.checker.check_model(str(one[kind].folder / name), full_check=True)


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_the_graphs_compute_in_real_numbers_of_at_most_32_bits(one, kind):
    allowed = {onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "INT64", "INT32", "INT8", "UINT8", "BOOL")}
    for model in graphs_of(one[kind]).values():
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        typed = [*graph.input, *graph.output, *graph.value_info]
        assert len(typed) > len(graph.node)
        types = {value.type.tensor_type.elem_type for value in typed} | {t.data_type for t in graph.initializer}
        assert types <= allowed


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_users_steps_and_items_are_free_in_every_graph(one, kind):
    table = {"table": [32, "N"], "table_scale": ["N"]} if kind == "int8" else {"table": ["N", 32]}
    ranks = {"bias": ["R", "N"], "k": [1]}
    best = {"scores": ["B", "K"], "items": ["B", "K"]}
    hidden = ["B", 2, 2, 32]
    expected = {
        "recommend.onnx": ({"history": ["B", "L"], **table, **ranks}, best),
        "step.onnx": ({"item": ["B"], "hidden": hidden, **table}, {"z": ["B", 32], "new_hidden": hidden}),
        "rank.onnx": ({"z": ["B", 32], **table, **ranks}, best),
    }
    for name, model in graphs_of(one[kind]).items():
        found = tuple(
            {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
            for values in (model.graph.input, model.graph.output)
        )
        assert found == expected[name]


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_every_weight_of_a_graph_lies_in_the_weights_file_once_and_no_copy_of_it_in_the_graph(one, kind):
    export = one[kind]
    stored = (export.folder / WEIGHTS).read_bytes()
    products = {n for n in export.weights if ".norm" not in n and not n.endswith("_log")}
    assert len(products) == 2 * 4 * (3 if kind == "int8" else 2)
    for name, model in graphs_of(export).items():
        external = of_initializers(model, external=True)
        assert {t.name for t in external} == (set() if name == "rank.onnx" else products)
        for tensor in external:
            at = {entry.key: entry.value for entry in tensor.external_data}
            assert at.keys() == {"location", "offset", "length"}
            assert at["location"] == WEIGHTS
            found = stored[int(at["offset"]) : int(at["offset"]) + int(at["length"])]
            weight = export.weights[tensor.name]
            assert found == weight.tobytes()
            assert tuple(tensor.dims) == weight.shape
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) == weight.dtype
        assert all(np.prod(t.dims) < 32 * 32 for t in of_initializers(model, external=False))


def test_in_eight_bits_every_matrix_is_multiplied_as_whole_numbers(one):
    products = {"recommend.onnx": 4 * 2 + 1, "step.onnx": 4 * 2, "rank.onnx": 1}
    for name, model in graphs_of(one["int8"]).items():
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("MatMulInteger") == products[name]
        assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(kinds)
    for name in ("lru.B", "lru.C", "ffn.expand", "ffn.reduce"):
        assert one["int8"].weights[f"blocks.0.{name}"].dtype == np.int8


def test_activations_are_small_enough_for_processors_that_add_products_in_16_bits(one):
    """2 * 127 (the largest activation after its zero point) * 127 (the largest weight) is below 2**15."""
    for model in graphs_of(one["int8"]).values():
        made = {node.output[0]: node for node in model.graph.node}
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in of_initializers(model, external=False)}
        for node in model.graph.node:
            if node.op_type == "MatMulInteger":
                shifted = made[made[node.input[0]].input[0]]
                assert shifted.op_type == "Add"
                assert constants[shifted.input[1]] == constants[node.input[2]] == 64
                assert 2 * (64 + 63) * 127 < 2**15
