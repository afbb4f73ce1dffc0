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
from common.errors import InputError

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
        raise InputError(f"{repository!r} must be the name of a repository on the Hub, such as user/name")
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
            "check the name, the network and, if it is private, `hf auth login`"
        ) from error


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f"it needs huggingface_hub ({error}): pip install huggingface_hub") from error
    return huggingface_hub


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    run_cli(main)
