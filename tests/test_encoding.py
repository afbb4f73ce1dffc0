"""Encode large catalogues: batch by batch on disk, resumed after a kill, by several ranks, read ahead by workers."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import InputError
from datasets.catalog import Catalog, load_catalog
from datasets.features import cache, encoder, image, text
from datasets.features.encode import encode_batches, in_order, longest_first
from datasets.features.image import ImageModality, PixelEncoder
from datasets.features.text import LexicalEncoder, TextModality
from tests.prepared import feature_parts, item_features, write_prepared, write_tiny_bert

REPOSITORY = Path(__file__).parent.parent
LEXICAL = {"language": "lexical", "image": None, "attributes": ("title", "brand"), "say": lambda line: None}
MEAN = {"pooling_mode_mean_tokens": True}
BATCHES = 10  # of the 20 items below, two each
BEGUN = 6  # of them, before a kill
RUN = """
import sys
from pathlib import Path
import torch
from datasets.features.image import PixelEncoder
from datasets.features.text import LexicalEncoder, TransformersEncoder
from datasets.catalog import load_catalog
from tests.prepared import feature_parts
data_root, cache_root, language, image, until = sys.argv[1:]
torch.set_num_threads(1)
seen = 0
def watched(forward):
    def counting(self, prepared):
        global seen
        seen += 1
        if seen > int(until):
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
        print("encoded a batch\\n", end="", flush=True)
        return forward(self, prepared)
    return counting
for encoder in (LexicalEncoder, PixelEncoder, TransformersEncoder):
    encoder.forward = watched(encoder.forward)
load = TransformersEncoder.__init__
def loaded(self, *arguments):
    global seen
    load(self, *arguments)
    seen = 0  # loading encodes a text
TransformersEncoder.__init__ = loaded
parts = feature_parts(load_catalog(data_root, "tiny"), language=language or None, image=image or None,
                      attributes=("title", "brand"), batch_size=2, cache_root=Path(cache_root))
