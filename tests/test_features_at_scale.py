"""Features of large catalogues: made batch by batch on disk, on after a kill, by several processes, read ahead."""

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
from PIL import Image

from common.errors import InputError
from datasets.catalog import Catalog, load_catalog
from datasets.features import cache, encoder, image, text
from datasets.features.encode import encode_batches, in_order, longest_first
from datasets.features.image import ImageModality, PixelEncoder
from datasets.features.text import LexicalEncoder, TextModality
from datasets.text import item_text
from tests.prepared import feature_parts, item_features, write_prepared, write_tiny_bert

REPOSITORY = Path(__file__).parent.parent
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
    """The cache of texts of which a process encoded six batches before it was killed."""
    root = tmp_path_factory.mktemp("begun")
    assert run(write_data(root), root / "cache", "lexical", until=BEGUN).returncode == -signal.SIGKILL
    return root / "cache"


@pytest.fixture
def begun(begun_once, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(begun_once, tmp_path / "begun"))


@pytest.fixture
def whole(data_root, tmp_path) -> dict[str, bytes]:
    """The arrays of an undisturbed process, this one."""
    arguments = {"language": "lexical", "image": None, "attributes": ("title", "brand"), "say": lambda line: None}
    item_features(catalog_of(data_root), **arguments, batch_size=2, cache_root=tmp_path / "whole")
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


# --------------------------------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize("kind", ["text", "picture"])
def test_after_a_kill_only_what_is_missing_is_encoded_and_the_bytes_are_the_same(data_root, bert, tmp_path, kind):
    what = {"language": bert} if kind == "text" else {"image": "pixel"}
    assert run(data_root, tmp_path / "undisturbed", **what).returncode == 0
    killed = run(data_root, tmp_path / "killed", **what, until=BATCHES - 1)
    assert killed.returncode == -signal.SIGKILL
    assert encoded(killed) == BATCHES - 1
    again = run(data_root, tmp_path / "killed", **what)
    assert encoded(again) == 1
    assert "9 of 10 batches were encoded before: going on" in again.stdout
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "undisturbed")


def test_why_pictures_are_broken_outlasts_a_kill(data_root, tmp_path):
    run(data_root, tmp_path / "cache", image="pixel", until=BATCHES - 1)
    assert "2 of 20 items have no readable picture" in run(data_root, tmp_path / "cache", image="pixel").stdout
    [sidecar] = tmp_path.glob("cache/tiny/*.json")
    first, last = json.loads(sidecar.read_text())["broken"].items()
    assert first[0] == "B000000001" and "cannot identify image file" in first[1]
    assert last[0] == "B000000020" and "No such file" in last[1]


@pytest.mark.parametrize("change", ["batch size", "rows", "mark", "plan", "cut"])
def test_a_partial_file_is_believed_only_where_it_is_of_these_batches(data_root, begun, tmp_path, monkeypatch, change):
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
    arguments = {"language": "lexical", "image": None, "attributes": ("title", "brand"), "say": lambda line: None}
    size = 3 if change == "batch size" else 2
    rows = item_features(catalog_of(data_root), **arguments, batch_size=size, cache_root=begun)
    assert len(batches) == {"batch size": 7, "mark": 5}.get(change, 10)
    np.testing.assert_array_equal(rows, item_features(catalog_of(data_root), **arguments, cache_root=tmp_path / "new"))


def test_a_kill_before_the_finished_file_has_its_name_costs_no_batch(tmp_path):
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


# ------------------------------------------------------------------------------------------------------- half precision

BOTH = {"language": "lexical", "image": "pixel", "attributes": ("title", "brand"), "say": lambda line: None}


def test_features_are_stored_in_float16_and_widened_in_memory(data_root, tmp_path):
    arguments = BOTH | {"cache_root": tmp_path / "cache"}
    text, picture = feature_parts(catalog_of(data_root), **arguments)
    assert text.dtype == picture.dtype == np.float16
    titles_and_brands = [item_text(record, BOTH["attributes"]) for record in catalog_of(data_root).metadata]
    np.testing.assert_array_equal(text, LexicalEncoder().encode(titles_and_brands).astype(np.float16))
    rows = item_features(catalog_of(data_root), **arguments)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.hstack([text, picture]))


