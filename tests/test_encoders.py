"""Encode texts and pictures by frozen encoders: one batch exactly, a catalogue on disk through kills, by several ranks.

Hugging Face's `datasets` is installed beside ours, of the same name, so every test here shows that it does not disturb.
"""

import functools
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
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
from tests.prepared import (
    TINY_CLIP,
    WORDS,
    feature_parts,
    item_features,
    put_in_hub_cache,
    write_prepared,
    write_tiny_bert,
)

REPOSITORY = Path(__file__).parent.parent
MEAN, FIRST = {"pooling_mode_mean_tokens": True}, {"pooling_mode_cls_token": True}
LAST = {"pooling_mode_lasttoken": True, "include_prompt": True}
SHORT, LONG = "red tent", "warm light lamp stove knife kettle gloves bottle"


@pytest.fixture(scope="module")
def mean_bert(tmp_path_factory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoders") / "mean-bert", MEAN)


@pytest.fixture
def copied(mean_bert, tmp_path) -> Path:
    """Return a copy of the model, for a test to change."""
    return Path(shutil.copytree(mean_bert, tmp_path / "copy"))


def draw(colour: str, shape: str = "ellipse", at: int = 20) -> Image.Image:
    picture = Image.new("RGB", (96, 96), "white")
    getattr(ImageDraw.Draw(picture), shape)((at, at, at + 50, at + 50), fill=colour)
    return picture


def assert_unit(vectors: np.ndarray) -> None:
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def refusal(make, name: object) -> str:
    with pytest.raises(InputError) as raised:
        make(str(name), "cpu")
    return str(raised.value)


@pytest.mark.parametrize("size", [1e-44, 1, 3e38])
def test_normalised_vectors_fit_float16_at_any_scale(size):
    vectors = np.random.default_rng(0).uniform(-size, size, (100, 64)).astype(np.float32)
    with np.errstate(over="ignore"):
        assert np.abs(normalised(vectors)).max() < 2


def test_lexical_gives_the_same_vector_in_every_process():
    code = "from datasets.features.text import LexicalEncoder as E; print(E().encode(['red tent']).tobytes().hex())"
    environment = {**os.environ, "PYTHONHASHSEED": "12"}
    done = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, text=True, timeout=60)
    assert done.strip() == language_encoder("lexical", "cpu").encode(["red tent"]).tobytes().hex()


@pytest.mark.parametrize(
    ("text", "nearer", "farther"),
    [
        ("Red camping tent", "Green camping tent", "Chef knife, steel"),
        ("Red camping tent", "red CAMPING tent!", "Green camping tent"),  # case and punctuation count little
        ("camping tents", "camping tent", "camping lamp"),  # parts of words count
        ("light blue lamp", "light blue tent", "blue tent, light"),  # so does the order
    ],
)
def test_lexical_puts_like_texts_nearer_than_unlike_ones(text, nearer, farther):
    a, b, c = language_encoder("lexical", "cpu").encode([text, nearer, farther])
    assert a @ b > a @ c + 0.05


def test_lexical_damps_repetition_and_leaves_a_text_without_words_at_zero():
    once, repeated, empty = language_encoder("lexical", "cpu").encode(["tent lamp", "tent " * 50 + "lamp", "!?"])
    assert 0.69 < once @ repeated < 0.85  # 0.63 in proportion, 0.95 if repetition did not count
    assert not empty.any()


@pytest.mark.parametrize(
    ("picture", "nearer", "farther"),
    [
        (draw("red"), draw("red", at=24), draw("blue")),
        (draw("red"), draw("red", at=24), draw("red", "rectangle")),
        (draw("red"), draw("red").resize((300, 300)), draw("orange")),
        *((draw("red"), draw("red").convert(mode), draw("blue")) for mode in ("P", "CMYK")),
    ],
    ids=["colour", "shape", "size", "palette", "CMYK"],
)
def test_pixel_puts_like_pictures_nearer_than_unlike_ones(picture, nearer, farther):
    vectors = a, b, c = image_encoder("pixel", "cpu").encode([picture, nearer, farther])
    assert a @ b > a @ c
    assert_unit(vectors)
    np.testing.assert_array_equal(image_encoder("pixel", "cpu").encode([farther])[0], c)  # whatever the batch


