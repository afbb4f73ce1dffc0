"""The engines that run an export, torch and onnxruntime, against the model that it was cut out of."""

import random
import sys

import numpy as np
import pytest
import torch

from common.errors import InputError
from model import slice_model
from model.lru import LRU
from serving import engines
from serving.engines import OnnxEngine, Table, TorchEngine, open_engine
from serving.folder import read_folder
from serving.quantize import dequantize, quantize
from tests.exported import one_of_each_kind, write_export
from tests.made_up import NEAR_1, random_model

NUM_ITEMS = 30
ENGINES = ("torch", "onnx")


def random_sizes(seed: int) -> tuple[int, ...]:
    """One to four sizes, the widths between them from 1 on."""
    generator = random.Random(seed)
    return tuple(sorted(generator.sample(range(1, 41), k=1 + seed % 4)))


# Sizes, blocks, max_len: every number of blocks with every length, and size lists of every length.
SHAPES = [
    (random_sizes(seed), num_blocks, max_len)
    for seed, (num_blocks, max_len) in enumerate((n, length) for n in (1, 2, 3) for length in (1, 2, 7, 50))
]


def model_of(shape, **options):
    """A model that forgets slowly; some LRUs have no bias, some models have post-norm."""
    sizes, num_blocks, max_len = shape
    kind = {"use_bias": max_len != 2, "post_norm": max_len in (2, 50)}
    return random_model(sizes, num_blocks, **kind, ring=NEAR_1, seed=sum(sizes), **options)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]},{shape[2]}".replace(" ", ""))
def exported(request, tmp_path_factory):
    """(model, max_len, export in float32)."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    model, max_len = model_of(request.param), request.param[2]
    return model, max_len, read_folder(write_export(folder, model, max_len=max_len))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One export of each kind of numbers: {"none": ..., "float16": ..., "int8": ...}."""
    return one_of_each_kind(tmp_path_factory.mktemp("one"))


def open_both(export):
    return [open_engine(export, name, threads=1) for name in ENGINES]


