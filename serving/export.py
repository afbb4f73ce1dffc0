"""Export sizes of a trained run, each as a folder that serves recommendations, or as the archives of a release.

python -m serving.export --dataset_code demo --size 64 --out exports/demo-64     # the newest run on demo
python -m serving.export --run experiments/runs/beauty/... --size all --format onnx --quantize int8
python -m serving.export --run experiments/runs/beauty/...-lrurec      # a baseline: lrurec, sasrec, itemknn, popularity
python -m serving.export --max_bytes 4MB --max_latency_ms 1      # the best size that fits, from the run's deploy.json
python -m serving.export --dataset_code demo --format onnx --release releases/demo      # archives of all sizes
"""

from __future__ import annotations

import argparse
import gzip
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import Parser, add_switch, run_cli
from common.errors import InputError
from common.files import check_schema, read_json, replacing_folder, sha256
from common.settings import format_value
from config import Config
from serving.folder import (
    CONFIG,
    FAISS,
    INDEX,
    ITEMS,
    ROWS,
    SCAN,
    STORED,
    WEIGHTS,
    make_items,
    pack_items,
    pack_rows,
    pack_weights,
    refuse_existing,
    write_folder,
)
from serving.hub import CARD, front_matter
from serving.weights import BASELINES, COUNTING, TABLES, user_weighted_pca
from serving.weights import quantize as to_int8

if TYPE_CHECKING:
    from dataloader import EvalRows
    from datasets.catalog import Catalog
    from model import FMRLRec
    from trainer.checkpoint import RunItems


FORMATS = ("torch", "onnx", "onnx-file")


def arguments_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = Parser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--size", metavar="N,N|all", help="trained sizes to export (default: the largest)")
    parser.add_argument(
        "--max_bytes",
        metavar="BYTES",
        help="instead of --size: export the size with the best test NDCG@10 among folders of at most BYTES, e.g. 2MB",
    )
    parser.add_argument(
        "--max_latency_ms",
        type=float,
        metavar="MS",
        help="the same among sizes that answer one user within MS, as benchmarks.deploy measured",
    )
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="torch",
        help="onnx adds graphs, which run without torch; onnx-file: one self-contained recommend.onnx for other "
        "runtimes (default: torch)",
    )
    parser.add_argument(
        "--quantize",
        choices=TABLES,
        default="float16",
        help="none: all float32; float16: the item table in half precision (default); int8: item table and the "
        "blocks' matrices in int8",
    )
    parser.add_argument(
        "--table_width",
        type=int,
        metavar="W",
        help="keep the encoder of --size and cut the ranked item table to W dimensions, by a PCA weighted by the "
        "validation users; needs the run's dataset (default: the size)",
    )
    parser.add_argument(
        "--index",
        choices=("int8", "faiss"),
        help="for large catalogues, with --format onnx and without --quantize int8: int8 adds a scan that finds the "
        "same items in a fraction of the time; faiss (package faiss-cpu) is faster still and may miss an item "
        "(default: none)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="output folder; with several sizes the parent of their folders "
        "(default: exports/<dataset>-<size>)",
    )  # fmt: skip
    parser.add_argument(
        "--release",
        type=Path,
        metavar="FOLDER",
        help="instead of --out: write one archive per size (default: all), SHA256SUMS and a card into a new folder",
    )
    add_switch(parser, "overwrite", "replace an existing export (default: refuse)")
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, positional: bool = False) -> None:
    """Add the flags that choose the run. positional: the run's folder is an argument without a flag."""
    if positional:
        parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the run's folder (default: the newest)")
    else:
        parser.add_argument("--run", type=Path, metavar="FOLDER", help="the run (default: the newest)")
    parser.add_argument("--dataset_code", metavar="NAME", help="the newest run on this dataset")
    parser.add_argument("--data_root", metavar="FOLDER", help="where the dataset is now (default: as in training)")
    parser.add_argument(
        "--runs_root", default=Config.runs_root, metavar="FOLDER", help="where runs are (default: %(default)s)"
    )