def test_what_an_earlier_version_finished_in_float32_is_used_as_it_is(data_root, tmp_path, monkeypatch):
    arguments = BOTH | {"cache_root": tmp_path / "cache"}
    with monkeypatch.context() as earlier:
        earlier.setattr(cache, "DTYPE", np.float32)
        text, _ = feature_parts(catalog_of(data_root), **arguments)
        next(tmp_path.glob("cache/tiny/image-*.npy")).unlink()  # the picture's is made by this version
    before = arrays(tmp_path / "cache")
    parts = feature_parts(catalog_of(data_root), **arguments)
    assert [part.dtype for part in parts] == [np.float32, np.float16]
    assert before.items() < arrays(tmp_path / "cache").items()
    np.testing.assert_array_equal(item_features(catalog_of(data_root), **arguments)[:, : text.shape[1]], text)


def test_a_number_beyond_float16_is_an_error_and_never_infinite(tmp_path):
    path, [batch] = tmp_path / "a.npy", in_order(1, 1)
    cache.begin(path, {}, (1, 2), [batch])
    with pytest.raises(FloatingPointError, match="overflow"):
        cache.Writer(path).write(0, batch, np.float32([[1, 65520]]))
    assert cache.unfinished(path, [batch]) == [0]
    cache.Writer(path).write(0, batch, np.float32([[1, 65504]]))
    assert cache.unfinished(path, [batch]) == []


@pytest.mark.parametrize("width", [16, 1024])
def test_half_precision_turns_no_unit_vector_beyond_a_cosine_of_9999999(width):
    exact = encoder.normalised(np.random.default_rng(0).normal(size=(5000, width))).astype(np.float64)
    rounded = exact.astype(np.float16).astype(np.float64)
    cosines = (exact * rounded).sum(axis=1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rounded, axis=1)
    assert cosines.min() > 0.9999999


# -------------------------------------------------------------------------------------------------------- several ranks


def test_two_ranks_make_the_bytes_that_one_process_makes_each_a_share(data_root, bert, tmp_path):
    one = run(data_root, tmp_path / "one", bert, "pixel")
    two = run(data_root, tmp_path / "two", bert, "pixel", ranks=2)
    assert two.returncode == one.returncode == 0, two.stderr
    assert two.stdout.count("features [(20, ") == 2
    assert two.stdout.count("2 of 20 items have no readable picture") == 1  # said by the first rank alone
    assert arrays(tmp_path / "two") == arrays(tmp_path / "one")
    assert len(arrays(tmp_path / "one")) == 2


def test_what_one_process_began_two_ranks_finish(data_root, begun, whole):
    two = run(data_root, begun, "lexical", ranks=2)
    assert encoded(two) == BATCHES - BEGUN
    assert arrays(begun) == whole


def test_what_is_wrong_is_said_on_every_rank_rather_than_waited_for(data_root, tmp_path):
    done = run(data_root, tmp_path / "cache", "nobody/no-such-encoder", ranks=2)
    assert done.returncode != 0
    assert "cannot be loaded" in done.stderr


def test_a_second_process_waits_for_the_first_and_reads_what_it_made(data_root, tmp_path):
    from filelock import FileLock

    arguments = {"language": "lexical", "image": None, "attributes": ("title",)}
    item_features(catalog_of(data_root), **arguments, cache_root=tmp_path / "cache")
    [path] = tmp_path.glob("cache/tiny/*.npy")
    away = path.rename(tmp_path / "away.npy")

    def appears(line: str) -> None:
        said.append(line)
        away.rename(path)
        lock.release()

    said: list[str] = []
    with FileLock(path.with_suffix(".lock")) as lock:
        before = away.stat().st_mtime_ns
        item_features(catalog_of(data_root), **arguments, cache_root=tmp_path / "cache", say=appears)
    assert said == [f"another process is making {path}: waiting for it"]
    assert path.stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------------------ precision


