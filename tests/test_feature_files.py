"""Read items' features from a file: every format gives the same rows, every fault one clear error."""

import json
import os
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

import eval as eval_script
import train
from common.errors import InputError
from datasets.catalog import Catalog, load_catalog
from datasets.features import arrays
from serving import Recommender
from serving import export as export_script
from tests.prepared import feature_parts, write_prepared

N, WIDTH = 12, 4
ROWS = np.random.default_rng(0).normal(size=(N + 2, WIDTH)).astype(np.float32)
IDS = [*(f"B{i:09d}" for i in range(N, 0, -1)), "OTHER00001", "OTHER00002"]  # in another order, with unknown products
EXPECTED = (ROWS[:N] / np.linalg.norm(ROWS[:N], axis=1, keepdims=True))[::-1]  # of items 1..N


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return load_catalog(write_prepared(tmp_path / "data", users=20, items=N).parent, "tiny")


def write_npy(folder: Path, rows=ROWS, ids=IDS, endings: str = "txt") -> Path:
    np.save(folder / "visual.npy", rows)
    text = "".join(f"{item}\n" for item in ids) if endings == "txt" else json.dumps(ids)
    (folder / f"visual.ids.{endings}").write_text(text)
    return folder / "visual.npy"


def write_safetensors(folder: Path, rows=ROWS, ids=IDS) -> Path:
    codes = np.array([item.encode() for item in ids])
    save_file(
        {"features": np.asarray(rows), "ids": codes.view(np.uint8).reshape(len(ids), -1)}, folder / "visual.safetensors"
    )
    return folder / "visual.safetensors"


def write_tensors(folder: Path, rows=ROWS, ids=IDS) -> Path:
    save_file({item: np.ascontiguousarray(row) for item, row in zip(ids, rows, strict=True)}, folder / "t.safetensors")
    return folder / "t.safetensors"


def as_table(rows, ids, column: str = "asin") -> pd.DataFrame:
    return pd.DataFrame({column: ids} | {f"f{k}": rows[:, k] for k in range(rows.shape[1])})


def write_csv(folder: Path, rows=ROWS, ids=IDS) -> Path:
    as_table(rows, ids).to_csv(folder / "visual.csv", index=False)
    return folder / "visual.csv"


def write_parquet(folder: Path, rows=ROWS, ids=IDS) -> Path:
    as_table(rows, ids, "item_id").to_parquet(folder / "visual.parquet")
    return folder / "visual.parquet"


def write_lists(folder: Path, rows=ROWS, ids=IDS) -> Path:
    pd.DataFrame({"product_id": ids, "vector": [list(map(float, row)) for row in rows]}).to_parquet(
        folder / "l.parquet"
    )
    return folder / "l.parquet"


def write_amazon(folder: Path, rows=ROWS, ids=IDS) -> Path:
    """4096 numbers a product, of which the first are given."""
    path = folder / "image_features_Tiny.b"
    with path.open("wb") as file:
        for item, row in zip(ids, rows, strict=True):
            file.write(item.encode().ljust(10))
            file.write(np.pad(np.asarray(row, "<f4"), (0, 4096 - len(row))).tobytes())
    return path


def read(catalog: Catalog, path: Path, say=lambda line: None) -> np.ndarray:
    [part] = feature_parts(catalog, files=(f"visual={path}",), cache_root=path.parent / "cache", say=say)
    return part


def refusal(catalog: Catalog, path: Path) -> str:
    with pytest.raises(InputError) as raised:
        read(catalog, path)
    assert not list(path.parent.glob("cache/tiny/*.npy")), "nothing of a bad file is kept"
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------------- formats


def write_npy_with_json(folder: Path, rows=ROWS, ids=IDS) -> Path:
    return write_npy(folder, rows, ids, endings="json")


WRITERS = [write_npy, write_safetensors, write_tensors, write_csv, write_parquet, write_lists, write_amazon]


@pytest.mark.parametrize("write", [*WRITERS, write_npy_with_json])
def test_every_format_gives_the_items_rows_in_order_and_of_length_1(catalog, tmp_path, monkeypatch, write):
    monkeypatch.setattr("datasets.features.array_files.PIECE", 5)
    rows = read(catalog, write(tmp_path))
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(rows[:, :WIDTH], EXPECTED.astype(np.float16))


def test_ids_in_a_table_stay_texts_even_if_they_look_like_numbers(tmp_path):
    catalog = load_catalog(write_prepared(tmp_path / "data", items=3).parent, "tiny")
    catalog.asins[:] = ["0012", "NA", "7"]
    rows = read(catalog, write_csv(tmp_path, ROWS[:3], catalog.asins))
    assert rows.any(axis=1).all()


