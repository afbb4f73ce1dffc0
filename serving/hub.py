"""Publish an export on the Hugging Face Hub, and fetch one. Needs huggingface_hub (the extra `.[hub]`).

python -m serving.hub exports/demo-64 user/name      # then Recommender.from_pretrained("user/name")

Log in with `hf auth login` or set HF_TOKEN. HF_ENDPOINT names another server with the Hub's API.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import Parser, add_switch, run_cli
from common.errors import InputError, shown

FILES = ["config.json", "README.md", "items.json", "*.safetensors", "*.onnx", "*.ort", "*.faiss"]
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def main(argv: Sequence[str] | None = None) -> str:
    """Publish an export; return its address."""
    parser = Parser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="the export, as serving.export printed it")
    parser.add_argument("repository", metavar="USER/NAME", help="the repository on the Hub; made if it does not exist")
    add_switch(parser, "private", "make a new repository private (default: public)")
    arguments = parser.parse_args(argv)
    address = push(arguments.folder, arguments.repository, arguments.private)
    print(address)
    return address


def is_repository(name: str | Path) -> bool:
    """Return whether a name can only mean a repository on the Hub: "user/name", and no folder `user` is here."""
    return bool(REPOSITORY.fullmatch(str(name))) and not Path(name).exists() and not Path(name).parent.is_dir()


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Publish a folder of serving.export as one commit; return its address.

    Raises InputError if the folder is not an export, or the Hub refuses.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [*config["files"], "config.json", "README.md"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{folder} is not an export; python -m serving.export makes one") from None
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"{shown(repository)} must be the name of a repository on the Hub, such as user/name")
    hub = _library()
    api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    message = f"Add {config['dataset']['code']}, size {config['size']}"
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, allow_patterns=names, commit_message=message)
    except Exception as error:  # huggingface_hub's errors and its client's share no base class
        raise InputError(
            f"could not publish {repository} on the Hub ({_reason(error)}); log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        ) from error
    return str(made.url)


def fetch(repository: str, revision: str | None = None) -> Path:
    """Return the folder of an export on the Hub, downloaded once. Raises InputError if it cannot be had."""
    try:
        hub = _library()
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=FILES, endpoint=os.environ.get("HF_ENDPOINT")
            )
        )
    except Exception as error:  # huggingface_hub's errors and its client's share no base class
        raise InputError(
            f"there is no folder {repository}, and no such repository could be read from the Hub ({_reason(error)}); "
            "check the name, or make the folder by python -m serving.export; for the Hub check the network and "
            "`hf auth login`"
        ) from error


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f"it needs huggingface_hub ({error}): pip install huggingface_hub") from error
    return huggingface_hub


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------- card
# Write the model card of an export: README.md with the front matter that the Hugging Face Hub reads.

CARD, MODEL, IDS = "README.md", "recommend.onnx", "items.json"

Tensors = dict[str, tuple[str, str]]  # name -> (shape and type, meaning)

GRAPH_OF_FILE: tuple[Tensors, Tensors] = (
    {
        "history": ("[B, L] int64", "item numbers, oldest first; 0 and unknown numbers are skipped"),
        "exclude_history": ("[1] bool", "whether items of the history are never recommended"),
        "k": ("[1] int64", "how many items to return; default 10"),
        "allowed": ("[1 or B, 1 or N] bool", "which of the items 1 to N may be recommended; default all"),
        "boost": ("[1 or B, 1 or N] float32", "numbers added to the scores of items 1 to N; default 0"),
    },
    {
        "items": ("[B, K] int64", f"numbers of the best items, best first; {IDS} has their ids; 0 if none is left"),
        "scores": ("[B, K] float32", "scores of these items"),
        "user": ("[B, m] float32", "the users' vectors"),
    },
)


def graphs_of_folder(int8: bool) -> dict[str, tuple[Tensors, Tensors]]:
    """Return graph -> (inputs, outputs) of an export with --format onnx."""
    history: Tensors = {"history": ("[B, L] int64", "item numbers, oldest first, left-padded with 0")}
    hidden = "[B, blocks, 2, m] float32"
    table: Tensors = {"table": ("[N+1, m] float32", "the item table")}
    if int8:
        table = {"table": ("[m, N+1] int8", "the item table"), "table_scale": ("[N+1] float32", "scale of each item")}
    ranking: Tensors = {
        "bias": ("[1 or B, N+1] float32", "0 for candidates, -inf for all other items and for row 0"),
        "k": ("[1] int64", "how many items to return"),
    }
    vectors: Tensors = {"z": ("[B, m] float32", "the users' vectors")}
    best: Tensors = {
        "scores": ("[B, K] float32", "scores of the best items, best first"),
        "items": ("[B, K] int64", "numbers of these items"),
    }
    return {
        MODEL: (history | table | ranking, best | vectors),
        "step.onnx": (
            {"item": ("[B] int64", "number of the next item"), "hidden": (hidden, "the users' states")} | table,
            vectors | {"new_hidden": (hidden, "the users' new states")},
        ),
        "rank.onnx": (vectors | table | ranking, best),
    }


PYTHON = f"""import json
from pathlib import Path

