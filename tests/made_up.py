"""Small inputs of tests: models and catalogues, exports, prepared datasets and encoders, raw files."""

import dataclasses
import gzip
import json
import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.files import sha256, write_json
from config import Config, FeatureSettings, ModelSettings
from datasets.catalog import Catalog, Sequences, load_catalog
from datasets.features.load import load_features
from model import FMRLRec
from model.extensions.objective import TIMES
from serving import Recommender
from serving.export import export_size
from trainer.runs import WEIGHTS, read_log
from trainer.training_run import RunLog, TrainingRun

NEAR_1 = (0.9, 0.999)  # a ring of eigenvalues that forget slowly: every step of a history counts


def with_random_weights(model: FMRLRec, largest: float = 0.4) -> FMRLRec:
    """Draw every weight of a model anew, masked ones too, but its eigenvalues, and return it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("nu_log", "theta_log")):
                parameter.uniform_(-largest, largest)
    return model


def random_model(
    sizes: tuple[int, ...],
    num_blocks: int = 2,
    *,
    num_items: int = 30,
    features: np.ndarray | Sequence[np.ndarray] | None = None,
    ring: tuple[float, float] = (0.3, 0.9),
    seed: int = 0,
    history_bias: Sequence[float] = (),
    **settings,
) -> FMRLRec:
    """Return a model of random weights with eigenvalues on the ring. history_bias: of each size; empty: none."""
    torch.manual_seed(seed)
    parts = [features] if isinstance(features, np.ndarray | torch.Tensor) else features
    model = FMRLRec(
        num_items,
        parts and [torch.as_tensor(part) for part in parts],
        ModelSettings(
            mrl_hidden_sizes=sizes,
            lru_num_blocks=num_blocks,
            lru_r_min=ring[0],
            lru_r_max=ring[1],
            history_bias=bool(history_bias),
            **settings,
        ),
    )
    model = with_random_weights(model).eval()
    if model.history_bias is not None:
        model.history_bias.data = torch.tensor(history_bias) / TIMES
    return model


def as_sequences(histories: Sequence[Sequence[int]]) -> Sequences:
    """Return the histories, one per user, as Sequences."""
    return Sequences(np.concatenate(histories).astype(np.int64), np.cumsum([0, *map(len, histories)]))


def made_up_catalog(num_items: int) -> Catalog:
    """Return a catalogue of items A1, A2, ... with the titles Item 1, Item 2, ..."""
    ids, records = [f"A{i}" for i in range(1, num_items + 1)], [{"title": f"Item {i}"} for i in range(1, num_items + 1)]
    return Catalog("made-up", as_sequences([[1]]), ids, records, None, Path("photos"), [])


def made_up_run(folder: Path, config: Config) -> TrainingRun:
    """Return a run in a folder, with the log in that folder."""
    folder.mkdir(exist_ok=True)
    run = TrainingRun(config, {})
    run.folder, run.log = folder, RunLog(folder, read_log(folder))
    return run


def write_plane(run: Path, sizes: Sequence[int], num_items: int) -> None:
    """Write a cut.json of made-up metrics of all encoder sizes and table widths, as experiments.cut does."""
    plane = [
        {"size": m, "width": w, "table_bytes": 4 * (num_items + 1) * w, "encoder_ms": m / 100}
        | {protocol: {"NDCG@10": m * w / 10_000, "Recall@10": m * w / 5_000} for protocol in ("kept", "masked")}
        for m in sizes
        for w in sizes
        if w <= m
    ]
    write_json(run / "cut.json", {"kept": {}, "masked": {}, "weights": sha256(run / WEIGHTS), "plane": plane})


class NoUpdate:
    """An optimizer that leaves weights and gradients as they are."""

    def step(self) -> None: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...


# ------------------------------------------------------------------------------------------------------------- exported
# Small exports, a shop that is exported, and comparisons of answers.

ENGINES, KINDS = ("torch", "onnx"), ("none", "float16", "int8")
ATTRIBUTES = ("title", "price", "brand", "categories")
N, MAX_LEN = 20, 5
# Ids neither in order nor of one length.
IDS = [f"{'QBXA'[i % 4]}{(i * 7) % N}{'-long' * (i % 3)}" for i in range(N)]

# Two engines, or two ways to the same state, sum in another order; with int8 that can move an activation by one of its
# 127 steps.
SAME = {"none": 1e-5, "float16": 1e-5, "int8": 5e-3}


def write_export(
    folder: Path,
    model: FMRLRec,
    catalog: Catalog | None = None,
    *,
    size: int | None = None,
    max_len: int = 7,
    quantize: str = "none",
    format: str = "onnx",
    index: str | None = None,
    overwrite: bool = False,
    cut: dict | None = None,
    **settings,
) -> Path:
    """Export a model at a size, its largest by default.

    cut: table_width and users of `export_size`. settings: of the run, where they matter.
    """
    by_text = {"use_language_encoder": hasattr(model.items, "projection"), "use_img_encoder": False}
    config = Config(
        **{"language_encoder": "lexical", "img_encoder": "pixel", **by_text, **settings},
        dataset_code="made-up",
        mrl_hidden_sizes=model.sizes,
        lru_max_len=max_len,
        lru_num_blocks=len(model.blocks),
    )
    export_size(
        model,
        size or model.sizes[-1],
        folder,
        config=config,
        catalog=catalog or made_up_catalog(model.num_items),
        run=folder.parent / "no-such-run",
        format=format,
        quantize=quantize,
        index=index,
        overwrite=overwrite,
        **(cut or {}),
    )
    return folder


class Shop:
    """A dataset of 20 products with texts and pictures, a model that reads them, and its exports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        catalog = load_catalog(write_prepared(root, users=5, items=N, pictures=True).parent, "tiny")
        self.catalog = dataclasses.replace(catalog, asins=IDS)
        self.features = item_features(
            self.catalog, language="lexical", image="pixel", attributes=ATTRIBUTES, cache_root=root
        )
        self.model = random_model((4, 12), num_items=N, features=np.split(self.features, [1024], axis=1), ring=NEAR_1)
        self.records = [
            record | {"picture": str(picture)}
            for record, picture in zip(self.catalog.metadata, self.catalog.pictures, strict=True)
        ]

    def export(self, kind: str = "none", format: str = "onnx") -> Path:
        folder = self.root / f"{kind}-{format}"
        if not folder.exists():
            run = {"use_img_encoder": True, "item_attributes": ATTRIBUTES}
            write_export(folder, self.model, self.catalog, max_len=MAX_LEN, quantize=kind, format=format, **run)
        return folder

    def open(self, engine: str, kind: str = "none") -> Recommender:
        return Recommender.from_pretrained(self.export(kind), engine, threads=1)

    def first(self, engine: str, kind: str, n: int) -> Recommender:
        """Open the same model with a catalogue of the first n products."""
        folder = self.root / f"{kind}-first-{n}"
        if not folder.exists():
            model = random_model(
                (4, 12), num_items=n, features=np.split(self.features[:n], [1024], axis=1), ring=NEAR_1
            )
            model.load_state_dict(self.model.state_dict())
            catalog = dataclasses.replace(self.catalog, asins=IDS[:n], metadata=self.catalog.metadata[:n])
            write_export(folder, model, catalog, max_len=MAX_LEN, quantize=kind, use_img_encoder=True)
        return Recommender.from_pretrained(folder, engine, threads=1)

    def scores(self, history: list[int]) -> np.ndarray:
        """Return the model's own scores [N+1] after a history."""
        tokens = torch.tensor(history or [0])
        with torch.no_grad():
            table = self.model.item_table()
            return (table @ self.model.encode(table[tokens], torch.arange(len(tokens)), len(tokens))[-1]).numpy()


