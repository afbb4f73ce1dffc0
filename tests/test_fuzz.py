"""Fuzz every door that reads data: each input works or ends in InputError, in bounded time and memory.

FUZZ_EXAMPLES=10000 pytest tests/test_fuzz.py     tries 10,000 random inputs per door instead of the fixed few;
--hypothesis-seed=7 --hypothesis-show-statistics  names the seed and counts the inputs
"""

import copy
import hashlib
import io
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from benchmarks import memory_mb, reset_peak_memory
from common.errors import InputError
from config import Config
from datasets.catalog import describe, load_catalog
from datasets.features.arrays import open_array_file
from datasets.items import item_text
from datasets.prepare.raw import FILTERS
from datasets.prepare.read import read_events, read_items
from datasets.prepare.sequences import make_sequences
from experiments.store import kept_runs
from serving import Recommender
from serving.engines import State
from serving.export import arguments_parser, best_size
from serving.folder import CONFIG, ITEMS, WEIGHTS
from tests.made_up import random_model, write_export
from trainer.runs import check_data, describe_run, features_of, read_config, read_log, read_metrics, read_plane

MANY = int(os.environ.get("FUZZ_EXAMPLES", 0))
SECONDS, MEGABYTES = 2, 500  # the most that an input may take
DEEP = b"[" * 990 + b"]" * 990  # stands in JSON where NASTY has "DEEP"
NUMBERS = [-1, 0, 1, 7, 10**6, 10**12, 2**31, 2**63, 10**30, 10**400, 1.5, 1e308, float("nan"), float("inf")]
TEXTS = ["", "x", "0", "../..", "/etc/passwd", "a\0b", "a\nb", "\ud800", "x" * 300, "é" * 5000, "DEEP"]
NASTY = [None, True, *NUMBERS, *TEXTS, [], {}, [[]], [None], [1, 0], {"a": 1}, {"": {}}]
MARKS = [bytes([mark]) for mark in b"\0\n\r\"',\t{[}]"]
STARTS = [b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"PK\x03\x04", b"\x80\x04", b"\x28\xb5\x2f\xfd", b"<a =", b"<!--"]
LONG = [b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000, b"(" * 200, b"[" * 990, b"&amp;" * 50, b"A" * 300]
ODD = [b"", b"::", b"nan", b"-1", b"1e999", b"\\ud800", b"\xed\xa0\x80", b"\xff" * 7 + b"\x7f", b"__import__('os')"]
BYTES = [*MARKS, *STARTS, *LONG, *ODD]


def fuzzed(count):
    """Run a test on `count` derandomized inputs, or on FUZZ_EXAMPLES random ones."""
    options = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=MANY or count, derandomize=not MANY, **options)


def memory(name):
    return memory_mb(name) if Path("/proc/self/status").exists() else 0


def bounded(function, *arguments, again=False, **options):
    """Return the result, or the message of an InputError; any other exception, long time or much memory fails."""
    reset_peak_memory()
    before, started = memory("VmRSS"), time.process_time()
    try:
        result = function(*arguments, **options)
    except InputError as error:
        result = str(error)
        assert len(result) < 4000, "an endless message"
    taken, grown = time.process_time() - started, memory("VmHWM") - before
    if not again and (taken > SECONDS or grown > MEGABYTES):
        return bounded(function, *arguments, again=True, **options)  # the first call may have imported a library
    assert taken < SECONDS, f"{taken:.1f} s"
    assert grown < MEGABYTES, f"{grown:.0f} MB"
    return result


VALUES = st.sampled_from(NASTY) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value):
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from places(inner)


@st.composite
def altered(draw, original):
    value = [copy.deepcopy(original)]
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(value))
        container, key = found[draw(st.integers(0, len(found) - 1))]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if how == "remove" and container is not value:
            del container[key]
        else:
            added = how == "add" and isinstance(container, dict)
            key = draw(st.sampled_from(["x", "", "a\0", "__class__", "1"])) if added else key
            container[key] = copy.deepcopy(draw(VALUES))
    return value[0]


@st.composite
def damaged(draw, original):
    data = original
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 4, 30, 10**6])))
        more = draw(st.sampled_from(BYTES) | st.binary(max_size=6) | st.just(data[start:end] * 3))
        data = data[:start] + more + data[end:]
    return data


def to_json(value):
    return json.dumps(value).encode().replace(b'"DEEP"', DEEP)


def json_lines(rows):
    return b"\n".join(map(to_json, rows if isinstance(rows, list) else [rows]))