import numpy as np
import onnxruntime

ids = json.loads(Path("{IDS}").read_text(encoding="utf-8"))["ids"]
session = onnxruntime.InferenceSession("{MODEL}")
history = np.array([[1, 2]])  # item number 1 is ids[0]
items, scores, user = session.run(None, {{"history": history, "exclude_history": np.array([True])}})
print([ids[item - 1] for item in items[0] if item])
"""
JAVASCRIPT = f"""import {{ readFileSync }} from "node:fs";
import * as ort from "onnxruntime-node";

const {{ ids }} = JSON.parse(readFileSync("{IDS}", "utf8"));
const session = await ort.InferenceSession.create("{MODEL}");
const history = new ort.Tensor("int64", [1n, 2n], [1, 2]); // item number 1 is ids[0]
const {{ items }} = await session.run({{ history, exclude_history: new ort.Tensor("bool", [true], [1]) }});
console.log(JSON.stringify(Array.from(items.data, Number).filter(Boolean).map((item) => ids[item - 1])));
"""
STORED = {
    "none": "in float32",
    "float16": "with the item table in float16",
    "int8": "with the item table and the blocks' matrices in int8",
}


def model_card(config: dict[str, Any]) -> str:
    """Return the README.md of an export with this config.json."""
    features, metrics = config["features"], config["metrics"] or {}
    width = config.get("table_width")
    cut = (
        f" Ranks vectors of {width} numbers, cut from the {config['size']}; the metrics are of the whole."
        if width
        else ""
    )
    ranked = config["num_items"] - config.get("num_removed", 0)
    described = [features[kind]["encoder"] for kind in ("language", "image") if features[kind]]
    encoders = " and ".join(described + [f"`{file['name']}` from a file" for file in features.get("files", ())])
    named = [f"{name} {metrics[name]:.4f}" for name in ("NDCG@10", "Recall@10") if name in metrics]
    commit = f" (commit `{config['commit']}`)" if config.get("commit") else ""
    title, kind = f"size {config['size']}", "fMRLRec, Findings of EMNLP 2024"
    if name := config.get("model"):
        title, kind = name, f"the baseline {name}"
    return f"""{front_matter(config)}
# {config["dataset"]["code"]}, {title}

A sequential recommender ({kind}) with {config["size"]} dimensions, {"from" if name else "sliced from"} the run
`{config["run"]}`. It reads the last {config["max_len"]} items of a history and ranks {ranked:,} items.