def assert_same_answer(actual, expected, tolerance=1e-5):
    """Compare scores up to `tolerance` times the largest, and items unless their scores are as close."""
    unit = tolerance * np.abs(expected.scores).max()
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=0, atol=unit)
    of_item = dict(zip(expected.numbers, expected.scores, strict=True))
    for item, score in zip(actual.numbers[:-1], actual.scores, strict=False):  # the last may be a tie with the next
        assert score == pytest.approx(of_item[item], abs=2 * unit)


def everything(r: Recommender, history, **options):
    """Return the ranking of all items after a history."""
    [answer] = r.recommend([history], **{"top_k": len(r), "exclude_history": False} | options)
    return answer


# ------------------------------------------------------------------------------------------------------ prepared inputs
# A prepared dataset, a text encoder, a CLIP of a few hundred weights; a training that is cut off, a forked process.

WORDS = ("red", "warm", "light", "tent", "lamp", "stove", "knife", "kettle", "gloves", "bottle")
BRANDS = ("Alder", "Birch &amp; Co.", "Corvid")
COLOURS = ((200, 40, 40), (40, 160, 60), (50, 80, 190), (230, 200, 60), (120, 60, 160))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def feature_parts(
    catalog: Catalog,
    *,
    language: str | None = None,
    image: str | None = None,
    attributes: tuple[str, ...] = ("title", "price", "brand", "categories"),
    precision: str = "fp32",
    batch_size: int = 32,
    files: tuple[str, ...] = (),
    cache_root: Path = Path("data/features"),
    **arguments: Any,
) -> list[np.memmap]:
    """Return the features [N, F] of each modality. language, image: encoders, None for a branch that is off."""
    settings = FeatureSettings(
        use_language_encoder=language is not None,
        language_encoder=language or "",
        item_attributes=attributes,
        use_img_encoder=image is not None,
        img_encoder=image or "",
        features=files,
        features_root=str(cache_root),
        encoder_precision=precision,
        encoder_batch_size=batch_size,
        encoder_workers=0,
    )
    return load_features(settings, catalog, "cpu", **arguments)


