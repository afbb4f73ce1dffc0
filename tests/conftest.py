"""What tests of several files are given: a folder to train in, a web server, a cache of the hub."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.picture_server import Server, serving
from tests.prepared import write_prepared

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported, which tests do


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty folder to run in, with data/tiny prepared."""
    monkeypatch.chdir(tmp_path)
    write_prepared(tmp_path / "data", "tiny", users=20, items=12, pictures=True)
    return tmp_path


@pytest.fixture
def web(monkeypatch) -> Iterator[Server]:
    """A server whose pages a test sets."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving({}) as server:
        yield server


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hugging Face hub, without network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"