- Item features: {encoders or "none, the item table is learned"}. Stored {STORED[config["quantize"]]}.{cut}
- Test metrics at this size in float32, full ranking, history kept: {", ".join(named) or "not tested"}.
- `config.json` records how it was made{commit} and the checksums of the files.
{_plane(config)}{_usage_of_file() if IDS in config["files"] else _usage_of_folder(config)}"""


def front_matter(config: dict[str, Any]) -> str:
    """Return the metadata that the Hub reads. The license is yours to name: data and encoders have their own."""
    onnx = ["onnx"] if MODEL in config["files"] else []
    tags = ["recommendation", "sequential-recommendation", "multimodal", "matryoshka", *onnx]
    lists = {"tags": tags, "datasets": [json.dumps(config["dataset"]["code"])], "metrics": ["ndcg", "recall"]}
    lines = ["license: unknown", "library_name: fmrlrec"]
    for name, values in lists.items():
        lines += [f"{name}:", *(f"- {value}" for value in values)]
    return "\n".join(["---", *lines, "---", ""])


def _plane(config: dict[str, Any]) -> str:
    """Return a table of the run's encoder sizes and table widths, this export's in bold; "" if not measured."""
    plane: dict[str, Any] = config.get("plane") or {}
    widths = sorted({int(width) for row in plane.values() for width in row["NDCG@10"]})
    if len(widths) < 2:
        return ""
    own = str(config["size"]), str(config.get("table_width") or config["size"])
    megabytes = (f"{width} ({4 * (config['num_items'] + 1) * width / 1e6:.3g} MB)" for width in widths)
    lines = [["encoder", "ms", *megabytes], ["---:"] * (len(widths) + 2)]
    for size, row in plane.items():
        cells = {width: f"{value:.4f}" for width, value in row["NDCG@10"].items()}
        if size == own[0] and own[1] in cells:
            cells[own[1]] = f"**{cells[own[1]]}**"
        lines.append([size, f"{row['encoder_ms']:.2f}", *(cells.get(str(width), "") for width in widths)])
    return f"""
Test NDCG@10 of the run by encoder size (rows) and width of the item table (columns, with its bytes in memory), history
kept. *ms*: CPU time to encode one history, where it was measured. `--size` and `--table_width` of `serving.export`
choose; this export is in bold.

{"".join(f"| {' | '.join(line)} |{chr(10)}" for line in lines)}"""


def _usage_of_folder(config: dict[str, Any]) -> str:
    text = _commands("In a clone of the repository", "python -m serving.recommend", "serving")
    if MODEL not in config["files"] and "model" not in config:
        return text
    text += _commands("Installed (`pip install .` in a clone), without torch", "fmrlrec-recommend", "fmrlrec")
    width = config.get("table_width")
    if width:
        text += (
            "\n`recommend.onnx` and `step.onnx` read the table of rows.safetensors, `rank.onnx` ranks that of "
            "items.safetensors. Multiply z by `cut.users` of model.safetensors before `rank.onnx`.\n"
        )
    for name, (inputs, outputs) in graphs_of_folder(config["quantize"] == "int8").items():
        if name in config["files"]:
            m = width if width and name == "rank.onnx" else config["size"]
            text += f"\n`{name}`, B users, N items, m = {m}:\n{_tensors(inputs, outputs)}"
    return text + "\nFor other languages, `--format onnx-file` exports one file without the table as an input.\n"


def _commands(how: str, command: str, package: str) -> str:
    return f"""
{how}:

```sh
{command} THIS_FOLDER --history ID,ID --top_k 10
```

```python
from {package} import Recommender

recommender = Recommender.from_pretrained(".")  # this folder
print(recommender.recommend([[1, 2]], top_k=10)[0].ids)  # ids as strings, or item numbers
```
"""


def _usage_of_file() -> str:
    return f"""
`{MODEL}` holds weights and item table; `recommend.ort` is the same for onnxruntime's small builds. `{IDS}` holds the
ids and titles of items 1 to N.

In Python (`pip install numpy onnxruntime`), in this folder:

```python
{PYTHON}```

In JavaScript (`npm install onnxruntime-node`; in a browser onnxruntime-web has the same API), in this folder:

```js
{JAVASCRIPT}```

B users, L items of a history, K items returned:
{_tensors(*GRAPH_OF_FILE)}
Inputs with a default may be left out. onnxruntime's JavaScript packages cannot set them: onnxruntime-web refuses
them and onnxruntime-node ignores them.
"""


def _tensors(inputs: Tensors, outputs: Tensors) -> str:
    rows = [
        f"| {kind} | `{name}` | {shape} | {meaning} |"
        for kind, tensors in (("input", inputs), ("output", outputs))
        for name, (shape, meaning) in tensors.items()
    ]
    return "\n".join(["", "| | name | shape | meaning |", "| --- | --- | --- | --- |", *rows, ""])


if __name__ == "__main__":
    run_cli(main)