def asked_run(arguments: argparse.Namespace, models: Sequence[str] = ("fmrlrec",)) -> Path:
    """Return the run that the flags choose. Raises InputError if there is none or it is of another model."""
    from trainer.runs import find_trained, read_config, with_runtime_flags

    flags = {"dataset_code": arguments.dataset_code} if arguments.dataset_code else {}
    run = find_trained(arguments.run, Path(arguments.runs_root), flags | {"model_code": "fmrlrec"})
    trained, _ = read_config(run)
    if trained.model_code not in models:
        raise InputError(f"{run} is a run of {trained.model_code}; this command takes runs of {', '.join(models)}")
    with_runtime_flags(trained, flags, run)  # raises if the run is of another dataset
    return run


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Export; return the folders."""
    arguments = arguments_parser().parse_args(argv)
    from trainer.runs import describe_run, read_config

    arguments.run = asked_run(arguments, ("fmrlrec", *BASELINES))
    saved, _ = read_config(arguments.run)
    if arguments.release:
        check_release_flags(arguments)
        if arguments.size is arguments.max_bytes is arguments.max_latency_ms is None:
            arguments.size = "all"
    if saved.model_code in BASELINES:
        check_baseline_flags(arguments, saved.model_code)
        sizes = [saved.mrl_hidden_sizes[-1]]
        folders = [arguments.out or Path("exports") / f"{saved.dataset_code}-{saved.model_code}"]
    else:
        sizes = chosen_sizes(arguments, saved.mrl_hidden_sizes)
        folders = [target(arguments, saved.dataset_code, size, len(sizes)) for size in sizes]
    check_table_width(arguments.table_width, sizes, arguments.format, arguments.quantize)
    for folder in folders if not arguments.release else ():
        refuse_existing(folder, arguments.overwrite)

    # Heavy imports wait until the flags are known to be good, so that errors come at once.
    from model import FMRLRec
    from trainer.load_run import load_for_export

    flags = {"device": "cpu"} | ({"data_root": arguments.data_root} if arguments.data_root else {})
    print(describe_run(arguments.run), flush=True)
    config, items, model = load_for_export(arguments.run, flags)
    if not isinstance(model, FMRLRec):
        options = {"quantize": arguments.quantize, "overwrite": arguments.overwrite}
        export_baseline(model, folders[0], config=config, items=items, run=arguments.run, **options)
        print(f"{folders[0]}  {config.model_code}: {folder_bytes(folders[0]) / 1e6:.2f} MB", flush=True)
        return folders
    users = validation_users(config, items) if arguments.table_width else None

    def export(size: int, folder: Path) -> None:
        export_size(
            model, size, folder, config=config, catalog=items, run=arguments.run,
            format=arguments.format, quantize=arguments.quantize, index=arguments.index, overwrite=arguments.overwrite,
            table_width=arguments.table_width, users=users,
        )  # fmt: skip

    if arguments.release:
        write_release(arguments.release, saved.dataset_code, sizes, export)
        print(f"{arguments.release}  {len(sizes)} sizes: {folder_bytes(arguments.release) / 1e6:.2f} MB", flush=True)
        return [arguments.release]
    for size, folder in zip(sizes, folders, strict=True):
        export(size, folder)
        how = f"{arguments.format}, {arguments.quantize}"
        how += f", table width {arguments.table_width}" if arguments.table_width else ""
        print(f"{folder}  size {size}, {how}: {folder_bytes(folder) / 1e6:.2f} MB", flush=True)
    return folders


def folder_bytes(folder: Path) -> int:
    """Return the bytes of an export's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def check_release_flags(arguments: argparse.Namespace) -> None:
    """Raise InputError for a flag that --release does not go with, and if the release exists."""
    for flag, given in (
        ("--out", arguments.out is not None),
        ("--overwrite", arguments.overwrite),
        ("--format onnx-file", arguments.format == "onnx-file"),
    ):
        if given:
            raise InputError(
                f"{flag} does not go with --release, which writes archives of --format torch or onnx into a new "
                f"folder; leave {flag} out"
            )
    refuse_release(arguments.release)