def item_features(catalog: Catalog, **arguments: Any) -> np.ndarray | None:
    """Return `feature_parts` side by side, [N, F] float32; None without features."""
    parts = feature_parts(catalog, **arguments)
    return np.concatenate(parts, axis=1, dtype=np.float32) if parts else None


def write_prepared(
    data_root: Path, name: str = "tiny", users: int = 30, items: int = 20, pictures: bool = False, seed: int = 0
) -> Path:
    """Write a prepared dataset as datasets/catalog.py reads it, and return its folder <data_root>/<name>.

    Histories are random, without repetition, 3 to 8 items long or as long as there are items. Every item has a title
    and categories, two of three have a price and a brand. With `pictures` each has a picture of 16 x 16 pixels.
    """
    rng = np.random.default_rng(seed)
    folder, photos = Path(data_root) / name, Path(data_root) / "photos" / name
    folder.mkdir(parents=True, exist_ok=True)
    asins = [f"B{i:09d}" for i in range(1, items + 1)]
    histories = [rng.permutation(items)[: rng.integers(3, 9)] + 1 for _ in range(users)]
    lines = [f"{user} {' '.join(map(str, history))}\n" for user, history in enumerate(histories, start=1)]
    (folder / "sequential_data.txt").write_text("".join(lines), encoding="utf-8")
    write_maps(folder, {asin: str(i) for i, asin in enumerate(asins, start=1)}, users)
    write_metadata(folder, [_record(asin, i, rng) for i, asin in enumerate(asins)])
    if pictures:
        photos.mkdir(parents=True, exist_ok=True)
        for i, asin in enumerate(asins):
            draw_picture(photos / f"{asin}.png", COLOURS[i % len(COLOURS)], corner=i % 12)
        write_item2img(folder, {asin: f"{asin}.png" for asin in asins})
    return folder


def write_maps(folder: Path, item2id: dict[str, str], users: int = 1) -> None:
    """Write datamaps.json with these items and users 1..users."""
    maps = {"user2id": {f"USER{u}": str(u) for u in range(1, users + 1)}, "item2id": item2id}
    (folder / "datamaps.json").write_text(json.dumps(maps), encoding="utf-8")


