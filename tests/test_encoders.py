"""Encode texts and pictures by frozen encoders, beside Hugging Face's `datasets`, which has our folder's name."""

import functools
import json
import os
import pickle
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import transformers
from filelock import FileLock
from huggingface_hub import constants
from PIL import Image, ImageDraw

from common.errors import InputError
from datasets.catalog import Catalog, load_catalog
from datasets.features import cache, encode, text
from datasets.features.encode import encode_batches, in_order, longest_first, normalised, offline_without_network
from datasets.features.image import ImageModality, PixelEncoder
from datasets.features.image import fingerprint as image_fingerprint
from datasets.features.image import load_encoder as image_encoder
from datasets.features.text import LexicalEncoder, hub_commit
from datasets.features.text import fingerprint as language_fingerprint
from datasets.features.text import load_encoder as language_encoder
from tests.prepared import feature_parts, in_child, item_features, put_in_hub_cache, write_prepared, write_tiny_bert

MEAN, FIRST = {"pooling_mode_mean_tokens": True}, {"pooling_mode_cls_token": True}
LAST, MAX = {"pooling_mode_lasttoken": True, "include_prompt": True}, {"pooling_mode_max_tokens": True}
SHORT, LONG = "red tent", "warm light lamp stove knife kettle gloves bottle"


