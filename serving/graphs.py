"""Build the three ONNX graphs of an export: real arithmetic, any number of users, items and (up to max_len) steps.

recommend   history [B, L]                    -> scores [B, k], items [B, k], z [B, m]     encode, score, top-k
step        item [B], hidden [B, blocks, 2, m] -> z [B, m], new_hidden           one more event per user
rank        z [B, m]                          -> scores [B, k], items [B, k]     score, top-k

The catalogue is an input, so it can grow: `table` [N+1, m] float32, row 0 begins a sequence; or, with int8, `table`
[m, N+1] and `table_scale` [N+1]. `bias` [1 or B, N+1] is added to the scores: 0 for candidates, -inf for all other
items and for row 0. `k` [1]: how many items to return, best first; of equal scores the lower number comes first. A
history is item numbers (1-based), oldest first, left-padded with 0; all zeros: an empty history.

The graphs point into model.safetensors beside them for the weights. B users, L steps, m the size.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load

from model.base import increments
from serving.folder import GRAPHS, INDEX, WEIGHTS, Items, tensor_offsets
from serving.hub import GRAPH_OF_FILE, IDS, MODEL, Tensors
from serving.weights import STEPS

OPSET, IR_VERSION = 17, 8  # from 2022, so that old onnxruntimes can read them
EPSILON = 1e-5  # LayerNorm's default in torch

TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int8): TensorProto.INT8}


def build_graphs(
    weights: dict[str, np.ndarray],
    packed: bytes,
    sizes: tuple[int, ...],
    num_blocks: int,
    max_len: int,
    table_width: int | None = None,
) -> dict[str, bytes]:
    """Return file name -> ONNX bytes.

    packed: the bytes of model.safetensors, which holds `weights`. table_width: of the table that is ranked; None: m.
    """
    offsets = tensor_offsets(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    graphs = (
        Graph(weights, offsets, sizes).recommend(num_blocks, max_len),
        Graph(weights, offsets, sizes).step(num_blocks),
        Graph(weights, offsets, (table_width or sizes[-1],)).only_rank(),
    )
    return {name: graph.SerializeToString() for name, graph in zip(GRAPHS, graphs, strict=True)}


def build_scan(packed: bytes) -> bytes:
    """Return the graph of serving/index.py: z [2, m] -> items that can be among the best k, [n].

    packed: the bytes of index.safetensors; `codes` must be a weight, which onnxruntime lays out for fast products.
    z: the vector's two parts plus 64, uint8, worth `steps` [2, 1] each. `bias` [N+1] is added to the scores; `length`
    is |z|, `slack` is added to every bound.
    """
    offsets = tensor_offsets(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    graph = Graph(load(packed), offsets, ())
    codes, scale, bound = (graph.weight(name, INDEX) for name in ("codes", "scale", "bound"))
    products = graph.op("MatMulInteger", "z", codes, graph.constant(np.uint8(STEPS + 1)))
    parts = graph.op("Mul", graph.op("Cast", products, to=TensorProto.FLOAT), "steps")  # [2, N]
    total = graph.op("ReduceSum", parts, graph.constant([0]), keepdims=0)
    center = graph.op("Add", graph.op("Mul", total, scale), "bias")
    spread = graph.op("Add", graph.op("Mul", bound, "length"), "slack")
    best, _ = graph.op("TopK", graph.op("Sub", center, spread), "k", axis=-1, outputs=2)
    least = graph.op("Gather", best, graph.constant([-1]))
    upper = graph.op("Add", center, spread)
    allowed = graph.op("Greater", upper, graph.constant(np.finfo(np.float32).min))
    possible = graph.op("And", graph.op("GreaterOrEqual", upper, least), allowed)
    graph.op("Reshape", graph.op("NonZero", possible), graph.constant([-1]), output="items")
    inputs = [
        helper.make_tensor_value_info("z", TensorProto.UINT8, [2, graph.weights["codes"].shape[0]]),
        graph.floats("steps", [2, 1]),
        graph.floats("length", []),
        graph.floats("slack", []),
        graph.floats("bias", ["N"]),
        graph.integers("k", [1]),
    ]
    return graph.finished("scan", inputs, [graph.integers("items", ["n"])]).SerializeToString()


class Graph:
    """A graph under construction. Methods add nodes and return the names of their outputs."""

    def __init__(
        self, weights: dict[str, np.ndarray], offsets: dict[str, tuple[int, int]], sizes: tuple[int, ...]
    ) -> None:
        self.weights, self.offsets, self.sizes, self.m = weights, offsets, sizes, sizes[-1] if sizes else 0
        self.history = "history"  # the tensor [B, L] that the recurrence reads
        self.post_norm = "norm.weight" in weights
        self.int8 = any(value.dtype == np.int8 for value in weights.values())
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    # ------------------------------------------------------------------------------------------------- the graphs

    def recommend(self, num_blocks: int, max_len: int) -> onnx.ModelProto:
        self.op("Identity", self.encode("history", num_blocks, max_len), output="z")
        outputs = [*self.rank("z"), self.floats("z", ["B", self.m])]
        return self.model("recommend", [self.integers("history", ["B", "L"])], outputs)

    def encode(self, history: str, num_blocks: int, max_len: int) -> str:
        """Return the users' vectors z [B, m]."""
        self.history = history
        x = self.embed(history)  # [B L, m]
        batch_first = self.op("Concat", self.op("Shape", history), self.constant([-1]), axis=0)  # [B, L, -1]
        keep = self.carried()
        for i in range(num_blocks):
            name = f"blocks.{i}"
            u = self.linear(x if self.post_norm else self.norm(x, f"{name}.norm1"), f"{name}.lru.B")  # [B L, 2m]
            u = self.op("Mul", self.op("Reshape", u, batch_first), keep)  # [B, L, 2m]
            if i + 1 < num_blocks:
                h = self.op("Reshape", self.scan(u, name, max_len), self.constant([-1, 2 * self.m]))
            else:  # only the last step of the last block is needed
                h = self.final_state(u, name, max_len)
                x = self.op("Gather", self.op("Reshape", x, batch_first), self.constant(-1), axis=1)
            x = self.rest_of_block(x, h, name)
        return x

    def step(self, num_blocks: int) -> onnx.ModelProto:
        x, after = self.embed("item"), []
        for i in range(num_blocks):
            name, m = f"blocks.{i}", self.m
            before = self.op("Gather", "hidden", self.constant(i), axis=1)  # [B, 2, m]
            h_re, h_im = (self.op("Gather", before, self.constant(part), axis=1) for part in (0, 1))
            u = self.linear(x if self.post_norm else self.norm(x, f"{name}.norm1"), f"{name}.lru.B")
            re, im = self.times(h_re, h_im, *self.power(name, 1))
            h = self.op("Add", u, self.op("Concat", re, im, axis=-1))  # [B, 2m]
            after.append(self.op("Reshape", h, self.constant([-1, 1, 2, m])))
            x = self.rest_of_block(x, h, name)
        self.op("Identity", x, output="z")
        self.op("Concat", *after, axis=1, output="new_hidden")
        hidden = ["B", num_blocks, 2, self.m]
        return self.model(
            "step",
            [self.integers("item", ["B"]), self.floats("hidden", hidden)],
            [self.floats("z", ["B", self.m]), self.floats("new_hidden", hidden)],
            ranks=False,
        )

    def only_rank(self) -> onnx.ModelProto:
        return self.model("rank", [self.floats("z", ["B", self.m])], self.rank("z"))

    # -------------------------------------------------------------------------------------------------- the model

    def embed(self, items: str) -> str:
        """Return the first block's input [B L, m] float32."""
        x = self.rows(self.op("Reshape", items, self.constant([-1])))
        return self.norm(x, "norm") if self.post_norm else x

    def rows(self, flat: str) -> str:
        """Return rows of the item table [B L, m] float32."""
        if not self.int8:
            return self.op("Gather", "table", flat, axis=0)
        columns = self.op("Transpose", self.op("Gather", "table", flat, axis=1), perm=[1, 0])
        scale = self.op("Unsqueeze", self.op("Gather", "table_scale", flat), self.constant([1]))
        return self.op("Mul", self.op("Cast", columns, to=TensorProto.FLOAT), scale)

    def norm(self, x: str, name: str) -> str:
        """Apply one LayerNorm per increment: [..., m] -> [..., m]."""
        parts, outputs = increments(self.sizes), []
        pieces = [x]
        if len(parts) > 1:
            widths = self.constant([high - low for low, high in parts])
            pieces = self.op("Split", x, widths, axis=-1, outputs=len(parts))
        for (low, high), piece in zip(parts, pieces, strict=True):
            weight, bias = (self.weights[f"{name}.{p}"][low:high] for p in ("weight", "bias"))
            outputs.append(
                self.op("LayerNormalization", piece, self.constant(weight), self.constant(bias), epsilon=EPSILON)
            )
        return outputs[0] if len(outputs) == 1 else self.op("Concat", *outputs, axis=-1)

    def linear(self, x: str, name: str) -> str:
        """Return x W + b: [rows, inputs] -> [rows, outputs]."""
        if not self.int8:
            return self.op("Gemm", x, self.weight(name), self.weight(f"{name}_bias"))
        product, scale = self.integer_product(x, self.weight(name))
        wide = self.op("Mul", self.op("Mul", product, scale), self.weight(f"{name}.scale"))
        return self.op("Add", wide, self.weight(f"{name}_bias"))

    def integer_product(self, x: str, matrix: str) -> tuple[str, str]:
        """Multiply x [rows, inputs] float32 by an int8 matrix; return (product, scale of each row), to be multiplied.

        Each row is quantized by itself, so a user's scores do not depend on the rest of the batch.
        """
        largest = self.op("ReduceMax", self.op("Abs", x), axes=[-1], keepdims=1)
        scale = self.op(
            "Max", self.op("Div", largest, self.constant(np.float32(STEPS))), self.constant(np.float32(1e-30))
        )
        rounded = self.op("Round", self.op("Div", x, scale))
        q = self.op("Cast", self.op("Add", rounded, self.constant(np.float32(STEPS + 1))), to=TensorProto.UINT8)
        product = self.op("MatMulInteger", q, matrix, self.constant(np.uint8(STEPS + 1)))
        return self.op("Cast", product, to=TensorProto.FLOAT), scale

    def rest_of_block(self, x: str, h: str, name: str) -> str:
        """Return the block's output, as Block.after_lru: x [rows, m], h [rows, 2m] -> [rows, m]."""
        x = self.op("Add", x, self.linear(h, f"{name}.lru.C"))
        if not self.post_norm:
            return self.op("Add", x, self.feed_forward(self.norm(x, f"{name}.norm2"), name))
        x = self.norm(x, f"{name}.norm1")
        return self.norm(self.op("Add", x, self.feed_forward(x, name)), f"{name}.norm2")

    def feed_forward(self, x: str, name: str) -> str:
        """Return FFN(x): [rows, m] -> [rows, m]."""
        expanded = self.linear(x, f"{name}.ffn.expand")
        gate, value = self.op("Split", expanded, self.constant([self.m, self.m]), axis=-1, outputs=2)
        silu = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.linear(self.op("Mul", silu, value), f"{name}.ffn.reduce")

    # --------------------------------------------------------------------------------------------- the recurrence

    def carried(self) -> str:
        """Return the mask [B, L, 1]: 0 on padding, 1 on items and on the last step (also of an empty history)."""
        items = self.op("Cast", self.op("Greater", self.history, self.constant(0)), to=TensorProto.FLOAT)
        all_but_last = self.op("Slice", items, self.constant([0]), self.constant([-1]), self.constant([1]))
        last_kept = self.op("Pad", all_but_last, self.constant([0, 0, 0, 1]), self.constant(np.float32(1)))
        return self.op("Unsqueeze", last_kept, self.constant([2]))

    def scan(self, u: str, name: str, max_len: int) -> str:
        """Return h_t = u_t + λ h_{t-1} over [B, L, 2m], in ceil(log2(max_len)) steps as in model/lru.py."""
        re, im = self.op("Split", u, self.constant([self.m, self.m]), axis=-1, outputs=2)
        length = self.op("Gather", self.op("Shape", self.history), self.constant([1]))
        first, axis = self.constant([0]), self.constant([1])
        shift = 1
        while shift < max_len:
            # Shift right by padding and slicing: old onnxruntimes fail on short histories with negative pads.
            pads = self.constant([0, shift, 0, 0, 0, 0])
            past_re, past_im = (self.op("Slice", self.op("Pad", part, pads), first, length, axis) for part in (re, im))
            carried_re, carried_im = self.times(past_re, past_im, *self.power(name, shift))
            re, im = self.op("Add", re, carried_re), self.op("Add", im, carried_im)
            shift *= 2
        return self.op("Concat", re, im, axis=-1)

    def final_state(self, u: str, name: str, max_len: int) -> str:
        """Return h at the last step, Σ_t λ^(L-1-t) u_t: [B, L, 2m] -> [B, 2m]."""
        powers = [self.eigenvalue(name) ** n for n in range(max_len - 1, -1, -1)]
        length = self.op("Gather", self.op("Shape", self.history), self.constant([1]))
        start = self.op("Sub", self.constant([max_len]), length)
        end = self.constant([max_len])
        power_re, power_im = (
            self.op("Slice", self.constant(np.stack(part).astype(np.float32)), start, end)
            for part in ([p.real for p in powers], [p.imag for p in powers])
        )
        re, im = self.op("Split", u, self.constant([self.m, self.m]), axis=-1, outputs=2)
        parts = self.times(re, im, power_re, power_im)
        sums = [self.op("ReduceSum", part, self.constant([1]), keepdims=0) for part in parts]
        return self.op("Concat", *sums, axis=-1)

    def times(self, a_re: str, a_im: str, b_re: str, b_im: str) -> tuple[str, str]:
        """Return the product of two complex numbers."""
        re = self.op("Sub", self.op("Mul", a_re, b_re), self.op("Mul", a_im, b_im))
        return re, self.op("Add", self.op("Mul", a_re, b_im), self.op("Mul", a_im, b_re))

    def eigenvalue(self, name: str) -> np.ndarray:
        """Return λ [m], complex128."""
        nu, theta = (np.exp(self.weights[f"{name}.lru.{p}"].astype(np.float64)) for p in ("nu_log", "theta_log"))
        return np.exp(-nu + 1j * theta)

    def power(self, name: str, exponent: int) -> tuple[str, str]:
        """Return λ^exponent as constants (re, im), each [m]."""
        value = self.eigenvalue(name) ** exponent
        return self.constant(value.real.astype(np.float32)), self.constant(value.imag.astype(np.float32))

    # ------------------------------------------------------------------------------------------------ the ranking

    def rank(self, z: str) -> list[onnx.ValueInfoProto]:
        """Rank the table for z [B, m]; return the graph's outputs scores and items [B, K]."""
        if self.int8:
            product, scale = self.integer_product(z, "table")
            scores = self.op("Add", self.op("Mul", product, "table_scale"), "bias")
            best, items = self.op("TopK", scores, "k", axis=-1, outputs=2)
            self.op("Mul", best, scale, output="scores")  # scale > 0 keeps the order
        else:
            scores = self.op("Add", self.op("Gemm", z, "table", transB=1), "bias")
            best, items = self.op("TopK", scores, "k", axis=-1, outputs=2)
            self.op("Identity", best, output="scores")
        self.op("Identity", items, output="items")
        return [self.floats("scores", ["B", "K"]), self.integers("items", ["B", "K"])]

    # ------------------------------------------------------------------------------------------------ ONNX helpers

    def op(self, kind: str, *inputs: str, outputs: int = 1, output: str = "", **attributes: Any) -> Any:
        """Add a node; return its output's name, or a list of names if outputs > 1."""
        names = [output or f"{kind}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, value: Any) -> str:
        """Add a small constant, stored in the graph itself."""
        array = np.asarray(value)
        name = f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if array.size > 4:
            name = f"constant_{len(self.initializers)}"
        self.initializers.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, file: str = WEIGHTS) -> str:
        """Add a weight that stays in its file."""
        value, (offset, length) = self.weights[name], self.offsets[name]
        tensor = TensorProto(name=name, data_type=TYPES[value.dtype], dims=value.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in {"location": file, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(entry))
        self.initializers[name] = tensor
        return name

    @staticmethod
    def floats(name: str, shape: list) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    @staticmethod
    def integers(name: str, shape: list) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.INT64, shape)

    def model(self, name: str, inputs: list, outputs: list, ranks: bool = True) -> onnx.ModelProto:
        table = (
            [helper.make_tensor_value_info("table", TensorProto.INT8, [self.m, "N"]), self.floats("table_scale", ["N"])]
            if self.int8
            else [self.floats("table", ["N", self.m])]
        )
        ranking = [self.floats("bias", ["R", "N"]), self.integers("k", [1])] if ranks else []
        return self.finished(name, [*inputs, *table, *ranking], outputs)

    def finished(self, name: str, inputs: list, outputs: list) -> onnx.ModelProto:
        """Return the graph with these inputs and outputs as a model."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        model.producer_name = "fmrlrec"
        return model


# ------------------------------------------------------------------------------------------------------------ onnx file
# Build recommend.onnx: one file that recommends, for any runtime of ONNX. Weights and item table are inside.
#
#     history [B, L] int64          item numbers 1 to N, oldest first; 0 and unknown numbers are skipped, on either side
#     exclude_history [1] bool      never recommend items of the history
#     k [1] int64 = 10              how many items to return
#     allowed [1|B, 1|N] bool = 1   the items 1 to N that may be recommended
#     boost [1|B, 1|N] float = 0    numbers added to the scores of items 1 to N
#
#     items [B, K] int64            the best items, best first; 0 where fewer than k are allowed
#     scores [B, K] float           their scores, -inf where the item is 0
#     user [B, m] float             the users' vectors; a score is such a vector times an item's
#
# Inputs with a default are initializers that may be overridden; onnxruntime's JavaScript packages cannot set them. The
# last max_len items of a history are encoded, all are excluded. Weights stored in float16 or int8 are converted to
# float32 when the file is loaded; activations are not quantized.
#
# B users, L items of a history, N items of the catalogue, m the size.

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
