"""The ONNX graphs of an export: real arithmetic, any number of users and items, weights beside them."""

import numpy as np
import onnx
import pytest

from serving.folder import GRAPHS, WEIGHTS
from tests.exported import one_of_each_kind


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One export of each storage: {"none": ..., "float16": ..., "int8": ...}."""
    return one_of_each_kind(tmp_path_factory.mktemp("one"))


@pytest.fixture(params=["none", "int8"])
def export(request, one):
    return one[request.param]


def graphs_of(export):
    return {name: onnx.load(export.folder / name, load_external_data=False) for name in GRAPHS}


def initializers(model, external: bool):
    return [t for t in model.graph.initializer if (t.data_location == onnx.TensorProto.EXTERNAL) == external]


def test_the_graphs_are_valid_and_compute_in_real_numbers_of_at_most_32_bits(export):
    allowed = {onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "INT64", "INT32", "INT8", "UINT8", "BOOL")}
    for name, model in graphs_of(export).items():
        onnx.checker.check_model(str(export.folder / name), full_check=True)
        graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        typed = [*graph.input, *graph.output, *graph.value_info]
        assert len(typed) > len(graph.node)
        types = {value.type.tensor_type.elem_type for value in typed} | {t.data_type for t in graph.initializer}
        assert types <= allowed


def test_users_steps_and_items_are_free_in_every_graph(export):
    int8 = export.config["quantize"] == "int8"
    table = {"table": [32, "N"], "table_scale": ["N"]} if int8 else {"table": ["N", 32]}
    ranks = {"bias": ["R", "N"], "k": [1]}
    best = {"scores": ["B", "K"], "items": ["B", "K"]}
    hidden = ["B", 2, 2, 32]
    expected = {
        "recommend.onnx": ({"history": ["B", "L"], **table, **ranks}, best),
        "step.onnx": ({"item": ["B"], "hidden": hidden, **table}, {"z": ["B", 32], "new_hidden": hidden}),
        "rank.onnx": ({"z": ["B", 32], **table, **ranks}, best),
    }
    for name, model in graphs_of(export).items():
        found = tuple(
            {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
            for values in (model.graph.input, model.graph.output)
        )
        assert found == expected[name]


def test_the_graphs_point_to_every_weight_in_the_weights_file_and_hold_no_copy(export):
    stored = (export.folder / WEIGHTS).read_bytes()
    products = {n for n in export.weights if ".norm" not in n and not n.endswith("_log")}
    for name, model in graphs_of(export).items():
        external = initializers(model, external=True)
        assert {t.name for t in external} == (set() if name == "rank.onnx" else products)
        for tensor in external:
            at = {entry.key: entry.value for entry in tensor.external_data}
            assert at.keys() == {"location", "offset", "length"} and at["location"] == WEIGHTS
            found = stored[int(at["offset"]) : int(at["offset"]) + int(at["length"])]
            weight = export.weights[tensor.name]
            assert found == weight.tobytes() and tuple(tensor.dims) == weight.shape
            assert onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type) == weight.dtype
        assert all(np.prod(t.dims) < 32 * 32 for t in initializers(model, external=False))


def test_with_int8_every_matrix_product_is_an_integer_product_that_cannot_overflow_16_bits(one):
    """2 * 127 (largest activation plus its zero point) * 127 (largest weight) < 2**15."""
    products = {"recommend.onnx": 4 * 2 + 1, "step.onnx": 4 * 2, "rank.onnx": 1}
    for name, model in graphs_of(one["int8"]).items():
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("MatMulInteger") == products[name]
        assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(kinds)
        made = {node.output[0]: node for node in model.graph.node}
        constants = {t.name: onnx.numpy_helper.to_array(t) for t in initializers(model, external=False)}
        for node in (node for node in model.graph.node if node.op_type == "MatMulInteger"):
            shifted = made[made[node.input[0]].input[0]]
            assert shifted.op_type == "Add"
            assert constants[shifted.input[1]] == constants[node.input[2]] == 64
            assert 2 * (64 + 63) * 127 < 2**15