def histories_of(lengths, longest, num_items=NUM_ITEMS, seed=0) -> np.ndarray:
    """Random histories of these lengths, zeros in front: [B, longest]."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(1, num_items + 1, size=length) for length in lengths]
    return np.stack([np.concatenate([np.zeros(longest - len(row), dtype=np.int64), row]) for row in rows])


def all_items(table: Table) -> tuple[np.ndarray, int]:
    """(bias, k) that rank every item."""
    bias = np.zeros((1, len(table)), dtype=np.float32)
    bias[0, 0] = -np.inf
    return bias, len(table) - 1


def ranking(engine, export, history) -> np.ndarray:
    """The scores of all items in numerical order, [B, N]; checks that they came sorted, and every item once."""
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


# ---------------------------------------------------------------------------------------------------- event by event


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_over_a_history_end_where_encoding_the_whole_of_it_does(shape):
    model, length, users = model_of(shape).double(), max(shape[2], 3), 4
    items = torch.from_numpy(histories_of([length] * users, length))
    table = model.item_table()
    position = torch.arange(length).repeat(users)
    expected = model.encode(table[items.flatten()], position, length).view(users, length, -1)
    hidden = torch.zeros(users, shape[1], 2, shape[0][-1], dtype=torch.float64)
    for t in range(length):
        z, hidden = model.step(table[items[:, t]], hidden)
        assert_close(z.detach(), expected[:, t].detach(), tolerance=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_steps_of_the_lru_are_its_recurrence(bias):
    torch.manual_seed(0)
    layer = LRU((3, 8), bias, *NEAR_1)
    with torch.no_grad():
        for parameter in (layer.B_re, layer.B_im, layer.C_re, layer.C_im):
            parameter.uniform_(-1, 1)
    x = torch.randn(4, 50, 8)
    expected = layer(x.flatten(0, 1), torch.arange(50).repeat(4), 50).view(4, 50, 8)
    h = torch.zeros(4, 2, 8)
    for t in range(50):
        y, h = layer.step(x[:, t], h)
        assert_close(y.detach(), expected[:, t].detach())


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_steps_to_where_it_encodes_to(exported, name):
    _, max_len, export = exported
    engine = open_engine(export, name, threads=1)
    table, history = engine.table(export), histories_of([max_len] * 3, max_len)
    hidden = np.zeros((3, export.config["num_blocks"], 2, export.config["size"]), dtype=np.float32)
    for t in range(max_len):
        z, hidden = engine.step(history[:, t], hidden, table)
    stepped = by_item(engine.rank(z, table, *all_items(table)))
    assert_close(stepped, ranking(engine, export, history))


# ----------------------------------------------------------------------------------- the engines, and the model itself


def test_both_engines_rank_histories_of_every_length_in_one_batch_alike(exported):
    _, max_len, export = exported
    history = histories_of(range(max_len + 1), max_len)
    with_torch, with_onnx = (ranking(engine, export, history) for engine in open_both(export))
    assert_close(with_onnx, with_torch)


@pytest.mark.parametrize("name", ENGINES)
def test_an_export_scores_as_the_model_does(exported, name):
    model, max_len, export = exported
    lengths = range(max_len + 1)
    history = histories_of(lengths, max_len)
    expected = []
    with torch.no_grad():
        table = model.item_table()
        for row, length in zip(history, lengths, strict=True):
            tokens = torch.from_numpy(row[-max(length, 1) :])  # an empty history is token 0 alone
            z = model.encode(table[tokens], torch.arange(len(tokens)), len(tokens))
            expected.append((table @ z[-1])[1:].numpy())
    assert_close(ranking(open_engine(export, name, threads=1), export, history), np.stack(expected))


@pytest.mark.parametrize("name", ENGINES)
def test_an_export_of_any_size_scores_as_the_full_models_prefix(tmp_path, name):
    model = random_model((3, 8, 9, 20), num_blocks=2, ring=NEAR_1)
    history = histories_of([7, 7], 7)
    with torch.no_grad():
        table = model.item_table()
        z = model.encode(table[torch.from_numpy(history).flatten()], torch.arange(7).repeat(2), 7)[[6, 13]]
    z, table = z.numpy(), table.detach().numpy()
    for size in model.sizes:
        export = read_folder(write_export(tmp_path / str(size), model, size=size))
        expected = z[:, :size] @ table[1:, :size].T
        assert_close(ranking(open_engine(export, name, threads=1), export, history), expected)


def test_the_engines_make_the_same_steps(exported):
    _, _, export = exported
    rng = np.random.default_rng(0)
    item = np.array([0, 3, NUM_ITEMS, 3])
    hidden = rng.normal(size=(4, export.config["num_blocks"], 2, export.config["size"])).astype(np.float32)
    (z, after), (onnx_z, onnx_after) = (e.step(item, hidden.copy(), e.table(export)) for e in open_both(export))
    assert_close(onnx_z, z)
    assert_close(onnx_after, after)


def test_the_engines_rank_alike(exported):
    _, _, export = exported
    z = np.random.default_rng(0).normal(size=(3, export.config["size"])).astype(np.float32)
    with_torch, with_onnx = (by_item(e.rank(z, t := e.table(export), *all_items(t))) for e in open_both(export))
    assert_close(with_torch, z @ export.table[1:].T)
    assert_close(with_onnx, with_torch)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", ENGINES)
def test_the_k_best_are_the_head_of_the_whole_ranking(one, name, k):
    export = one["none"]
    engine = open_engine(export, name, threads=1)
    table, history = engine.table(export), histories_of([3, 0, 20], 20)
    bias, everything = all_items(table)
    whole = engine.recommend(history.copy(), table, bias, everything)
    best = engine.recommend(history.copy(), table, bias, k)
    np.testing.assert_array_equal(best[1], whole[1][:, :k])
    assert_close(best[0], whole[0][:, :k])


@pytest.mark.parametrize("name", ENGINES)
def test_each_user_may_have_other_candidates(one, name):
    export = one["none"]
    engine = open_engine(export, name, threads=1)
    table, history = engine.table(export), histories_of([4, 4], 4)
    bias = np.full((2, len(table)), -np.inf, dtype=np.float32)
    bias[0, [3, 8, 12]] = bias[1, [1, 2, 3]] = 0
    _, items = engine.recommend(history, table, bias, 3)
    assert np.sort(items, axis=1).tolist() == [[3, 8, 12], [1, 2, 3]]


# ------------------------------------------------------------------------------------- users do not see one another

# A batch's products may be summed in another order than one row's. In eight bits a difference in the last digit can
# move an activation to the next of its 127 steps, which is far below what a scale shared between users would do.
ALONE = {"none": 1e-5, "float16": 1e-5, "int8": 2e-3}


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_users_scores_do_not_depend_on_who_else_is_in_the_batch(one, name, kind):
    export = one[kind]
    engine = open_engine(export, name, threads=1)
    history = histories_of([20, 1, 0, 7, 20, 3, 12], 20)
    together = ranking(engine, export, history)
    for row in range(len(history)):
        assert_close(ranking(engine, export, history[row : row + 1]), together[row : row + 1], ALONE[kind])


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_users_scores_do_not_depend_on_how_much_filling_is_in_front(one, name, kind):
    export = one[kind]
    engine = open_engine(export, name, threads=1)
    for length in (0, 1, 2, 5):
        history = histories_of([length], 20)
        bare = ranking(engine, export, history[:, -max(length, 1) :])
        for filled in (max(length, 1) + 1, 9, 20):
            assert_close(ranking(engine, export, history[:, -filled:]), bare, ALONE[kind])


@pytest.mark.parametrize("kind", ["none", "int8"])
@pytest.mark.parametrize("name", ENGINES)
def test_a_user_of_large_numbers_costs_a_user_of_small_ones_no_precision(one, name, kind):
    export = one[kind]
    engine = open_engine(export, name, threads=1)
    table = engine.table(export)
    z = np.random.default_rng(0).normal(size=(2, export.config["size"])).astype(np.float32)
    alone = by_item(engine.rank(z[:1], table, *all_items(table)))
    together = by_item(engine.rank(z * np.float32([[1], [1e4]]), table, *all_items(table)))
    assert_close(together[:1], alone)


# ------------------------------------------------------------------------------------------------------- eight bits


def test_a_quantised_matrix_lies_within_half_a_step_of_what_it_stands_for():
    values = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32) * np.logspace(-3, 3, 9, dtype=np.float32)
    values[:, 2] = 0
    for axis in (0, 1):
        q, scale = quantize(values, axis)
        assert (q.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (values.shape[1 - axis],))
        half_a_step = np.abs(values).max(axis=axis, keepdims=True) / 127 / 2
        assert (np.abs(dequantize(q, scale, axis) - values) <= 1.001 * half_a_step).all()
        assert q.min() >= -127
        used = np.abs(q).max(axis=axis)
        assert set(used.tolist()) <= {0, 127}  # the largest of every row or column uses the whole range


def quantised_rank(z, q, scale):
    """The integer product in plain words: each user's vector in 127 steps, of which 63 are negative."""
    step = np.abs(z).max(axis=1, keepdims=True) / np.float32(63)
    rounded = np.rint(z / step).astype(np.int64)
    return (rounded @ q.astype(np.int64).T) * step * scale


