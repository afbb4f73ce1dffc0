"""Build recommend.onnx: one file that recommends, for any runtime of ONNX. Weights and item table are inside.

    history [B, L] int64          item numbers 1 to N, oldest first; 0 and unknown numbers are skipped, on either side
    exclude_history [1] bool      never recommend items of the history
    k [1] int64 = 10              how many items to return
    allowed [1|B, 1|N] bool = 1   the items 1 to N that may be recommended
    boost [1|B, 1|N] float = 0    numbers added to the scores of items 1 to N

    items [B, K] int64            the best items, best first; 0 where fewer than k are allowed
    scores [B, K] float           their scores, -inf where the item is 0
    user [B, m] float             the users' vectors; a score is such a vector times an item's

Inputs with a default are initializers that may be overridden; onnxruntime's JavaScript packages cannot set them. The
last max_len items of a history are encoded, all are excluded. Weights stored in float16 or int8 are converted to
float32 when the file is loaded; activations are not quantized.

B users, L items of a history, N items of the catalogue, m the size.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serving.card import GRAPH_OF_FILE, IDS, MODEL, Tensors
from serving.graphs import IR_VERSION, OPSET, Graph
from serving.items import Items

ORT_MODEL = "recommend.ort"
DEFAULT_K = 10
END = np.iinfo(np.int64).max  # slices to the end of an axis


def build_files(
    weights: dict[str, np.ndarray], table: np.ndarray, scale: np.ndarray | None, items: Items, config: dict[str, Any]
) -> dict[str, bytes]:
    """Return file name -> bytes of an export in one file: recommend.onnx, recommend.ort and items.json."""
    model = build_onnx_file(weights, table, scale, config)
    return {MODEL: model, ORT_MODEL: build_ort_file(model), IDS: pack_ids(items)}


def build_onnx_file(
    weights: dict[str, np.ndarray], table: np.ndarray, scale: np.ndarray | None, config: dict[str, Any]
) -> bytes:
    """Return the bytes of recommend.onnx, checked by onnx.

    table: [N+1, m] float32, float16, or int8 with `scale` [N+1]. config: of the export (serving/folder.py).
    """
    stored = {**weights, "table": table} | ({} if scale is None else {"table.scale": scale})
    model = _OneFile(stored, tuple(config["sizes"])).one_file(config)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def build_ort_file(model: bytes) -> bytes:
    """Return recommend.ort: the model in the format of onnxruntime's small builds.

    Graph optimizations are off; they would store the table in float32.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # no warnings about inputs with defaults
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, ORT_MODEL))
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return Path(folder, ORT_MODEL).read_bytes()


def pack_ids(items: Items) -> bytes:
    """Return the bytes of items.json: ids and titles of items 1 to N."""
    numbers = range(1, len(items) + 1)
    content = {"ids": [items.id(i) for i in numbers], "titles": [items.title(i) for i in numbers]}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