def check_baseline_flags(arguments: argparse.Namespace, model: str) -> None:
    """Raise InputError for a flag that a baseline does not have."""
    for flag, given in (
        ("--size", arguments.size is not None),
        ("--max_bytes", arguments.max_bytes is not None),
        ("--max_latency_ms", arguments.max_latency_ms is not None),
        ("--format onnx", arguments.format == "onnx"),
        ("--quantize int8", arguments.quantize == "int8"),
        ("--index", arguments.index is not None),
        ("--table_width", arguments.table_width is not None),
        ("--release", arguments.release is not None),
    ):
        if given:
            raise InputError(f"{flag} is for runs of fmrlrec; leave it out: {model} has one size, which NumPy serves")


def check_table_width(width: int | None, sizes: Sequence[int], format: str, quantize: str) -> None:
    """Raise InputError if a table of these sizes cannot be cut to `width`."""
    if width is None:
        return
    if not 1 <= width <= min(sizes):
        raise InputError(f"--table_width {width} must be from 1 to the size, {min(sizes)}")
    if format == "onnx-file" or quantize == "int8":
        given = "--format onnx-file" if format == "onnx-file" else "--quantize int8"
        raise InputError(f"--table_width is not for {given}; use --format onnx or torch, --quantize float16 or none")


def validation_users(config: Config, items: RunItems) -> EvalRows:
    """Return the histories of the validation users. Raises InputError unless the run's dataset is at hand."""
    from dataloader import eval_rows
    from datasets.catalog import load_dataset

    try:
        catalog = load_dataset(config)
    except InputError as error:
        raise InputError(f"--table_width needs the validation users of the run's dataset: {error}") from error
    if catalog.digest() != items.data:
        raise InputError(
            f"--table_width needs the validation users of the run's dataset, but {config.dataset_code} in "
            f"{config.data_root} has changed; name the folder of the old one: --data_root FOLDER"
        )
    return eval_rows(catalog.sequences, config.lru_max_len, "val")


def target(arguments: argparse.Namespace, dataset: str, size: int, how_many: int) -> Path:
    """Return the output folder of one size."""
    if arguments.out and how_many == 1:
        return arguments.out
    return (arguments.out or Path("exports")) / f"{dataset}-{size}"


def chosen_sizes(arguments: argparse.Namespace, trained: tuple[int, ...]) -> list[int]:
    """Return the sizes for --size, or for --max_bytes and --max_latency_ms. Raises InputError if there are none."""
    if arguments.max_bytes is None and arguments.max_latency_ms is None:
        return named_sizes(str(trained[-1]) if arguments.size is None else arguments.size, trained)
    if arguments.size is not None:
        raise InputError("give --size, or --max_bytes and --max_latency_ms, not both")
    if arguments.index or arguments.table_width:
        raise InputError("deploy.json has no figures with --index or --table_width; give --size with them, not a limit")
    return [best_size(arguments)]


def named_sizes(text: str, trained: tuple[int, ...]) -> list[int]:
    """Parse "64", "8,64" or "all". Raises InputError for a size that was not trained."""
    if text == "all":
        return list(trained)
    sizes = [part.strip() for part in text.split(",")]
    for size in sizes:
        if size not in map(str, trained):
            raise InputError(
                f"--size {size or repr(size)} was not trained; use sizes of {format_value(trained)}, or all"
            )
    return list(dict.fromkeys(map(int, sizes)))