def test_text_and_pictures_come_before_files_in_the_given_order(catalog, tmp_path):
    one, two = write_npy(tmp_path), write_csv(tmp_path, ROWS[:, :2])
    files = (f"zebra={one}", f"apple={two}")
    parts = feature_parts(catalog, language="lexical", files=files, cache_root=tmp_path / "cache")
    assert [part.shape[1] for part in parts] == [1024, WIDTH, 2]


def test_items_missing_from_the_file_have_zeros_and_are_counted_at_every_use(catalog, tmp_path):
    path, said = write_npy(tmp_path, ROWS[:N - 2], IDS[:N - 2]), []  # fmt: skip
    for _ in range(2):
        rows = read(catalog, path, said.append)
        assert rows.any(axis=1).tolist() == [False] * 2 + [True] * (N - 2)
    counted = [line for line in said if line.startswith(f"2 of {N} items are not in {path}: zero vectors, named in ")]
    assert len(counted) == 2
    sidecar = Path(counted[0].rpartition(" ")[2])
    assert list(json.loads(sidecar.read_text())["broken"]) == catalog.asins[:2]


def test_a_file_is_read_once_until_its_content_changes(catalog, tmp_path):
    path, said = write_npy(tmp_path), []
    first = read(catalog, path, said.append)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    np.save(path, -ROWS)
    os.utime(path, ns=times)  # of the same size and time, so it is not hashed again
    np.testing.assert_array_equal(read(catalog, path, said.append), first)
    assert len(said) == 1
    os.utime(path, ns=(1, 1))
    assert not np.array_equal(read(catalog, path), first)
    assert len(list(tmp_path.glob("cache/tiny/*.npy"))) == 2


# -------------------------------------------------------------------------------------------------------------- faults


def changed(array: np.ndarray, at, value) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize("write", WRITERS)
def test_a_number_that_is_not_finite_is_refused_with_its_place(catalog, tmp_path, write):
    path = write(tmp_path, changed(ROWS, (5, 2), np.nan))
    message = refusal(catalog, path)
    assert message.startswith(f"{path}, ")
    assert "finite" in message
    place = {"visual.csv": "line 7", "t.safetensors": "tensor (sorted by name) 7"}.get(path.name, " 6")
    assert place in message


@pytest.mark.parametrize("write", [write for write in WRITERS if write is not write_tensors])
def test_an_id_may_repeat_its_row_but_not_have_another(catalog, tmp_path, write):
    twice = [*IDS[:-1], IDS[3]]
    path = write(tmp_path, changed(ROWS, N + 1, ROWS[3]), twice)
    assert read(catalog, path).any(axis=1).all()
    for cached in tmp_path.glob("cache/tiny/*.npy"):
        cached.unlink()
    message = refusal(catalog, write(tmp_path, ROWS, twice))
    second, first = (15, 5) if path.suffix == ".csv" else (14, 4)
    assert f"{second} has other numbers for {IDS[3]} than" in message and f" {first}; keep one" in message


def test_a_file_without_any_known_item_is_refused_with_an_example_id(catalog, tmp_path):
    message = refusal(catalog, write_npy(tmp_path, ROWS[:2], ["X", "Y"]))
    assert f"has 2 products and none of the {N} items, whose ids are such as 'B000000001'" in message


def write_without_ids(folder: Path) -> Path:
    path = write_npy(folder)
    (folder / "visual.ids.txt").unlink()
    return path


def write_ragged_lists(folder: Path) -> Path:
    path = folder / "l.parquet"
    pd.DataFrame({"asin": IDS[:3], "vector": [[1.0, 2.0], [1.0, 2.0], [3.0]]}).to_parquet(path)
    return path


def write_ragged_tensors(folder: Path) -> Path:
    save_file({"A": np.ones(3), "B": np.ones(2)}, folder / "t.safetensors")
    return folder / "t.safetensors"


def write_text(name: str, text: str):
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


def write_cut(write):
    def cut(folder: Path) -> Path:
        path = write(folder)
        path.write_bytes(path.read_bytes()[:-7])
        return path

    return cut