class _OneFile(Graph):
    """The graph of recommend.onnx. All arithmetic is in float32."""

    def __init__(self, weights: dict[str, np.ndarray], sizes: tuple[int, ...]) -> None:
        super().__init__(weights, {}, sizes)
        self.int8 = False  # no integer products

    def one_file(self, config: dict[str, Any]) -> onnx.ModelProto:
        history = self.cleaned(config["num_items"])
        newest = self.op(
            "Slice", history, self.constant([-config["max_len"]]), self.constant([END]), self.constant([1])
        )
        z = self.op("Identity", self.encode(newest, config["num_blocks"], config["max_len"]), output="user")
        excluded = self.op("Mul", history, self.op("Cast", "exclude_history", to=TensorProto.INT64))
        self.best_items(z, excluded, config["num_items"], history, config.get("history_bias", 0.0))
        return self.described(config)

    def cleaned(self, num_items: int) -> str:
        """Return histories [B, L+1] without unknown items, left-padded with 0; at least one 0 is in front."""
        known = self.op(
            "And",
            self.op("Greater", "history", self.constant(0)),
            self.op("LessOrEqual", "history", self.constant(num_items)),
        )
        items = self.op("Mul", "history", self.op("Cast", known, to=TensorProto.INT64))
        items = self.op("Pad", items, self.constant([0, 1, 0, 0]), self.constant(0))
        length = self.op("Gather", self.op("Shape", items), self.constant([1]))
        positions = self.op("Range", self.constant(0), self.op("Squeeze", length), self.constant(1))
        filled = self.op("Cast", self.op("Greater", items, self.constant(0)), to=TensorProto.INT64)
        # Sort by position, with 0 for what was skipped.
        _, order = self.op("TopK", self.op("Mul", filled, positions), length, axis=1, largest=0, sorted=1, outputs=2)
        return self.op("GatherElements", items, order, axis=1)

    def best_items(self, z: str, excluded: str, num_items: int, history: str, history_bias: float) -> None:
        """Rank items 1 to N for z [B, m]. excluded, history: item numbers [B, any], 0 for none."""
        minus_inf = self.constant(np.float32(-np.inf))
        scores = self.op("Gemm", z, self.in_float32("table"), transB=1)  # [B, N+1]
        if "table.scale" in self.weights:
            scores = self.op("Mul", scores, self.in_float32("table.scale"))
        if history_bias:  # an item that occurs twice is written twice, with the same score
            own = self.op("GatherElements", scores, history, axis=1)
            own = self.op("Add", own, self.constant(np.float32(history_bias)))
            scores = self.op("ScatterElements", scores, history, own, axis=1)
        blocked = self.op("Expand", minus_inf, self.op("Shape", excluded))
        scores = self.op("ScatterElements", scores, excluded, blocked, axis=1)
        scores = self.op("Slice", scores, self.constant([1]), self.constant([END]), self.constant([1]))  # [B, N]
        scores = self.op("Where", "allowed", self.op("Add", scores, "boost"), minus_inf)
        k = self.op("Min", "k", self.constant([num_items]))
        best, columns = self.op("TopK", scores, k, axis=1, outputs=2)
        self.op("Identity", best, output="scores")
        found = self.op("Greater", best, minus_inf)
        self.op("Where", found, self.op("Add", columns, self.constant(1)), self.constant(0), output="items")

    def rows(self, flat: str) -> str:
        """Return rows of the item table [B L, m] float32."""
        rows = self.op("Cast", self.op("Gather", self.stored("table"), flat, axis=0), to=TensorProto.FLOAT)
        if "table.scale" not in self.weights:
            return rows
        scales = self.op("Gather", self.stored("table.scale"), flat, axis=0)
        return self.op("Mul", rows, self.op("Unsqueeze", scales, self.constant([1])))

    def weight(self, name: str, file: str = "") -> str:
        """Add a block's weight; return it in float32."""
        if f"{name}.scale" not in self.weights:
            return self.in_float32(name)
        return self.op("Mul", self.in_float32(name), self.in_float32(f"{name}.scale"))

    def in_float32(self, name: str) -> str:
        """Add a weight; return it in float32. onnxruntime converts it once, when it loads the file."""
        name, is_float = self.stored(name), self.weights[name].dtype == np.float32
        return name if is_float else self.op("Cast", name, to=TensorProto.FLOAT)

    def stored(self, name: str) -> str:
        """Add a weight as it is stored."""
        self.initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(self.weights[name]), name))
        return name

    def described(self, config: dict[str, Any]) -> onnx.ModelProto:
        """Return the model with its inputs, defaults, outputs, documentation and metadata."""
        defaults = {
            "k": np.array([DEFAULT_K]),
            "allowed": np.ones((1, 1), dtype=bool),
            "boost": np.zeros((1, 1), dtype=np.float32),
        }
        self.initializers |= {name: numpy_helper.from_array(value, name) for name, value in defaults.items()}
        shapes: dict[str, list] = {"[1]": [1], "[B, m]": ["B", self.m], "[1 or B, 1 or N]": [None, None]}
        types = {"int64": TensorProto.INT64, "bool": TensorProto.BOOL, "float32": TensorProto.FLOAT}

        def values(tensors: Tensors) -> list[onnx.ValueInfoProto]:
            found = []
            for name, (text, meaning) in tensors.items():
                shape, _, dtype = text.rpartition(" ")
                dims = shapes.get(shape) or shape.strip("[]").split(", ")
                found.append(helper.make_tensor_value_info(name, types[dtype], dims, doc_string=meaning))
            return found

        inputs, outputs = map(values, GRAPH_OF_FILE)
        graph = helper.make_graph(self.nodes, "recommend", inputs, outputs, list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "fmrlrec"
        model.doc_string = model.graph.doc_string = (
            f"Ranks {config['num_items']} items of {config['dataset']['code']} after a history. Size {self.m}."
        )
        metadata = {
            "dataset": config["dataset"]["code"],
            "dataset_digest": config["dataset"]["digest"],
            "size": self.m,
            "num_items": config["num_items"],
            "max_len": config["max_len"],
            "quantize": config["quantize"],
            "items_file": IDS,
            "run": config["run"],
            "commit": config["commit"] or "",
            "metrics": json.dumps(config["metrics"] or {}),
        }
        helper.set_model_props(model, {name: str(value) for name, value in metadata.items()})
        return model