def write_model(folder: Path, kind: str, pooling: dict | None) -> Path:
    """Write a random model of transformers that reads 12 tokens, with a tokenizer that pads on the left."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 4 + len(WORDS)}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 12, "initializer_range": 0.5}
    sizes |= {
        "MPNet": {"max_position_embeddings": 14},  # two of them are never used
        "Qwen3": {"head_dim": 8, "num_key_value_heads": 1},
        "T5Encoder": {"d_model": 16, "d_kv": 8, "d_ff": 32, "initializer_factor": 5.0},
    }.get(kind, {})
    config = getattr(transformers, f"{kind.removesuffix('Encoder')}Config")(**sizes)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    special |= {"cls_token": "<s>"} if kind == "MPNet" else {}
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)
    made.save_pretrained(folder)
    if pooling:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    return folder


def plain_states(model: Path, text: str, kind: str) -> np.ndarray:
    """Return the last hidden states of one text's tokens, [tokens, 16], without padding."""
    from transformers import AutoModel, AutoTokenizer, T5EncoderModel

    tokens = AutoTokenizer.from_pretrained(model)(text, truncation=True, max_length=12, return_tensors="pt")
    loaded = (T5EncoderModel if kind == "T5Encoder" else AutoModel).from_pretrained(model).eval()
    with torch.inference_mode():
        return loaded(**tokens).last_hidden_state[0].numpy()


def mean(states: np.ndarray) -> np.ndarray:
    return states.mean(axis=0)


def first(states: np.ndarray) -> np.ndarray:
    return states[0]


def last(states: np.ndarray) -> np.ndarray:
    return states[-1]


def modules(pooling_folder: str) -> str:
    kinds = {"Transformer": "", "Pooling": pooling_folder}
    return json.dumps([{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds.items()])


@pytest.mark.parametrize(
    ("kind", "pooling", "pools", "by"),
    [
        ("bert", MEAN, mean, "the mean of the tokens (1_Pooling/config.json)"),
        ("bert", FIRST, first, "the first token (2_Pooling/config.json)"),
        ("bert", None, first, "the first token (the default, as the model has no 1_Pooling/config.json)"),
        ("bert", {"pooling_mode": "mean"}, mean, "the mean of the tokens (1_Pooling/config.json)"),
        ("bert", {"pooling_mode": "cls"}, first, "the first token (1_Pooling/config.json)"),
        ("MPNet", LAST, last, "the last token (1_Pooling/config.json)"),
        ("Qwen3", LAST, last, "the last token (1_Pooling/config.json)"),
        ("GPT2", None, mean, "the mean of the tokens (the default, as the model has no 1_Pooling/config.json and"),
        ("T5Encoder", MEAN, mean, "the mean of the tokens (1_Pooling/config.json)"),
    ],
)
def test_a_text_is_its_tokens_pooled_as_the_model_says(tmp_path, kind, pooling, pools, by):
    model = write_tiny_bert(tmp_path / "m", pooling) if kind == "bert" else write_model(tmp_path / "m", kind, pooling)
    if "2_Pooling" in by:
        (model / "1_Pooling").rename(model / "2_Pooling")
        (model / "modules.json").write_text(modules("2_Pooling"))
    encoder = language_encoder(str(model), "cpu")
    assert encoder.note.startswith(f"{model} pools by {by}")
    assert encoder.note.endswith("and reads up to 12 tokens of a text")
    texts = (SHORT, LONG, 3 * LONG)
    vectors = encoder.encode(texts)  # padding changes nothing
    assert_unit(vectors)
    for sentence, vector in zip(texts, vectors, strict=True):
        expected = pools(plain_states(model, sentence, kind))
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize(
    "pooling",
    [{"pooling_mode_max_tokens": True}, MEAN | {"pooling_mode_max_tokens": True}, {"pooling_mode": "weighted"}, []],
    ids=["max", "mean and max", "another by its newer name", "no map"],
)
def test_a_pooling_that_is_not_supported_is_refused(copied, pooling):
    (copied / "1_Pooling/config.json").write_text(json.dumps(pooling))
    assert "pooling" in refusal(language_encoder, copied).lower()


def test_a_model_with_layers_after_its_pooling_is_refused(copied):
    (copied / "modules.json").write_text(modules("1_Pooling").replace("]", ', {"type": "models.Dense"}]'))
    assert "Dense" in refusal(language_encoder, copied)


def test_a_long_text_is_cut_where_the_model_says(copied):
    (copied / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 4}))
    cut, whole, other = language_encoder(str(copied), "cpu").encode(["lamp lamp knife", "lamp lamp", "lamp knife"])
    np.testing.assert_allclose(cut, whole, atol=1e-6)
    assert np.abs(cut - other).max() > 1e-3  # the last word is still read