def test_the_graphs_in_eight_bits_multiply_whole_numbers(one):
    export = one["int8"]
    engine = OnnxEngine(export, threads=1)
    table = engine.table(export)
    z = np.random.default_rng(0).normal(size=(5, export.config["size"])).astype(np.float32)
    expected = quantised_rank(z, export.table[1:], export.scale[1:])
    assert_close(by_item(engine.rank(z, table, *all_items(table))), expected, 1e-6)


def test_a_vector_of_zeros_scores_zero_in_eight_bits(one):
    engine = OnnxEngine(one["int8"], threads=1)
    table = engine.table(one["int8"])
    scores = by_item(engine.rank(np.zeros((1, 32), dtype=np.float32), table, *all_items(table)))
    assert not scores.any()


def test_the_torch_engine_reads_eight_bits_as_the_float32_they_stand_for(one):
    export = one["int8"]
    engine = TorchEngine(export)
    table = engine.table(export)
    np.testing.assert_array_equal(table.rows(), export.table * export.scale[:, None])
    z = np.random.default_rng(0).normal(size=(5, export.config["size"])).astype(np.float32)
    assert_close(by_item(engine.rank(z, table, *all_items(table))), z @ table.rows()[1:].T)


# In eight bits a weight is off by at most half a step of 1/127 of its column's largest, an activation by half a step of
# 1/63 of its row's largest. Relative to the row, that is about 0.5 % and 1 % of a product (uniform errors, 2 to 3 times
# the mean square as the largest of a few dozen). A score of 3 blocks has 13 such products behind it: 1.1 % * sqrt(13)
# = 4 % of the scores' spread, of which the largest score is 2 to 4 times: rms 2 %, and the worst of a few thousand
# scores 4 times that, relative to the largest score. The weights alone are half of one product's part: 0.5 % and 2 %.
BOUNDS = {"onnx": (0.02, 0.08), "torch": (0.005, 0.02)}  # (rms, largest) error / largest score


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
@pytest.mark.parametrize("name", ENGINES)
def test_scores_in_eight_bits_are_close_to_those_in_float32(tmp_path, name, num_blocks):
    model = random_model((8, 16, 32), num_blocks, num_items=100, ring=NEAR_1)
    history = histories_of(range(51), 50, num_items=100)
    exact, rounded = (
        ranking(engine, export, history)
        for kind, engine_name in (("none", "torch"), ("int8", name))
        for export in [read_folder(write_export(tmp_path / kind, model, max_len=50, quantize=kind))]
        for engine in [open_engine(export, engine_name, threads=1)]
    )
    error = (rounded - exact) / np.abs(exact).max()
    rms, largest = BOUNDS[name]
    assert 0 < np.sqrt((error**2).mean()) <= rms
    assert np.abs(error).max() <= largest