def best_size(arguments: argparse.Namespace) -> int:
    """Return the size with the best NDCG@10 within the limits, as benchmarks/deploy.py measured."""
    from trainer.runs import DEPLOYMENT, Deployment
    from trainer.runs import WEIGHTS as RUN_WEIGHTS

    path, measure = (
        arguments.run / DEPLOYMENT,
        f"measure it: python -m benchmarks.deploy --run {shlex.quote(str(arguments.run))}",
    )
    measured = check_schema(read_json(path, measure), Deployment, path, measure)
    if measured["weights"] != sha256(arguments.run / RUN_WEIGHTS):
        raise InputError(f"{path} was measured on other weights than the run has now; {measure}")
    columns = ("engine", "quantize", "size", "bytes", "p50_ms", "NDCG@10")
    rows = [tuple(row[column] for column in columns) for row in measured["rows"]]
    max_bytes = parse_bytes(arguments.max_bytes) if arguments.max_bytes is not None else float("inf")
    max_ms = arguments.max_latency_ms if arguments.max_latency_ms is not None else float("inf")
    fitting = [row for row in rows if row[3] <= max_bytes and row[4] <= max_ms]
    asked = [row for row in fitting if row[:2] == (arguments.format, arguments.quantize)]
    if not asked:
        kinds = sorted({row[:2] for row in rows})
        if (arguments.format, arguments.quantize) not in kinds:
            raise InputError(
                f"{path} has no --format {arguments.format} --quantize {arguments.quantize}; it has "
                + ", ".join(" ".join(kind) for kind in kinds)
            )
        other = ", ".join(sorted({f"--format {row[0]} --quantize {row[1]}" for row in fitting}))
        smallest = min(row for row in rows if row[:2] == (arguments.format, arguments.quantize))
        raise InputError(
            f"no size fits as --format {arguments.format} --quantize {arguments.quantize}; size {smallest[2]} has "
            f"{smallest[3]:,} bytes and {smallest[4]:.2f} ms; variants that fit: {other or 'none'}"
        )
    _, _, size, bytes_, milliseconds, ndcg = max(asked, key=lambda row: row[5])
    print(f"size {size}: {bytes_ / 1e6:.2f} MB, {milliseconds:.2f} ms, NDCG@10 {ndcg:.4f}")
    return size


def parse_bytes(text: str) -> float:
    """Parse "2MB", "500 kB" or "1000000" as bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([kmg]?)b?\s*", text, re.IGNORECASE)
    if not match:
        raise InputError(f"--max_bytes {text!r} must be a number of bytes such as 2MB, 500kB or 1000000")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()]


def export_size(
    model: FMRLRec,
    size: int,
    folder: Path,
    *,
    config: Config,
    catalog: Catalog | RunItems,
    run: Path,
    format: str = "torch",
    quantize: str = "float16",
    index: str | None = None,
    overwrite: bool = False,
    table_width: int | None = None,
    users: EvalRows | None = None,
) -> None:
    """Write one size of a run's model as an export.

    table_width: cut the ranked table to this width, fitted on `users`.
    Raises InputError if weights are not finite, the table overflows float16, or the folder cannot be written.
    """
    import torch

    from model import slice_model
    from serving.torch_engine import serving_weights
    from trainer.checkpoint import RunItems

    if index and (format != "onnx" or quantize == "int8"):
        raise InputError(f"--index {index} needs --format onnx, and --quantize float16 or none")
    check_table_width(table_width, [size], format, quantize)
    small = slice_model(model, size)
    with torch.inference_mode():
        table, scale = small.item_table().float().cpu().numpy(), None
    weights = serving_weights(small, quantized=False)
    for name, value in {"the item table": table, **weights}.items():
        if not np.isfinite(value).all():
            raise InputError(f"{name} of {run} is not finite and cannot be exported; train it again")
    rows: np.ndarray | None = None
    if table_width:
        assert users is not None
        weights["cut.users"], weights["cut.items"] = cut_of(small, table, users, table_width)
        rows = table.astype(STORED[quantize][1])
        table = rows.astype(np.float32) @ weights["cut.items"]
    if quantize == "int8":
        (table, scale), weights = to_int8(table, axis=1), serving_weights(small, quantized=True)
    elif quantize == "float16":
        if abs(table).max() > np.finfo(np.float16).max:
            raise InputError("the item table exceeds float16's 65504; export it with --quantize none")
        table = table.astype(np.float16)
    packed = pack_weights(weights)
    known = catalog if isinstance(catalog, RunItems) else RunItems.of(catalog)
    items = make_items(known.ids, known.titles)
    files: dict[str, Any] = {WEIGHTS: packed, ITEMS: pack_items(items, table, scale)}
    described = description(small, config, known, run) | {"quantize": quantize}
    if rows is not None:
        files[ROWS] = pack_rows(rows)
        described["table_width"] = table_width
    try:
        if format == "onnx":
            from serving.graphs import build_graphs

            files |= build_graphs(weights, packed, small.sizes, config.lru_num_blocks, config.lru_max_len, table_width)
            if index == "faiss":
                from serving.index import build_faiss

                files[FAISS] = build_faiss(table.astype(np.float32))
            elif index:
                from serving.graphs import build_scan
                from serving.index import build_index

                files[INDEX] = build_index(table.astype(np.float32))
                files[SCAN] = build_scan(files[INDEX])
        elif format == "onnx-file":
            from serving.graphs import build_files

            files = build_files(weights, table, scale, items, described)
    except ImportError as error:
        raise InputError(
            f"--format {format} needs the packages onnx and onnxruntime ({error}): pip install onnx onnxruntime"
        ) from error
    write_folder(folder, described, files, overwrite)


def cut_of(model: FMRLRec, table: np.ndarray, users: EvalRows, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return [m, width] float32 twice: z @ the first and item rows @ the second score nearest to the whole table."""
    import torch

    from dataloader import eval_batches
    from trainer.evaluation import GROUP, encode_last

    with torch.inference_mode():
        batches = eval_batches(users, GROUP, torch.device("cpu"))
        z = [encode_last(model, batch, torch.from_numpy(table)).numpy() for batch in batches]
    for_users, for_items = user_weighted_pca(np.concatenate(z), table[1:])
    return for_users[:, :width].astype(np.float32), for_items[:, :width].astype(np.float32)