def test_the_fingerprint_follows_the_files_that_are_loaded_not_the_folders_name(mean_bert, copied):
    original = language_fingerprint(str(mean_bert))
    (copied / ".git").mkdir()
    for name in (".DS_Store", ".git/HEAD", "README.md", "notes.txt"):
        (copied / name).write_text("x")
    assert language_fingerprint(str(copied)) == original == language_encoder(str(mean_bert), "cpu").fingerprint
    for name in ("model.safetensors", "tokenizer.json", "config.json", "1_Pooling/config.json"):
        content = (copied / name).read_bytes()
        (copied / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert language_fingerprint(str(copied)) != original, name
        (copied / name).write_bytes(content)


@pytest.mark.parametrize(
    "name", ["nobody/no-such-encoder", "nobody/no-such-encoder@v1", "./no/such/folder", "x/" + "x" * 300]
)
def test_an_unavailable_encoder_is_refused_with_the_offline_choices(name):
    message = refusal(language_encoder, name)
    assert message.startswith(f"--language_encoder {name!r} cannot be loaded")
    assert "local folder" in message and "'lexical'" in message


def cut_weights(model: Path) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def drop_tokenizer(model: Path) -> None:
    for path in (*model.glob("tokenizer*"), model / "vocab.txt"):
        path.unlink()


def change_config(model: Path, **values) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def bring_code(model: Path) -> None:
    change_config(model, model_type="strange", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    (model / "own.py").write_text(f"open({str(model / 'run')!r}, 'w')\n")


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        drop_tokenizer,  # or every word would be unknown
        lambda model: (model / "config.json").unlink(),
        lambda model: change_config(model, num_hidden_layers=4),  # or the missing layers would be random
        bring_code,  # which is never run
    ],
)
def test_an_incomplete_local_encoder_is_refused(copied, damage):
    damage(copied)
    assert refusal(language_encoder, copied).startswith(f"--language_encoder {str(copied)!r} cannot be loaded")
    assert not (copied / "run").exists()


def test_the_unused_pooler_needs_no_weights(mean_bert, copied):
    from safetensors.torch import load_file, save_file

    weights = load_file(copied / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, copied / "model.safetensors", {"format": "pt"})
    expected = language_encoder(str(mean_bert), "cpu").encode([LONG])
    np.testing.assert_array_equal(language_encoder(str(copied), "cpu").encode([LONG]), expected)


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
def test_a_hub_that_does_not_resolve_is_asked_only_by_a_proxy(monkeypatch, proxy, offline):
    from huggingface_hub import constants

    def unresolved(*_):
        raise OSError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    offline_without_network()
    assert constants.HF_HUB_OFFLINE is offline


def test_a_local_folder_needs_no_network(mean_bert, monkeypatch):
    monkeypatch.setattr(text, "offline_without_network", None)  # a call fails
    assert language_encoder(str(mean_bert), "cpu").dim == 16


def test_open_clip_encodes_pictures_as_its_model_does(clip):
    import open_clip

    name, weights = clip.split("/", 1)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.load_state_dict(torch.load(weights))
    with torch.inference_mode():
        expected = normalised(model.eval().encode_image(preprocess(draw("red"))[None]).numpy())
    encoder = image_encoder(clip, "cpu")
    vectors = encoder.encode([draw("red"), draw("blue").convert("L"), Image.new("RGB", (7, 90), "green")])
    assert vectors.shape == (3, encoder.dim) == (3, 24)
    assert_unit(vectors)
    np.testing.assert_allclose(vectors[:1], expected, atol=1e-6)


def test_the_fingerprint_of_open_clip_follows_model_and_weights(clip, tmp_path):
    name, weights = clip.split("/", 1)
    moved = Path(shutil.copy(weights, tmp_path))
    assert image_fingerprint(f"{name}/{moved}") == image_fingerprint(clip) == image_encoder(clip, "cpu").fingerprint
    moved.write_bytes(moved.read_bytes() + b"x")
    names = (clip, f"{name}/{moved}", f"other/{weights}", "ViT-B-32/openai", "ViT-B-32/laion2b_s34b_b79k", "pixel")
    assert len({json.dumps(image_fingerprint(name)) for name in names}) == len(names)