def test_the_float16_table_is_the_float32_one_rounded(one):
    assert one["float16"].table.dtype == np.float32
    np.testing.assert_array_equal(one["float16"].table, one["none"].table.astype(np.float16))


def test_a_step_in_eight_bits_is_close_to_the_one_in_float32(one):
    item = np.array([3, 0, 7])
    hidden = np.random.default_rng(0).normal(size=(3, 2, 2, 32)).astype(np.float32)
    (z, after), (z8, after8) = (
        engine.step(item, hidden, engine.table(export))
        for export, engine in ((one["none"], TorchEngine(one["none"])), (one["int8"], OnnxEngine(one["int8"], 1)))
    )
    assert_close(z8, z, 0.05)
    assert_close(after8, after, 0.05)


def test_numbers_too_small_for_a_scale_are_quantised_as_zeros():
    q, scale = quantize(np.array([[1e-44, -1e-40], [1e-37, 2e-37]], dtype=np.float32), axis=1)
    assert not q.any()
    assert scale.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_a_table_that_grew_is_the_table_of_all_the_rows(kind):
    rows = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)

    def table_of(rows):
        return Table(*quantize(rows, axis=1)) if kind == "int8" else Table(rows, None)

    whole, grown = table_of(rows), table_of(rows[:6]).extended(rows[6:])
    assert len(grown) == len(whole) == 9
    assert whole.inputs().keys() == grown.inputs().keys()
    for name, value in whole.inputs().items():
        np.testing.assert_array_equal(grown.inputs()[name], value)
        assert grown.inputs()[name].flags.c_contiguous
    np.testing.assert_array_equal(grown.rows(), whole.rows())


# ------------------------------------------------------------------------------------------------------- equal scores