def precision_of(path: Path) -> str:
    return json.loads(path.with_suffix(".json").read_text())["key"]["precision"]


@pytest.fixture
def features(data_root, bert, tmp_path):
    """item_features of the tiny BERT in a precision."""
    arguments = {"language": str(bert), "image": None, "attributes": ("title", "brand"), "say": lambda line: None}
    return functools.partial(item_features, catalog_of(data_root), **arguments, cache_root=tmp_path / "cache")


@pytest.mark.parametrize(("there", "best"), [("fp32", "bf16"), ("bf16", "fp16")])
def test_auto_takes_what_is_there_whatever_the_device_is_best_at(features, tmp_path, monkeypatch, there, best):
    made = features(precision=there)
    monkeypatch.setattr(encoder, "best_precision", lambda device: best)
    np.testing.assert_array_equal(features(precision="auto"), made)
    assert len(arrays(tmp_path / "cache")) == 1


def test_auto_keeps_to_what_was_made_first(features, monkeypatch):
    monkeypatch.setattr(encoder, "best_precision", lambda device: "bf16")
    made = features(precision="auto")
    assert not np.array_equal(features(precision="fp32"), made)
    np.testing.assert_array_equal(features(precision="auto"), made)


def test_auto_takes_what_a_run_was_trained_on_before_what_was_made_first(features, tmp_path):
    for precision in ("fp32", "bf16"):
        before = set(tmp_path.glob("cache/tiny/*.npy"))
        made = features(precision=precision)
        (file,) = set(tmp_path.glob("cache/tiny/*.npy")) - before
    np.testing.assert_array_equal(features(precision="auto", trained_on=[file.name]), made)
    assert (features(precision="auto") != made).any()


def test_auto_makes_again_what_is_damaged_in_its_own_precision(features, tmp_path, monkeypatch):
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


def test_lexical_and_pixel_have_no_precision(data_root, tmp_path):
    for precision in ("fp32", "bf16", "auto"):
        arguments = {"language": "lexical", "image": "pixel", "attributes": ("title",), "precision": precision}
        feature_parts(catalog_of(data_root), **arguments, cache_root=tmp_path / "cache", say=lambda line: None)
    assert len(arrays(tmp_path / "cache")) == 2


# ----------------------------------------------------------------------------------------------------------- read ahead


@pytest.mark.parametrize("encoder", [LexicalEncoder(), PixelEncoder()], ids=["lexical", "pixel"])
def test_workers_change_no_bit(data_root, encoder):
    catalog = catalog_of(data_root)
    texts = [record["title"] for record in catalog.metadata]
    read, items = (
        (TextModality.read, texts) if isinstance(encoder, LexicalEncoder) else (ImageModality.read, catalog.pictures)
    )
    batches = [items[start : start + 3] for start in range(0, len(items), 3)]
    plain, ahead = (np.concatenate([*encode_batches(encoder, read, batches, workers=n)]) for n in (0, 2))
    np.testing.assert_array_equal(ahead, plain)
    assert plain.any(axis=1).sum() == (20 if isinstance(encoder, LexicalEncoder) else 18)


def test_workers_change_no_bit_of_what_transformers_reads(bert):
    encoder = text.load_encoder(str(bert), "cpu")
    batches = [encoder.tokenize(texts) for texts in (["red tent", "warm"], ["light stove knife", "lamp"])]
    plain, ahead = (np.concatenate([*encode_batches(encoder, TextModality.read, batches, workers=n)]) for n in (0, 1))
    np.testing.assert_array_equal(ahead, plain)


@pytest.fixture
def clip(tmp_path) -> str:
    """The name of an open_clip model of random weights."""
    import open_clip
    import torch

    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), tmp_path / "weights.pt")
    return f"ViT-S-32-alt/{tmp_path / 'weights.pt'}"