def export_baseline(
    model: Any,
    folder: Path,
    *,
    config: Config,
    items: RunItems,
    run: Path,
    quantize: str = "float16",
    overwrite: bool = False,
) -> None:
    """Write a run of one of BASELINES as an export. Raises InputError if weights are not finite."""
    from serving.torch_engine import baseline_weights

    table, weights = baseline_weights(model)
    for name, value in {"the item table": table, **weights}.items():
        if not np.isfinite(value).all():
            raise InputError(f"{name} of {run} is not finite and cannot be exported; train it again")
    counts = config.model_code in COUNTING  # its table holds item numbers, which float16 would round
    table, quantize = (table, "none") if counts else (table.astype(STORED[quantize][1]), quantize)
    described = common_description(config, items, run, model.sizes[-1])
    described |= {
        "model": config.model_code,
        "size": table.shape[1],
        "sizes": [table.shape[1]],
        "num_blocks": 1 if counts else config.lru_num_blocks,
        "num_heads": config.num_heads,
        "features": {"dim": 0, "language": None, "image": None},
        "quantize": quantize,
    }
    files = {WEIGHTS: pack_weights(weights), ITEMS: pack_items(make_items(items.ids, items.titles), table, None)}
    write_folder(folder, described, files, overwrite)


def description(model: FMRLRec, config: Config, items: RunItems, run: Path) -> dict[str, Any]:
    """Return the content of config.json for a sliced model, except its files."""
    from datasets.features.registry import describe_features
    from trainer.runs import read_plane

    size, whitening = model.sizes[-1], model.items.whitening
    widths = {"whitened": [len(mean) for mean, _ in whitening.transforms()]} if whitening else {}
    bias = model.ranking_bias()
    plane: dict[str, Any] = {}
    for cell in read_plane(run):
        row = plane.setdefault(str(cell["size"]), {"encoder_ms": cell["encoder_ms"], "NDCG@10": {}})
        row["NDCG@10"][str(cell["width"])] = cell["kept"]["NDCG@10"]
    return {
        "size": size,
        "sizes": list(model.sizes),
        "num_blocks": config.lru_num_blocks,
        "post_norm": model.settings.post_norm,
        **({"history_bias": bias[-1]} if bias else {}),
        "features": describe_features(config, [part.shape[1] for part in model.items.features]) | widths,
        **common_description(config, items, run, size),
        **({"plane": plane} if plane else {}),
    }


def common_description(config: Config, items: RunItems, run: Path, size: int) -> dict[str, Any]:
    """Return the part of config.json that every model has: its data, its run and the run's metrics at this size."""
    from trainer.runs import EVERY_SIZE, commit, read_metrics

    metrics = run / EVERY_SIZE
    return {
        "max_len": config.lru_max_len,
        "num_items": items.num_items,
        "dataset": {"code": config.dataset_code, "digest": items.data},
        "run": run.resolve().name,
        "commit": commit(),
        "metrics": read_metrics(metrics, "eval.py --run ... writes it").get(str(size)) if metrics.exists() else None,
    }