@pytest.mark.parametrize(("name", "kind"), [("torch", "none"), ("onnx", "none"), ("onnx", "int8")])
def test_of_items_with_equal_embeddings_the_lower_number_comes_first(one, name, kind):
    """Of whole numbers, whose products are exact: a matrix product may sum its columns in different orders, and give
    equal columns sums that differ in the last digit."""
    export = one[kind]
    engine = open_engine(export, name, threads=1)
    rng = np.random.default_rng(0)
    distinct = rng.integers(-1, 2, size=(9, 32)).astype(np.float32)
    which = rng.integers(0, 9, size=300)
    grown, first = engine.table(export).extended(distinct[which]), NUM_ITEMS + 1
    bias = np.full((1, len(grown)), -np.inf, dtype=np.float32)
    bias[0, first:] = 0
    z = rng.integers(-63, 64, size=(7, 32)).astype(np.float32)
    for users in (z[:1], z):
        scores, items = engine.rank(users, grown, bias, 300)
        for row, of_row in zip(np.asarray(items), np.asarray(scores), strict=True):
            groups = which[row - first]
            for group in range(9):
                assert (np.diff(row[groups == group]) > 0).all()
                assert len(set(of_row[groups == group].tolist())) == 1


def whole_numbers(users, items, seed=0):
    """(z, table) whose scores are exact in float32, and many of them equal."""
    rng = np.random.default_rng(seed)
    z, table = (rng.integers(-1, 2, size=(rows, 32)).astype(np.float32) for rows in (users, items + 1))
    return z, table * (np.arange(32) < 4)


@pytest.mark.parametrize("chunk", [1, 3, 10, 64])
@pytest.mark.parametrize("k", [1, 2, 9, 10, 11, 25, 63])
def test_ranking_by_chunks_of_the_catalogue_is_a_stable_sort_of_all_of_it(one, monkeypatch, chunk, k):
    monkeypatch.setattr(engines, "RANKED", chunk)
    z, table = whole_numbers(users=5, items=63)
    bias = np.zeros((5, 64), dtype=np.float32)
    bias[:, 0] = -np.inf
    expected = np.argsort(-(z @ table.T + bias), axis=1, kind="stable")[:, :k]
    assert (np.diff(np.take_along_axis(z @ table.T, expected, axis=1), axis=1) == 0).any() or k == 1
    scores, items = TorchEngine(one["none"]).rank(z, Table(table, None), bias, k)
    np.testing.assert_array_equal(items, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(z @ table.T, expected, axis=1))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_ranking_by_chunks_leaves_out_what_is_no_candidate_even_where_a_chunk_has_none(one, monkeypatch, chunk):
    monkeypatch.setattr(engines, "RANKED", chunk)
    z, table = whole_numbers(users=2, items=20)
    bias = np.full((2, 21), -np.inf, dtype=np.float32)
    bias[0, [5, 6, 19]] = bias[1, [10, 12, 20]] = 0
    _, items = TorchEngine(one["none"]).rank(z, Table(table, None), bias, 3)
    assert np.sort(items, axis=1).tolist() == [[5, 6, 19], [10, 12, 20]]


@pytest.mark.parametrize("k", [1, 7, 25, 63])
def test_the_onnx_engine_ranks_as_a_stable_sort_too(one, k):
    z, table = whole_numbers(users=5, items=63)
    bias = np.zeros((5, 64), dtype=np.float32)
    bias[:, 0] = -np.inf
    expected = np.argsort(-(z @ table.T + bias), axis=1, kind="stable")[:, :k]
    _, items = OnnxEngine(one["none"], threads=1).rank(z, Table(table, None), bias, k)
    np.testing.assert_array_equal(items, expected)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("users", [1, 3, 64])