@pytest.fixture(scope="module")
def mean_bert(tmp_path_factory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoders") / "mean-bert", MEAN)


@pytest.fixture
def copied(mean_bert, tmp_path) -> Path:
    return Path(shutil.copytree(mean_bert, tmp_path / "copy"))


def draw(colour: str, shape: str = "ellipse", at: int = 20) -> Image.Image:
    picture = Image.new("RGB", (96, 96), "white")
    getattr(ImageDraw.Draw(picture), shape)((at, at, at + 50, at + 50), fill=colour)
    return picture


def refusal(make, name: object) -> str:
    with pytest.raises(InputError) as raised:
        make(str(name), "cpu")
    return str(raised.value)


def test_lexical_puts_like_texts_nearer_than_unlike_ones():
    for like, nearer, farther in (
        ("Red camping tent", "red CAMPING tent!", "Green camping tent"),  # case and punctuation count little
        ("camping tents", "camping tent", "camping lamp"),  # parts of words count
        ("light blue lamp", "light blue tent", "blue tent, light"),  # so does the order
        ("tent lamp", "tent " * 50 + "lamp", "tent"),  # but not every repetition
    ):
        a, b, c, empty = language_encoder("lexical", "cpu").encode([like, nearer, farther, "!?"])
        assert a @ b > a @ c + 0.05 and not empty.any()


def test_pixel_puts_like_pictures_nearer_than_unlike_ones():
    red = draw("red")
    for nearer, farther in (
        (draw("red", at=24), draw("blue")),
        (draw("red", at=24), draw("red", "rectangle")),
        (red.resize((300, 300)), draw("orange")),
        (red.convert("CMYK"), draw("blue")),
    ):
        vectors = a, b, c = image_encoder("pixel", "cpu").encode([red, nearer, farther])
        assert a @ b > a @ c
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        np.testing.assert_array_equal(image_encoder("pixel", "cpu").encode([farther])[0], c)  # whatever the batch


def write_model(folder: Path, kind: str, pooling: dict | None) -> Path:
    """Write a random model of transformers that reads 12 tokens, with a tokenizer that pads on the left."""
    write_tiny_bert(folder, pooling)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"d_model": 16, "d_kv": 8, "d_ff": 32, "initializer_factor": 5.0} if kind == "T5Encoder" else {}
    positions = 14 if kind == "MPNet" else 12  # two of MPNet's are never used
    sizes |= {"vocab_size": 80, "max_position_embeddings": positions, "initializer_range": 0.5}
    config = getattr(transformers, f"{kind.removesuffix('Encoder')}Config")(**sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    special |= {"cls_token": "[CLS]"} if kind == "MPNet" else {}
    file = str(folder / "tokenizer.json")
    transformers.PreTrainedTokenizerFast(tokenizer_file=file, padding_side="left", **special).save_pretrained(folder)
    return folder


def plain_states(model: Path, text: str, kind: str, limit: int) -> np.ndarray:
    """Return the last hidden states of one text's tokens, [tokens, 16], without padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")
    loaded = (transformers.T5EncoderModel if kind == "T5Encoder" else transformers.AutoModel).from_pretrained(model)
    with torch.inference_mode():
        return loaded(tokens["input_ids"]).last_hidden_state[0].numpy()


def modules(pooling_folder: str, **more: str) -> str:
    kinds = {"Transformer": "", "Pooling": pooling_folder} | more
    return json.dumps([{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()])


@pytest.mark.parametrize(
    ("kind", "pooling", "by"),
    [
        ("bert", MEAN, "the mean of the tokens (1_Pooling/config.json)"),
        ("bert", FIRST, "the first token (2_Pooling/config.json)"),
        ("bert", None, "the first token (the default, as the model has no 1_Pooling/config.json)"),
        ("bert", {"pooling_mode": "mean"}, "the mean of the tokens (1_Pooling/config.json)"),
        ("MPNet", LAST, "the last token (1_Pooling/config.json)"),
        ("GPT2", None, "the mean of the tokens (the default, as the model has no 1_Pooling/config.json and"),
        ("T5Encoder", MEAN, "the mean of the tokens (1_Pooling/config.json)"),
    ],
)
def test_a_text_is_its_tokens_pooled_as_the_model_says(tmp_path, kind, pooling, by):
    model = write_tiny_bert(tmp_path / "m", pooling) if kind == "bert" else write_model(tmp_path / "m", kind, pooling)
    limit = 4 if "2_Pooling" in by else 12
    if limit == 4:
        (model / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
        (model / "1_Pooling").rename(model / "2_Pooling")
        (model / "modules.json").write_text(modules("2_Pooling"))
    encoder = language_encoder(str(model), "cpu")
    assert encoder.note.startswith(f"{model} pools by {by}")
    assert encoder.note.endswith(f"and reads up to {limit} tokens of a text")
    texts = (SHORT, LONG, 3 * LONG)
    vectors = encoder.encode(texts)  # padding changes nothing
    for sentence, vector in zip(texts, vectors, strict=True):
        states = plain_states(model, sentence, kind, limit)
        expected = {"mean": states.mean(axis=0), "first": states[0], "last": states[-1]}[by.split()[1]]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


def test_the_fingerprint_follows_the_files_that_are_loaded_not_the_folders_name(mean_bert, copied):
    original = language_fingerprint(str(mean_bert))
    for name in (".DS_Store", "README.md", "notes.txt"):
        (copied / name).write_text("x")
    assert language_fingerprint(str(copied)) == original == language_encoder(str(mean_bert), "cpu").fingerprint
    for path in map(copied.joinpath, ("model.safetensors", "tokenizer.json", "config.json", "1_Pooling/config.json")):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert language_fingerprint(str(copied)) != original, path
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["nobody/no-such-encoder@v1", "./no/such/folder", "x/" + "x" * 300])
def test_an_unavailable_encoder_is_refused_with_the_offline_choices(name):
    message = refusal(language_encoder, name)
    assert message.startswith(f"--language_encoder {name!r} cannot be loaded")
    assert "local folder" in message and "'lexical'" in message


def change_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def bring_code(model: Path) -> None:
    change_config(model, model_type="strange", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    (model / "own.py").write_text(f"open({str(model / 'run')!r}, 'w')\n")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda model: os.truncate(model / "model.safetensors", 5000), "incomplete"),
        (lambda model: [path.unlink() for path in (*model.glob("tokenizer*"), model / "vocab.txt")], "no words"),
        (lambda model: (model / "config.json").unlink(), "config"),
        (lambda model: change_config(model, num_hidden_layers=4), "its weights lack encoder.layer.2"),
        (bring_code, ""),  # which is never run
        (lambda model: (model / "1_Pooling/config.json").write_text(json.dumps(MAX | MEAN)), "'mean_tokens'] is none"),
        (lambda model: (model / "modules.json").write_text(modules("1_Pooling", Dense="2_Dense")), "Dense"),
    ],
)
def test_a_local_encoder_that_is_incomplete_or_pools_otherwise_is_refused(copied, damage, why):
    damage(copied)
    message = refusal(language_encoder, copied)
    assert message.startswith(f"--language_encoder {str(copied)!r} cannot be loaded") and why in message
    assert not (copied / "run").exists()


@pytest.mark.parametrize("name", ["org/tiny", f"org/tiny@{'a' * 40}"])
def test_an_encoder_in_the_hubs_cache_is_that_encoder_with_its_pooling(hub, mean_bert, name):
    put_in_hub_cache(hub, "org/tiny", "a" * 40, mean_bert)
    expected = language_encoder(str(mean_bert), "cpu").encode([LONG])
    np.testing.assert_array_equal(language_encoder(name, "cpu").encode([LONG]), expected)
    assert (hub_commit(name), hub_commit("org/tiny@v2")) == ("a" * 40, None)
    assert "'org/tiny@v2' cannot be loaded" in refusal(language_encoder, "org/tiny@v2")
    shutil.rmtree(hub / "models--org--tiny" / "snapshots" / ("a" * 40) / "1_Pooling")
    assert "1_Pooling/config.json is not in the local cache" in refusal(language_encoder, name)


@pytest.mark.parametrize(("proxy", "offline"), [("", True), ("http://proxy.example:3128", False)])
def test_a_hub_without_address_is_asked_by_a_proxy_alone_and_never_for_a_folder(mean_bert, monkeypatch, proxy, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("name not known")))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    offline_without_network()
    assert constants.HF_HUB_OFFLINE is offline
    monkeypatch.setattr(text, "offline_without_network", None)  # a call fails
    assert language_encoder(str(mean_bert), "cpu").dim == 16


def test_open_clip_encodes_pictures_as_its_model_does(clip):
    name, weights = clip.split("/", 1)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.load_state_dict(torch.load(weights))
    with torch.inference_mode():
        expected = normalised(model.eval().encode_image(preprocess(draw("red"))[None]).numpy())
    encoder = image_encoder(clip, "cpu")
    vectors = encoder.encode([draw("red"), draw("blue").convert("L"), Image.new("RGB", (7, 90), "green")])
    assert vectors.shape == (3, encoder.dim) == (3, 24) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:1], expected, atol=1e-6)


def test_the_fingerprint_of_open_clip_follows_model_and_weights(clip, tmp_path):
    name, weights = clip.split("/", 1)
    moved = Path(shutil.copy(weights, tmp_path))
    assert image_fingerprint(f"{name}/{moved}") == image_fingerprint(clip) == image_encoder(clip, "cpu").fingerprint
    moved.write_bytes(moved.read_bytes() + b"x")
    names = (clip, f"{name}/{moved}", f"other/{weights}", "ViT-B-32/openai", "ViT-B-32/laion2b_s34b_b79k", "pixel")
    assert len({json.dumps(image_fingerprint(name)) for name in names}) == len(names)


def test_weights_of_siglip_from_a_file_are_given_pictures_as_in_its_training(clip, monkeypatch):
    name, weights = "ViT-L-16-SigLIP-256", clip.split("/", 1)[1]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, open_clip.get_model_config("tiny-clip"))
    preprocess = image_encoder(f"{name}/{weights}", "cpu").preprocess
    wide = Image.new("RGB", (96, 32), "white")
    ImageDraw.Draw(wide).rectangle((0, 0, 31, 32), fill="black")
    pixels = preprocess(wide)
    assert torch.allclose(pixels[:, 16, 2], torch.tensor(-1.0)), "the black left third was cropped or scaled otherwise"
    assert torch.allclose(pixels[:, 16, 29], torch.tensor(1.0))


def test_a_picture_model_that_is_unknown_unavailable_or_damaged_is_refused_with_the_choices(clip, hub, tmp_path):
    (name, weights), cut, other = clip.split("/", 1), tmp_path / "cut.pt", tmp_path / "other.pt"
    cut.write_bytes(Path(weights).read_bytes()[:-1000])
    torch.save({"visual.proj": torch.zeros(3, 3)}, other)
    for model in (f"{name}/{cut}", f"{name}/{other}", "ViT-B-32/no-such-tag", "ViT-B-32/laion2b_s34b_b79k"):
        message = refusal(image_encoder, model)
        assert message.startswith(f"--img_encoder '{model}' cannot be loaded")
        assert "path-to-weights of a local file" in message and "'pixel'" in message
    for model in ("no-such-model/openai", "ViT-B-32"):
        message = refusal(image_encoder, model)
        assert f"{model!r} must be 'pixel', or MODEL/PRETRAINED or MODEL/path-to-weights with one of" in message


LEXICAL = {"language": "lexical", "image": None, "attributes": ("title", "brand")}
PIXEL = LEXICAL | {"language": None, "image": "pixel"}
BATCHES, BEGUN = 10, 6  # batches of the 20 items below, two each; those done before an interruption


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    """Return twenty items, two of whose pictures cannot be read."""
    write_prepared(tmp_path / "data", items=20, pictures=True)
    photos = sorted((tmp_path / "data/photos/tiny").iterdir())
    photos[0].write_text("<html>404</html>")
    photos[19].unlink()
    return load_catalog(tmp_path / "data", "tiny")


@pytest.fixture
def begun(catalog, tmp_path) -> Path:
    """Return the cache of a process that was interrupted after six of its ten batches of texts."""
    left = iter(range(BEGUN))

    def interrupted(self, prepared):
        return prepared if next(left, None) is not None else (_ for _ in ()).throw(KeyboardInterrupt)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LexicalEncoder, "forward", interrupted)
        item_features(catalog, **LEXICAL, batch_size=2, cache_root=tmp_path / "begun")
    return tmp_path / "begun"


def arrays(cache_root: Path) -> dict[str, bytes]:
    """Return name -> bytes of the finished arrays; nothing else but their sidecars and the locks may be left."""
    assert not [path for path in cache_root.rglob("*") if ".partial." in path.name or ".done." in path.name]
    return {path.name: path.read_bytes() for path in cache_root.rglob("*.npy")}


@pytest.mark.slow
def test_after_a_kill_only_missing_batches_are_encoded_to_the_same_bytes(catalog, encoded, tmp_path, capsys):
    feature_parts(catalog, **PIXEL, batch_size=2, cache_root=tmp_path / "whole")
    forward, left = PixelEncoder.forward, iter(range(BATCHES - 1))

    def killed(self, read):
        return forward(self, read) if next(left, None) is not None else os.kill(os.getpid(), signal.SIGKILL)

    work = functools.partial(feature_parts, catalog, **PIXEL, batch_size=2, cache_root=tmp_path / "killed")
    assert in_child(lambda: (setattr(PixelEncoder, "forward", killed), work())) == -signal.SIGKILL
    encoded.clear()
    work()
    assert len(encoded) == 1
    assert "9 of 10 batches were encoded before: going on" in capsys.readouterr().out
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "whole")
    [sidecar] = tmp_path.glob("killed/tiny/*.json")
    assert list(json.loads(sidecar.read_text())["broken"]) == ["B000000001", "B000000020"]


@pytest.mark.parametrize("change", ["batch size", "rows", "mark", "plan", "cut"])
def test_a_partial_file_is_used_only_for_the_same_batches_and_if_intact(catalog, begun, encoded, tmp_path, change):
    [partial], [done] = begun.glob("tiny/*.partial.npy"), begun.glob("tiny/*.done.npy")
    if change == "rows":  # of an unfinished batch, and as a power loss may leave them of a finished one
        np.lib.format.open_memmap(partial, "r+")[:] *= 0
    elif change == "mark":
        np.lib.format.open_memmap(done, "r+")[0] ^= 1
    elif change == "plan":
        partial.with_suffix(".json").unlink()
    elif change == "cut":
        partial.write_bytes(partial.read_bytes()[:-1])
    rows = item_features(catalog, **LEXICAL, batch_size=3 if change == "batch size" else 2, cache_root=begun)
    assert len(encoded) == {"batch size": 7, "mark": 5}.get(change, 10)
    np.testing.assert_array_equal(rows, item_features(catalog, **LEXICAL, cache_root=tmp_path / "new"))


def test_a_kill_before_the_final_rename_costs_no_batch_and_no_number_becomes_infinite(tmp_path):
    path, batches = tmp_path / "a.npy", in_order(5, 2)
    assert cache.begin(path, {"a": 1}, (5, 3), batches) == [0, 1, 2]
    writer = cache.Writer(path)
    for number, batch in enumerate(batches):
        writer.write(number, batch, np.full((len(batch), 3), number, np.float32))
    with pytest.raises(FloatingPointError, match="overflow"):
        writer.write(0, batches[0], np.full((2, 3), 65520, np.float32))
    writer.write(0, batches[0], np.full((2, 3), 65504, np.float32))
    cache.sidecar(path).write_text("{}")
    assert cache.begin(path, {"a": 1}, (5, 3), batches) == []
    header = cache.finish(path, {"key": {"k": 1}, "commit": "", "broken": {}}, batches)
    assert cache.read(path, {"k": 1}, None) == (header, "")
    assert np.load(path)[:, 0].tolist() == [65504, 65504, 1, 1, 2]


def test_a_second_process_waits_for_the_first_and_reads_its_features(catalog, tmp_path, monkeypatch):
    item_features(catalog, **LEXICAL, cache_root=tmp_path / "cache")
    [path] = tmp_path.glob("cache/tiny/*.npy")
    before, away, said = path.stat().st_mtime_ns, path.rename(tmp_path / "away.npy"), []

    def appears(line: str) -> None:
        said.append(line)
        away.rename(path)
        lock.release()

    monkeypatch.setattr(cache, "print_main", appears)
    with FileLock(path.with_suffix(".lock")) as lock:
        item_features(catalog, **LEXICAL, cache_root=tmp_path / "cache")
    assert (said, path.stat().st_mtime_ns) == ([f"another process is making {path}: waiting for it"], before)


def precisions(tmp_path: Path) -> list[str]:
    sidecars = [path.with_suffix(".json") for path in tmp_path.glob("cache/tiny/*.npy")]
    return sorted(json.loads(path.read_text())["key"]["precision"] for path in sidecars)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_auto_takes_what_a_run_was_trained_on_or_was_made_first(catalog, mean_bert, tmp_path, monkeypatch, precision):
    arguments = LEXICAL | {"language": str(mean_bert), "cache_root": tmp_path / "cache"}
    features = functools.partial(item_features, catalog, **arguments)
    monkeypatch.setattr(encode, "best_precision", lambda device: precision)
    fast = features(precision="auto")
    [first] = tmp_path.glob("cache/tiny/*.npy")
    exact = features(precision="fp32")
    [second] = set(tmp_path.glob("cache/tiny/*.npy")) - {first}
    assert (exact * fast).sum(axis=1).min() > 0.999 and not np.array_equal(exact, fast)
    np.testing.assert_array_equal(features(precision="auto", trained_on=[second.name]), exact)
    np.testing.assert_array_equal(features(precision="auto"), fast)
    second.unlink()
    first.write_bytes(b"")  # damaged, but its precision is known
    monkeypatch.setattr(encode, "best_precision", lambda device: "fp32")
    np.testing.assert_array_equal(features(precision="auto"), fast)
    assert precisions(tmp_path) == [precision]


def test_precision_belongs_to_the_cache_of_encoders_with_weights_alone(catalog, clip, tmp_path):
    for precision in ("fp32", "bf16", "auto"):
        arguments = LEXICAL | {"image": "pixel", "precision": precision, "cache_root": tmp_path / "built in"}
        feature_parts(catalog, **arguments)
    assert len(arrays(tmp_path / "built in")) == 2
    arguments = PIXEL | {"image": clip, "cache_root": tmp_path / "cache"}
    fp32, bf16 = (item_features(catalog, **arguments, precision=p) for p in ("fp32", "bf16"))
    assert not fp32[[0, 19]].any() and (fp32 * bf16)[1:19].sum(axis=1).min() > 0.999
    assert precisions(tmp_path) == ["bf16", "fp32"]


class KilledEncoder(PixelEncoder):
    def prepare(self, batch):  # as by a machine that is out of memory
        batch = list(batch)
        if batch[0].width > 16:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(batch)


@pytest.mark.slow
def test_a_worker_changes_no_bit_and_is_reported_with_a_remedy_if_it_is_killed(catalog, mean_bert, clip, tmp_path):
    draw("red").save(tmp_path / "large.png")
    pictures = [catalog.pictures[:7], catalog.pictures[7:]]
    batches = [*pictures, *pictures, [tmp_path / "large.png"]]  # a worker reads two batches ahead
    ahead = encode_batches(KilledEncoder(), ImageModality.read, batches, workers=1)
    for plain in encode_batches(PixelEncoder(), ImageModality.read, pictures):
        np.testing.assert_array_equal(next(ahead), plain)
    with pytest.raises(InputError, match=r"was killed \(DataLoader worker.*fewer --encoder_workers .* are kept"):
        list(ahead)
    texts = (language_encoder(str(mean_bert), "cpu"), [SHORT])
    for loaded, batch in (texts, (image_encoder(clip, "cpu"), [draw("red")])):
        there = pickle.loads(pickle.dumps(loaded.prepare))  # as in a worker
        np.testing.assert_array_equal(loaded.forward(there(loaded.tokenize(batch))), loaded.encode(batch))


def test_texts_of_similar_token_counts_share_a_batch():
    assert [batch.tolist() for batch in longest_first(["c", "aaaa", "bb", "aaa", "c"], 2)] == [[1, 3], [2, 0], [4]]


def test_features_are_mapped_from_the_file_copy_on_write(catalog, tmp_path):
    [rows] = feature_parts(catalog, **LEXICAL, cache_root=tmp_path / "cache")
    assert isinstance(rows, np.memmap)
    [file] = tmp_path.glob("cache/tiny/*.npy")
    before = file.read_bytes()
    torch.from_numpy(rows)[0] = 7.0  # torch warns of arrays that it may not write to
    rows.flush()
    assert file.read_bytes() == before