# -------------------------------------------------------------------------------------------------------------- release
# The exports of a run as archives, with their checksums and one card:
#
# fmrlrec-<dataset>-<size>.tar.gz     an export in a folder of the archive's name, the same bytes each time
# SHA256SUMS                          checksums of the archives, for sha256sum -c
# README.md                           the card of all sizes

SUMS = "SHA256SUMS"


def refuse_release(folder: Path) -> None:
    """Raise InputError if `folder` exists: a release that people may have fetched is never replaced."""
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} exists; choose another folder for --release, or remove it first")


def write_release(folder: Path, dataset: str, sizes: Sequence[int], export: Callable[[int, Path], None]) -> None:
    """Write the release of a run as a new folder.

    export: writes a size as an export into a new folder. Raises InputError, and leaves nothing, if `folder` exists or
    cannot be written, or if a size cannot be exported.
    """
    refuse_release(folder)
    with replacing_folder(folder) as temporary:
        configs, archives = [], []
        for size in sizes:
            unpacked = temporary / f"fmrlrec-{dataset}-{size}"
            export(size, unpacked)
            configs.append(read_json(unpacked / CONFIG, "export it again"))
            archives.append(pack(unpacked, temporary / f"{unpacked.name}.tar.gz"))
            shutil.rmtree(unpacked)
        sums = "".join(f"{sha256(archive)}  {archive.name}\n" for archive in archives)
        (temporary / SUMS).write_text(sums, encoding="utf-8")
        (temporary / CARD).write_text(release_card(configs, archives), encoding="utf-8")
        refuse_release(folder)  # another process may have written it meanwhile


def pack(folder: Path, archive: Path) -> Path:
    """Pack the files of a folder, without times and owners, so that the same files give the same bytes."""
    with (
        archive.open("xb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(folder.iterdir()):
            member = tarfile.TarInfo(f"{folder.name}/{path.name}")  # mode 0644, time 0, owner 0
            member.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(member, content)
    return archive


def release_card(configs: Sequence[dict[str, Any]], archives: Sequence[Path]) -> str:
    """Return the README.md of a release. configs: the config.json of each archive."""
    first, name = configs[0], archives[0].name.removesuffix(".tar.gz")
    code = first["dataset"]["code"]
    columns = ("NDCG@10", "Recall@10")
    rows = ""
    for config, archive in zip(configs, archives, strict=True):
        metrics = config["metrics"] or {}
        cells = (f"{metrics[column]:.4f}" if column in metrics else "" for column in columns)
        unpacked = sum(stored["bytes"] for stored in config["files"].values())
        rows += f"| {config['size']} | `{archive.name}` | {archive.stat().st_size / 1e6:.2f} | {unpacked / 1e6:.2f} | "
        rows += " | ".join(cells) + " |\n"
    return f"""{front_matter(first)}
# {code}, {len(configs)} sizes

Sequential recommenders (fMRLRec, Findings of EMNLP 2024), sliced from the run `{first["run"]}`.
Each reads the last {first["max_len"]} items of a history and ranks {first["num_items"]:,} items.
Test metrics in float32, full ranking, history kept:

| size | archive | MB | MB unpacked | {" | ".join(columns)} |
| ---: | --- | ---: | ---: | ---: | ---: |
{rows}
License: unknown, until the publisher names one above and here. Data and encoders have their own.

Download an archive and `{SUMS}` into one folder, then check and unpack it:

```sh
sha256sum -c --ignore-missing {SUMS}
tar xf {name}.tar.gz
```

In a clone of the repository, or with `from fmrlrec import Recommender` where the package is installed and the archive
has ONNX graphs:

```python
from serving import Recommender

recommender = Recommender.from_pretrained("{name}")
print(recommender.recommend([[1, 2]], top_k=10)[0].ids)  # ids as strings, or item numbers
```

The card of each size is the README.md in its archive.
"""


if __name__ == "__main__":
    run_cli(main)