def write_metadata(folder: Path, records: list[dict | str]) -> None:
    """Write meta.json.gz: dicts as Python literals, as Amazon did, and strings as they are."""
    lines = "".join((record if isinstance(record, str) else repr(record)) + "\n" for record in records)
    (folder / "meta.json.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))


def write_item2img(folder: Path, item2img: object) -> None:
    """Write item2img.json."""
    (folder / "item2img.json").write_text(json.dumps(item2img), encoding="utf-8")


def draw_picture(path: Path, colour: tuple[int, int, int], corner: int = 4, side: int = 16) -> None:
    """Write a square of the colour on white that begins at `corner`."""
    from PIL import Image

    pixels = np.full((side, side, 3), 255, dtype=np.uint8)
    pixels[corner : corner + side // 2, corner : corner + side // 2] = colour
    Image.fromarray(pixels).save(path)


def _record(asin: str, i: int, rng: np.random.Generator) -> dict:
    title = " ".join(rng.choice(WORDS, size=3, replace=False)).title()
    record = {"asin": asin, "title": title, "categories": [["Shop", WORDS[i % len(WORDS)].title()]]}
    if i % 3:
        record |= {"price": 1.5 + i, "brand": BRANDS[i % len(BRANDS)]}
    return record


def write_tiny_bert(folder: Path, pooling: dict | None = None, seed: int = 0, positions: int = 12) -> Path:
    """Write a random BERT of width 16 that reads `positions` tokens, and its tokenizer, in the format of transformers.

    pooling: content of its 1_Pooling/config.json; None writes no such file.
    """
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "text", "title", ":")
    vocabulary = [*special, *WORDS, *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": len(vocabulary), "max_position_embeddings": positions}
    config = BertConfig(**sizes, initializer_range=0.5)  # far enough from 0 that attention depends on every token
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)  # a text encoder needs no pooler
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text(json.dumps(pooling), encoding="utf-8")
    return folder


TINY_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.5},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def write_tiny_clip(folder: Path) -> str:
    """Write a small random CLIP and return its name for open_clip, tiny-clip/<weights>."""
    import open_clip

    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder / "tiny-clip.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.create_model("tiny-clip").state_dict(), folder / "weights.pt")
    return f"tiny-clip/{folder / 'weights.pt'}"


def put_in_hub_cache(hub: Path, name: str, commit: str, model: Path) -> None:
    """Copy a model's folder into a Hugging Face cache, like a download of `name` at `commit`."""
    repository = hub / f"models--{name.replace('/', '--')}"
    shutil.copytree(model, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text(commit, encoding="utf-8")
    if not (model / "1_Pooling").exists():  # an empty file marks a file that the hub lacks
        absent = repository / ".no_exist" / commit / "1_Pooling"
        absent.mkdir(parents=True)
        (absent / "config.json").touch()


@contextmanager
def cut_off_after(epochs: int) -> Iterator[None]:
    """Interrupt the training in this context after `epochs` epochs, and catch the KeyboardInterrupt."""
    from trainer.trainer import Trainer

    keep = Trainer._keep

    def interrupt(self, *arguments):
        keep(self, *arguments)
        if self.progress.epoch == epochs:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_keep", interrupt)
        yield


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process and return its exit status, negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------------------------------------------------------ raw
# Raw files as Amazon publishes them.


def write_raw(path: Path, records: Iterable[dict[str, Any] | str], literals: bool = False) -> Path:
    """Write a line per record, as JSON or Python literals (2014's metadata), gzipped if the name ends in .gz.

    A text is written as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write = repr if literals else json.dumps
    data = "".join((r if isinstance(r, str) else write(r)) + "\n" for r in records).encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(data, compresslevel=1, mtime=0) if path.suffix == ".gz" else data)
    return path


def review(user: str, item: str, time: int, rating: float = 5.0) -> dict[str, Any]:
    """Return a review of 2014 or 2018."""
    return {"reviewerID": user, "asin": item, "overall": rating, "reviewText": "fine", "unixReviewTime": time}


def reviews_of(sequences: list[tuple[str, list[str]]], seed: int = 0) -> list[dict[str, Any]]:
    """Return reviews in a file's order that give these histories (user, items), with noise that the 5-core removes.

    The noise: users with 4 reviews of known items, and an item with 4 reviews by known users.

    The users' first lines are in the order given. A user's reviews are not in the order of time, but those of the same
    time are in the order of the history.
    """
    rng = random.Random(seed)
    lines: list[tuple[float, dict[str, Any]]] = []  # place in the file, review
    for row, (user, items) in enumerate(sequences):
        times = sorted(rng.choice(range(10**9, 10**9 + 86_400 * len(items), 86_400)) for _ in items)  # days: with ties
        records = [review(user, item, time) for item, time in zip(items, times, strict=True)]
        records.sort(key=lambda record: hash((record["unixReviewTime"], seed)))  # stable: ties stay in order
        places = [float(row), *sorted(rng.uniform(row, len(sequences)) for _ in records[1:])]
        lines += zip(places, records, strict=True)
    known = sorted({item for _, items in sequences for item in items})
    noise = [review(f"NOISE{n // 4}", rng.choice(known), rng.randrange(1, 14 * 10**8)) for n in range(80)]
    noise += [review(user, "RARE", 1) for user, _ in sequences[:4]]
    lines += [(rng.uniform(5, len(sequences)), record) for record in noise]
    return [record for _, record in sorted(lines, key=lambda line: line[0])]