def test_weights_of_siglip_from_a_file_are_given_pictures_as_in_its_training(clip, monkeypatch):
    """SigLIP was trained on whole pictures squashed to a square, with pixels from -1 to 1; CLIP on centre crops."""
    import open_clip

    name, weights = "ViT-L-16-SigLIP-256", clip.split("/", 1)[1]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, TINY_CLIP)  # as small, under its name
    preprocess = image_encoder(f"{name}/{weights}", "cpu").preprocess
    wide = Image.new("RGB", (96, 32), "white")
    ImageDraw.Draw(wide).rectangle((0, 0, 31, 32), fill="black")
    pixels = preprocess(wide)
    assert torch.allclose(pixels[:, 16, 2], torch.tensor(-1.0)), "the black left third was cropped or scaled otherwise"
    assert torch.allclose(pixels[:, 16, 29], torch.tensor(1.0))


@pytest.mark.parametrize("name", ["no-such-model/openai", "ViT-B-32", ""])
def test_an_unknown_picture_model_is_refused_with_the_accepted_forms(name):
    message = refusal(image_encoder, name)
    assert message.startswith(f"--img_encoder {name!r} must be 'pixel', or MODEL/PRETRAINED or MODEL/path-to-weights")


@pytest.mark.parametrize("content", ["unknown", "not cached", "empty", "cut", "another model"])
def test_unavailable_or_damaged_picture_weights_are_refused_with_the_offline_choices(clip, hub, tmp_path, content):
    (name, weights), path = clip.split("/", 1), tmp_path / "weights.pt"
    if content == "another model":
        torch.save({"visual.proj": torch.zeros(3, 3)}, path)
    elif content in ("empty", "cut"):
        path.write_bytes(b"" if content == "empty" else Path(weights).read_bytes()[:-1000])
    else:
        name, path = "ViT-B-32", {"unknown": "no-such-tag", "not cached": "laion2b_s34b_b79k"}[content]
    message = refusal(image_encoder, f"{name}/{path}")
    assert message.startswith(f"--img_encoder '{name}/{path}' cannot be loaded")
    assert "path-to-weights of a local file" in message and "'pixel'" in message


LEXICAL = {"language": "lexical", "image": None, "attributes": ("title", "brand")}
PIXEL = LEXICAL | {"language": None, "image": "pixel"}
BATCHES, BEGUN = 10, 6  # batches of the 20 items below, two each; those done before an interruption
RUN = """
import os, signal, sys
from pathlib import Path
from datasets.catalog import load_catalog
from datasets.features.image import PixelEncoder
from datasets.features.text import LexicalEncoder
from common.errors import InputError
from tests.prepared import feature_parts
data_root, cache_root, language, until = sys.argv[1:]
seen = 0
def watched(forward):
    def counting(self, prepared):
        global seen
        seen += 1
        if seen > int(until):
            os.kill(os.getpid(), signal.SIGKILL)
        print("encoded a batch\\n", end="", flush=True)
        return forward(self, prepared)
    return counting
for encoder in (LexicalEncoder, PixelEncoder):
    encoder.forward = watched(encoder.forward)
arguments = {"language": language or None, "attributes": ("title", "brand"), "cache_root": Path(cache_root)}
catalog = load_catalog(data_root, "tiny")
parts = feature_parts(catalog, **arguments, image="pixel", batch_size=2)
print(f"features {[part.shape for part in parts]}\\n", end="", flush=True)  # in one piece, beside another rank's
try:
    feature_parts(catalog, **arguments, files=("absent=absent.npy",))
except InputError as error:
    print(f"refused: {error}\\n", end="", flush=True)
"""


@pytest.fixture
def data_root(tmp_path) -> Path:
    """Twenty items, two of whose pictures cannot be read."""
    folder = write_prepared(tmp_path / "data", items=20, pictures=True)
    photos = sorted((folder.parent / "photos/tiny").iterdir())
    photos[0].write_text("<html>404</html>")
    photos[19].unlink()
    return folder.parent


@pytest.fixture
def catalog(data_root) -> Catalog:
    return load_catalog(data_root, "tiny")