def write_pickle(folder: Path) -> Path:
    np.save(folder / "visual.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "visual.ids.txt").write_text("A\n")
    return folder / "visual.npy"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_without_ids, "visual.ids.txt (an id per line) or visual.ids.json (a list)"),
        (write_ragged_lists, "row 3 has 1 numbers, others 2"),
        (write_ragged_tensors, "tensor 'B' has shape [2], others [3]"),
        (write_text("a.csv", "asin,f0,f1\nA,1,2\nB,3\n"), "line 3: column 'f1' has"),
        (write_text("a.csv", "asin,f0,f1\nA,1,2\nB,3,4,5\n"), "cannot be read"),
        (write_text("a.csv", "asin,f0\nA,high\n"), "line 2: column 'f0' has 'high'; give a finite number"),
        (write_text("a.csv", "f0,asin\n1,A\n"), "has the columns f0, asin; write a header with asin or item_id or"),
        (write_text("a.csv", ""), "cannot be read"),
        (lambda folder: write_npy(folder, ROWS, IDS[:-1]), f"has {N + 1} ids for the {N + 2} rows"),
        (lambda folder: write_npy(folder, ROWS[0], IDS[:4]), "is float32 [4]; save a 2-d array of numbers"),
        (write_pickle, "cannot be read"),  # and nothing in it is unpickled
        (lambda folder: write_safetensors(folder, ROWS[0][:, None], IDS), "a 1-d tensor per product id"),
        (write_cut(write_npy), "cannot be read"),
        (write_cut(write_safetensors), "cannot be read"),
        (write_cut(write_parquet), "cannot be read"),
        (write_cut(write_amazon), f"ends within record {N + 2} (16387 of 16394 bytes)"),
        (write_text("visual.pkl", "x"), "none of the known suffixes .npy, .safetensors, .csv, .parquet, .b"),
        (lambda folder: folder / "absent.npy", "does not exist"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_fault(catalog, tmp_path, write, message):
    path = write(tmp_path)
    refused = refusal(catalog, path)
    assert message in refused
    assert path.stem in refused


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (("visual",), "must be NAME=FILE"),
        (("my visual=a.npy",), "must be NAME=FILE"),
        (("a=x.npy", "a=y.npy"), "the name 'a' is taken"),
        (("image=x.npy",), "the name 'image' is taken"),
        (("brand=a.npy",), "'brand' is one of --item_attributes"),
    ],
)
def test_a_wrong_name_is_refused(catalog, tmp_path, features, message):
    with pytest.raises(InputError, match=f"--features .*{message}"):
        feature_parts(catalog, files=features, cache_root=tmp_path)


# ------------------------------------------------------------------------------------------------- training and serving


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Return a folder with data/tiny and visual.npy, and a run in it trained on the texts and visual.npy."""
    folder = tmp_path_factory.mktemp("trained")
    write_prepared(folder / "data", users=20, items=N)
    write_npy(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = train.main(
            shlex.split(
                "--dataset_code tiny --language_encoder lexical --no-use_img_encoder --features visual=visual.npy "
                "--whiten_features --item_embedding 2 --mrl_hidden_sizes 2,4 --num_epochs 1 --lru_num_blocks 1"
            )
        )
    return folder, folder / run


@pytest.fixture
def at_work(trained, monkeypatch) -> Path:
    """Change to the folder of the run and return the run."""
    monkeypatch.chdir(trained[0])
    return trained[1]


def test_a_run_on_a_file_names_it_and_keeps_its_digest(at_work):
    assert at_work.name.endswith("-language+visual-4")
    content = arrays.file_sha256(Path("visual.npy"))
    [_, name] = json.loads((at_work / "env.json").read_text())["features"]
    assert name.startswith(f"file-visual-{content}-")


def test_a_run_whose_file_changed_is_refused(at_work):
    try:
        write_npy(Path(), ROWS * np.float32([1, 2, 3, 4]))
        with pytest.raises(InputError, match=r"--features visual=visual.npy is not the file that the run was trained"):
            eval_script.main(["--run", str(at_work)])
    finally:
        write_npy(Path())


@pytest.fixture
def recommender(at_work, tmp_path) -> Recommender:
    export_script.main(["--run", str(at_work), "--out", str(tmp_path / "export"), "--quantize", "none"])
    return Recommender.from_pretrained(tmp_path / "export")


def test_an_export_describes_the_file_and_takes_vectors_of_new_products(recommender, at_work):
    features = recommender.config["features"]
    assert features["files"] == [{"name": "visual", "sha256": arrays.file_sha256(Path("visual.npy")), "dim": WIDTH}]
    assert (features["dim"], features["whitened"]) == (1024 + WIDTH, [1024, WIDTH])
    records = [
        record | {"visual": ROWS[N - 1 - i].tolist()}
        for i, record in enumerate(load_catalog("data", "tiny").metadata[:3])
    ]
    for nothing in ({}, {"visual": None}, {"visual": float("nan")}):
        records.append({"title": "Red lamp"} | nothing)
    rows = recommender.embed_items(records)
    np.testing.assert_array_equal(rows[:3, 1024:].astype(np.float16), EXPECTED[:3].astype(np.float16))
    assert rows[3:, :1024].any(axis=1).all() and not rows[3:, 1024:].any()
    recommender.add_items([f"NEW{i}" for i in range(6)], rows)
    assert recommender.recommend([["NEW1"]], top_k=3)[0].ids


@pytest.mark.parametrize("vector", [[1.0, 2.0], [1, 2, 3, float("inf")], "red", [[1.0] * WIDTH]], ids=repr)
def test_a_new_products_vector_of_another_kind_is_refused(recommender, vector):
    with pytest.raises(InputError, match=r"'visual' of record 1 is .*give a list of 4 finite numbers, or nothing"):
        recommender.embed_items([{"title": "Red lamp", "visual": vector}])