def test_open_clip_from_a_file_is_cached_in_its_precision_and_workers_change_no_bit(data_root, clip, tmp_path):
    catalog, parts = catalog_of(data_root), {}
    arguments = {"language": None, "image": clip, "attributes": (), "say": lambda line: None}
    for precision in ("fp32", "bf16"):
        [rows] = feature_parts(catalog, **arguments, precision=precision, cache_root=tmp_path / "cache", batch_size=4)
        parts[precision] = rows.astype(np.float32)
        assert (parts[precision].any(axis=1)[[0, 19]] == 0).all() and parts[precision][1:19].any(axis=1).all()
    assert (parts["fp32"] * parts["bf16"])[1:19].sum(axis=1).min() > 0.999
    encoder = image.load_encoder(clip, "cpu")
    batches = [catalog.pictures[start : start + 4] for start in range(0, 20, 4)]
    ahead = np.concatenate([*encode_batches(encoder, ImageModality.read, batches, workers=1)])
    np.testing.assert_array_equal(ahead.astype(np.float16), parts["fp32"])


class Killed(PixelEncoder):
    """Whose worker is killed, as by a machine that is out of memory."""

    def prepare(self, batch):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_said_with_what_helps(data_root):
    pictures = catalog_of(data_root).pictures
    encoding = encode_batches(Killed(), ImageModality.read, [pictures[1:3]], workers=1)
    with pytest.raises(InputError, match=r"was killed \(DataLoader worker.*fewer --encoder_workers .* are kept"):
        next(encoding)


def test_texts_of_like_length_in_tokens_are_read_together(bert):
    encoder = text.load_encoder(str(bert), "cpu")
    texts = ["red", "zebra zebra", "warm light tent", "red warm light tent lamp stove", "lamp"]
    tokenized = encoder.tokenize(texts)
    assert [len(tokens) for tokens in tokenized] == [3, 12, 5, 8, 3]  # one to begin and one to end with, 12 at most
    assert [batch.tolist() for batch in longest_first(tokenized, 2)] == [[1, 3], [2, 0], [4]]


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from datasets.features.encode import encode_batches\n"
        "from datasets.features.image import ImageModality, PixelEncoder\n"
        "picture, count = Path(sys.argv[1]), int(sys.argv[2])\n"
        "batches = ([picture] * 20 for _ in range(count))\n"
        "for features in encode_batches(PixelEncoder(), ImageModality.read, batches): pass\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(int(status.partition('VmHWM:')[2].split()[0]) / 1e3)\n"
    )
    Image.new("RGB", (1000, 1000), "red").save(tmp_path / "a.png")  # 3 MB decoded
    few, many = (
        float(subprocess.check_output([sys.executable, "-c", code, tmp_path / "a.png", str(n)], cwd=REPOSITORY))
        for n in (1, 5)
    )
    assert many < few + 30  # 240 MB more were decoded


def test_encoding_is_announced_once(data_root, bert, tmp_path):
    said: list[str] = []
    for _ in range(2):
        item_features(catalog_of(data_root), language=str(bert), image=None, attributes=("title",),
                      cache_root=tmp_path / "cache", say=said.append)  # fmt: skip
    line, pooling = said
    assert pooling.startswith(f"{bert} pools by the mean of the tokens")
    assert line.startswith(f"encoding 20 texts by {bert} (fp32, cpu), once: {tmp_path / 'cache'}")


def test_features_are_read_from_the_file_not_held(data_root, tmp_path):
    [rows] = feature_parts(catalog_of(data_root), language="lexical", image=None, attributes=("title",),
                           cache_root=tmp_path / "cache", say=lambda line: None)  # fmt: skip
    assert isinstance(rows, np.memmap)
    [file] = tmp_path.glob("cache/tiny/*.npy")
    before = file.read_bytes()
    torch.from_numpy(rows)[0] = 7.0  # torch warns of arrays that it may not write to
    rows.flush()
    assert file.read_bytes() == before
    assert time.time() - json.loads(next(tmp_path.glob("cache/tiny/*.json")).read_text())["made"] < 600