def test_identical_items_come_by_number_whoever_is_in_the_batch(one, name, users):
    rng = np.random.default_rng(0)
    kinds, kind = rng.normal(size=(50, 32)).astype(np.float32), rng.integers(0, 50, 12_102)
    z, table = rng.normal(size=(64, 32)).astype(np.float32), Table(kinds[kind], None)
    scores = (z.astype(np.float64) @ kinds.T)[:, kind]
    scores[:, 0] = -np.inf
    engine = open_engine(one["none"], name, threads=1)
    bias = all_items(table)[0]
    for start in range(0, 64, users):
        part = slice(start, start + users)
        _, items = engine.rank(z[part], table, bias, 20)
        np.testing.assert_array_equal(items, np.argsort(-scores[part], axis=1, kind="stable")[:, :20])


@pytest.mark.parametrize("name", ENGINES)
def test_a_user_alone_is_answered_to_the_last_bit_as_in_a_batch(one, name):
    engine, rng = open_engine(one["none"], name, threads=1), np.random.default_rng(0)
    table, history = engine.table(one["none"]), rng.integers(1, NUM_ITEMS + 1, (64, 20))
    for user, row in enumerate(history):
        row[: user % 21] = 0
    scores, items = engine.recommend(history, table, *all_items(table))
    for user, row in enumerate(history):
        alone = row[min(user % 21, 19) :]
        of_user, items_of_user = engine.recommend(alone[None], table, *all_items(table))
        np.testing.assert_array_equal(items_of_user[0], items[user])
        np.testing.assert_array_equal(of_user[0], scores[user])


def test_histories_and_states_that_are_given_are_not_written_to(one):
    for engine in open_both(one["none"]):
        table = engine.table(one["none"])
        history, item = histories_of([3, 0], 5), np.array([1, 2])
        z, hidden = np.ones((2, 32), dtype=np.float32), np.ones((2, 2, 2, 32), dtype=np.float32)
        before = [array.copy() for array in (history, item, z, hidden, table.values)]
        engine.recommend(history, table, *all_items(table))
        engine.step(item, hidden, table)
        engine.rank(z, table, *all_items(table))
        for array, was in zip((history, item, z, hidden, table.values), before, strict=True):
            np.testing.assert_array_equal(array, was)


# -------------------------------------------------------------------------------------------------- opening an engine


def test_the_engine_that_is_taken_by_default_is_onnx_where_there_are_graphs(one, tmp_path):
    assert isinstance(open_engine(one["none"], None, 1), OnnxEngine)
    bare = read_folder(write_export(tmp_path / "bare", random_model((4,)), format="torch"))
    assert isinstance(open_engine(bare, None, 1), TorchEngine)


def test_the_onnx_engine_is_refused_where_there_are_no_graphs(tmp_path):
    bare = read_folder(write_export(tmp_path / "bare", random_model((4,)), format="torch"))
    with pytest.raises(InputError, match=r"bare has no ONNX graphs; export it with --format onnx, or take the torch"):
        open_engine(bare, "onnx", 1)


def test_an_engine_that_does_not_exist_is_refused_with_those_that_do(one):
    with pytest.raises(InputError, match="engine 'tensorrt' is unknown; take one of torch, onnx"):
        open_engine(one["none"], "tensorrt", 1)


def test_an_engine_whose_package_is_not_installed_is_refused_with_what_to_install(one, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="the onnx engine needs onnxruntime: pip install onnxruntime"):
        open_engine(one["none"], "onnx", 1)


def test_onnxruntime_takes_as_many_threads_as_it_is_given(one):
    engine = OnnxEngine(one["none"], threads=1)
    assert engine._recommend.get_session_options().intra_op_num_threads == 1


def test_opening_an_engine_draws_no_random_numbers(one):
    before = torch.get_rng_state()
    TorchEngine(one["none"])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weights_of_a_slice_of_a_slice_are_those_of_the_slice(tmp_path):
    model = random_model((3, 8, 20))
    direct = read_folder(write_export(tmp_path / "direct", model, size=8))
    around = read_folder(write_export(tmp_path / "around", slice_model(model, 8)))
    for name, weight in direct.weights.items():
        np.testing.assert_array_equal(around.weights[name], weight)