print(f"features {[part.shape for part in parts]}\\n", end="", flush=True)  # in one piece, beside another rank's
"""


def write_data(root: Path) -> Path:
    """Twenty items, two of whose pictures cannot be read."""
    folder = write_prepared(root / "data", items=20, pictures=True)
    photos = sorted((folder.parent / "photos/tiny").iterdir())
    photos[0].write_text("<html>404</html>")
    photos[19].unlink()
    return folder.parent


@pytest.fixture
def data_root(tmp_path) -> Path:
    return write_data(tmp_path)


@pytest.fixture(scope="module")
def begun_once(tmp_path_factory) -> Path:
    """Return the cache of a process that was killed after six of its ten batches of texts."""
    root = tmp_path_factory.mktemp("begun")
    assert run(write_data(root), root / "cache", "lexical", until=BEGUN).returncode == -signal.SIGKILL
    return root / "cache"


@pytest.fixture
def begun(begun_once, tmp_path) -> Path:
    """Return a copy of `begun_once`."""
    return Path(shutil.copytree(begun_once, tmp_path / "begun"))


@pytest.fixture
def whole(data_root, tmp_path) -> dict[str, bytes]:
    """Return the arrays that this process makes without interruption."""
    item_features(catalog_of(data_root), **LEXICAL, batch_size=2, cache_root=tmp_path / "whole")
    return arrays(tmp_path / "whole")


@pytest.fixture
def bert(tmp_path) -> Path:
    return write_tiny_bert(tmp_path / "bert", MEAN)


def run(data_root: Path, cache_root: Path, language="", image="", until=1000, ranks=1) -> subprocess.CompletedProcess:
    """Make features in a process of its own, or by torchrun in several, each killed after `until` batches."""
    script = cache_root.parent / "run.py"
    script.write_text(RUN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    arguments = map(str, (data_root, cache_root, language, image, until))
    return subprocess.run(
        [sys.executable, *torchrun, str(script), *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def encoded(done: subprocess.CompletedProcess) -> int:
    """How many batches a process encoded after loading its encoder."""
    return done.stdout.count("encoded a batch") - done.stdout.count("encoding 20 texts by")


def arrays(cache_root: Path) -> dict[str, bytes]:
    """Name -> bytes of the finished arrays; nothing else but their sidecars and the locks may be left."""
    assert not [path for path in cache_root.rglob("*") if ".partial." in path.name or ".done." in path.name]
    return {path.name: path.read_bytes() for path in cache_root.rglob("*.npy")}


def catalog_of(data_root: Path) -> Catalog:
    return load_catalog(data_root, "tiny")


@pytest.mark.slow
def test_after_a_kill_only_missing_batches_are_encoded_to_the_same_bytes(data_root, tmp_path):
    pixel = LEXICAL | {"language": None, "image": "pixel", "batch_size": 2}
    feature_parts(catalog_of(data_root), **pixel, cache_root=tmp_path / "whole")
    killed = run(data_root, tmp_path / "killed", image="pixel", until=BATCHES - 1)
    assert killed.returncode == -signal.SIGKILL
    assert encoded(killed) == BATCHES - 1
    again = run(data_root, tmp_path / "killed", image="pixel")
    assert encoded(again) == 1
    assert "9 of 10 batches were encoded before: going on" in again.stdout
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "whole")
    [sidecar] = tmp_path.glob("killed/tiny/*.json")
    first, last = json.loads(sidecar.read_text())["broken"].items()
    assert first[0] == "B000000001" and "cannot identify image file" in first[1]
    assert last[0] == "B000000020" and "No such file" in last[1]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["batch size", "rows", "mark", "plan", "cut"])
def test_a_partial_file_is_used_only_for_the_same_batches_and_if_intact(
    data_root, begun, tmp_path, monkeypatch, change
):
    [partial], [done] = begun.glob("tiny/*.partial.npy"), begun.glob("tiny/*.done.npy")
    if change == "rows":  # of an unfinished batch, and as a power loss may leave them of a finished one
        np.lib.format.open_memmap(partial, "r+")[:] *= 0
    elif change == "mark":
        np.lib.format.open_memmap(done, "r+")[0] ^= 1
    elif change == "plan":
        partial.with_suffix(".json").unlink()
    elif change == "cut":
        partial.write_bytes(partial.read_bytes()[:-1])
    batches, forward = [], LexicalEncoder.forward
    monkeypatch.setattr(LexicalEncoder, "forward", lambda self, read: batches.append(read) or forward(self, read))
    size = 3 if change == "batch size" else 2
    rows = item_features(catalog_of(data_root), **LEXICAL, batch_size=size, cache_root=begun)
    assert len(batches) == {"batch size": 7, "mark": 5}.get(change, 10)
    np.testing.assert_array_equal(rows, item_features(catalog_of(data_root), **LEXICAL, cache_root=tmp_path / "new"))


def test_a_kill_before_the_final_rename_costs_no_batch(tmp_path):
    path, batches = tmp_path / "a.npy", in_order(5, 2)
    assert cache.begin(path, {"a": 1}, (5, 3), batches) == [0, 1, 2]
    writer = cache.Writer(path)
    for number, batch in enumerate(batches):
        writer.write(number, batch, np.full((len(batch), 3), number, np.float32))
    cache.sidecar(path).write_text("{}")
    assert cache.read(path, {}, None) == (None, "")
    assert cache.begin(path, {"a": 1}, (5, 3), batches) == []
    header = cache.finish(path, {"key": {"k": 1}, "commit": "", "broken": {}}, batches)
    assert cache.read(path, {"k": 1}, None) == (header, "")
    assert np.load(path)[:, 0].tolist() == [0, 0, 1, 1, 2]


def test_features_of_an_earlier_version_in_float32_are_used_as_they_are(data_root, tmp_path, monkeypatch):
    arguments = LEXICAL | {"image": "pixel", "cache_root": tmp_path / "cache"}
    with monkeypatch.context() as earlier:
        earlier.setattr(cache, "DTYPE", np.float32)
        text, _ = feature_parts(catalog_of(data_root), **arguments)
        next(tmp_path.glob("cache/tiny/image-*.npy")).unlink()  # the picture's is made by this version
    before = arrays(tmp_path / "cache")
    parts = feature_parts(catalog_of(data_root), **arguments)
    assert [part.dtype for part in parts] == [np.float32, np.float16]
    assert before.items() < arrays(tmp_path / "cache").items()
    rows = item_features(catalog_of(data_root), **arguments)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.hstack([text, parts[1]]))


def test_a_number_beyond_float16_is_an_error_and_never_infinite(tmp_path):
    path, [batch] = tmp_path / "a.npy", in_order(1, 1)
    cache.begin(path, {}, (1, 2), [batch])
    with pytest.raises(FloatingPointError, match="overflow"):
        cache.Writer(path).write(0, batch, np.float32([[1, 65520]]))
    assert cache.unfinished(path, [batch]) == [0]
    cache.Writer(path).write(0, batch, np.float32([[1, 65504]]))
    assert cache.unfinished(path, [batch]) == []


@pytest.mark.slow
def test_two_ranks_finish_the_cache_of_one_process_and_end_at_an_input_error(data_root, begun, whole):
    for path in (data_root / "photos/tiny").iterdir():
        path.unlink()
    two = run(data_root, begun, "lexical", "pixel", ranks=2)
    assert encoded(two) == BATCHES - BEGUN
    assert arrays(begun) == whole
    assert two.returncode != 0
    assert two.stderr.count("InputError: tiny has no picture that can be read") == 2


@pytest.mark.slow
def test_two_ranks_make_the_bytes_that_one_process_makes(data_root, bert, tmp_path):
    both = LEXICAL | {"language": str(bert), "image": "pixel"}
    feature_parts(catalog_of(data_root), **both, batch_size=2, cache_root=tmp_path / "one")
    two = run(data_root, tmp_path / "two", bert, "pixel", ranks=2)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("features [(20, ") == 2
    assert two.stdout.count("2 of 20 items have no readable picture") == 1  # said by the first rank alone
    assert arrays(tmp_path / "two") == arrays(tmp_path / "one")
    assert len(arrays(tmp_path / "one")) == 2


def test_a_second_process_waits_for_the_first_and_reads_its_features(data_root, tmp_path):
    from filelock import FileLock

    item_features(catalog_of(data_root), **LEXICAL, cache_root=tmp_path / "cache")
    [path] = tmp_path.glob("cache/tiny/*.npy")
    away = path.rename(tmp_path / "away.npy")

    def appears(line: str) -> None:
        said.append(line)
        away.rename(path)
        lock.release()

    said: list[str] = []
    with FileLock(path.with_suffix(".lock")) as lock:
        before = away.stat().st_mtime_ns
        item_features(catalog_of(data_root), **LEXICAL | {"say": appears}, cache_root=tmp_path / "cache")
    assert said == [f"another process is making {path}: waiting for it"]
    assert path.stat().st_mtime_ns == before


def precision_of(path: Path) -> str:
    return json.loads(path.with_suffix(".json").read_text())["key"]["precision"]


@pytest.fixture
def features(data_root, bert, tmp_path):
    """Return item_features of the tiny BERT; its precision is left to the caller."""
    arguments = LEXICAL | {"language": str(bert), "cache_root": tmp_path / "cache"}
    return functools.partial(item_features, catalog_of(data_root), **arguments)


@pytest.mark.parametrize(("there", "best"), [("fp32", "bf16"), ("bf16", "fp16")])
def test_auto_takes_the_cached_precision_rather_than_the_fastest(features, tmp_path, monkeypatch, there, best):
    made = features(precision=there)
    monkeypatch.setattr(encoder, "best_precision", lambda device: best)
    np.testing.assert_array_equal(features(precision="auto"), made)
    assert len(arrays(tmp_path / "cache")) == 1


def test_auto_prefers_the_features_that_a_run_was_trained_on(features, tmp_path):
    for precision in ("fp32", "bf16"):
        before = set(tmp_path.glob("cache/tiny/*.npy"))
        made = features(precision=precision)
        (file,) = set(tmp_path.glob("cache/tiny/*.npy")) - before
    np.testing.assert_array_equal(features(precision="auto", trained_on=[file.name]), made)
    assert (features(precision="auto") != made).any()


def test_auto_makes_damaged_features_again_in_their_own_precision(features, tmp_path, monkeypatch):
    made = features(precision="fp32")
    [path] = tmp_path.glob("cache/tiny/*.npy")
    path.write_bytes(b"")
    monkeypatch.setattr(encoder, "best_precision", lambda device: "bf16")
    np.testing.assert_array_equal(features(precision="auto"), made)
    assert [precision_of(p) for p in tmp_path.glob("cache/tiny/*.npy")] == ["fp32"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_gives_nearly_the_same_unit_vectors_in_float32(features, monkeypatch, precision):
    monkeypatch.setattr(encoder, "best_precision", lambda device: precision)
    fast, exact = features(precision="auto"), features(precision="fp32")
    assert fast.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(fast, axis=1), 1, rtol=np.finfo(np.float16).eps)
    assert (exact * fast).sum(axis=1).min() > 0.999
    assert not np.array_equal(exact, fast)


def test_lexical_and_pixel_ignore_the_precision(data_root, tmp_path):
    for precision in ("fp32", "bf16", "auto"):
        arguments = LEXICAL | {"image": "pixel", "precision": precision, "cache_root": tmp_path / "cache"}
        feature_parts(catalog_of(data_root), **arguments)
    assert len(arrays(tmp_path / "cache")) == 2


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_workers_change_no_bit(data_root, bert, clip, kind):
    catalog = catalog_of(data_root)
    if kind == "transformers":
        encoder, read = text.load_encoder(str(bert), "cpu"), TextModality.read
        items = encoder.tokenize([record["title"] for record in catalog.metadata])
    else:
        encoder, read, items = image.load_encoder(clip, "cpu"), ImageModality.read, catalog.pictures
    batches = [items[start : start + 7] for start in range(0, len(items), 7)]
    plain, ahead = (np.concatenate([*encode_batches(encoder, read, batches, workers=n)]) for n in (0, 1))
    np.testing.assert_array_equal(ahead, plain)
    assert plain.any(axis=1).sum() == (20 if read == TextModality.read else 18)


class KilledEncoder(PixelEncoder):
    """An encoder whose worker is killed, as by a machine that is out of memory."""

    def prepare(self, batch):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported_with_a_remedy(data_root):
    pictures = catalog_of(data_root).pictures
    encoding = encode_batches(KilledEncoder(), ImageModality.read, [pictures[1:3]], workers=1)
    with pytest.raises(InputError, match=r"was killed \(DataLoader worker.*fewer --encoder_workers .* are kept"):
        next(encoding)


def test_open_clip_is_cached_in_its_precision(data_root, clip, tmp_path):
    arguments = LEXICAL | {"language": None, "image": clip, "cache_root": tmp_path / "cache"}
    fp32, bf16 = (item_features(catalog_of(data_root), **arguments, precision=p) for p in ("fp32", "bf16"))
    assert not fp32[[0, 19]].any() and (fp32 * bf16)[1:19].sum(axis=1).min() > 0.999
    assert len(arrays(tmp_path / "cache")) == 2


def test_texts_of_similar_token_counts_share_a_batch(bert):
    encoder = text.load_encoder(str(bert), "cpu")
    texts = ["red", "zebra zebra", "warm light tent", "red warm light tent lamp stove", "lamp"]
    tokenized = encoder.tokenize(texts)
    assert [len(tokens) for tokens in tokenized] == [3, 12, 5, 8, 3]  # one to begin and one to end with, 12 at most
    assert [batch.tolist() for batch in longest_first(tokenized, 2)] == [[1, 3], [2, 0], [4]]


def test_features_are_mapped_from_the_file_copy_on_write(data_root, tmp_path):
    [rows] = feature_parts(catalog_of(data_root), language="lexical", image=None, attributes=("title",),
                           cache_root=tmp_path / "cache", say=lambda line: None)  # fmt: skip
    assert isinstance(rows, np.memmap)
    [file] = tmp_path.glob("cache/tiny/*.npy")
    before = file.read_bytes()
    torch.from_numpy(rows)[0] = 7.0  # torch warns of arrays that it may not write to
    rows.flush()
    assert file.read_bytes() == before
    assert time.time() - json.loads(next(tmp_path.glob("cache/tiny/*.json")).read_text())["made"] < 600