@pytest.fixture
def encoded(monkeypatch) -> list:
    """Return a list that collects the batches given to the built-in encoders."""
    batches: list = []
    for kind in (LexicalEncoder, PixelEncoder):
        forward = kind.forward
        counted = functools.partial(lambda forward, self, read: batches.append(read) or forward(self, read), forward)
        monkeypatch.setattr(kind, "forward", lambda self, read, counted=counted: counted(self, read))
    return batches


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


def start(data_root: Path, cache_root: Path, language="", until=1000, rank=0, ranks=1, port=0) -> subprocess.Popen:
    """Make features in a process of its own, killed after `until` batches."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *map(str, (data_root, cache_root, language, until))],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def arrays(cache_root: Path) -> dict[str, bytes]:
    """Return name -> bytes of the finished arrays; nothing else but their sidecars and the locks may be left."""
    assert not [path for path in cache_root.rglob("*") if ".partial." in path.name or ".done." in path.name]
    return {path.name: path.read_bytes() for path in cache_root.rglob("*.npy")}


@pytest.mark.slow
def test_after_a_kill_only_missing_batches_are_encoded_to_the_same_bytes(catalog, data_root, encoded, tmp_path, capsys):
    feature_parts(catalog, **PIXEL, batch_size=2, cache_root=tmp_path / "whole")
    killed = start(data_root, tmp_path / "killed", until=BATCHES - 1)
    assert killed.communicate(timeout=60)[0].count("encoded a batch") == BATCHES - 1
    assert killed.returncode == -signal.SIGKILL
    encoded.clear()
    feature_parts(catalog, **PIXEL, batch_size=2, cache_root=tmp_path / "killed")
    assert len(encoded) == 1
    assert "9 of 10 batches were encoded before: going on" in capsys.readouterr().out
    assert arrays(tmp_path / "killed") == arrays(tmp_path / "whole")
    [sidecar] = tmp_path.glob("killed/tiny/*.json")
    first, last = json.loads(sidecar.read_text())["broken"].items()
    assert first[0] == "B000000001" and "cannot identify image file" in first[1]
    assert last[0] == "B000000020" and "No such file" in last[1]


@pytest.mark.slow
def test_two_ranks_finish_the_cache_of_one_process_and_end_at_an_input_error(catalog, data_root, begun, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [start(data_root, begun, "lexical", rank=rank, ranks=2, port=port) for rank in range(2)]
    first, second = (rank.communicate(timeout=300)[0] for rank in ranks)
    whole = feature_parts(catalog, **LEXICAL | {"image": "pixel"}, batch_size=2, cache_root=tmp_path / "whole")
    assert len(whole) == 2 and arrays(begun) == arrays(tmp_path / "whole")
    assert first.count("encoded a batch") + second.count("encoded a batch") == BATCHES - BEGUN + BATCHES
    for said in (first, second):
        assert said.count("features [(20, 1024), (20, 240)]") == 1
        assert said.count("refused: absent.npy does not exist") == 1
    assert ("2 of 20 items have no readable picture" in first, "no readable picture" in second) == (True, False)


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
    assert cache.unfinished(path, batches) == [0]
    writer.write(0, batches[0], np.full((2, 3), 65504, np.float32))
    cache.sidecar(path).write_text("{}")
    assert cache.read(path, {}, None) == (None, "")
    assert cache.begin(path, {"a": 1}, (5, 3), batches) == []
    header = cache.finish(path, {"key": {"k": 1}, "commit": "", "broken": {}}, batches)
    assert cache.read(path, {"k": 1}, None) == (header, "")
    assert np.load(path)[:, 0].tolist() == [65504, 65504, 1, 1, 2]


def test_features_of_an_earlier_version_in_float32_are_used_as_they_are(catalog, tmp_path, monkeypatch):
    arguments = LEXICAL | {"image": "pixel", "cache_root": tmp_path / "cache"}
    with monkeypatch.context() as earlier:
        earlier.setattr(cache, "DTYPE", np.float32)
        text, _ = feature_parts(catalog, **arguments)
        next(tmp_path.glob("cache/tiny/image-*.npy")).unlink()  # the picture's is made by this version
    before = arrays(tmp_path / "cache")
    parts = feature_parts(catalog, **arguments)
    assert [part.dtype for part in parts] == [np.float32, np.float16]
    assert before.items() < arrays(tmp_path / "cache").items()
    np.testing.assert_array_equal(parts[0], text)


def test_a_second_process_waits_for_the_first_and_reads_its_features(catalog, tmp_path, monkeypatch):
    from filelock import FileLock

    item_features(catalog, **LEXICAL, cache_root=tmp_path / "cache")
    [path] = tmp_path.glob("cache/tiny/*.npy")
    away, said = path.rename(tmp_path / "away.npy"), []

    def appears(line: str) -> None:
        said.append(line)
        away.rename(path)
        lock.release()

    monkeypatch.setattr(cache, "print_main", appears)
    with FileLock(path.with_suffix(".lock")) as lock:
        before = away.stat().st_mtime_ns
        item_features(catalog, **LEXICAL, cache_root=tmp_path / "cache")
    assert said == [f"another process is making {path}: waiting for it"]
    assert path.stat().st_mtime_ns == before


def precisions(tmp_path: Path) -> list[str]:
    """Return the precision of each cached array."""
    sidecars = [path.with_suffix(".json") for path in tmp_path.glob("cache/tiny/*.npy")]
    return sorted(json.loads(path.read_text())["key"]["precision"] for path in sidecars)


@pytest.fixture
def features(catalog, mean_bert, tmp_path):
    """Return item_features of the tiny BERT; its precision is left to the caller."""
    arguments = LEXICAL | {"language": str(mean_bert), "cache_root": tmp_path / "cache"}
    return functools.partial(item_features, catalog, **arguments)


@pytest.mark.parametrize(("there", "best"), [("fp32", "bf16"), ("bf16", "fp16")])
def test_auto_takes_the_cached_precision_even_if_damaged(features, tmp_path, monkeypatch, there, best):
    made = features(precision=there)
    monkeypatch.setattr(encode, "best_precision", lambda device: best)
    np.testing.assert_array_equal(features(precision="auto"), made)
    next(tmp_path.glob("cache/tiny/*.npy")).write_bytes(b"")
    np.testing.assert_array_equal(features(precision="auto"), made)
    assert precisions(tmp_path) == [there]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_auto_is_nearly_as_exact_and_prefers_what_a_run_was_trained_on(features, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(encode, "best_precision", lambda device: precision)
    fast = features(precision="auto")
    [first] = tmp_path.glob("cache/tiny/*.npy")
    exact = features(precision="fp32")
    [second] = set(tmp_path.glob("cache/tiny/*.npy")) - {first}
    np.testing.assert_allclose(np.linalg.norm(fast, axis=1), 1, rtol=np.finfo(np.float16).eps)
    assert (exact * fast).sum(axis=1).min() > 0.999 and not np.array_equal(exact, fast)
    np.testing.assert_array_equal(features(precision="auto", trained_on=[second.name]), exact)
    np.testing.assert_array_equal(features(precision="auto"), fast)  # which was made first


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
    """An encoder whose worker is killed at a large picture, as by a machine that is out of memory."""

    def prepare(self, batch):
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
        assert plain.any()
    with pytest.raises(InputError, match=r"was killed \(DataLoader worker.*fewer --encoder_workers .* are kept"):
        list(ahead)
    for loaded, batch in (
        (language_encoder(str(mean_bert), "cpu"), [SHORT]),
        (image_encoder(clip, "cpu"), [draw("red")]),
    ):
        there = pickle.loads(pickle.dumps(loaded.prepare))  # as in a worker
        np.testing.assert_array_equal(loaded.forward(there(loaded.tokenize(batch))), loaded.encode(batch))


def test_texts_of_similar_token_counts_share_a_batch():
    assert [batch.tolist() for batch in longest_first(["c", "aaaa", "bb", "aaa", "c"], 2)] == [[1, 3], [2, 0], [4]]


def test_features_are_mapped_from_the_file_copy_on_write(catalog, tmp_path):
    [rows] = feature_parts(catalog, language="lexical", attributes=("title",), cache_root=tmp_path / "cache")
    assert isinstance(rows, np.memmap)
    [file] = tmp_path.glob("cache/tiny/*.npy")
    before = file.read_bytes()
    torch.from_numpy(rows)[0] = 7.0  # torch warns of arrays that it may not write to
    rows.flush()
    assert file.read_bytes() == before
    assert time.time() - json.loads(file.with_suffix(".json").read_text())["made"] < 600