def json_file(original):
    return altered(original).map(to_json) | damaged(to_json(original))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def fill(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


MAPS = {"item2id": {f"B{i}": str(i) for i in range(1, 6)}, "user2id": {"u": "1", "v": "2"}}
RECORDS = [
    {"asin": "B1", "title": "Tent &amp; <b>lamp</b>", "price": 9.5, "categories": [["Home", "Light"]], "brand": None},
    {"asin": "B2", "title": "Stove", "description": ["a", "b"], "related": {"also_bought": ["B1"]}},
]
LITERALS = "".join(f"{record}\n" for record in RECORDS).encode()
SPLIT = {"name": "time 2020-01-01 2021-01-01", "cuts": [[2, 3], [1, 2]]}
WHOLE = {"datamaps.json": to_json(MAPS), "sequential_data.txt": b"1 1 2 3 4\n2 5 4 3\n", "meta.json.gz": LITERALS}
DATASET = {
    "datamaps.json": json_file(MAPS),
    "sequential_data.txt": damaged(WHOLE["sequential_data.txt"]),
    "meta.json.gz": altered(RECORDS).map(json_lines) | damaged(LITERALS),
    "split.json": json_file(SPLIT),
    "item2img.json": json_file({"1": "a.png", "B2": "b.png"}),
    "prepare_report.json": json_file({"prepared": {"recipe": {}, "files": {}, "filters": [], "notes": []}}),
    "item2img_dict.pkl": damaged(pickle.dumps({"B1": "x/B1.png", "B2": "B2.jpg"})),
}


def load_dataset(root):
    catalog = load_catalog(root, "tiny")
    describe(catalog)
    catalog.digest()
    for record in catalog.metadata:
        item_text(record, ("title", "price", "brand", "categories", "description"))


@given(changed=st.sampled_from(sorted(DATASET)).flatmap(lambda name: st.tuples(st.just(name), DATASET[name])))
@fuzzed(80)
def test_prepared_datasets(folder, changed):
    fill(folder / "tiny", WHOLE | dict([changed]))
    bounded(load_dataset, folder)


COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
EVENTS = pd.DataFrame([["u", "B1", 5.0, 1400000000], ["u", "B2", 4.0, 1400000001]], columns=COLUMNS)
ROWS = EVENTS.to_dict("records")
RAW = [
    json_lines(ROWS),
    *map(to_json, (ROWS, {"reviews": ROWS}, {"0": [3, 7], "1": [4, 5]})),
    EVENTS.to_csv().encode(),
    EVENTS.to_parquet(),
    EVENTS.set_index("user_id").to_parquet(),
    EVENTS.assign(days=[[pd.Timestamp(0)], []], rating=[{"a": [1]}, None]).to_parquet(),
    LITERALS,
    b"u1,i1,5.0,1400000000\nu2,i1,4.0,1400000001\n",
    b"1 3 4 5\n2 5 4\n",
    b"1::1193::5::978300760\n1::661::3::978302109\n",
    b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n",
    b"movieId,title,genres\n1,Toy Story (1995),Adventure|Animation\n",
    b"user_id:token\titem_id:token\n1\t2\n",
]


@given(data=st.sampled_from(RAW).flatmap(damaged) | altered(ROWS).map(json_lines))
@fuzzed(80)
def test_raw_files(folder, data):
    path = folder / "raw"
    path.write_bytes(data)
    bounded(lambda: make_sequences(read_events(path), **FILTERS | {"min_uc": 1, "min_sc": 1}))
    bounded(read_items, path, frozenset(["B1", "B2", "1", "0"]))


ROWS_2X3 = np.arange(6, dtype=np.float32).reshape(2, 3)
NPY = io.BytesIO()
np.save(NPY, ROWS_2X3)
TABLE = pd.DataFrame({"asin": ["B1", "B2"], "a": [1.0, 2.0], "b": [3.0, 4.0]})
ARRAYS = {
    ".npy": NPY.getvalue(),
    ".safetensors": save({"features": ROWS_2X3, "ids": np.array([[66, 49], [66, 50]], np.uint8)}),
    ".csv": TABLE.to_csv(index=False).encode(),
    ".parquet": TABLE.to_parquet(index=False),
    ".b": np.zeros(1, np.dtype([("id", "S10"), ("row", "<f4", 4096)])).tobytes(),
}
NUMPY_HEADERS = [
    b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    for shape in ("(10**12,3)", "(1000000000000, 3)", "(-1, 3)", "(2**70, 1)", "()")
    for kind in ("<f4", "|O", "<U1000000000", "[('a','<f4')]")
    for text in [f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()]
]


@given(suffix=st.sampled_from(sorted(ARRAYS)), data=st.data())
@fuzzed(80)
def test_feature_files(folder, suffix, data):
    path = folder / f"vectors{suffix}"
    content = damaged(ARRAYS[suffix]) | (st.sampled_from(NUMPY_HEADERS) if suffix == ".npy" else st.nothing())
    path.write_bytes(data.draw(content))
    (folder / "vectors.ids.json").write_bytes(data.draw(st.just(b'["B1", "B2"]') | json_file(["B1", "B2"])))
    bounded(lambda: [rows.sum() for _, rows in open_array_file(path).pieces()])


METRICS = {"8": {"NDCG@10": 0.5, "Recall@10": 0.5}, "16": {"NDCG@10": 0.25, "Recall@10": 0.25}}
ENVIRONMENT = {"started": "a", "command": ["train.py"], "commit": "c", "uncommitted_changes": False, "device": "cpu"}
ENVIRONMENT |= {"versions": {"torch": "2"}, "data": "d", "features": ["f.npy"], "resumed": []}
TIMES = {"best_epoch": 1, "seconds": 1.0, "train_seconds": 1.0}
COSTS = {"engine": "torch", "quantize": "float16", "size": 8, "bytes": 9, "p50_ms": 1, "NDCG@10": 0.5}
CELL = {"size": 8, "width": 8, "table_bytes": 9, "encoder_ms": 1, "kept": METRICS["8"], "masked": METRICS["8"]}
SETTINGS = {"settings": vars(Config()), "sources": {"lr": "flag"}}
RUN = {
    "config.json": SETTINGS,
    "env.json": ENVIRONMENT,
    "log.jsonl": TIMES | {"epoch": 1, "val": METRICS},
    "test_mrl_metrics.json": METRICS,
    "deploy.json": {"weights": hashlib.sha256(b"").hexdigest(), "rows": [COSTS]},
    "cut.json": {"kept": {}, "masked": {}, "weights": hashlib.sha256(b"").hexdigest(), "plane": [CELL]},
    "runs.jsonl": SETTINGS | TIMES | {"run": "demo-a", "environment": ENVIRONMENT, "epochs": 1},
}
RUN = json.loads(json.dumps(RUN))  # tuples as lists


@given(changed=st.sampled_from(sorted(RUN)).flatmap(lambda name: st.tuples(st.just(name), json_file(RUN[name]))))
@fuzzed(60)
def test_runs(folder, changed):
    run = folder / "run"
    csv = b"run,dataset,split,protocol,size,NDCG@10\ndemo-a,demo,test,kept,8,0.5\n"
    whole = {name: to_json(value) for name, value in RUN.items()} | {"best.safetensors": b"", "metrics.csv": csv}
    fill(run, whole | dict([changed]))
    for read in (read_config, read_log, describe_run, features_of, read_plane, lambda run: check_data(run, "d")):
        bounded(read, run)
    bounded(read_metrics, run / "test_mrl_metrics.json", "test again")
    if changed[0] == "runs.jsonl":  # pandas makes it slow
        bounded(kept_runs, run)
    arguments = arguments_parser().parse_args(["--max_bytes", "1MB"])
    arguments.run = run
    bounded(best_size, arguments)


FEATURES = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(folder):
    model = random_model((4, 8), num_blocks=1, num_items=12, features=FEATURES)
    made = write_export(folder / "export", model, quantize="int8")
    return {path.name: path.read_bytes() for path in made.iterdir()}


def checked(files):
    try:
        config = json.loads(files[CONFIG])
        for name, entry in config["files"].items():
            if name in files and isinstance(entry, dict):
                entry |= {"bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        config.pop("sha256", None)
        config["sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        return files | {CONFIG: json.dumps(config).encode()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return files


EMPTY = [np.zeros(0, np.float32), np.zeros((0, 0), np.uint8), np.zeros((12, 0), np.uint8), np.zeros(())]
NUMBERED = [np.zeros(3, np.int64), np.full(12, 10**12), np.full(12, -1), np.arange(12)[::-1].copy()]
TABLES = [np.full((13, 8), *value) for value in ((np.nan, np.float32), (-128, np.int8), (0, np.float16))]
OTHER = [np.full((12, 4), 255, np.uint8), np.full(13, np.nan, np.float32), np.full((8, 16), np.inf, np.float32)]
ARRAY = st.sampled_from([*EMPTY, *NUMBERED, *TABLES, *OTHER, np.zeros((1, 10**5), bool)])


@st.composite
def broken_export(draw, files):
    name = draw(st.sampled_from([CONFIG, CONFIG, ITEMS, WEIGHTS, "recommend.onnx", "step.onnx", "rank.onnx"]))
    if name == CONFIG:
        return checked(files | {name: draw(json_file(json.loads(files[name])))})
    if name in (ITEMS, WEIGHTS) and draw(st.booleans()):
        tensors = load(files[name])
        which = draw(st.sampled_from([*sorted(tensors), "removed", "more"]))
        return checked(files | {name: save(tensors | {which: draw(ARRAY)})})
    return checked(files | {name: draw(damaged(files[name]))})


def serve(folder, engine):
    recommender = Recommender.from_pretrained(folder, engine)
    recommender.recommend([[1, 2], [], ["A3"]], top_k=3)
    recommender.recommend([recommender.step(recommender.start(), 1)], candidates=["A1", "A2"])
    recommender.add_items(["new"], FEATURES[:1], ["title"])
    recommender.similar_items(["new"])
    recommender.remove_items(["A1"])
    recommender.embed_items([{"title": "a tent"}])
    recommender.reload()


@given(data=st.data(), engine=st.sampled_from(["onnx", "torch", None]))
@fuzzed(80)
def test_exports_with_right_checksums(folder, exported, data, engine):
    fill(folder / "broken", data.draw(broken_export(exported)))
    bounded(serve, folder / "broken", engine)


@pytest.fixture(scope="module")
def recommender(folder, exported):
    return Recommender.from_pretrained(folder / "export", "onnx")


ITEMS_OF = ["A1", "A12", 1, 12, 13, -1, True, 1.0, "zzz", "\ud800", "a\0", 10**30, 10**5000, np.int64(3), b"A1"]
ITEM = st.sampled_from(ITEMS_OF) | VALUES
GIVEN = st.lists(ITEM, max_size=4) | VALUES | st.just(("A1",)) | st.just(np.array([1, 2])) | st.just(range(3))
SHAPED = [FEATURES[:1], FEATURES[:2], FEATURES.astype(str), np.zeros((1, 0)), np.ones(12, bool), [[1], [2, 3]]]
ODD_VECTORS = [np.full((1, 6), np.nan), np.full((1, 6), 1e38), np.array([[None] * 6]), [[10**5000]]]
VECTORS = st.sampled_from([*SHAPED, *ODD_VECTORS]) | VALUES
HISTORIES = st.lists(GIVEN, max_size=3) | VALUES
TOP_K = st.sampled_from([1, 3, 2.5, "3", 10**5000]) | VALUES


def call(name, required, **optional):
    return st.tuples(st.just(name), st.fixed_dictionaries(required, optional=optional))


CALLS = st.one_of(
    call("recommend", {"histories": HISTORIES}, top_k=TOP_K, candidates=GIVEN | HISTORIES, exclude_history=VALUES),
    call("recommend", {"histories": HISTORIES}, top_k=TOP_K, boost=VECTORS),
    call("similar_items", {"items": GIVEN}, top_k=TOP_K),
    call("start", {"history": GIVEN}),
    call("step", {"state": VALUES | st.just("state"), "item": ITEM}),
    call("filter", {"items": GIVEN | VECTORS, "boost": VECTORS | st.none()}),
    call("item_vectors", {"items": GIVEN}),
    call("user_vectors", {"histories": HISTORIES}),
    call("add_items", {"ids": GIVEN, "features": VECTORS}, titles=GIVEN),
    call("update_items", {"ids": GIVEN}, features=VECTORS, titles=GIVEN),
    call("remove_items", {"ids": GIVEN}),
    call("embed_items", {"products": altered([{"title": "Tent", "brand": "B", "price": 3}]) | VALUES}),
)


@given(call=CALLS)
@fuzzed(200)
def test_calls_of_the_recommender(recommender, call):
    name, arguments = call
    if arguments.get("state") == "state":
        arguments["state"] = recommender.start(["A1"])
    if len(recommender.items) > 40:
        recommender._now = Recommender.from_pretrained(recommender._opened[0], "onnx")._now
    bounded(getattr(recommender, name), **arguments)


@given(data=st.data())
@fuzzed(60)
def test_bytes_of_states(recommender, data):
    whole = recommender.start(["A1", "A2"]).to_bytes()
    state = bounded(State.from_bytes, data.draw(damaged(whole) | VALUES | st.just(whole)))
    if isinstance(state, State):
        bounded(recommender.recommend, [state], 3)
